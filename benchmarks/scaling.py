"""Attention, bytes and time to first token against prompt length and sp, with the theory drawn in.

    python -m benchmarks.scaling --sp 1 2 4 --json scaling.json --figures docs/figures
    python -m benchmarks.scaling --plot-only scaling.json --figures docs/figures

One random Llama of 56M parameters in bfloat16; each rank has one thread. Ranks beyond the machine's cores
share them: their times are no speed-up, their bytes are what they would be anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.csa_speed import add_budgets, checkpoint_folder, engine_config, token_ids
from benchmarks.meter import Note
from benchmarks.scaling_plot import draw
from benchmarks.side_by_side import Answer, Ours
from benchmarks.work_model import Row, kept_pairs, why_not
from megatron_sps2.config import ModelConfig
from megatron_sps2.engine.build import EngineConfig
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel.traffic import Traffic

DTYPE, ELEMENT_SIZE = "bfloat16", 2
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
COLUMNS = (
    "mode",
    "sp",
    "tokens",
    "strategy",
    "TTFT, s",
    "attention, s",
    "of it CPU, s",
    "bytes",
    "of formula",
)
# What the formulas of bytes take of a model; the rest of its config says nothing here.
SHAPE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    *("num_query_groups", "head_dim", "vocab_size", "max_seq_len"),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt that ran, in the order of the ranks' notes."""

    mode: str
    tokens: int
    answer: Answer


def main() -> None:
    args = _parse()
    if args.plot_only:
        draw(json.loads(Path(args.plot_only).read_text()), Path(args.figures))
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "rows": [], "left_out": []}
    print("|", " | ".join(COLUMNS), "|\n" + "|---" * len(COLUMNS) + "|", flush=True)
    with checkpoint_folder(args) as folder:
        model = load_model_config(folder)
        found["model"] = {name: getattr(model, name) for name in SHAPE}
        for sp in args.sp:
            rows, left_out = measure(sp, model, folder, args)
            found["rows"] += map(asdict, rows)
            found["left_out"] += left_out
            if args.json:  # what is known so far: the next ranks take long
                Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    for line in found["left_out"]:
        print("left out:", line)
    if args.figures:
        draw(found, Path(args.figures))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--sp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--modes", nargs="+", choices=["exact", "csa"], default=["exact", "csa"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--limit-s", type=float, default=150, help="leave out prefills that would take longer than this"
    )
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--figures", help="folder for the plots")
    parser.add_argument("--plot-only", metavar="JSON", help="measure nothing, draw what --json wrote")
    add_budgets(parser)
    args = parser.parse_args()
    if args.plot_only and not args.figures:
        parser.error("--plot-only without --figures draws nowhere; name a folder")
    return args


def measure(
    sp: int, model: ModelConfig, folder: str, args: argparse.Namespace
) -> tuple[list[Row], list[str]]:
    """All lengths and modes on sp ranks, and what was left out, in words."""
    config = engine_config(argparse.Namespace(**{**vars(args), "sp": sp}), folder, DTYPE)
    left_out: list[str] = []
    ours = Ours(config, metered=True)
    asked = list(_ask(ours, config, folder, args, left_out))
    notes = list(zip(*ours.close(), strict=True))  # of each prompt, by rank
    warm_ups = len(args.modes)
    both = list(zip(asked, notes, strict=True))[warm_ups:]
    traffic = Traffic(model=model, parallel=config.parallel, element_size=ELEMENT_SIZE)
    kinds = list(dict.fromkeys((one.mode, one.tokens) for one, _ in both))
    rows = [
        _row([each for each in both if (each[0].mode, each[0].tokens) == kind], config, traffic)
        for kind in kinds
    ]
    for row in rows:
        print("|", " | ".join(_cells(row)), "|", flush=True)
    return rows, left_out


def _ask(
    ours: Ours, config: EngineConfig, folder: str, args: argparse.Namespace, left_out: list[str]
) -> Iterator[Asked]:
    """Runs everything: first each mode once, for what is slow once only; then lengths, modes taking turns."""
    for mode in args.modes:
        ids = token_ids(args, folder, min(args.lengths))
        yield Asked(mode, len(ids), ours.run(ids, 1, mode))
    last: dict[str, tuple[int, float]] = {}
    for length in sorted(args.lengths):
        size = _segment_size(config, length)
        reasons = {
            mode: why_not(length, last.get(mode), args.limit_s, size if mode == "csa" else 0)
            for mode in args.modes
        }
        left_out += [
            f"sp {config.parallel.sp_size}, {m}, {length}: {why}" for m, why in reasons.items() if why
        ]
        modes, ids = [mode for mode, why in reasons.items() if not why], token_ids(args, folder, length)
        for i in range(args.rounds):
            for mode in modes[:: 1 - 2 * (i % 2)]:
                answer = ours.run(ids, 1, mode)
                last[mode] = length, answer.times.ttft
                print(f"{mode}, {length} tokens: {answer.times.ttft:.2f} s", file=sys.stderr, flush=True)
                yield Asked(mode, length, answer)


def _row(runs: Sequence[tuple[Asked, Sequence[Note]]], config: EngineConfig, traffic: Traffic) -> Row:
    """One length and mode: the median over rounds of the mean over ranks."""
    asked, notes = runs[-1]
    report, strategy = asked.answer.csa, notes[0].strategy
    parts = config.parallel.sp_size * traffic.model.num_layers
    kept, seconds = 1.0, {}
    if report is None:
        formula = getattr(traffic, strategy)(asked.tokens)
    else:
        formula, seconds = report.bytes_formula / parts, report.seconds
        kept = kept_pairs(report.density, _segment_size(config, asked.tokens), asked.tokens)
    return Row(
        mode=asked.mode,
        sp=config.parallel.sp_size,
        tokens=asked.tokens,
        strategy=strategy,
        ttft_s=statistics.median(one.answer.times.ttft for one, _ in runs),
        attention_s=_median(runs, "attention_s"),
        attention_cpu_s=_median(runs, "attention_cpu_s"),
        bytes_sent=sum(note.bytes_sent for note in notes) / parts,
        bytes_formula=formula,
        kept=kept,
        seconds=seconds,
    )


def _segment_size(config: EngineConfig, tokens: int) -> int:
    assert config.csa is not None, "these ranks serve both modes"
    return config.csa.for_prompt(tokens).segment_size


def _median(runs: Sequence[tuple[Asked, Sequence[Note]]], name: str) -> float:
    return statistics.median(statistics.fmean(getattr(note, name) for note in notes) for _, notes in runs)


def _cells(row: Row) -> list[str]:
    ratio = f"{row.bytes_sent / row.bytes_formula:.6f}" if row.bytes_formula else "-"
    return [
        *(row.mode, f"{row.sp}", f"{row.tokens}", row.strategy, f"{row.ttft_s:.3f}"),
        *(f"{row.attention_s:.3f}", f"{row.attention_cpu_s:.3f}", f"{row.bytes_sent:.0f}", ratio),
    ]


if __name__ == "__main__":
    main()
