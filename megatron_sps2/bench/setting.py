"""The settings of a comparison by name, such as sarathi-512@sp1tp2: a name -> flags of `sps2 serve`.

Knows the names and what a model's heads allow; starts nothing.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.csa_setting import PRESETS

NAMES = "sps2-exact, sps2-csa, sps2-csa-PRESET, sps2-auto, sarathi-CHUNK, fcfs or fcfs-TOKENS"
# The one that others' answers are compared with.
REFERENCE = "sps2-exact"
_LAYOUT = re.compile(r"sp([1-9]\d*)tp([1-9]\d*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to serve: what it is called in results, and how its server is started."""

    name: str
    parallel: ParallelConfig
    flags: tuple[str, ...]  # of policy, attention and chunk
    is_sarathi: bool = False

    @property
    def base(self) -> str:
        """The name without the layout."""
        return self.name.partition("@")[0]

    @property
    def serve_flags(self) -> tuple[str, ...]:
        sizes = ("--sp", str(self.parallel.sp_size), "--tp", str(self.parallel.tp_size))
        return (*sizes, *self.flags)

    def at(self, parallel: ParallelConfig) -> Setting:
        """The same on another layout, with its name."""
        name = f"{self.base}@{layout_name(parallel)}"
        return Setting(name=name, parallel=parallel, flags=self.flags, is_sarathi=self.is_sarathi)


def parse_settings(
    text: str, parallel: ParallelConfig, defined: Mapping[str, str] | None = None
) -> list[Setting]:
    """`--settings A,B,C` -> each once, in order. `defined`: names of the user's own -> flags of serve.

    Raises ValueError for an unknown or repeated name, and for a text without any.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--settings {text!r} names none; give some, as in sps2-csa,sps2-exact,sarathi-512")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"--settings names {', '.join(repeated)} more than once; each is measured once")
    return [_setting(name, parallel, defined or {}) for name in names]


def parse_definitions(texts: Sequence[str]) -> dict[str, str]:
    """`--define NAME=FLAGS` ... -> flags by name. Raises ValueError for another form."""
    found = {}
    for text in texts:
        name, _, flags = text.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or not flags.strip():
            raise ValueError(
                f"--define {text!r} must be NAME=FLAGS, the name of letters, digits, '.', '-' and '_', as in "
                "'--define slo=--policy sps2 --tbt-slo-ms 200'"
            )
        found[name] = flags
    return found


def layout_name(parallel: ParallelConfig) -> str:
    return f"sp{parallel.sp_size}tp{parallel.tp_size}"


def fitting_layouts(world_size: int, model: ModelConfig) -> tuple[list[ParallelConfig], dict[str, str]]:
    """Every (sp, tp) of `world_size` ranks -> those that the model allows, and why not the others."""
    fit, left_out = list[ParallelConfig](), dict[str, str]()
    for tp_size in (size for size in range(1, world_size + 1) if world_size % size == 0):
        parallel = ParallelConfig(sp_size=world_size // tp_size, tp_size=tp_size)
        try:
            parallel.check_model(model)
        except ValueError as error:
            left_out[layout_name(parallel)] = str(error)
        else:
            fit.append(parallel)
    return fit, left_out


def spread(settings: Sequence[Setting], layouts: Sequence[ParallelConfig]) -> list[Setting]:
    """Each setting on every layout; one that names its layout stays as it is, and its own keeps its name."""
    found = dict[str, Setting]()
    for setting in settings:
        if "@" in setting.name:
            found.setdefault(setting.name, setting)
            continue
        for layout in layouts:
            each = setting if layout == setting.parallel else setting.at(layout)
            found.setdefault(each.name, each)
    return list(found.values())


def _setting(name: str, parallel: ParallelConfig, defined: Mapping[str, str]) -> Setting:
    base, at, layout = name.partition("@")
    if at:
        parallel = _layout(name, layout)
    flags = tuple(shlex.split(defined[base])) if base in defined else _flags(base)
    return Setting(
        name=name,
        parallel=parallel,
        flags=flags,
        is_sarathi=not {"sarathi", "--policy=sarathi"}.isdisjoint(flags),
    )


def _layout(name: str, layout: str) -> ParallelConfig:
    found = _LAYOUT.fullmatch(layout)
    if found is None:
        raise ValueError(
            f"setting {name!r}: layout {layout!r} must be spPtpT, as in {name.split('@')[0]}@sp1tp2"
        )
    return ParallelConfig(sp_size=int(found[1]), tp_size=int(found[2]))


def _flags(base: str) -> tuple[str, ...]:
    """Of a known name. Raises ValueError for any other."""
    policy, _, kind = base.partition("-")
    if policy == "sps2" and kind in ("exact", "csa", "auto"):
        return ("--policy", "sps2", "--attention", kind)
    if policy == "sps2" and kind.removeprefix("csa-") in PRESETS and kind.startswith("csa-"):
        return ("--policy", "sps2", "--attention", "csa", "--csa-setting", kind.removeprefix("csa-"))
    if base == "fcfs":
        return ("--policy", "fcfs", "--attention", "exact")
    if policy in ("sarathi", "fcfs") and re.fullmatch(r"[1-9]\d*", kind):
        return ("--policy", policy, "--attention", "exact", "--max-num-batched-tokens", kind)
    raise ValueError(
        f"setting {base!r} is not known; use {NAMES} (presets: {', '.join(PRESETS)}), or name it by "
        f"'--define {base}=FLAGS of sps2 serve'"
    )
