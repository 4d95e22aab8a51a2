"""Reads request traces: when requests come and how long they are. Knows no tokens and no clock.

Formats: Mooncake's JSONL, Azure's CSV, a plain CSV of lengths, and mixes drawn from a line of text.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_TOKENS = 512  # of a Mooncake hash id
DEFAULT_OUTPUT = 128  # of a synthetic request that does not say
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
EPOCH = datetime(1970, 1, 1)
CSV_COLUMNS = ("prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A request as a trace knows it. Equal hash ids are equal blocks of prompt tokens."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()


def read_trace(
    trace: str | Path, trace_format: str, num_requests: int | None = None, seed: int = 0
) -> list[Planned]:
    """The first `num_requests` of a trace by arrival, the first one at 0 s; all of them for None.

    Of the format `synthetic`, `trace` is a mix such as 0.8:128-1024,0.2:4096-8192. Raises ValueError for
    what cannot be read and for a trace that is too short, OSError for no file.
    """
    if num_requests is not None and num_requests < 1:
        raise ValueError(f"num_requests={num_requests} must be at least 1")
    if trace_format == "synthetic":
        return synthetic(str(trace), num_requests or 100, seed)
    if trace_format not in READERS:
        raise ValueError(f"trace format {trace_format!r} is not known; use {', '.join(FORMATS)}")
    planned = list(READERS[trace_format](Path(trace)))
    if num_requests is not None and len(planned) < num_requests:
        raise ValueError(f"{trace} has {len(planned)} requests, fewer than {num_requests}; ask for fewer")
    if not planned:
        raise ValueError(f"{trace} has no requests; give a trace of the format {trace_format}")
    planned.sort(key=lambda each: each.arrival_s)
    start = planned[0].arrival_s
    return [replace(each, arrival_s=each.arrival_s - start) for each in planned[:num_requests]]


# Mooncake


def read_mooncake(path: Path) -> Iterator[Planned]:
    """One JSON object a line: timestamp in ms, input_length, output_length, hash_ids of 512 tokens each."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _mooncake_line(_Place(path, number), line)


def _mooncake_line(place: _Place, line: str) -> Planned:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise place.wrong(line.strip()[:80], f"must be one JSON object ({error.msg})") from error
    if not isinstance(row, dict):
        raise place.wrong(line.strip()[:80], "must be a JSON object")
    length = place.count(row.get("input_length"), "input_length")
    hash_ids = row.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(type(i) is int and i >= 0 for i in hash_ids):
        raise place.wrong(str(hash_ids)[:80], "hash_ids must be a list of integers of at least 0")
    if hash_ids and len(hash_ids) != math.ceil(length / BLOCK_TOKENS):
        rule = f"input_length {length} has {math.ceil(length / BLOCK_TOKENS)} blocks of {BLOCK_TOKENS} tokens"
        raise place.wrong(f"{len(hash_ids)} hash_ids", rule)
    return Planned(
        arrival_s=place.number_of(row.get("timestamp"), "timestamp") / 1e3,
        num_prompt_tokens=length,
        num_output_tokens=place.count(row.get("output_length"), "output_length"),
        hash_ids=tuple(hash_ids),
    )


# CSV


def read_azure(path: Path) -> Iterator[Planned]:
    """TIMESTAMP,ContextTokens,GeneratedTokens; the timestamp is a date with fractions of seconds."""
    for place, row in _rows(path, AZURE_COLUMNS):
        yield Planned(
            arrival_s=place.date(row["TIMESTAMP"]),
            num_prompt_tokens=place.count(row["ContextTokens"], "ContextTokens"),
            num_output_tokens=place.count(row["GeneratedTokens"], "GeneratedTokens"),
        )


def read_csv(path: Path) -> Iterator[Planned]:
    """prompt_tokens,output_tokens and, where arrivals are known, arrival_s."""
    for place, row in _rows(path, CSV_COLUMNS):
        yield Planned(
            arrival_s=place.number_of(row.get("arrival_s", "0"), "arrival_s"),
            num_prompt_tokens=place.count(row["prompt_tokens"], "prompt_tokens"),
            num_output_tokens=place.count(row["output_tokens"], "output_tokens"),
        )


def _rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[_Place, dict[str, str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        missing = [name for name in needed if name not in (reader.fieldnames or ())]
        if missing:
            found = ",".join(reader.fieldnames or ())
            rule = f"the first line must name the columns {','.join(needed)}"
            raise _Place(path, 1).wrong(found[:80], rule)
        for row in reader:
            yield _Place(path, reader.line_num), row


# Mixes


def synthetic(spec: str, num_requests: int, seed: int = 0) -> list[Planned]:
    """Lengths drawn from SHARE:LEAST-MOST[:LEAST-MOST of outputs],...; all arrive at 0 s."""
    parts = [_part(text, spec) for text in spec.split(",")]
    rng = np.random.default_rng([seed, len(parts)])
    shares = np.array([share for share, _, _ in parts])
    chosen = rng.choice(len(parts), size=num_requests, p=shares / shares.sum())
    return [
        Planned(
            arrival_s=0.0,
            num_prompt_tokens=_drawn(rng, parts[i][1]),
            num_output_tokens=_drawn(rng, parts[i][2]),
        )
        for i in chosen
    ]


def _drawn(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


def _part(text: str, spec: str) -> tuple[float, tuple[int, int], tuple[int, int]]:
    fields = text.strip().split(":")
    try:
        share, lengths = float(fields[0]), [_range(field) for field in fields[1:]]
    except ValueError:
        share, lengths = 0.0, []
    if not 0 < share < math.inf or len(lengths) not in (1, 2):
        raise ValueError(
            f"{text.strip()!r} in the mix {spec!r} must be SHARE:LEAST-MOST or SHARE:LEAST-MOST:OUTPUT, "
            "share above 0, lengths at least 1; use such as 0.8:128-1024,0.2:4096-8192:64-256"
        )
    return share, lengths[0], lengths[1] if len(lengths) == 2 else (DEFAULT_OUTPUT, DEFAULT_OUTPUT)


def _range(text: str) -> tuple[int, int]:
    """Raises ValueError."""
    least, _, most = text.partition("-")
    found = int(least), int(most or least)
    if not 1 <= found[0] <= found[1]:
        raise ValueError(text)
    return found


# Errors


@dataclass(frozen=True, slots=True)
class _Place:
    """A line of a file, and what is wrong with it."""

    path: Path
    line: int

    def wrong(self, value: object, rule: str) -> ValueError:
        return ValueError(f"{self.path}, line {self.line}: {value!r}: {rule}; mend the line or remove it")

    def count(self, value: Any, name: str) -> int:
        number = self.number_of(value, name)
        if number != int(number) or number < 1:
            raise self.wrong(value, f"{name} must be a whole number of at least 1")
        return int(number)

    def number_of(self, value: Any, name: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not 0 <= number < math.inf:
            raise self.wrong(value, f"{name} must be a number of at least 0")
        return number

    def date(self, text: Any) -> float:
        try:
            moment = datetime.fromisoformat(str(text).strip()[:26])  # microseconds at most
        except ValueError as error:
            raise self.wrong(text, "TIMESTAMP must be a date such as 2023-11-16 18:17:03.9799600") from error
        return (moment.replace(tzinfo=None) - EPOCH).total_seconds()


READERS: dict[str, Callable[[Path], Iterator[Planned]]] = {
    "mooncake": read_mooncake,
    "azure": read_azure,
    "csv": read_csv,
}
FORMATS = (*READERS, "synthetic")
