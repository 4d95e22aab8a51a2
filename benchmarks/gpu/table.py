"""Outcomes as JSON and as a Markdown table, each rate beside the card's ceiling."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import Outcome, Row

COLUMNS = ("what", "shape", "ms", "rate", "of ceiling", "ours against", "error", "remarks")


def write(folder: Path, machine: dict[str, Any], outcomes: Sequence[Outcome], seconds: float) -> str:
    """results.json and results.md in `folder` -> the text of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "seconds": seconds, "outcomes": [each.to_json() for each in outcomes]}
    (folder / "results.json").write_text(json.dumps(_without_nan(found), indent=1) + "\n")
    text = markdown(machine, outcomes)
    (folder / "results.md").write_text(text)
    return text


def markdown(machine: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    ceilings = _ceilings(outcomes)
    lines = [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(_cells(each, ceilings)) + " |" for each in outcomes]
    return "\n".join(lines) + "\n"


def _ceilings(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """By unit."""
    return {each.row.unit: each.row.rate for each in outcomes if each.section == "ceilings" and each.row}


def _cells(outcome: Outcome, ceilings: dict[str, float]) -> list[str]:
    name, row = f"{outcome.section}: {outcome.case}", outcome.row
    if row is None:
        told = outcome.detail.strip().splitlines()[-1] if outcome.detail else ""
        return [name, *[""] * 6, f"{outcome.status.upper()}: {told}".replace("|", "/")]
    ratios = ", ".join(f"{other} {ratio:.2f}x" for other, ratio in row.ratios.items())
    remarks = [*(["WRONG"] if outcome.status == "wrong" else []), *([row.note] if row.note else [])]
    return [
        name,
        row.shape,
        _number(row.milliseconds, ".3f"),
        f"{_number(row.rate, '.4g')} {row.unit}".strip(),
        _share(row, ceilings),
        ratios,
        _error(row),
        "; ".join(remarks),
    ]


def _share(row: Row, ceilings: dict[str, float]) -> str:
    return f"{row.rate / ceilings[row.unit]:.0%}" if row.unit in ceilings else ""


def _error(row: Row) -> str:
    if row.check is None:
        return ""
    bad = f", {row.check.num_not_finite} not finite" if row.check.num_not_finite else ""
    return f"{row.check.error:.1e}{bad}"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: None instead."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
