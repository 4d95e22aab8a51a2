"""A scheduler on a fake clock, and what its plans would do to the tables and KV caches of all ranks.

Ranks are replayed slot by slot, without a model: each rank must get just the room its tokens need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sps2.attention.strategy import lay_out
from megatron_sps2.config import (
    AttentionConfig,
    CacheConfig,
    ModelConfig,
    ParallelConfig,
    SamplingParams,
    ScheduleConfig,
)
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.plan import DecodeToken, PrefillPiece, StepPlan
from megatron_sps2.engine.request import Request
from megatron_sps2.engine.sampler import SampledToken
from megatron_sps2.engine.scheduler import Scheduler

NUM_LAYERS = 4
BLOCK = 4
VOCAB_SIZE = 50
MODEL = ModelConfig(
    num_layers=NUM_LAYERS,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=2,
    vocab_size=VOCAB_SIZE,
    max_seq_len=1000,
)
Slot = tuple[int, int]  # position, digest of all tokens up to it


@dataclass(slots=True)
class Table:
    """One request on one rank."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0


class Ranks:
    """Block tables and slots of every sp rank, as Runner and KVCache keep them."""

    def __init__(self, num_blocks: int, sp_size: int, unit: int) -> None:
        self.num_blocks, self.sp_size, self.unit = num_blocks, sp_size, unit
        self.tables: list[dict[int, Table]] = [{} for _ in range(sp_size)]
        self.slots: list[dict[int, Slot]] = [{} for _ in range(sp_size)]
        self.host: dict[int, list[list[Slot]]] = {}
        self.known: dict[int, list[int]] = {}
        self.paused: dict[int, int] = {}

    @property
    def num_known(self) -> int:
        """Requests that any rank still knows of."""
        return len({*self.known, *self.host, *self.paused, *(i for tables in self.tables for i in tables)})

    def run(self, plan: StepPlan) -> None:
        for request_id in plan.freed:
            for tables in self.tables:
                tables.pop(request_id, None)
            for forgotten in (self.host, self.known, self.paused):
                forgotten.pop(request_id, None)  # type: ignore[attr-defined]
        for request_id in plan.swapped_out:
            assert request_id not in self.paused, "a paused prefill cannot be swapped"
            self.host[request_id] = [self.read(rank, request_id) for rank in range(self.sp_size)]
            for tables in self.tables:
                tables.pop(request_id, None)
        for request_id, blocks in plan.swapped_in:
            saved = self.host.pop(request_id)
            for rank, slots in enumerate(saved):
                self.grant(rank, request_id, blocks[rank])
                self.write(rank, request_id, slots)
        for piece in plan.pieces:
            self._prefill(piece)
        for token in plan.decode:
            self._decode(token)
        assert [(t.home, t.spread) for t in plan.decode] == sorted((t.home, t.spread) for t in plan.decode)

    def grant(self, rank: int, request_id: int, blocks: Sequence[int]) -> None:
        assert all(0 <= block < self.num_blocks for block in blocks)
        self.tables[rank].setdefault(request_id, Table()).blocks.extend(blocks)

    def read(self, rank: int, request_id: int) -> list[Slot]:
        """Of every token of the request on this rank."""
        table = self.tables[rank].get(request_id, Table())
        return [
            self.slots[rank][table.blocks[i // BLOCK] * BLOCK + i % BLOCK] for i in range(table.num_tokens)
        ]

    def write(self, rank: int, request_id: int, slots: Sequence[Slot]) -> None:
        """Tokens after those that the request has here; blocks must be its own, and as many as needed."""
        table = self.tables[rank].setdefault(request_id, Table())
        others = {b for i, other in self.tables[rank].items() if i != request_id for b in other.blocks}
        for slot in slots:
            block = table.blocks[table.num_tokens // BLOCK]
            assert block not in others, f"block {block} of rank {rank} is written by {request_id} and shared"
            self.slots[rank][block * BLOCK + table.num_tokens % BLOCK] = slot
            table.num_tokens += 1
        assert len(table.blocks) == -(-table.num_tokens // BLOCK), (
            f"request {request_id}, rank {rank}: {table}"
        )
        assert len(table.blocks) == len(set(table.blocks))

    def check_whole(self, request_id: int) -> None:
        """Every token known of the request lies in one slot of one rank."""
        held = sorted(slot for rank in range(self.sp_size) for slot in self.read(rank, request_id))
        assert held == digests(self.known[request_id]), f"request {request_id} attends to other tokens"

    def _prefill(self, piece: PrefillPiece) -> None:
        number = piece.request_id
        assert self.paused.pop(number, 0) == piece.first_layer and number not in self.host
        if piece.first_layer == 0:
            self._begin(piece)
        if piece.last_layer < NUM_LAYERS:
            self.paused[number] = piece.last_layer
        elif piece.stop == len(self.known[number]):
            self.check_whole(number)

    def _begin(self, piece: PrefillPiece) -> None:
        number = piece.request_id
        if piece.prompt:
            past = self.known.get(number, [])[: piece.prompt.num_past]
            assert len(past) == piece.prompt.num_past, "an earlier turn was forgotten"
            self.known[number] = [*past, *piece.prompt.token_ids]
            for rank, blocks in enumerate(piece.prompt.prefix):
                assert number not in self.tables[rank], "a prefix comes first"
                self.grant(rank, number, blocks)
                self.tables[rank][number].num_tokens = len(blocks) * BLOCK
        wanted = digests(self.known[number])[piece.start : piece.stop]
        layout = lay_out(
            piece.strategy,
            *(piece.stop - piece.start, self.sp_size, None),
            unit=self.unit,
            home=piece.home,
            turn=piece.turn,
        )
        held = sorted(slot for rank in range(self.sp_size) for slot in self.read(rank, number))
        assert held == digests(self.known[number])[: piece.start], "what comes before a chunk is not cached"
        assert (piece.strategy == "local") == (piece.home is not None)
        for rank, blocks in enumerate(piece.blocks):
            self.grant(rank, number, blocks)
            self.write(rank, number, [wanted[place] for place in layout.positions(rank)])

    def _decode(self, token: DecodeToken) -> None:
        number = token.request_id
        assert len(self.known[number]) == token.position and number not in self.host
        self.known[number].append(token.token_id)
        if token.new_block is not None:
            self.grant(token.kv_rank, number, [token.new_block])
        self.write(token.kv_rank, number, digests(self.known[number])[-1:])
        self.check_whole(number)
        if not token.spread:
            assert token.home == token.kv_rank
            assert not any(self.read(rank, number) for rank in range(self.sp_size) if rank != token.home)


def digests(token_ids: Sequence[int]) -> list[Slot]:
    found, digest = list[Slot](), 0
    for position, token_id in enumerate(token_ids):
        digest = hash((digest, token_id))
        found.append((position, digest))
    return found


class Desk:
    """A scheduler, its blocks and its ranks, with a model that says tokens of no meaning."""

    def __init__(
        self,
        num_blocks: int = 8,
        sp_size: int = 2,
        *,
        strategy: Any = "auto",
        cost: Callable[[StepPlan], float] = lambda plan: 1.0,
        **schedule: Any,
    ) -> None:
        config = ScheduleConfig(**{"max_num_seqs": 2, **schedule})
        cache = CacheConfig(num_blocks=num_blocks, block_size=BLOCK)
        self.now, self._cost = 0.0, cost
        self.blocks = BlockManager(cache, sp_size, prefix_caching=config.prefix_caching)
        self.scheduler = Scheduler(
            MODEL,
            ParallelConfig(sp_size=sp_size),
            AttentionConfig(strategy=strategy),
            self.blocks,
            config,
            clock=lambda: self.now,
        )
        self.ranks = Ranks(num_blocks, sp_size, BLOCK if config.prefix_caching else 1)
        self.requests: dict[int, Request] = {}

    def add(
        self,
        request_id: int,
        prompt: int | Sequence[int],
        max_tokens: int,
        num_past: int = 0,
        **params: Any,
    ) -> Request:
        """`prompt`: its tokens, or how many, all of another id than those of other requests."""
        ids = (request_id % VOCAB_SIZE,) * prompt if isinstance(prompt, int) else tuple(prompt)
        request = Request(
            request_id=request_id,
            prompt_ids=ids,
            params=SamplingParams(max_tokens=max_tokens, **params),
            num_past=num_past,
            arrived_at=self.now,
        )
        self.scheduler.add(request)
        self.requests[request_id] = request
        return request

    def step(self, keep_cache: bool = False) -> StepPlan:
        """A plan, replayed on the ranks, and what the engine and its user do after it."""
        plan = self.scheduler.schedule()
        self.ranks.run(plan)
        self._compare()
        seconds = self._cost(plan)
        self.now += seconds
        self.scheduler.ran(plan, seconds)
        ended = [piece.request_id for piece in plan.pieces if self._is_through(piece)]
        for request_id in [*ended, *(token.request_id for token in plan.decode)]:
            request = self.requests[request_id]
            request.take(SampledToken((request_id + len(request.output)) % VOCAB_SIZE), ())
            if request_id in ended:
                self.scheduler.prefilled(request)
            if request.finish_reason:
                self.scheduler.release(request, keep_cache)
        assert self.blocks.num_lost_blocks == [0] * self.ranks.sp_size
        return plan

    def run(self, limit: int = 3000) -> list[StepPlan]:
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
            assert len(plans) < limit, "the scheduler is stuck"
        return plans

    def check_empty(self) -> None:
        """Every block came back and no rank knows of any request."""
        assert self.blocks.num_free_blocks == [self.blocks.config.num_blocks] * self.ranks.sp_size
        assert not self.blocks.holders and self.ranks.num_known == 0

    def _is_through(self, piece: PrefillPiece) -> bool:
        return piece.last_layer == NUM_LAYERS and piece.stop == self.requests[piece.request_id].num_tokens

    def _compare(self) -> None:
        """What rank 0 believes of each rank is so."""
        told = {each.request.request_id for each in self.scheduler.prefilling if each.is_new}
        freed = self.scheduler.failed
        for rank, tables in enumerate(self.ranks.tables):
            for number in self.blocks.holders - told:
                table = tables.get(number, Table())
                assert self.blocks.tokens_per_rank(number)[rank] == table.num_tokens
                assert self.blocks.blocks_per_rank(number)[rank] == len(table.blocks)
            strangers = tables.keys() - self.blocks.holders - {each.request_id for each in freed}
            assert not strangers, f"rank {rank} still holds blocks of {strangers}"


def kind(plan: StepPlan) -> str:
    """'p3:0-1' a piece of request 3's prefill, 'd12' a decode of requests 1 and 2, 'p3:0-4 d12' both, '-'."""
    parts = []
    if plan.pieces:
        numbers = ",".join(str(piece.request_id) for piece in plan.pieces)
        parts.append(f"p{numbers}:{plan.pieces[0].first_layer}-{plan.pieces[0].last_layer}")
    if plan.decode:
        parts.append("d" + "".join(str(i) for i in sorted(token.request_id for token in plan.decode)))
    return " ".join(parts) or "-"
