"""SLURM's compressed names: host lists, tasks per node, step numbers.

Text in, plain values out. Knows SLURM's variables, not RankEnv and not torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Batch scripts and interactive shells are "steps" too, numbered from here up (slurm.h); no rank runs in them.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Below the ephemeral range of Linux (32768), so that an outgoing connection does not hold the port.
FIRST_PORT, NUM_PORTS = 15000, 15000


def in_step(env: Mapping[str, str]) -> bool:
    """True in a process that srun started; False in the shell of sbatch or salloc."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return "SLURM_PROCID" in env and step.isdecimal() and int(step) < FIRST_SPECIAL_STEP


def expand_hosts(text: str) -> list[str]:
    """'n[01-03,7],m' -> ['n01', 'n02', 'n03', 'n7', 'm']. Raises RuntimeError if unreadable."""
    hosts: list[str] = []
    for name in re.split(r",(?![^\[]*\])", text):
        hosts += _expand_name(name)
    if not all(hosts) or not hosts or any(mark in host for host in hosts for mark in "[]"):
        raise RuntimeError(f"SLURM node list {text!r} cannot be read; expected names such as n[01-03,7],m")
    return hosts


def _expand_name(name: str) -> list[str]:
    match = re.fullmatch(r"([^\[]*)\[([\d,\-]+)\](.*)", name)
    if match is None:
        return [name]
    head, ranges, tail = match.groups()
    numbers = [number for part in ranges.split(",") for number in _expand_range(part)]
    return [head + number + rest for number in numbers for rest in _expand_name(tail)]


def _expand_range(part: str) -> list[str]:
    """'08-10' -> ['08', '09', '10']: the width of the first number is kept."""
    first, _, last = part.partition("-")
    if not last:
        return [first]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def expand_counts(text: str) -> list[int]:
    """'2(x3),1' -> [2, 2, 2, 1], one entry a node. Raises RuntimeError for text that cannot be read."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise RuntimeError(
                f"SLURM tasks per node {text!r} cannot be read; expected counts such as 2(x3),1"
            )
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts


def num_tasks(env: Mapping[str, str]) -> int:
    """Tasks of this step. Raises RuntimeError when srun's variables do not say."""
    text = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", env.get("SLURM_NPROCS", "")))
    if not text.isdecimal():
        raise RuntimeError(
            f"SLURM_NTASKS={text!r} is not a count though SLURM_PROCID is set; start the ranks with srun"
        )
    return int(text)


def tasks_on_node(env: Mapping[str, str]) -> int:
    """Tasks of this step on this node. Raises RuntimeError if the counts do not add up."""
    total = num_tasks(env)
    text = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE"))
    if text is None:
        return _uniform_tasks(env, total)
    counts = expand_counts(text)
    node = env.get("SLURM_NODEID", "0" if len(set(counts)) == 1 else "")
    if sum(counts) != total or not node.isdecimal() or int(node) >= len(counts):
        raise RuntimeError(
            f"SLURM says {total} tasks, {text!r} per node and SLURM_NODEID={node!r}; the counts must "
            f"add up and the node be one of them; start the ranks with srun, clear SLURM_* left in the shell"
        )
    return counts[int(node)]


def _uniform_tasks(env: Mapping[str, str], total: int) -> int:
    if "SLURM_NTASKS_PER_NODE" in env:
        return min(total, expand_counts(env["SLURM_NTASKS_PER_NODE"])[0])
    if env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")) == "1":
        return total
    raise RuntimeError("SLURM says neither SLURM_TASKS_PER_NODE nor SLURM_NTASKS_PER_NODE; set one of them")


def first_host(env: Mapping[str, str]) -> str:
    """The host of rank 0: first of the step's node list, else of the job's."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if name in env:
            return expand_hosts(env[name])[0]
    raise RuntimeError(
        "SLURM_STEP_NODELIST and SLURM_JOB_NODELIST are not set; set MASTER_ADDR and MASTER_PORT"
    )


def job_port(env: Mapping[str, str]) -> int:
    """A port that all ranks of a step work out alike and that two steps of a job do not share."""
    numbers = [
        env.get("SLURM_JOB_ID", env.get("SLURM_JOBID", "")),
        env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", "0")),
    ]
    if not all(number.isdecimal() for number in numbers):
        raise RuntimeError(f"SLURM_JOB_ID={numbers[0]!r} is not a number; set MASTER_ADDR and MASTER_PORT")
    return FIRST_PORT + (int(numbers[0]) + 97 * int(numbers[1])) % NUM_PORTS
