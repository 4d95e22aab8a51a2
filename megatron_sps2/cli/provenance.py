"""Where a measurement comes from: the code's commit, the machine, the versions."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

from megatron_sps2.cli.installed import installed

GIB = 2**30


def provenance() -> dict[str, object]:
    return {"commit": commit(), "hardware": hardware(), "versions": installed()}


def commit() -> str | None:
    """Of this code, marked where files differ from it; None outside its git checkout."""
    here = Path(__file__).resolve().parent
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    found = _git(here, "rev-parse", "HEAD")
    return f"{found} with changes" if found and _git(here, "status", "--porcelain", "-uno") else found


def hardware() -> str:
    """In one line."""
    import psutil

    memory = f"{psutil.virtual_memory().total / GIB:.0f} GiB"
    return f"{psutil.cpu_count()} cores of {_cpu()}, {memory}, {platform.system()} {platform.machine()}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "an unknown CPU")


def _git(folder: Path, *args: str) -> str | None:
    """None where there is no git, or it says no."""
    try:
        done = subprocess.run(("git", "-C", str(folder), *args), capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
