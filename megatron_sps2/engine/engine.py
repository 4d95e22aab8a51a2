"""One serving replica: rank 0 schedules, every rank runs, rank 0 updates.

`step` is one sentence. Knows requests and plans; tensors stay in the runner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_sps2.config import AttentionMode, ModelConfig, SamplingParams
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.csa_reporter import CsaReporter
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.engine.request import FinishReason, Request, check_request
from megatron_sps2.engine.runner import Runner, StepResult
from megatron_sps2.engine.sampler import SampledToken
from megatron_sps2.engine.scheduler import Scheduler
from megatron_sps2.engine.start_up import StartUp
from megatron_sps2.parallel.collectives import Wire, broadcast_plan, gather_objects
from megatron_sps2.parallel.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Progress:
    """A step's news of one request: a token, how many layers of its prompt are done, or that it failed."""

    request: Request
    has_token: bool
    layers_done: int
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this rank stands in the grid."""

    rank: int  # in the world
    replica: int  # its dp rank
    sp_rank: int
    tp_rank: int


class Engine:
    """The engine of this rank. Rank 0 of the replica calls `step`; all others call `follow`."""

    def __init__(
        self,
        model: ModelConfig,
        runner: Runner,
        scheduler: Scheduler,
        blocks: BlockManager,
        replica: Wire,
        ledger: Ledger,
        *,
        max_model_len: int,
        device: torch.device,
        attention: AttentionMode,
        reporter: CsaReporter,
        place: Place,
    ) -> None:
        self.place = place
        self._attention, self._reporter = attention, reporter
        self.model, self.blocks, self.ledger = model, blocks, ledger
        self.max_model_len = max_model_len
        self._runner, self._scheduler, self._replica, self._device = runner, scheduler, replica, device
        self._requests: dict[int, Request] = {}
        self._next_id = 0
        # Per rank of the replica, since the last audit: blocks held for requests that are not known here.
        self.num_leaked_blocks: list[int] | None = None
        self.last_plan = StepPlan()
        # Of every rank of the world, from build_engine.
        self.start_up: list[StartUp] = []
        # Blocks in this rank's tables after the newest step.
        self.num_used_blocks = 0
        # Told every plan that this rank has run, when it began (time.time()) and how many seconds it took.
        self.observe: Callable[[StepPlan, float, float], None] | None = None

    @property
    def is_leader(self) -> bool:
        """True on the rank that schedules."""
        return self._replica.axis.rank == 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def scheduler(self) -> Scheduler:
        """Who waits and runs, and the counters; to be read only."""
        return self._scheduler

    @property
    def last_strategy(self) -> str:
        """The prefill strategy of the newest prompt."""
        return self._scheduler.last_strategy

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache on this rank, used or not."""
        return self._runner.kv_bytes

    def add_request(
        self, prompt_ids: Sequence[int], params: SamplingParams, attention: AttentionMode | None = None
    ) -> Request:
        """Queues a prompt. Raises ValueError, naming value, rule and fix, for one that cannot be served.

        `attention` None is the engine's default.
        """
        request = Request(
            request_id=self._next_id,
            prompt_ids=tuple(prompt_ids),
            params=params,
            attention=attention or self._attention,
        )
        return self._queue(request)

    def continue_request(
        self, request: Request, prompt_ids: Sequence[int], params: SamplingParams
    ) -> Request:
        """Another turn on a finished request whose cache was kept: `prompt_ids` follow its cached tokens.

        The newest sampled token was never fed, so it is not cached: it must be the first of `prompt_ids`.
        Raises ValueError for a request whose cache is not that of a whole answer, and as add_request does.
        """
        cached = sum(self.blocks.tokens_per_rank(request.request_id))
        if request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH) or not request.output:
            raise ValueError(
                f"request {request.request_id} ended by {request.finish_reason} after {len(request.output)} "
                "tokens; only a finished answer can be continued, add the whole conversation as a new request"
            )
        if cached != request.num_tokens - 1:
            raise ValueError(
                f"request {request.request_id} has {cached} tokens in the cache, not "
                f"{request.num_tokens - 1}; it was released, add the whole conversation as a new request"
            )
        if list(prompt_ids[:1]) != request.output_ids[-1:]:
            raise ValueError(
                f"prompt_ids begin with {list(prompt_ids[:1])}; they must begin with the newest token, "
                f"{request.output_ids[-1]}, which is not cached yet"
            )
        turn = Request(
            request_id=request.request_id, prompt_ids=tuple(prompt_ids), params=params, num_past=cached
        )
        return self._queue(turn)

    def step(self) -> list[Progress]:
        """Schedule, run, update. Raises KVCacheFull when only the release of a finished request helps."""
        plan = self.last_plan = self._scheduler.schedule()
        start = time.perf_counter()
        result = self._run(broadcast_plan(plan, self._replica, self._device))
        self._scheduler.ran(plan, time.perf_counter() - start)
        return self._update(plan, result)

    def follow(self) -> None:
        """Runs rank 0's plans until the last one; for every rank but 0."""
        while True:
            plan: StepPlan = broadcast_plan(None, self._replica, self._device)
            self._run(plan)
            if plan.stop:
                self._runner.forget_recorded()
                return

    def idle(self) -> None:
        """An empty step: tells the other ranks that rank 0 lives, while it waits for a user."""
        self._run(broadcast_plan(StepPlan(), self._replica, self._device))

    def audit(self) -> list[int]:
        """A step that compares what every rank's tables hold with what is known here -> `num_leaked_blocks`.

        Per rank of the replica, tp innermost. What is freed with the next plan counts as leaked: call it when
        `has_work` is False.
        """
        result = self._run(broadcast_plan(StepPlan(audit=True), self._replica, self._device))
        assert result.held_blocks is not None, "an audit without its answer"
        unknown = self.blocks.holders - set(self._requests)
        held, lost = self.blocks.num_held_blocks, self.blocks.num_lost_blocks
        tp_size = len(result.held_blocks) // len(held)
        stray = [
            sum(self.blocks.blocks_per_rank(each)[rank] for each in unknown) for rank in range(len(held))
        ]
        self.num_leaked_blocks = [
            abs(count - held[i // tp_size]) + lost[i // tp_size] + stray[i // tp_size]
            for i, count in enumerate(result.held_blocks)
        ]
        return self.num_leaked_blocks

    def stop(self) -> None:
        """Sends the last plan; the other ranks leave `follow`. Rank 0 only, once."""
        broadcast_plan(StepPlan(stop=True), self._replica, self._device)
        self._runner.forget_recorded()

    def finish(self, request: Request, reason: FinishReason = FinishReason.STOP) -> None:
        """Ends a running request early, e.g. at a stop string; its cache stays until `release`."""
        if request.finish_reason is None:
            request.finish_reason = reason
            self._scheduler.release(request, keep_cache=True)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is and gives back its blocks."""
        known = self._requests.pop(request.request_id, None)
        if known is request and request.finish_reason is not None:
            self._scheduler.release(request)
        else:
            self._scheduler.abort(request.request_id)

    def release(self, request: Request) -> None:
        """Gives back a finished request's blocks; every rank forgets them with the next plan."""
        self._requests.pop(request.request_id, None)
        self._scheduler.release(request)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank of the replica, in rank order (tp innermost). All ranks must call it."""
        return gather_objects(value, self._replica.axis)

    def _run(self, plan: StepPlan) -> StepResult:
        start, before = time.time(), time.perf_counter()
        self.ledger.activity.begin_step()
        result = self._runner.run(plan)
        if self._device.type == "cuda":
            # Policies go by how long a step takes, not by how soon it was launched.
            torch.cuda.synchronize(self._device)
        self.ledger.activity.end_step()
        self.num_used_blocks = self._runner.num_used_blocks
        if self.observe:
            self.observe(plan, start, time.perf_counter() - before)
        return result

    @property
    def ranks(self) -> tuple[int, ...]:
        """World ranks of the replica, tp innermost."""
        return self._replica.axis.ranks

    def _queue(self, request: Request) -> Request:
        check_request(request, self.model, self.max_model_len)
        self._scheduler.add(request)
        self._requests[request.request_id] = request
        self._next_id = max(self._next_id, request.request_id + 1)
        return request

    def _update(self, plan: StepPlan, result: StepResult) -> list[Progress]:
        news, num_layers = [], self.model.num_layers
        for request_id, rows in result.prompt_logprobs.items():
            _take_prompt_logprobs(self._requests[request_id], *rows)
        for request_id, token in result.tokens.items():
            request = self._requests[request_id]
            if request_id in result.csa:
                request.csa = self._reporter.report(request, result.csa[request_id])
            request.take(token, self.model.eos_token_ids)
            news.append(Progress(request, token is not None, num_layers, num_layers))
            if any(piece.request_id == request_id for piece in plan.pieces):
                self._scheduler.prefilled(request)
            elif request.finish_reason is not None:
                self._scheduler.release(request, keep_cache=True)
        for piece in plan.pieces:
            if piece.request_id not in result.tokens:
                news.append(Progress(self._requests[piece.request_id], False, piece.last_layer, num_layers))
        failed, self._scheduler.failed = self._scheduler.failed, []
        return [*news, *(Progress(request, False, 0, num_layers) for request in failed)]


def _take_prompt_logprobs(request: Request, start: int, tokens: Sequence[SampledToken]) -> None:
    """Of the tokens after positions start, start + 1, ...; some may be known from before a preemption."""
    known = request.prompt_logprobs or [None]
    num_known = len(known) - 1 - (start - request.num_past)
    request.prompt_logprobs = [*known, *tokens[num_known:]][: len(request.prompt_ids)]
