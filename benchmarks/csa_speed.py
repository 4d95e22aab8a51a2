"""Prefill with CSA beside our own exact mode: the same ranks, weights and prompt, taking turns in one run.

A random model attends to everything, so its budgets are fixed: --density is what a real model was measured to
keep. With --checkpoint and --text it is a real model and the budgets of --csa-setting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.side_by_side import Answer, Ours, prompt, random_llama
from checkpoints_tools.convert import convert
from megatron_sps2.attention.csa_tally import CsaReport
from megatron_sps2.config import AttentionConfig, ParallelConfig
from megatron_sps2.csa_setting import CsaSetting, load_setting
from megatron_sps2.engine.build import EngineConfig
from megatron_sps2.engine.tokenizer import load_tokenizer

COLUMNS = (
    "dtype",
    "tokens",
    "segment",
    "exact, s",
    "csa, s",
    "ratio",
    "density",
    "bytes, of exact",
    "of which, s",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt length: medians over the rounds; seconds of CSA's attention by span, the mean over ranks."""

    dtype: str
    tokens: int
    segment_size: int
    exact_s: float
    csa_s: float
    density: float
    bytes_ratio: float
    seconds: dict[str, float]

    @property
    def cells(self) -> list[str]:
        spans = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        return [
            *(
                self.dtype,
                f"{self.tokens}",
                f"{self.segment_size}",
                f"{self.exact_s:.2f}",
                f"{self.csa_s:.2f}",
            ),
            *(f"{self.exact_s / self.csa_s:.2f}x", f"{self.density:.3f}", f"{self.bytes_ratio:.3f}", spans),
        ]


def main() -> None:
    args = _parse()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks
    rows = []
    print("|", " | ".join(COLUMNS), "|")
    print("|" + "---|" * len(COLUMNS))
    with checkpoint_folder(args) as folder:
        for dtype in args.dtypes:
            ours = Ours(engine_config(args, folder, dtype))
            for attention in ("exact", "csa"):  # what is slow once only
                ours.run(token_ids(args, folder, min(args.lengths)), 1, attention)
            for length in args.lengths:
                rows.append(_measure(ours, token_ids(args, folder, length), dtype, args))
                print("|", " | ".join(rows[-1].cells), "|", flush=True)
            ours.close()
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--json", help="file to write")
    return parser.parse_args()


def add_model(parser: argparse.ArgumentParser) -> None:
    """Flags of what runs: lengths, ranks and what add_budgets adds."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    add_budgets(parser)


def add_budgets(parser: argparse.ArgumentParser) -> None:
    """Flags of CSA's budgets, and a real model in place of the random one."""
    parser.add_argument(
        "--density", type=float, default=0.03, help="share of keys kept by score, of the random model"
    )
    parser.add_argument("--segment-size", type=int, default=512)
    parser.add_argument("--max-segment-size", type=int, default=2048)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--checkpoint", help="a real model")
    parser.add_argument("--text", help="its prompt")
    parser.add_argument("--csa-setting", default="default", help="of the real model")


def csa_setting(args: argparse.Namespace) -> CsaSetting:
    if args.checkpoint:
        return load_setting(args.csa_setting)
    return CsaSetting(
        name="fixed",
        segment_size=args.segment_size,
        max_segment_size=args.max_segment_size,
        num_probes=args.probes,
        degrees=(1, 1 / args.density),
    )


def engine_config(args: argparse.Namespace, folder: str, dtype: str) -> EngineConfig:
    return EngineConfig(
        checkpoint=folder,
        parallel=ParallelConfig(sp_size=args.sp),
        attention=AttentionConfig(mode="csa"),
        csa=csa_setting(args),
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=max(args.lengths) + 64,
    )


@contextmanager
def checkpoint_folder(args: argparse.Namespace) -> Iterator[str]:
    """The folder of --checkpoint, or one with random weights."""
    if args.checkpoint:
        yield args.checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        random_llama().save_pretrained(f"{folder}/hf")
        convert(f"{folder}/hf", f"{folder}/megatron")
        yield f"{folder}/megatron"


def token_ids(args: argparse.Namespace, folder: str, length: int) -> list[int]:
    if not args.checkpoint:
        return prompt(length)
    text = Path(args.text).read_text(encoding="utf-8")
    return load_tokenizer(folder).encode(text[: 20 * length])[:length]


def _measure(ours: Ours, ids: list[int], dtype: str, args: argparse.Namespace) -> Row:
    exact: list[Answer] = []
    csa: list[Answer] = []
    for i in range(2 * args.rounds):  # exact first and csa first in turns
        if i % 4 in (0, 3):
            exact.append(ours.run(ids, 1, "exact"))
        else:
            csa.append(ours.run(ids, 1, "csa"))
    reports = [answer.csa for answer in csa if answer.csa is not None]
    assert reports, "the prompt is too short for CSA"
    return Row(
        dtype=dtype,
        tokens=len(ids),
        segment_size=csa_setting(args).for_prompt(len(ids)).segment_size,
        exact_s=statistics.median(answer.times.ttft for answer in exact),
        csa_s=statistics.median(answer.times.ttft for answer in csa),
        density=reports[-1].density,
        bytes_ratio=reports[-1].bytes_sent / (reports[-1].bytes_exact or 1),
        seconds=_median_seconds(reports),
    )


def _median_seconds(reports: list[CsaReport]) -> dict[str, float]:
    return {name: statistics.median(r.seconds[name] for r in reports) for name in reports[0].seconds}


if __name__ == "__main__":
    main()
