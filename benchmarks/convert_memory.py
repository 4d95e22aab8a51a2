"""Memory and time of conversions of a random model of about 1 GB, each in a process of its own.

Memory that no file stands behind (RssAnon) counts: mapped files are written back when memory runs short.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MEGABYTE = 2**20
STEPS = (
    ("hf", "core", ("--to", "megatron")),
    ("core", "hf2", ("--to", "hf")),
    ("core", "legacy", ("--to", "megatron-legacy", "--tp", "2")),
    ("legacy", "core2", ("--to", "megatron")),
)


def make_model(folder: Path) -> None:
    """A Llama of 254M parameters in float32, in files of 300 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="300MB")


def anonymous_bytes() -> int:
    """Of this process, that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def convert_here(arguments: list[str]) -> None:
    """Converts in this process and prints the peak beyond what the imports took, and the seconds."""
    from checkpoints_tools.convert import convert  # noqa: F401  # what it imports is no part of the peak
    from megatron_sps2.cli.main import main

    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)  # an error is an end
    watcher.start()
    start = time.perf_counter()
    assert main(["convert", *arguments]) == 0
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    print(f"RESULT {(peak - before) / MEGABYTE:.0f} {seconds:.1f}")


def largest_file(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--here", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        convert_here(args.here)
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_model(root / "hf")
        print("| from | to | peak, MB | largest file written, MB | seconds |\n|---|---|---|---|---|")
        for source, target, flags in STEPS:
            arguments = [str(root / source), str(root / target), *flags]
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.convert_memory",
                "--here",
                *arguments,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            _, peak, seconds = next(
                line for line in done.stdout.splitlines() if line.startswith("RESULT")
            ).split()
            size = largest_file(root / target) / MEGABYTE
            print(f"| {source} | {flags[1]} | {peak} | {size:.0f} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
