"""First come, first served, whole prompts first: what vLLM did before chunked prefill."""

from __future__ import annotations

from megatron_sps2.engine.policies.choice import Choice, Desk, PolicyConfig
from megatron_sps2.engine.prefill_progress import Prefill


class FcfsPolicy:
    """Waiting prompts are prefilled whole, as many as fit the token budget; decodes run when none waits."""

    chunked = False

    def __init__(self, config: PolicyConfig) -> None:
        self._budget = config.max_num_batched_tokens

    def choose(self, desk: Desk, now: float) -> Choice:
        room, started = self._budget, list[Prefill]()
        for request in list(desk.waiting):
            if started and request.num_new_tokens > room:
                break
            prefill = desk.start(request)
            if prefill is None:
                break
            started.append(prefill)
            room -= prefill.num_left
        if started:
            return Choice(
                prefills=started, stops=[prefill.end for prefill in started], last_layer=desk.num_layers
            )
        return Choice(decode=bool(desk.running))

    def observe(self, choice: Choice, seconds: float) -> None:
        """Time plays no part."""
