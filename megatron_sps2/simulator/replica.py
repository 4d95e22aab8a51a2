"""One replica on a simulated clock: the engine's loop, with a cost model in the place of its ranks.

The scheduler, the policies and the block manager are the engine's own classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megatron_sps2.config import AttentionConfig, CacheConfig, ModelConfig, ParallelConfig, ScheduleConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.plan import PrefillPiece, StepPlan
from megatron_sps2.engine.request import FinishReason, Request
from megatron_sps2.engine.sampled_token import SampledToken
from megatron_sps2.engine.scheduler import Scheduler
from megatron_sps2.simulator.cost import CostModel

TOKEN = SampledToken(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every replica is built of."""

    model: ModelConfig
    parallel: ParallelConfig  # of the whole world
    schedule: ScheduleConfig
    cache: CacheConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    csa: CsaSetting | None = None


@dataclass(slots=True)
class Busy:
    """Seconds of steps by kind, and what they did."""

    steps: int = 0
    seconds: float = 0.0
    bytes_sent: float = 0.0  # by one rank
    by_kind: dict[str, float] = field(default_factory=dict)


class Replica:
    """Requests come by `submit`; `advance` runs steps until a time."""

    def __init__(
        self, setup: Setup, cost: CostModel, observe: Callable[[StepPlan], None] | None = None
    ) -> None:
        self.now, self.busy = 0.0, Busy()
        self._cost, self._observe = cost, observe
        self.blocks = BlockManager(
            setup.cache, setup.parallel.sp_size, prefix_caching=setup.schedule.prefix_caching
        )
        self.scheduler = Scheduler(
            setup.model,
            replace(setup.parallel, dp_size=1),
            setup.attention,
            self.blocks,
            setup.schedule,
            csa=setup.csa,
            clock=lambda: self.now,
        )
        self._num_layers, self._policy = setup.model.num_layers, setup.schedule.policy
        self._inbox: deque[Request] = deque()
        self._alive: dict[int, Request] = {}

    @property
    def load(self) -> int:
        """Tokens of all requests that are not done, as the front end counts them."""
        alive = (*self._inbox, *self._alive.values())
        return sum(each.num_prompt_tokens + each.params.max_tokens for each in alive)

    def submit(self, request: Request) -> None:
        """It is seen after the step that runs when it comes."""
        self._inbox.append(request)

    def advance(self, until: float) -> None:
        """Runs steps that begin before `until`; a step under way is finished, as a real one is."""
        while self.now < until:
            self._take_inbox()
            if self.scheduler.has_work:
                self._step()
            elif self._inbox:
                self.now = max(self.now, min(until, self._inbox[0].arrived_at))
            else:
                return

    def _take_inbox(self) -> None:
        while self._inbox and self._inbox[0].arrived_at <= self.now:
            request = self._inbox.popleft()
            try:
                self.scheduler.add(request)
            except ValueError as error:
                request.finish_reason, request.error = FinishReason.ERROR, str(error)
                continue
            self._alive[request.request_id] = request

    def _step(self) -> None:
        plan = self.scheduler.schedule()
        moved = plan.freed or plan.swapped_out or plan.swapped_in or self.scheduler.failed
        assert moved or not plan.is_empty, f"policy {self._policy!r} has work at {self.now} s and does none"
        ended = [self._alive[each.request_id] for each in plan.pieces if self._is_through(each)]
        work = self._cost.counter.work(plan, len(ended))
        seconds = self._cost.price(work).total
        self.now += seconds
        self._note(plan, seconds, work.bytes_sent)
        self.scheduler.ran(plan, seconds)
        for request in ended:
            request.take(TOKEN, (), self.now)
            self.scheduler.prefilled(request)
            self._release_if_done(request)
        for token in plan.decode:
            request = self._alive[token.request_id]
            request.take(TOKEN, (), self.now)
            self._release_if_done(request)
        self._drop_failed()

    def _is_through(self, piece: PrefillPiece) -> bool:
        """Whether the prompt's first token comes with it."""
        is_last = piece.stop == self._alive[piece.request_id].num_tokens
        return is_last and piece.last_layer == self._num_layers

    def _release_if_done(self, request: Request) -> None:
        if request.finish_reason is not None:
            self.scheduler.release(request)
            del self._alive[request.request_id]

    def _drop_failed(self) -> None:
        for request in self.scheduler.failed:
            self._alive.pop(request.request_id, None)
        self.scheduler.failed = []

    def _note(self, plan: StepPlan, seconds: float, num_bytes: float) -> None:
        if self._observe:
            self._observe(plan)
        self.busy.steps += not plan.is_empty
        self.busy.seconds += seconds
        self.busy.bytes_sent += num_bytes
        self.busy.by_kind[plan.kind] = self.busy.by_kind.get(plan.kind, 0.0) + seconds
