"""Runs StepPlans on one rank: embeds, goes through layers, samples. The same code on every rank.

Knows the model and the plan; does not decide anything.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_sps2.attention.core import BatchStep, PrefillStep, StepContext
from megatron_sps2.attention.decode import DecodeRow, DecodeStep
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.window import Windows
from megatron_sps2.config import SamplingParams
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.decode_graph import DecodeGraphs, Recorder
from megatron_sps2.engine.plan import DecodeToken, NewPrompt, PrefillPiece, StepPlan
from megatron_sps2.engine.sampler import (
    PoisonedLogits,
    SampledToken,
    decode_sampled,
    encode_sampled,
    sample,
    score,
)
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.ops.kernel_set import TORCH, Kernels
from megatron_sps2.parallel.collectives import Wire, gather_tokens

logger = logging.getLogger(__name__)

# A token for each request whose forward the step completed, None where its logits were poisoned.
Tokens = dict[int, SampledToken | None]

# Shorter prompts exchange all heads at once: a message per head chunk would cost more than overlap wins.
OVERLAP_MIN_TOKENS = 1024


# Rows of a prompt whose logits are held at a time, where its own log-probabilities are asked for.
SCORED_ROWS = 64


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, on every rank alike."""

    tokens: Tokens = field(default_factory=dict)
    # Of prompts that were prefilled with CSA: the tally of every rank of the replica, [ranks, entries].
    csa: dict[int, Tensor] = field(default_factory=dict)
    # Where asked for: (start, the prompt tokens after position start, scored by what came before each).
    prompt_logprobs: dict[int, tuple[int, list[SampledToken]]] = field(default_factory=dict)
    # Of an audit: blocks in the tables of every rank of the replica.
    held_blocks: list[int] | None = None


@dataclass(slots=True)
class _Sequence:
    """What sampling needs of a request, on every rank: any of them may be its home."""

    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(slots=True)
class _Part:
    """Rows of this rank that go through the layers with one attention: a prompt's, or the decodes'."""

    step: PrefillStep | DecodeStep
    hidden: Tensor
    angles: Tensor


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request that gets a token in this step: the rank that samples it, and the row there."""

    home: int
    request_id: int
    part: _Part
    row: int


class Runner:
    """This rank's model, cache shard and paused prefills."""

    def __init__(
        self,
        forward: GptForward,
        cache: KVCache,
        context: StepContext,
        sp: Wire,
        *,
        overlap: bool,
        device: torch.device | str,
        replica: Wire,
        csa: CsaSetting | None,
        tp_rank: int,
        unit: int = 1,
        kernels: Kernels = TORCH,
    ) -> None:
        self._forward, self._cache, self._context = forward, cache, context
        # Long prompts overlap their exchanges with computing, which the mailbox cannot; the rest is small.
        self._sp, self._small = replace(sp, mailbox=None), sp
        self._overlap, self._device = overlap, torch.device(device)
        self._replica, self._csa, self._tp_rank = replica, csa, tp_rank
        self.kernels = kernels
        self._unit = unit  # of tokens that stay together on a rank, as the scheduler lays them out
        model = forward.model
        self._scale = model.softmax_scale
        self._windows = Windows(model.window or 0, frozenset(model.window_layers))
        self._sequences: dict[int, _Sequence] = {}
        self._paused: dict[int, _Part] = {}
        self._graphs: DecodeGraphs | None = None

    def warm_up_decode(self, recorder: Recorder, *, max_rows: int, max_tokens: int) -> None:
        """To be called by all ranks of the replica, which wait for each other; then record_decode."""
        assert self.kernels.append_roped is not None
        self._graphs = DecodeGraphs(
            self._forward,
            self._cache,
            self._context,
            self.kernels,
            self._sp,
            max_rows=max_rows,
            max_tokens=max_tokens,
            scale=self._scale,
            windows=self._windows,
            recorder=recorder,
        )

    def record_decode(self) -> None:
        """From now on batches of decodes alone are replayed. Waits for no other rank."""
        assert self._graphs is not None
        self._graphs.record()

    def check_recorded(self) -> str:
        """Where recorded decode steps are off on this rank, else "". All ranks call this."""
        assert self._graphs is not None
        return self._graphs.check()

    def forget_recorded(self) -> None:
        """At the end: NCCL's communicators wait for the graphs that hold their messages."""
        self._graphs = None

    @property
    def kv_bytes(self) -> int:
        """Bytes of this rank's KV cache, used or not."""
        return self._cache.bytes_per_token * self._cache.config.tokens_per_rank

    @property
    def num_used_blocks(self) -> int:
        """Blocks in the tables of all requests on this rank."""
        return self._cache.num_used_blocks

    @property
    def _row_bytes(self) -> int:
        """The most that one token sends to one rank at a time: K and V, or a partial output and its LSE."""
        model, size = self._forward.model, self._cache.element_size
        row = max(2 * model.num_query_groups, model.num_attention_heads) * model.head_dim * size
        return row + 4 * model.num_attention_heads

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Every rank of the replica calls this with the same plan and gets the same result."""
        self._make_room(plan)
        if plan.audit:
            mine = torch.tensor([self._cache.num_used_blocks], device=self._device)
            return StepResult(held_blocks=self._gather_all(mine, "gather_audit").tolist())
        if plan.is_empty:
            return StepResult()
        with self._sp.ledger.phase(plan.kind), self._span(plan.kind, "steps"):
            return self._run_layers(plan)

    def _make_room(self, plan: StepPlan) -> None:
        for request_id in plan.freed:
            self._cache.free(request_id)
            self._sequences.pop(request_id, None)
            self._paused.pop(request_id, None)
        for request_id in plan.swapped_out:
            self._cache.swap_out(request_id)
        for request_id, blocks in plan.swapped_in:
            self._cache.swap_in(request_id, list(blocks[self._sp.axis.rank]))

    def _run_layers(self, plan: StepPlan) -> StepResult:
        """All parts through the same layers, in one pass."""
        graphs = self._graphs if not plan.pieces else None
        if graphs is not None and graphs.fit(token.home for token in plan.decode):
            return self._finish(plan, [self._replay(graphs, plan.decode)])
        num_layers = self._forward.num_layers
        first, last = (
            (plan.pieces[0].first_layer, plan.pieces[0].last_layer) if plan.pieces else (0, num_layers)
        )
        assert not plan.decode or (first, last) == (0, num_layers), "decodes go through all layers at once"
        parts = self._resume(plan.pieces) if first else self._begin(plan)
        steps, rows = [part.step for part in parts], [len(part.hidden) for part in parts]
        self._context.step = steps[0] if len(steps) == 1 else BatchStep(steps, rows)
        hidden, angles = (torch.cat(x) for x in zip(*((p.hidden, p.angles) for p in parts), strict=True))
        for layer in range(first, last):
            self._sp.ledger.activity.layer = layer
            with self._span(f"layer {layer}", "layers"):
                hidden = self._forward.layer(layer, hidden, self._turned_by_megatron(layer, angles))
        self._context.step = None
        for part, mine in zip(parts, hidden.split(rows), strict=True):
            part.hidden = mine
        if last < num_layers:
            self._paused.update(zip((piece.request_id for piece in plan.pieces), parts, strict=False))
            return StepResult()
        return self._finish(plan, parts)

    def _replay(self, graphs: DecodeGraphs, tokens: Sequence[DecodeToken]) -> _Part:
        step = self._decode_step(tokens)
        mine = [token for token in tokens if token.home == self._sp.axis.rank]
        hidden = graphs.run(*_ids_and_positions(mine), step)
        return _Part(step, hidden, hidden.new_empty(0))

    def _resume(self, pieces: Sequence[PrefillPiece]) -> list[_Part]:
        return [self._paused[piece.request_id] for piece in pieces]

    def _begin(self, plan: StepPlan) -> list[_Part]:
        """Rooms and rows of a step that begins at the first layer; all its tokens are embedded at once."""
        steps = list[PrefillStep | DecodeStep]()
        ids, positions, counts = list[int](), list[int](), list[int]()
        for piece in plan.pieces:
            step = self._prefill_step(piece)
            places = [piece.start + place for place in step.layout.positions(self._sp.axis.rank)]
            known = self._sequences[piece.request_id].token_ids
            steps.append(step)
            ids += [known[place] for place in places]
            positions += places
            counts.append(len(places))
        if plan.decode:
            mine = [token for token in plan.decode if token.home == self._sp.axis.rank]
            steps.append(self._decode_step(plan.decode))
            for known, new in zip((ids, positions), _ids_and_positions(mine), strict=True):
                known += new
            counts.append(len(mine))
        hidden, angles = (x.split(counts) for x in self._embed(ids, positions))
        parts = [_Part(*each) for each in zip(steps, hidden, angles, strict=True)]
        if self.kernels.append_roped is not None:
            for part in parts:
                part.step.rotation_of = self._forward.rotations(part.angles, part.hidden.dtype)
        return parts

    def _turned_by_megatron(self, layer: int, angles: Tensor) -> Tensor | None:
        """The angles by which Megatron's layer turns queries and keys: none where the kernels do."""
        return self._forward.angles_of(layer, angles) if self.kernels.append_roped is None else None

    def _prefill_step(self, piece: PrefillPiece) -> PrefillStep:
        rank, num_tokens = self._sp.axis.rank, piece.stop - piece.start
        if piece.prompt:
            self._learn(piece.request_id, piece.prompt)
        self._cache.grant(piece.request_id, list(piece.blocks[rank]))
        num_rows = -(-num_tokens // self._sp.axis.size) + self._unit
        overlap = self._overlap and num_tokens >= OVERLAP_MIN_TOKENS
        sparse = piece.strategy in ("csa", "dilated")  # whose messages have no small bound
        return PrefillStep(
            cache=self._cache,
            wire=self._sp if overlap or sparse else self._small.for_messages(num_rows * self._row_bytes),
            request_id=piece.request_id,
            strategy=piece.strategy,
            num_tokens=num_tokens,
            num_past=piece.start,
            scale=self._scale,
            overlap=overlap,
            setting=self._csa,
            first_kv_head=self._tp_rank * self._cache.num_kv_heads,
            home=piece.home,
            unit=self._unit,
            turn=piece.turn,
            windows=self._windows,
            kernels=self.kernels,
        )

    def _learn(self, request_id: int, prompt: NewPrompt) -> None:
        known = self._sequences.get(request_id)
        history = [*(known.token_ids[: prompt.num_past] if known else ()), *prompt.token_ids]
        self._sequences[request_id] = _Sequence(prompt.params, history, len(history) - prompt.num_generated)
        if prompt.prefix:
            self._cache.adopt(request_id, list(prompt.prefix[self._sp.axis.rank]))

    def _decode_step(self, tokens: Sequence[DecodeToken]) -> DecodeStep:
        for token in tokens:
            if token.kv_rank == self._sp.axis.rank and token.new_block is not None:
                self._cache.grant(token.request_id, [token.new_block])
        rows = [
            DecodeRow(token.request_id, token.home, token.kv_rank, token.spread, token.position)
            for token in tokens
        ]
        wire = self._small.for_messages(len(rows) * self._row_bytes)
        return DecodeStep(
            cache=self._cache,
            wire=wire,
            rows=rows,
            scale=self._scale,
            windows=self._windows,
            kernels=self.kernels,
        )

    def _embed(self, token_ids: list[int], positions: list[int]) -> tuple[Tensor, Tensor]:
        """-> hidden [s/P, 1, h] and the rotary angles of these positions."""
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device).unsqueeze(1)
        places = torch.tensor(positions, dtype=torch.int64, device=self._device)
        return self._forward.embed(ids, places), self._forward.angles(places)

    def _finish(self, plan: StepPlan, parts: Sequence[_Part]) -> StepResult:
        """After the last layer: a token for each request that is through, and what else it asked for."""
        result, asks = StepResult(), list[_Ask]()
        for piece, part in zip(plan.pieces, parts, strict=False):
            self._paused.pop(piece.request_id, None)
            assert isinstance(part.step, PrefillStep)
            sequence = self._sequences[piece.request_id]
            if sequence.params.prompt_logprobs is not None:
                result.prompt_logprobs[piece.request_id] = piece.start, self._score(piece, part, part.step)
            if piece.stop == len(sequence.token_ids):
                home, row = part.step.layout.find(piece.stop - piece.start - 1)
                asks.append(_Ask(home, piece.request_id, part, row))
                if part.step.csa is not None:
                    tally = part.step.csa.tally.encode().unsqueeze(0).to(self._device)
                    result.csa[piece.request_id] = self._gather_all(tally, "gather_csa")
        for i, token in enumerate(plan.decode):
            first = next(j for j, other in enumerate(plan.decode) if other.home == token.home)
            asks.append(_Ask(token.home, token.request_id, parts[-1], i - first))
        result.tokens.update(self._sample(sorted(asks, key=lambda ask: ask.home)))
        return result

    def _gather_all(self, mine: Tensor, name: str) -> Tensor:
        """[1, ...] of each rank of the replica -> [ranks, ...]"""
        return gather_tokens(mine, self._replica, [1] * self._replica.axis.size, name).wait()

    def _span(self, name: str, track: str) -> AbstractContextManager[None]:
        trace = self._sp.ledger.trace
        return trace.span(name, track) if trace else nullcontext()

    def _score(self, piece: PrefillPiece, part: _Part, step: PrefillStep) -> list[SampledToken]:
        """The tokens after positions start <= i < stop of a prompt, as far as they are known."""
        sequence = self._sequences[piece.request_id]
        num_top, ids = sequence.params.prompt_logprobs or 0, sequence.token_ids
        places = [piece.start + place for place in step.layout.positions(self._sp.axis.rank)]
        scored: list[SampledToken | None] = []
        for rows in (slice(i, i + SCORED_ROWS) for i in range(0, len(places), SCORED_ROWS)):
            logits = self._forward.logits(part.hidden[rows])[:, 0]
            scored += [
                score(row, ids[place + 1], num_top) if place + 1 < len(ids) else None
                for row, place in zip(logits, places[rows], strict=True)
            ]
        packed = encode_sampled(scored, num_top).to(self._device)
        counts = step.layout.tokens_per_rank
        found = decode_sampled(gather_tokens(packed, self._sp, counts, "gather_scores").wait())
        order = [place for rank in range(self._sp.axis.size) for place in step.layout.positions(rank)]
        by_place = dict(zip(order, found, strict=True))
        return [token for _, token in sorted(by_place.items()) if token is not None]

    def _sample(self, asks: Sequence[_Ask]) -> Tokens:
        """`asks` sorted by home rank -> the tokens of all of them, on every rank; each is sampled at home."""
        if not asks:
            return {}
        me, ids = self._sp.axis.rank, [ask.request_id for ask in asks]
        counts = [sum(ask.home == rank for ask in asks) for rank in range(self._sp.axis.size)]
        mine = [ask for ask in asks if ask.home == me]
        sampled: list[SampledToken | None] = []
        if mine:
            logits = self._forward.logits(torch.cat([ask.part.hidden[ask.row][None] for ask in mine]))[:, 0]
            logits = logits.cpu()  # sampled there, row by row: one copy for all
            sampled = [self._sample_one(ask.request_id, row) for ask, row in zip(mine, logits, strict=True)]
        num_top = max(self._sequences[request_id].params.logprobs or 0 for request_id in ids)
        packed = encode_sampled(sampled, num_top).to(self._device)
        wire = self._small.for_messages(len(ids) * packed.shape[1] * packed.element_size())
        tokens = decode_sampled(gather_tokens(packed, wire, counts, "gather_sampled").wait())
        for request_id, token in zip(ids, tokens, strict=True):
            if token is not None:
                self._sequences[request_id].token_ids.append(token.token_id)
        return dict(zip(ids, tokens, strict=True))

    def _sample_one(self, request_id: int, logits: Tensor) -> SampledToken | None:
        sequence = self._sequences[request_id]
        eos = () if sequence.params.ignore_eos else self._forward.model.eos_token_ids
        try:
            return sample(logits, sequence.params, sequence.token_ids, sequence.num_generated, eos)
        except PoisonedLogits:
            return None
        except Exception:  # One request's trouble must not end the others'; its client is told.
            logger.exception("request %d could not be sampled", request_id)
            return None


def _ids_and_positions(tokens: Sequence[DecodeToken]) -> tuple[list[int], list[int]]:
    return [token.token_id for token in tokens], [token.position for token in tokens]
