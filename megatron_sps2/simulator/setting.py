"""A policy and an attention under one name, such as sps2-csa or sarathi-512. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.config import BATCHED_TOKENS, AttentionMode, PolicyName, ScheduleConfig

EXAMPLES = ("sps2-exact", "sps2-csa", "sarathi-512", "fcfs")
# What `sps2 serve` does where nothing is said.
SHORT_PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is compared on one layout."""

    name: str
    policy: PolicyName
    chunk: int  # tokens of a step: sarathi's chunk
    attention: AttentionMode = "exact"

    @classmethod
    def parse(cls, name: str) -> Setting:
        """Raises ValueError for a name that means nothing."""
        policy, _, rest = name.partition("-")
        if policy == "sps2" and rest in ("exact", "csa", "auto", ""):
            modes: dict[str, AttentionMode] = {"csa": "csa", "auto": "auto"}
            return cls(
                name=name, policy="sps2", chunk=BATCHED_TOKENS["sps2"], attention=modes.get(rest, "exact")
            )
        if policy == "sarathi" and rest.isdecimal() and int(rest) > 0:
            return cls(name=name, policy="sarathi", chunk=int(rest))
        if name == "fcfs":
            return cls(name=name, policy="fcfs", chunk=BATCHED_TOKENS["fcfs"])
        raise ValueError(
            f"setting {name!r} is not known; use names such as {', '.join(EXAMPLES)}, the number being "
            "sarathi's chunk"
        )

    def schedule(self, max_num_seqs: int, tbt_slo_ms: float | None = None) -> ScheduleConfig:
        """`tbt_slo_ms` is what sps2 aims for; the others know no aim."""
        return ScheduleConfig(
            policy=self.policy,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(self.chunk, max_num_seqs + 1)
            if self.policy == "sarathi"
            else self.chunk,
            short_prompt_tokens=SHORT_PROMPT_TOKENS,
            tbt_slo_ms=tbt_slo_ms if self.policy == "sps2" else None,
            prefix_caching=True,
        )
