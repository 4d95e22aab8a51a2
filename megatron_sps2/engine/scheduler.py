"""Requests and their room -> StepPlans: a policy decides what runs, this makes it a plan.

A request waits, prefills, runs (decodes), and may be sent back or swapped out where blocks run short. Pure
Python on rank 0.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_sps2.config import AttentionConfig, KVCacheFull, ModelConfig, ParallelConfig, ScheduleConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.homes import assign_homes
from megatron_sps2.engine.placement import Placement
from megatron_sps2.engine.plan import DecodeToken, NewPrompt, PrefillPiece, StepPlan
from megatron_sps2.engine.policies import POLICIES, Choice
from megatron_sps2.engine.prefill_progress import Prefill
from megatron_sps2.engine.request import FinishReason, Request
from megatron_sps2.engine.room import Room

# What a resident will still decode weighs on its rank as so many prompt tokens. A prefix that many share
# would otherwise gather all of them where it was first computed.
RESIDENT_TOKENS = 32


@dataclass(slots=True)
class Counters:
    """Since the engine's start; of prefixes, tokens."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_pauses: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Scheduler:
    """Waiting, prefilling, running and swapped requests -> the next plan. What a policy sees is `Desk`."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        attention: AttentionConfig,
        blocks: BlockManager,
        config: ScheduleConfig | None = None,
        *,
        csa: CsaSetting | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config, self._clock, self._blocks = config or ScheduleConfig(), clock, blocks
        unit = blocks.config.block_size if blocks.prefix_caching else 1
        self._placement = Placement(model=model, parallel=parallel, attention=attention, csa=csa, unit=unit)
        self._room = Room(blocks, self._placement, self._config.watermark)
        self._policy = POLICIES[self._config.policy](self._config)
        if self._policy.chunked and not self._placement.takes_context:
            raise ValueError(
                f"strategy={attention.strategy!r} cannot prefill onto a cached context, and policy "
                f"{self._config.policy!r} cuts prompts into chunks; use strategy 'auto' or 'pass_q'"
            )
        self._waiting: list[Request] = []
        self._prefilling: list[Prefill] = []
        self._running: list[Request] = []
        self._swapped: list[Request] = []
        self._choice = Choice()
        self._last_pieces: set[int] = set()  # requests that the plan before held pieces of
        self.failed: list[Request] = []  # that can never get room; whoever reads it empties it
        self.counters = Counters()
        self.last_strategy = ""

    # What a policy sees.

    @property
    def waiting(self) -> Sequence[Request]:
        return self._waiting

    @property
    def prefilling(self) -> Sequence[Prefill]:
        return self._prefilling

    @property
    def running(self) -> Sequence[Request]:
        return self._running

    @property
    def swapped(self) -> Sequence[Request]:
        return self._swapped

    @property
    def num_layers(self) -> int:
        return self._placement.model.num_layers

    @property
    def sp_size(self) -> int:
        return self._placement.sp_size

    @property
    def block_size(self) -> int:
        return self._room.block_size

    def start(self, request: Request, home: int | None = None, *, chunked: bool = False) -> Prefill | None:
        """Gives a waiting request its room, on rank `home` or on all; None where there is none now."""
        busy = len(self._running) + len(self._prefilling)
        if busy >= self._config.max_num_seqs or self._swapped:
            return None
        prefill = self._room.begin(request, home, alone=not busy, chunked=chunked)
        if prefill is None:
            return None
        if self._room.may_share(request):
            self.counters.prefix_queries += request.num_new_tokens
            self.counters.prefix_hits += request.num_cached
        self._waiting.remove(request)
        self._prefilling.append(prefill)
        request.started_at = request.started_at or self._clock()
        return prefill

    def best_home(self, request: Request, load: Sequence[int]) -> int | None:
        """The rank for a request that lives on one: room, then least to compute, `load` included."""
        residents = Counter(each.home for each in self._running)
        residents.update(prefill.request.home for prefill in self._prefilling)
        return self._room.best_home(
            request, [tokens + RESIDENT_TOKENS * residents[rank] for rank, tokens in enumerate(load)]
        )

    # Requests come and go.

    @property
    def has_work(self) -> bool:
        """True while a plan would do something, freeing blocks included."""
        queues = (self._waiting, self._prefilling, self._running, self._swapped)
        return any(queues) or self._room.has_freed

    def exact_strategy(self, request: Request) -> str:
        """The strategy that serves the prompt where it runs exactly."""
        return self._placement.exact_strategy(request.num_past)

    def add(self, request: Request) -> None:
        """Raises ValueError for a request that fits not even an empty cache, or not the chosen strategy."""
        if request.attention != "exact" and self._placement.csa is None:
            raise ValueError(
                f"attention={request.attention!r} on an engine without CSA; build it with a setting "
                "(EngineConfig.csa, --attention auto)"
            )
        if request.attention != "exact" and self._policy.chunked:
            raise ValueError(
                f"attention={request.attention!r} needs whole prompts and policy {self._config.policy!r} "
                "cuts them into chunks; use attention='exact', or --policy sps2 or fcfs"
            )
        needed = self._room.most_blocks(request, chunked=self._policy.chunked)
        num_blocks = self._blocks.config.num_blocks
        if needed > num_blocks:
            raise ValueError(
                f"the request may grow to {needed} KV blocks of {self.block_size} tokens on an sp rank, and "
                f"each has {num_blocks}; raise --max-model-len or --sp, or lower --max-tokens"
            )
        self._queue(request)

    def abort(self, request_id: int) -> None:
        """Ends a request wherever it is; its blocks go with the next plan."""
        prefilling = [prefill.request for prefill in self._prefilling]
        for request in [*self._waiting, *prefilling, *self._running, *self._swapped]:
            if request.request_id == request_id:
                request.finish_reason = FinishReason.ABORT
                self.release(request)

    def release(self, request: Request, keep_cache: bool = False) -> None:
        """Forgets a finished request; its blocks go back unless the cache is kept, e.g. for another turn."""
        self._remove(request)
        if not keep_cache:
            self._room.free(request.request_id)

    def prefilled(self, request: Request) -> None:
        """The prompt's last layer has run and its first token was taken."""
        (prefill,) = [each for each in self._prefilling if each.request is request]
        self._prefilling.remove(prefill)
        if request.finish_reason is not FinishReason.ERROR:
            self._room.publish(prefill)
        if request.finish_reason is None:
            insort(self._running, request, key=_arrival)
        else:
            self.release(request, keep_cache=True)

    # A step.

    def schedule(self) -> StepPlan:
        """The next step.

        Raises KVCacheFull, and changes nothing, when nothing runs and the next prompt has no room beside the
        caches kept of finished requests: only releasing one of them helps.
        """
        self._resume_swapped()
        choice = self._choice = self._policy.choose(self, self._clock())
        decode = self._decode_batch() if choice.decode else ()
        pieces = self._pieces(choice, decodes_run=bool(decode))
        self._count_pauses({piece.request_id for piece in pieces})
        orders = self._room.take_orders()
        plan = StepPlan(
            pieces=pieces,
            decode=decode,
            freed=tuple(orders.freed),
            swapped_out=tuple(orders.swapped_out),
            swapped_in=tuple(orders.swapped_in),
        )
        if plan.is_empty and not (orders.freed or self._running or self._prefilling) and self.has_work:
            self._give_up_one()
        self.counters.num_steps += not plan.is_empty
        return plan

    def ran(self, plan: StepPlan, seconds: float) -> None:
        """The plan of the last `schedule` has run; before its tokens are handed out."""
        if not plan.is_empty:
            self._policy.observe(self._choice, seconds)
        advanced = {piece.request_id: piece for piece in plan.pieces}
        for prefill in self._prefilling:
            piece = advanced.get(prefill.request.request_id)
            if piece is None:
                continue
            prefill.next_layer = piece.last_layer
            if piece.last_layer == self.num_layers:
                prefill.start, prefill.stop, prefill.next_layer = piece.stop, None, 0

    def _queue(self, request: Request) -> None:
        insort(self._waiting, request, key=_arrival)

    def _remove(self, request: Request) -> None:
        for requests in (self._waiting, self._running, self._swapped):
            if request in requests:
                requests.remove(request)
        self._prefilling = [prefill for prefill in self._prefilling if prefill.request is not request]

    def _pieces(self, choice: Choice, decodes_run: bool) -> tuple[PrefillPiece, ...]:
        """Of the chosen prefills that have room. One without waits as long as others run."""
        others_run = decodes_run
        for prefill, stop in zip(choice.prefills, choice.stops, strict=True):
            if prefill in self._prefilling:
                if prefill.stop is None:
                    self._next_chunk(prefill, stop, others_run)
                others_run = others_run or prefill.stop is not None
        ready = [each for each in choice.prefills if each in self._prefilling and each.stop is not None]
        return tuple(self._piece(prefill, choice.last_layer) for prefill in ready)

    def _piece(self, prefill: Prefill, last_layer: int) -> PrefillPiece:
        assert prefill.stop is not None, "a piece without its chunk"
        piece = PrefillPiece(
            request_id=prefill.request.request_id,
            start=prefill.start,
            stop=prefill.stop,
            first_layer=prefill.next_layer,
            last_layer=last_layer,
            strategy=prefill.strategy,
            home=prefill.request.home,
            turn=prefill.turn,
            blocks=prefill.granted,
            prompt=_new_prompt(prefill) if prefill.is_new else None,
        )
        self.last_strategy = prefill.strategy
        prefill.is_new, prefill.granted = False, ()
        return piece

    def _decode_batch(self) -> tuple[DecodeToken, ...]:
        kept: dict[int, tuple[int, int | None]] = {}

        def take(request: Request) -> None:
            kept[request.request_id] = self._room.append(request)

        for request in list(self._running):
            if request in self._running:  # not sent back for an older one
                self._make_room(request, lambda each=request: take(each))  # type: ignore[misc]
        return self._decode_tokens([(request, *kept[request.request_id]) for request in self._running])

    def _decode_tokens(self, kept: list[tuple[Request, int, int | None]]) -> tuple[DecodeToken, ...]:
        local = [self._room.is_local(request) for request, *_ in kept]
        homes = assign_homes([rank for _, rank, _ in kept], self.sp_size, local)
        tokens = [
            DecodeToken(
                request_id=request.request_id,
                token_id=request.output[-1].token_id,
                position=request.num_tokens - 1,
                home=home,
                kv_rank=rank,
                new_block=block,
                spread=not is_local,
            )
            for (request, rank, block), home, is_local in zip(kept, homes, local, strict=True)
        ]
        return tuple(sorted(tokens, key=lambda token: (token.home, token.spread)))

    def _count_pauses(self, now: set[int]) -> None:
        """A prefill pauses when it is between two layers, ran in the plan before and does not in this one."""
        for prefill in self._prefilling:
            number = prefill.request.request_id
            if prefill.next_layer and number in self._last_pieces and number not in now:
                prefill.request.num_pauses += 1
                self.counters.num_pauses += 1
        self._last_pieces = now

    # Who must make room.

    def _next_chunk(self, prefill: Prefill, stop: int, others_run: bool) -> None:
        """Room for the next tokens of a prefill; where there is none it waits while others run on."""
        try:
            self._room.extend(prefill, stop)
        except KVCacheFull:
            if not others_run:
                self._make_room(prefill.request, lambda: self._room.extend(prefill, stop))

    def _make_room(self, request: Request, take: Callable[[], None]) -> None:
        """`take()`, sending the youngest requests back while it raises KVCacheFull; it may be `request`."""
        while True:
            try:
                return take()
            except KVCacheFull as error:
                victim = max(self._victims(), key=_arrival, default=None)
                is_alone = len(self._running) + len(self._prefilling) == 1
                if victim is None or (victim is request and is_alone):
                    return self._fail(request, str(error))
                self._preempt(victim)
                if victim is request:
                    return None

    def _victims(self) -> list[Request]:
        """Who may be sent back: not a paused prefill whose context cannot be computed again."""
        prefilling = [prefill.request for prefill in self._prefilling]
        return [*self._running, *(request for request in prefilling if not request.num_past)]

    def _preempt(self, victim: Request) -> None:
        """Takes a request's blocks: they are swapped out, or computed again when its turn comes."""
        was_running, is_news = victim in self._running, True
        self._remove(victim)
        if was_running and (self._config.preemption == "swap" or _is_unrepeatable(victim)):
            is_news = self._room.swap_out(victim.request_id)
            insort(self._swapped, victim, key=_arrival)
        else:
            self._room.free(victim.request_id)
            self._queue(victim)
        victim.num_preemptions += is_news
        self.counters.num_preemptions += is_news

    def _resume_swapped(self) -> None:
        """Brings the oldest swapped requests back while there is room."""
        while self._swapped:
            request, alone = self._swapped[0], not (self._running or self._prefilling)
            if not self._room.swap_in(request.request_id, alone=alone):
                return
            self._swapped.remove(request)
            insort(self._running, request, key=_arrival)

    def _fail(self, request: Request, error: str) -> None:
        """Nobody else is left to make room."""
        request.finish_reason, request.error = FinishReason.ERROR, error
        self.failed.append(request)
        self.release(request)

    def _give_up_one(self) -> None:
        """Nothing runs and the next request has no room: because of kept caches, or for ever."""
        request = (self._swapped or self._waiting)[0]
        blocks = self._room.blocks_needed(request)
        needed = f"request {request.request_id} needs {blocks} KV blocks on an sp rank"
        queued = {each.request_id for each in (*self._swapped, *self._waiting)}
        finished = sorted(self._blocks.holders - queued)
        if finished:
            raise KVCacheFull(f"{needed} and finished requests keep the cache; release one of {finished}")
        self._fail(
            request, f"{needed}, more than can be had; raise --max-model-len or wait for other requests"
        )


def _arrival(request: Request) -> tuple[float, int]:
    return request.arrived_at, request.request_id


def _is_unrepeatable(request: Request) -> bool:
    """Whether its KV would not be the same if it was computed again: CSA takes an answer for a prompt."""
    return request.num_past > 0 or request.csa is not None


def _new_prompt(prefill: Prefill) -> NewPrompt:
    request = prefill.request
    return NewPrompt(
        token_ids=request.token_ids,
        params=request.params,
        num_past=request.num_past,
        num_generated=len(request.output),
        prefix=prefill.prefix,
    )
