"""The turns of a comparison -> its results: summaries, ratios to sarathi, agreement. Knows no process.

A setting's rounds are pooled: percentiles are over the requests of all rounds, throughputs over the sum of
their times.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

from megatron_sps2.bench.agreement import agreement
from megatron_sps2.bench.busy import Busy, busy
from megatron_sps2.bench.ratios import PAPER, Measured, ratios_to_bases
from megatron_sps2.bench.record import Record
from megatron_sps2.bench.setting import REFERENCE, Setting
from megatron_sps2.bench.summary import summarize
from megatron_sps2.bench.turns import Turn

# Of a summary: what is counted at one moment, and means nothing over several rounds together.
HIGHEST = ("max_concurrent_requests", "max_output_tokens_per_s")


class Comparison:
    """What was measured, by load and setting."""

    def __init__(
        self, settings: Sequence[Setting], turns: Sequence[Turn], slos: Mapping[str, float] | None = None
    ) -> None:
        """`slos`: limits of goodput, as in summary.py."""
        self.settings = list(settings)
        self.loads = sorted({turn.load for turn in turns}, reverse=True)  # the lightest first
        self._turns, self._slos = turns, slos

    @property
    def bases(self) -> list[str]:
        """The sarathi settings."""
        return [each.name for each in self.settings if each.is_sarathi]

    @property
    def reference(self) -> str | None:
        """The setting whose answers others' are compared with."""
        exact = [each.name for each in self.settings if each.base == REFERENCE]
        return REFERENCE if REFERENCE in exact else next(iter(exact), None)

    def rounds(self, load: float, setting: str) -> list[Turn]:
        """Those that all settings have taken, where the comparison was cut short."""
        here = [turn for turn in self._turns if turn.load == load]
        names = {each.name for each in self.settings}
        done = {turn.round for turn in here if {t.setting for t in here if t.round == turn.round} == names}
        chosen = (turn for turn in here if turn.setting == setting and turn.round in done)
        return sorted(chosen, key=lambda turn: turn.round)

    def records(self, load: float, setting: str) -> list[Record]:
        return list(chain.from_iterable(turn.records for turn in self.rounds(load, setting)))

    def measured(self, load: float, setting: str) -> Measured:
        """Raises nothing where requests failed: their numbers are counted as failed."""
        turns = self.rounds(load, setting)
        each = [self._summary([turn.records]) for turn in turns]
        pooled = self._summary([turn.records for turn in turns], sum(one["duration"] for one in each))
        # Of rounds that did not run at the same time.
        highest = {key: max((one[key] for one in each), default=0) for key in HIGHEST}
        return Measured(pooled={**pooled, **highest}, rounds=each)

    def to_json(self) -> dict[str, Any]:
        """`results`, `ratios_to_sarathi` by load, `paper`."""
        results, found = list[dict[str, Any]](), dict[str, Any]()
        for load in (load for load in self.loads if self.rounds(load, self.settings[0].name)):
            measured = {each.name: self.measured(load, each.name) for each in self.settings}
            found[f"{load:g}"] = ratios_to_bases(measured, self.bases)
            results += [self._result(load, name, one) for name, one in measured.items()]
        return {"results": results, "ratios_to_sarathi": found, "paper": PAPER}

    def _summary(self, rounds: Sequence[Sequence[Record]], duration_s: float | None = None) -> dict[str, Any]:
        """vLLM's numbers, and throughputs of the whole time and of that in which there was such work."""
        found = summarize(list(chain.from_iterable(rounds)), duration_s, self._slos)
        total = sum(map(busy, rounds), Busy())
        return {
            **found,
            "prefill_throughput": found["input_throughput"],
            "decode_throughput": found["output_throughput"],
            "prefill_throughput_busy": total.prefill_throughput,
            "decode_throughput_busy": total.decode_throughput,
        }

    def _result(self, load: float, setting: str, measured: Measured) -> dict[str, Any]:
        return {
            "load": load,
            "setting": setting,
            **measured.pooled,
            "mean_kept_mass": _kept_mass(self.records(load, setting)),
            "agreement": self._agreement(load, setting),
            "by_round": list(measured.rounds),
        }

    def _agreement(self, load: float, setting: str) -> dict[str, Any] | None:
        """With the reference; None for itself, and without one."""
        if self.reference in (None, setting):
            return None
        mine, theirs = self._answers(load, setting), self._answers(load, str(self.reference))
        return {"reference": self.reference, **agreement(mine, theirs).to_json()}

    def _answers(self, load: float, setting: str) -> dict[Hashable, list[str]]:
        return {
            (turn.round, record.index): record.tokens
            for turn in self.rounds(load, setting)
            for record in turn.records
            if record.ok
        }


def _kept_mass(records: Sequence[Record]) -> float | None:
    """Mean share of the probes' attention that CSA kept, of prompts that the server says it of."""
    said = [(record.extras.get("csa") or {}).get("kept_mass") for record in records if record.ok]
    known = [mass for mass in said if mass is not None]
    return fmean(known) if known else None
