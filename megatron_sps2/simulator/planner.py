"""Which ranks, attention and policy serve a workload: every option simulated, one chosen, and why.

Knows no printing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_sps2.config import ModelConfig, ParallelConfig, divisors
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.deployment import Deployment
from megatron_sps2.simulator.setting import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Milliseconds that the 99th percentiles should not exceed; None: none."""

    ttft_ms: float | None = None
    tbt_ms: float | None = None

    def missed(self, result: dict[str, Any]) -> list[str]:
        found = []
        for name, limit in (("ttft_ms", self.ttft_ms), ("tbt_ms", self.tbt_ms)):
            value, label = result[name].get("p99"), f"{name.removesuffix('_ms').upper()} p99"
            if limit is not None and value is None:
                found.append(f"{label} is not known: no request has one")
            elif limit is not None and value > limit:
                found.append(f"{label} {value:,.0f} ms is above {limit:,.0f}")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One option: `result` is a summary of its run, None where it does not fit."""

    option: Deployment
    result: dict[str, Any] | None
    missed: Sequence[str] = ()
    why_not: str = ""  # "" for the chosen one

    @property
    def name(self) -> str:
        return name_of(self.option)

    @property
    def rank(self) -> tuple[int, bool, float]:
        """Least is best: all served, within the targets, then by the mean time of a whole answer."""
        assert self.result is not None, "what does not fit has no rank"
        mean = self.result["e2e_ms"].get("mean", float("inf"))
        return self.result["failed"], bool(self.missed), mean

    def to_json(self) -> dict[str, Any]:
        option, memory = self.option, self.option.memory
        return {
            "name": self.name,
            "tp": option.parallel.tp_size,
            "sp": option.parallel.sp_size,
            "dp": option.parallel.dp_size,
            "setting": option.setting.name,
            "attention": option.setting.attention,
            "policy": option.setting.policy,
            "memory_per_rank": {
                "usable": memory.usable,
                "weights": memory.weights,
                "activations": memory.activations,
                "kv_of_longest": memory.kv_needed,
                "kv_tokens": max(0, memory.kv_room) // memory.kv_per_token,
            },
            "fits": memory.fits,
            "predicted": self.result,
            "why_not": self.why_not,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The choice first, then the others, best first; those that do not fit last."""

    verdicts: Sequence[Verdict]

    @property
    def chosen(self) -> Verdict:
        return self.verdicts[0]

    def to_json(self) -> dict[str, Any]:
        profile = self.chosen.option.profile
        return {
            "profile": profile.name,
            "profile_source": profile.source,
            "longest": self.chosen.option.longest,
            "choice": self.chosen.to_json(),
            "why": why(self),
            "others": [each.to_json() for each in self.verdicts[1:]],
        }


def name_of(option: Deployment) -> str:
    grid = option.parallel
    return f"tp {grid.tp_size} sp {grid.sp_size} dp {grid.dp_size} {option.setting.name}"


def grids(model: ModelConfig, num_devices: int, per_node: int) -> Iterator[ParallelConfig]:
    """Every grid of all devices whose tp groups stay inside a node; sp by doubling."""
    for tp_size in divisors(model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size):
        if tp_size > per_node or per_node % tp_size:
            continue
        sp_size = 1
        while sp_size * tp_size <= num_devices:
            if num_devices % (sp_size * tp_size) == 0:
                dp_size = num_devices // (sp_size * tp_size)
                yield ParallelConfig(dp_size=dp_size, sp_size=sp_size, tp_size=tp_size)
            sp_size *= 2


def choose(
    base: Deployment,
    settings: Sequence[Setting],
    num_devices: int,
    planned: Sequence[Arrival],
    targets: Targets,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """`base` says all but grid and setting. Raises ValueError where nothing fits."""
    tried = []
    for parallel in grids(base.model, num_devices, base.profile.devices_per_node):
        for setting in settings:
            option = replace(base, parallel=parallel, setting=setting)
            tell(name_of(option))
            tried.append(_try(option, planned, targets))
    able = sorted((each for each in tried if each.result is not None), key=lambda each: each.rank)
    unable = [each for each in tried if each.result is None]
    if not able:
        closest = min(unable, key=lambda each: each.option.memory.kv_needed - each.option.memory.kv_room)
        raise ValueError(
            f"{base.longest:,} tokens fit no layout of {num_devices} devices; the closest, {closest.name}, "
            f"needs {closest.option.memory}; use more nodes, or a smaller --longest"
        )
    best, others = able[0], able[1:]
    assert best.result is not None, "sorted by it"
    if not best.result["completed"]:
        raise ValueError(
            f"none of {len(planned)} requests was served by any of {len(able)} options; prompt and answer "
            "must fit the KV cache: use more nodes, or a smaller --longest"
        )
    explained = [replace(each, why_not=_why_not(each, best)) for each in others]
    return Plan(verdicts=[best, *explained, *unable])


def why(plan: Plan) -> str:
    """One sentence on the choice."""
    best, result = plan.chosen, plan.chosen.result
    assert result is not None, "a choice that was not run"
    text = f"{best.name}: the shortest mean response time, {result['e2e_ms']['mean']:,.0f} ms, of "
    text += f"{_company(plan)}; a rank needs {best.option.memory}"
    if failed := result["failed"]:
        text += f"; but {failed} of {failed + result['completed']} requests failed, and no option serves more"
    if best.missed:
        text += f"; but no option meets the targets: {', '.join(best.missed)}"
    if best.option.setting.attention == "csa":
        exact = [e for e in plan.verdicts[1:] if e.result and e.option.setting.attention == "exact"]
        if exact:
            text += f"; CSA approximates: the best exact option is {exact[0].name}, {exact[0].why_not}"
    return text


def _company(plan: Plan) -> str:
    """Those that the choice is the best of: as good as it is by failures and targets."""
    alike = [each for each in plan.verdicts if each.result and each.rank[:2] == plan.chosen.rank[:2]]
    rule = "fit" if plan.chosen.missed else "fit and meet the targets"
    return f"the {len(alike)} of {len(plan.verdicts)} options that {rule}"


def _try(option: Deployment, planned: Sequence[Arrival], targets: Targets) -> Verdict:
    if not option.memory.fits:
        return Verdict(option=option, result=None, why_not=f"does not fit: needs {option.memory} on a rank")
    result = option.run(planned).to_json()
    return Verdict(option=option, result=result, missed=targets.missed(result))


def _why_not(other: Verdict, best: Verdict) -> str:
    """What is worse about it, as ratios to the choice."""
    assert other.result is not None and best.result is not None
    ratios = []
    for name, label in (("e2e_ms", "response time"), ("ttft_ms", "TTFT"), ("tbt_ms", "TBT")):
        mine, its = best.result[name].get("mean", 0.0), other.result[name].get("mean", 0.0)
        if mine > 0:
            ratios.append(f"{label} {its / mine:.2f}x")
    failed = [f"{other.result['failed']} requests failed"] if other.result["failed"] else []
    return "; ".join([*failed, *other.missed, ", ".join(ratios)])
