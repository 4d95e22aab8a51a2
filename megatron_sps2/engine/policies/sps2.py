"""SPS2: decodes apart from prefills, prefills in pieces of layers, short prompts before young long ones.

Between two pieces of a long prefill a decode step or a batch of short prompts may run (method.md 2d). A short
prompt lives wholly on one rank, so that different ranks prefill different ones at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sps2.engine.policies.choice import Choice, Desk, PolicyConfig, Timing
from megatron_sps2.engine.prefill_progress import Prefill
from megatron_sps2.engine.request import Request

# A prompt may be overtaken by others that come within so many times its own prefill's time.
PATIENCE = 5.0
# Where nothing decodes, a piece takes about so long: what comes meanwhile waits no longer.
IDLE_PIECE_S = 0.05
# Decode steps that a piece takes at most, however many prompts wait: answers keep a fifth of their pace.
MAX_DECODE_STEPS = 4.0


@dataclass(slots=True, eq=False)
class _Group:
    """Prefills that go through the layers together: one on all ranks, or short ones on one rank each."""

    prefills: list[Prefill]
    load: int  # tokens on the busiest rank
    layer_s: float | None = None

    @property
    def next_layer(self) -> int:
        return self.prefills[0].next_layer


class Sps2Policy:
    """The most urgent prefill and the decodes take turns, by the time they take."""

    chunked = False

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        self._timing = Timing()
        self._groups: list[_Group] = []
        self._current: _Group | None = None
        self._decode_is_next = False

    def choose(self, desk: Desk, now: float) -> Choice:
        self._forget_gone(desk)
        if desk.running and self._decode_is_next:
            self._decode_is_next, self._current = False, None
            return Choice(decode=True)
        group = self._most_urgent(desk)
        self._current = group
        if group is None:
            return Choice(decode=bool(desk.running))
        self._decode_is_next = True
        last = min(desk.num_layers, group.next_layer + self._piece(group, desk))
        return Choice(
            prefills=list(group.prefills), stops=[each.end for each in group.prefills], last_layer=last
        )

    def observe(self, choice: Choice, seconds: float) -> None:
        """Learns how long a decode step and a layer of this prefill take."""
        if choice.decode:
            self._timing.observe_decode(seconds)
        elif choice.prefills and self._current:
            num_layers = choice.last_layer - self._first_layer
            self._current.layer_s = seconds / max(1, num_layers)
            self._timing.observe_prefill(seconds, num_layers * self._current.load)

    def _forget_gone(self, desk: Desk) -> None:
        """Drops what was aborted, preempted or is through."""
        alive = set(map(id, desk.prefilling))
        for group in self._groups:
            group.prefills = [prefill for prefill in group.prefills if id(prefill) in alive]
        self._groups = [group for group in self._groups if group.prefills]

    def _due(self, desk: Desk, request: Request, num_tokens: int) -> float:
        """When it begins to come before younger ones that are shorter: short before long, with aging."""
        load = num_tokens if self._is_short(request) else -(-num_tokens // desk.sp_size)
        cost_s = (self._timing.token_layer_s or 0.0) * desk.num_layers * load
        return request.arrived_at + PATIENCE * cost_s

    def _most_urgent(self, desk: Desk) -> _Group | None:
        """A paused group or a new one, what is due first; where that has no room, no later one starts."""
        paused = min(self._groups, key=lambda group: self._group_due(desk, group), default=None)
        waiting = sorted(
            desk.waiting, key=lambda each: (self._due(desk, each, each.num_new_tokens), each.request_id)
        )
        if waiting and (
            paused is None
            or self._due(desk, waiting[0], waiting[0].num_new_tokens) < self._group_due(desk, paused)
        ):
            return self._begin(desk, waiting) or paused
        return paused

    def _group_due(self, desk: Desk, group: _Group) -> float:
        return min(self._due(desk, each.request, each.num_left) for each in group.prefills)

    def _begin(self, desk: Desk, waiting: Sequence[Request]) -> _Group | None:
        """The first waiting prompt, and if it is short, more short ones on the other ranks and beside it."""
        load, prefills = [0] * desk.sp_size, list[Prefill]()
        room = self._room_to_start()
        for request in waiting:
            home = desk.best_home(request, load) if self._is_short(request) else None
            if home is None and self._groups and request.num_new_tokens > room:
                break
            if prefills and (home is None or load[home] + request.num_new_tokens > self._budget):
                break
            prefill = desk.start(request, home)
            if prefill is None:
                break
            prefills.append(prefill)
            if home is None:
                load = [-(-prefill.num_left // desk.sp_size)] * desk.sp_size
                break
            load[home] += prefill.num_left
        if not prefills:
            return None
        group = _Group(prefills, max(load))
        self._groups.append(group)
        return group

    def _room_to_start(self) -> float:
        """Tokens of a long prompt that may begin: what each holds between layers takes memory until its last.

        Short ones are few and small: they need not ask, or they would wait for long ones.
        """
        most = self._config.max_started_tokens
        begun = (prefill for group in self._groups for prefill in group.prefills)
        started = (prefill.num_left for prefill in begun if prefill.request.home is None)
        return math.inf if most is None else most - sum(started)

    @property
    def _budget(self) -> int:
        """Tokens of a batch of short prompts on one rank."""
        return max(self._config.short_prompt_tokens, self._config.max_num_batched_tokens)

    def _is_short(self, request: Request) -> bool:
        return request.num_new_tokens <= self._config.short_prompt_tokens and not request.num_past

    def _piece(self, group: _Group, desk: Desk) -> int:
        """Layers until the decodes' turn, by the time that they may take."""
        self._first_layer = group.next_layer
        if self._config.layers_per_piece is not None:
            return self._config.layers_per_piece
        layer_s = group.layer_s
        if layer_s is None and self._timing.token_layer_s is not None:
            layer_s = self._timing.token_layer_s * group.load
        if layer_s is None:
            return 1
        budget = self._decode_gap(desk) if desk.running else IDLE_PIECE_S
        return max(1, int(budget / max(layer_s, 1e-9)))

    def _decode_gap(self, desk: Desk) -> float:
        """Seconds of prefill that fit between two decode steps.

        Without a target, as many decode steps as prompts wait for each answer that runs: each request has the
        same part in what is done, whether it waits for its first token or for its next.
        """
        decode_s = self._timing.decode_s or 0.0
        if self._config.tbt_slo_ms is None:
            num_prompts = len(desk.waiting) + len(desk.prefilling)
            return decode_s * min(MAX_DECODE_STEPS, max(1.0, num_prompts / len(desk.running)))
        return max(0.0, self._config.tbt_slo_ms / 1e3 - decode_s)

    _first_layer = 0
