"""What a device and its links can do, measured or from a data sheet, and its JSON file. Plain data.

A rate is what a kernel reaches, not what a sheet promises.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_sps2.config import DTYPES, DType, ParallelConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One rank's way to others: bytes per second that it sends, and seconds that a message takes at least."""

    bandwidth: float
    latency_s: float

    def __post_init__(self) -> None:
        _check("bandwidth", self.bandwidth, above=0)
        _check("latency_s", self.latency_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Seconds that no work explains: kernels started, Python, what a queue of small tensors takes."""

    step_s: float = 0.0  # of every step
    layer_s: float = 0.0  # of every layer of a step
    piece_layer_s: float = 0.0  # of every prompt in a layer
    row_layer_s: float = 0.0  # of every decoded token in a layer
    sample_s: float = 0.0  # of every token that is sampled

    def __post_init__(self) -> None:
        for each in fields(self):
            _check(each.name, getattr(self, each.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """One device, as one rank has it while the others work too."""

    name: str
    source: str  # "measured ..." or "data sheet, not measured"
    matmul_flops: dict[str, float]  # per second, by dtype: projections and MLP
    attention_flops: dict[str, float]  # per second, by dtype: attention of prompts
    weight_bandwidth: float  # bytes per second: weights that a step reads
    kv_bandwidth: float  # bytes per second: keys and values that a decode reads
    intra: Link  # ranks of one node
    inter: Link  # ranks of two nodes
    memory_bytes: int
    devices_per_node: int
    overheads: Overheads = field(default_factory=Overheads)
    # Shares of the shorter of two that hide behind the longer: weights read behind matmuls; exchange of a
    # prompt's heads behind its attention. A measured profile has 0: its times add up as they were fitted.
    memory_overlap: float = 0.0
    exchange_overlap: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("matmul_flops", "attention_flops"):
            for dtype, rate in getattr(self, name).items():
                if dtype not in DTYPES:
                    raise ValueError(f"{name} has dtype {dtype!r}; use {', '.join(DTYPES)}")
                _check(f"{name}[{dtype}]", rate, above=0)
        for name in ("weight_bandwidth", "kv_bandwidth", "memory_bytes", "devices_per_node"):
            _check(name, getattr(self, name), above=0)
        for name in ("memory_overlap", "exchange_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")

    def check_dtype(self, dtype: DType) -> None:
        """Raises ValueError for a dtype whose rates are not known."""
        known = sorted(set(self.matmul_flops) & set(self.attention_flops))
        if dtype not in known:
            raise ValueError(
                f"profile {self.name!r} has no rates for {dtype}; use --dtype {' or '.join(known)}, "
                "or measure it with `sps2 profile`"
            )

    def check_parallel(self, parallel: ParallelConfig) -> None:
        """Raises ValueError for ranks that talk where no link was measured; warns of any other grid."""
        if "sp" not in self.notes:
            return  # a data sheet speaks of one device
        sp_size, tp_size = self.notes["sp"], self.notes.get("tp", 1)
        if sp_size == tp_size == 1 and parallel.sp_size * parallel.tp_size > 1:
            raise ValueError(
                f"sp={parallel.sp_size} tp={parallel.tp_size}: profile {self.name!r} was measured on one "
                "rank and knows no link; measure with "
                f"`sps2 profile --sp {parallel.sp_size} --tp {parallel.tp_size}`"
            )
        if (sp_size, tp_size) != (parallel.sp_size, parallel.tp_size):
            logger.warning(
                "profile %r was measured with sp=%s tp=%s, not sp=%d tp=%d: what ranks share may differ",
                *(self.name, sp_size, tp_size, parallel.sp_size, parallel.tp_size),
            )


def save_profile(profile: DeviceProfile, path: Path) -> None:
    path.write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")


def read_profile(path: Path) -> DeviceProfile:
    """Raises FileNotFoundError, or ValueError naming the file and what is wrong in it."""
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; `sps2 profile` writes such a file") from error


def _parse(content: Any) -> DeviceProfile:
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}; a profile is a JSON object")
    known = {each.name for each in fields(DeviceProfile)}
    if unknown := sorted(set(content) - known):
        raise ValueError(f"unknown keys {unknown}; known are {sorted(known)}")
    parts: dict[str, type] = {"intra": Link, "inter": Link, "overheads": Overheads}
    made = {key: parts[key](**value) if key in parts else value for key, value in content.items()}
    return DeviceProfile(**made)


def _check(name: str, value: float, above: float | None = None) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0 or (above is not None and value <= above):
        rule = "a number of at least 0" if above is None else f"a number above {above:g}"
        raise ValueError(f"{name}={value!r} must be {rule}")
