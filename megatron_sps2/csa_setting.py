"""One setting of CSA: which keys of earlier segments a prompt's queries still see (method.md section 4).

Presets, checks, and the small JSON file that a calibration writes. Knows no torch and no ranks.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from megatron_sps2.config import ModelConfig

SELECTORS = ("none", "strided", "scored", "dilated")
Selector = Literal["none", "strided", "scored", "dilated"]
# A calibration's file beside a checkpoint.
CALIBRATION_NAME = "sps2_csa.json"

# Measured (benchmarks/RESULTS.md): far keys that an adaptive setting keeps at a few thousand tokens, and what
# scoring a key with a probe costs beside attending to it with a query.
ADAPTIVE_DENSITY = 0.15
PROBE_COST = 2.8
NEVER = 2**62
# Prompts of up to 14 segments keep the least size; each doubling serves prompts 2^2.5 times as long. By cost
# alone it would begin later (a query reads G/2 own keys, scoring takes PROBE_COST * num_probes * s / 2G), but
# larger segments see more of their past and fewer of them mean fewer bytes.
FIRST_DOUBLING = 14
LATER_DOUBLINGS = 2**2.5

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CsaSetting:
    """Frozen and comparable: every rank must have the same one.

    A key of a segment far from the reader's belongs to the lowest level l whose group of group_sizes[l]
    segments holds both; the widest level takes everything beyond it too. Level 0 is the own segment, dense.
    """

    name: str = "custom"
    # none: sinks and window only. strided: every d-th key. scored: by the probes' attention.
    # dilated: the paper's own variant, on segments that are the ranks; on another number of ranks than the
    # widest group, groups double (or grow by the next factor) and degrees equal them.
    selector: Selector = "scored"
    segment_size: int = 512  # tokens; a multiple of 8
    # Segments double up to this where prompts are long (512: above 7,168 and 40,548 tokens); None: never.
    max_segment_size: int | None = None
    num_sinks: int = 4  # first tokens of the sequence, always kept
    window: int = 512  # tokens just before the reading segment, always kept
    tail: int = 64  # last queries of the prompt, which attend to everything
    # Queries of a reading segment that score the keys and measure the kept mass; a quarter are its last ones.
    num_probes: int = 16
    # Least share of the probes' attention that is kept, the mean over the probes of a segment and KV head;
    # None: fixed budgets by `degrees`.
    floor: float | None = None
    group_sizes: tuple[int, ...] = (1, 2)
    degrees: tuple[float, ...] = (1, 8)
    # Calibrated, [layer][KV head]: floors in place of `floor`.
    floors: Table | None = None
    # Calibrated, [layer][KV head][level - 1]: kept shares in place of 1 / degree.
    densities: tuple[Table, ...] | None = None
    # Of the checkpoint that `floors` and `densities` were made for.
    content_id: str = ""

    def __post_init__(self) -> None:
        for name, holds, rule in self._rules():
            if not holds:
                raise ValueError(f"CSA setting {self.name!r}: {name}={getattr(self, name)!r} {rule}")

    def _rules(self) -> list[tuple[str, bool, str]]:
        groups, degrees = self.group_sizes, self.degrees
        nests = groups[:1] == (1,) and all(a >= 1 and b > a and b % a == 0 for a, b in pairwise(groups))
        in_unit = [value for row in self.floors or () for value in row]
        shares = [value for layer in self.densities or () for row in layer for value in row]
        levels = {len(row) for layer in self.densities or () for row in layer}
        return [
            ("selector", self.selector in SELECTORS, f"is not known; use one of {', '.join(SELECTORS)}"),
            (
                "segment_size",
                self.segment_size >= 8 and self.segment_size % 8 == 0,
                "must be a multiple of 8, at least 8; 512 to 2048 is usual",
            ),
            (
                "max_segment_size",
                self.max_segment_size is None or self.max_segment_size >= self.segment_size,
                f"must be at least segment_size ({self.segment_size})",
            ),
            *((name, getattr(self, name) >= 0, "must be 0 or above") for name in _COUNTS),
            (
                "num_probes",
                self.num_probes > 0 or self.selector != "scored",
                "must be above 0: probes are what scores the keys",
            ),
            (
                "floor",
                self.floor is None or 0 <= self.floor <= 1,
                "must lie between 0 and 1: it is the share of attention that is kept; 1 is exact",
            ),
            (
                "group_sizes",
                len(groups) >= 2 and nests,
                "must begin with 1 and each divide the next, as in [1, 2, 8]",
            ),
            (
                "degrees",
                len(degrees) == len(groups) and degrees[:1] == (1,),
                f"must be as many as group_sizes ({len(groups)}) and begin with 1, the own segment",
            ),
            ("degrees", all(d >= 1 for d in degrees), "must be at least 1: 1 keeps all keys, d every d-th"),
            (
                "degrees",
                self.selector not in ("strided", "dilated") or all(d % 1 == 0 for d in degrees),
                "must be integers where keys are taken by stride",
            ),
            ("floors", all(0 <= value <= 1 for value in in_unit), "must lie between 0 and 1"),
            ("densities", all(0 <= value <= 1 for value in shares), "must lie between 0 and 1"),
            ("densities", levels <= {len(groups) - 1}, "must have one share for each level above 0"),
        ]

    @property
    def is_adaptive(self) -> bool:
        """True: how many keys are kept is known only once the probes have scored them."""
        return self.selector == "scored" and (self.floor is not None or self.floors is not None)

    def floor_of(self, layer: int, kv_head: int) -> float:
        """Of an adaptive setting; kv_head counts over the whole model."""
        if self.floors is not None:
            return self.floors[layer][kv_head]
        assert self.floor is not None, "a fixed setting has no floor"
        return self.floor

    def density_of(self, layer: int, kv_head: int, level: int) -> float:
        """Share of a far segment's keys that a fixed setting keeps; level from 1."""
        if self.densities is not None:
            return self.densities[layer][kv_head][level - 1]
        return 1 / self.degrees[level]

    def for_prompt(self, num_tokens: int) -> CsaSetting:
        """This setting with the segments that a prompt of that length gets, whatever the number of ranks."""
        size, largest = self.segment_size, self.max_segment_size or self.segment_size
        limit: float = FIRST_DOUBLING * size
        while num_tokens > limit and 2 * size <= largest:
            size, limit = 2 * size, limit * LATER_DOUBLINGS
        return replace(self, segment_size=size, max_segment_size=None)

    def level_of(self, reader: int, segment: int) -> int:
        """The lowest level whose group holds both segments; the widest one where none does."""
        for level, size in enumerate(self.group_sizes):
            if reader // size == segment // size:
                return level
        return len(self.group_sizes) - 1

    @property
    def expected_density(self) -> float:
        """Share of far keys kept, before any prompt is seen: as measured, calibrated or set."""
        if self.selector == "none":
            return 0.0
        if self.is_adaptive:
            return 1.0 if self.floor == 1 and self.floors is None else ADAPTIVE_DENSITY
        shares = [value for layer in self.densities or () for row in layer for value in row]
        # A dilated level samples its queries too.
        power = 2 if self.selector == "dilated" else 1
        return fmean(shares) if shares else fmean(degree**-power for degree in self.degrees[1:])

    @property
    def whole_tokens(self) -> int:
        """Prompts up to this length keep every key: of one segment, or few, whose windows reach the sinks."""
        if self.selector == "dilated":  # has neither
            return self.segment_size
        return (1 + (self.num_sinks + self.window) // self.segment_size) * self.segment_size

    @property
    def break_even_tokens(self) -> int:
        """The cost model of --attention auto: from this length on CSA is worth its approximation.

        Per query exact attention reads s/2 keys; CSA reads G/2 of its own segment, the kept share of s/2, and
        scores s/2 keys with m probes for G queries. It pays where that is a third of exact.
        """
        # For segments of the least size: larger ones come with prompts that are far beyond it.
        scoring = PROBE_COST * self.num_probes / self.segment_size if self.selector != "dilated" else 0.0
        spared = 1 / 3 - self.expected_density - scoring
        return math.ceil(self.segment_size / spared) if spared > 0 else NEVER

    def levels_for(self, num_segments: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(group_sizes, degrees) where the widest group is all segments, as `dilated` needs; else None."""
        if self.group_sizes[-1] != num_segments:
            return None
        return self.group_sizes, tuple(int(degree) for degree in self.degrees)

    def check_model(self, model: ModelConfig, content_id: str) -> None:
        """Raises ValueError when calibrated tables belong to another model, or layers have windows."""
        if model.window_layers:
            raise ValueError(
                f"CSA is not for this model: {len(model.window_layers)} of its layers see only the last "
                f"{model.window} tokens; use --attention exact"
            )
        if self.content_id and content_id and self.content_id != content_id:
            raise ValueError(
                f"CSA setting {self.name!r} was calibrated for a model with content id {self.content_id!r}, "
                f"this checkpoint has {content_id!r}; run `sps2 csa calibrate` for it, or use a preset "
                f"({', '.join(PRESETS)})"
            )
        for table in (self.floors, self.densities):
            if table is None:
                continue
            heads = {len(row) for row in table}
            if len(table) != model.num_layers or heads != {model.num_query_groups}:
                raise ValueError(
                    f"CSA setting {self.name!r} has budgets for {len(table)} layers of {sorted(heads)} "
                    f"KV heads, the model has {model.num_layers} of {model.num_query_groups}; "
                    "run `sps2 csa calibrate` for it"
                )


# In a file: how a value is called, and its shape.
_TEXT, _INTEGER, _NUMBER = ("a string", str), ("an integer", int), ("a number", float)
_JSON_TYPES: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("name", "selector", "content_id"), _TEXT),
    **dict.fromkeys(("segment_size", "num_sinks", "window", "tail", "num_probes"), _INTEGER),
    "max_segment_size": _INTEGER,
    "floor": _NUMBER,
    "group_sizes": ("a list of integers", [int]),
    "degrees": ("a list of numbers", [float]),
    "floors": ("a list, by layer, of lists of numbers", [[float]]),
    "densities": ("a list, by layer and KV head, of lists of numbers", [[[float]]]),
}
_MAY_BE_NULL = ("max_segment_size", "floor", "floors", "densities")
_COUNTS = ("num_sinks", "window", "tail", "num_probes")

PRESETS: dict[str, CsaSetting] = {
    setting.name: setting
    for setting in (
        CsaSetting(name="default", floor=0.9, max_segment_size=2048),
        CsaSetting(name="careful", floor=0.97, window=1024, max_segment_size=2048),
        CsaSetting(name="fast", floor=0.8, window=256, max_segment_size=2048),
        CsaSetting(name="full", floor=1.0, max_segment_size=2048),
        CsaSetting(name="local", selector="none", num_sinks=0, window=0),
        CsaSetting(
            name="strided", selector="strided", group_sizes=(1, 2, 4, 8), degrees=(1, 2, 4, 8), window=0
        ),
        CsaSetting(
            name="paper",
            selector="dilated",
            group_sizes=(1, 2, 4, 8),
            degrees=(1, 2, 4, 8),
            num_sinks=0,
            window=0,
            tail=0,
            num_probes=0,
        ),
    )
}


def load_setting(name_or_file: str | Path) -> CsaSetting:
    """A preset, or the setting in a JSON file. Raises ValueError or FileNotFoundError."""
    if str(name_or_file) in PRESETS:
        return PRESETS[str(name_or_file)]
    path = Path(name_or_file)
    if not path.is_file():
        raise FileNotFoundError(
            f"CSA setting {str(name_or_file)!r} is no preset ({', '.join(PRESETS)}) and no file"
        )
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")), path.stem)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def choose_setting(wanted: str | None, checkpoint: str | Path) -> CsaSetting:
    """What the user names, else the calibration beside the checkpoint, else the preset `default`."""
    beside = Path(checkpoint) / CALIBRATION_NAME
    if wanted is not None:
        return load_setting(wanted)
    return load_setting(beside) if beside.is_file() else PRESETS["default"]


def save_setting(setting: CsaSetting, path: Path) -> None:
    path.write_text(json.dumps(asdict(setting), indent=1) + "\n", encoding="utf-8")


def _parse(content: Any, name: str) -> CsaSetting:
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}; a CSA setting is a JSON object")
    known = {field.name for field in fields(CsaSetting)}
    unknown = sorted(set(content) - known)
    if unknown:
        raise ValueError(f"unknown keys {unknown}; known are {sorted(known)}")
    for key, value in content.items():
        wanted, shape = _JSON_TYPES[key]
        if not (_fits(value, shape) or (value is None and key in _MAY_BE_NULL)):
            raise ValueError(f"{key}={value!r} must be {wanted}")
    return CsaSetting(**{"name": name, **{key: _frozen(value) for key, value in content.items()}})


def _fits(value: Any, shape: Any) -> bool:
    """Whether a JSON value is of `shape`: a type, or a list that holds the shape of its entries."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(entry, shape[0]) for entry in value)
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if shape is float else shape)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
