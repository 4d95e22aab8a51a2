"""`sps2 csa calibrate` and `sps2 csa report`: budgets for a model, and what a setting costs and saves.

Reads text, writes files; measuring is the engine's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sps2.cli.text import check_text, token_ids
from megatron_sps2.cli.world import in_world
from megatron_sps2.csa_setting import (
    CALIBRATION_NAME,
    PRESETS,
    CsaSetting,
    choose_setting,
    load_setting,
    save_setting,
)
from megatron_sps2.model.manifest import read_manifest

if TYPE_CHECKING:
    from rich.progress import Progress

    from megatron_sps2.engine.calibration import Calibration
    from megatron_sps2.engine.trade_off import TradeOff

NUM_CONTINUATION = 256
MAX_SAMPLES = 4  # taken unasked


def run(args: argparse.Namespace) -> int:
    body, check = {"calibrate": (_calibrate, _check_calibrate), "report": (_report, _check_report)}[
        args.action
    ]
    return in_world(args, body, check)


# calibrate


def _check_calibrate(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError for everything that can be wrong before the model is loaded."""
    from megatron_sps2.engine.calibration import check_length

    model, base = read_manifest(args.checkpoint).model, _base(args)
    base.check_model(model, "")
    check_length(base, args.tokens, model)
    check_text(args.text)
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples {args.samples} must be at least 1")
    out = _calibration_file(args)
    if out.exists() and not args.force:
        raise FileExistsError(f"{out} exists; --force replaces it, --out FILE writes another")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}, the folder of --out, does not exist")


def _base(args: argparse.Namespace) -> CsaSetting:
    from megatron_sps2.engine.calibration import base_setting

    shape = replace(PRESETS["default"], window=args.window)
    is_adaptive = args.budget == "adaptive"
    return base_setting(shape, args.floor, adaptive=is_adaptive, segment_size=args.segment_size)


def _calibration_file(args: argparse.Namespace) -> Path:
    return Path(args.out) if args.out else Path(args.checkpoint) / CALIBRATION_NAME


def _calibrate(args: argparse.Namespace) -> int:
    from megatron_sps2.engine.calibration import calibrate
    from megatron_sps2.engine.trial import Trial
    from megatron_sps2.parallel.collectives import from_first_rank

    samples = from_first_rank(
        lambda: cut_samples(token_ids(args.text, args.checkpoint), args.tokens, args.samples)
    )
    trial = Trial.load(args.checkpoint)
    with _progress() as progress:
        task = progress.add_task("layers", total=len(samples) * trial.model.num_layers)
        found = calibrate(trial, samples, _base(args), args.floor, lambda: progress.advance(task))
    content_id = read_manifest(args.checkpoint).content_id
    save_setting(replace(found.setting, content_id=content_id), _calibration_file(args))
    _print_calibration(found, args, len(samples))
    return 0


def cut_samples(ids: list[int], num_tokens: int, num_samples: int | None) -> list[list[int]]:
    """Pieces of num_tokens ids, evenly spread over the text, none overlapping; None: as many as fit, to 4.

    Raises ValueError for a text that is too short.
    """
    fitting = len(ids) // num_tokens
    wanted = min(fitting, MAX_SAMPLES) if num_samples is None else num_samples
    if not 0 < wanted <= fitting:
        raise ValueError(
            f"the text has {len(ids)} tokens, too short for {max(1, wanted)} samples of {num_tokens}; "
            "give a longer text or ask for fewer"
        )
    step = len(ids) // wanted
    return [ids[start : start + num_tokens] for start in range(0, wanted * step, step)]


def _print_calibration(found: Calibration, args: argparse.Namespace, num_samples: int) -> None:
    from rich.console import Console
    from rich.table import Table

    mass, density = ([value for row in table for value in row] for table in (found.kept_mass, found.density))
    table = Table(show_header=False, title=f"CSA setting {found.setting.name}")
    for name, value in (
        ("budgets", f"{args.budget}, for {len(found.density)} layers of {len(found.density[0])} KV heads"),
        ("text", f"{num_samples} samples of {args.tokens:,} tokens"),
        ("attention kept, by held-out queries", f"mean {_mean(mass):.2%}, least {min(mass):.2%}"),
        ("far keys kept", f"mean {_mean(density):.2%}, {min(density):.2%} to {max(density):.2%}"),
        ("written to", str(_calibration_file(args))),
    ):
        table.add_row(name, value)
    Console().print(table)


# report


def _check_report(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError for everything that can be wrong before the model is loaded."""
    from megatron_sps2.engine.calibration import check_length

    manifest = read_manifest(args.checkpoint)
    if args.num_ranks < 1:
        raise ValueError(f"--sp {args.num_ranks} must be at least 1")
    for setting in _settings(args):
        setting.check_model(manifest.model, manifest.content_id)
        if setting.selector != "dilated":
            check_length(setting, args.tokens, manifest.model)
    if _settings(args)[0].selector == "dilated":
        raise ValueError(
            f"--csa-setting {_settings(args)[0].name!r} has no budgets to draw; name it in --settings"
        )
    if args.tokens + NUM_CONTINUATION > manifest.model.max_seq_len:
        raise ValueError(
            f"--tokens {args.tokens} and a continuation of {NUM_CONTINUATION} are more than the model's "
            f"{manifest.model.max_seq_len}"
        )
    check_text(args.text)
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise FileExistsError(f"--out {args.out} is a file; give a folder")


def _settings(args: argparse.Namespace) -> list[CsaSetting]:
    """What is drawn first, then what it is compared with; names once."""
    drawn = choose_setting(args.csa_setting, args.checkpoint)
    others = [load_setting(name.strip()) for name in args.settings.split(",") if name.strip()]
    calibrated = Path(args.checkpoint) / CALIBRATION_NAME
    if calibrated.is_file():
        others.append(load_setting(calibrated))
    return _named_apart([drawn, *others])


def _named_apart(settings: list[CsaSetting]) -> list[CsaSetting]:
    """Each once; of different ones with one name the later get a number."""
    found: list[CsaSetting] = []
    for setting in dict.fromkeys(settings):
        same = sum(other.name.split(" #")[0] == setting.name for other in found)
        found.append(replace(setting, name=f"{setting.name} #{same + 1}") if same else setting)
    return found


def _report(args: argparse.Namespace) -> int:
    from megatron_sps2.cli.csa_plots import Facts, write_report
    from megatron_sps2.engine.trade_off import compare
    from megatron_sps2.engine.trial import Trial
    from megatron_sps2.parallel.collectives import from_first_rank

    num_ids = args.tokens + NUM_CONTINUATION
    [ids] = from_first_rank(lambda: cut_samples(token_ids(args.text, args.checkpoint), num_ids, 1))
    settings = _settings(args)
    trial = Trial.load(args.checkpoint)
    with _progress() as progress:
        task = progress.add_task("exact", total=len(settings) + 2)

        def start(name: str) -> None:
            progress.update(task, description=name, advance=0 if name == "exact" else 1)

        found = compare(trial, ids, args.tokens, settings, args.num_ranks, start)
        progress.advance(task)
    facts = Facts(
        checkpoint=Path(args.checkpoint).resolve().name,
        text=Path(args.text).name,
        num_tokens=args.tokens,
        num_continuation=NUM_CONTINUATION,
        num_ranks=args.num_ranks,
    )
    page = write_report(Path(args.out), found, facts)
    _print_trade_off(found, page)
    return 0


def _print_trade_off(found: TradeOff, page: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from megatron_sps2.cli.csa_plots import COLUMNS, rows

    # Narrow enough for 80 columns.
    table = Table(title="CSA beside exact attention", box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, no_wrap=True)
    for row in rows(found):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"written: {page}", soft_wrap=True)


# both


def _progress() -> Progress:
    """On stderr, gone when done."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
