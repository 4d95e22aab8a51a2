"""What this host has for its ranks: cores, NUMA nodes, memory. Knows the operating system, no ranks."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

Cores = tuple[int, ...]

NODES = Path("/sys/devices/system/node")
CPUS = Path("/sys/devices/system/cpu")
CAN_BIND = hasattr(os, "sched_setaffinity")  # Linux
GROUPS = Path("/sys/fs/cgroup")


def available_cores() -> Cores:
    """That this process may run on, in order."""
    if CAN_BIND:
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(available_cores())


def in_order(cores: Cores, folder: Path = CPUS) -> Cores:
    """Hardware threads of one core side by side, so that two ranks do not share a core."""

    def place(core: int) -> tuple[int, ...]:
        names = ("physical_package_id", "core_id")
        files = [folder / f"cpu{core}" / "topology" / name for name in names]
        return (*(int(file.read_text()) if file.is_file() else 0 for file in files), core)

    return tuple(sorted(cores, key=place))


def bind(cores: Collection[int]) -> None:
    """This thread, and those and the processes that it starts from now on, keep to `cores`."""
    os.sched_setaffinity(0, cores)


@contextmanager
def bound_to(cores: Collection[int]) -> Iterator[None]:
    """For a while; where the system knows no binding, nothing happens."""
    if not CAN_BIND:
        yield
        return
    before = os.sched_getaffinity(0)
    bind(cores)
    try:
        yield
    finally:
        bind(before)


def numa_nodes(folder: Path = NODES) -> list[Cores]:
    """The cores of each NUMA node, as Linux tells; none elsewhere."""
    lists = sorted(folder.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name[4:]))
    return [cores for cores in (_expand(path.read_text()) for path in lists) if cores]


def _expand(text: str) -> Cores:
    """'0-3,8' -> (0, 1, 2, 3, 8)"""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def num_numa_nodes(folder: Path = NODES) -> int:
    """At least 1; memory buses that this host's cores share."""
    return max(1, len(numa_nodes(folder)))


def host_memory() -> tuple[int, int]:
    """(free, total) bytes of this host, or of the control group that a container or a job is held to."""
    memory = psutil.virtual_memory()
    limits = [(memory.available, memory.total), *_group_limits(GROUPS, _own_group())]
    return min(free for free, _ in limits), min(total for _, total in limits)


def _own_group() -> str:
    """Path below GROUPS; "" where there are no version 2 groups."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")


def _group_limits(root: Path, group: str) -> list[tuple[int, int]]:
    """(free, limit) of each group around this process that has one."""
    found, folder = [], root / group
    while folder == root or root in folder.parents:
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                found.append((max(0, int(limit) - _used(folder)), int(limit)))
        except OSError:  # the root has no limit, and a namespace may hide the rest
            pass
        folder = folder.parent
    return found


def _used(folder: Path) -> int:
    """Without cached files, which give way."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
