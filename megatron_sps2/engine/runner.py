"""Runs StepPlans on one rank: embeds, goes through layers, samples. The same code on every rank.

Knows the model and the plan; does not decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_sps2.attention.core import PrefillStep, StepContext
from megatron_sps2.attention.decode import DecodeRow, DecodeStep
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.config import SamplingParams
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.plan import DecodeToken, NewPrompt, PrefillPiece, StepPlan
from megatron_sps2.engine.sampler import PoisonedLogits, SampledToken, decode_sampled, encode_sampled, sample
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.parallel.collectives import Wire, gather_tokens

# A token for each request whose forward the step completed, None where its logits were poisoned.
Tokens = dict[int, SampledToken | None]

# Shorter prompts exchange all heads at once: a message per head chunk would cost more than overlap wins.
OVERLAP_MIN_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave, on every rank alike."""

    tokens: Tokens = field(default_factory=dict)
    # Of a prompt that was prefilled with CSA: the tally of every rank of the replica, [ranks, entries].
    csa: Tensor | None = None


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
class _PausedPrefill:
    step: PrefillStep
    hidden: Tensor
    angles: Tensor


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
    ) -> None:
        self._forward, self._cache, self._context = forward, cache, context
        # Long prompts overlap their exchanges with computing, which the mailbox cannot; the rest is small.
        self._sp, self._small = replace(sp, mailbox=None), sp
        self._overlap, self._device = overlap, torch.device(device)
        self._replica, self._csa, self._tp_rank = replica, csa, tp_rank
        self._scale = forward.model.head_dim**-0.5
        self._sequences: dict[int, _Sequence] = {}
        self._paused: dict[int, _PausedPrefill] = {}

    @property
    def kv_bytes(self) -> int:
        """Bytes of this rank's KV cache, used or not."""
        return self._cache.bytes_per_token * self._cache.config.tokens_per_rank

    @property
    def _row_bytes(self) -> int:
        """The most that one token sends to one rank at a time: K and V, or a partial output and its LSE."""
        model, size = self._forward.model, self._cache.element_size
        row = max(2 * model.num_query_groups, model.num_attention_heads) * model.head_dim * size
        return row + 4 * model.num_attention_heads

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Every rank of the replica calls this with the same plan and gets the same result."""
        for request_id in plan.freed:
            self._cache.free(request_id)
            self._sequences.pop(request_id, None)
            self._paused.pop(request_id, None)
        if plan.prefill:
            with self._sp.ledger.phase("prefill"):
                return self._prefill(plan.prefill)
        if plan.decode:
            with self._sp.ledger.phase("decode"):
                return StepResult(self._decode(plan.decode))
        return StepResult()

    def _prefill(self, piece: PrefillPiece) -> StepResult:
        if piece.prompt:
            self._paused[piece.request_id] = self._start_prefill(piece.request_id, piece.prompt)
        paused = self._paused[piece.request_id]
        self._context.step = paused.step
        paused.hidden = self._layers(piece.first_layer, piece.last_layer, paused.hidden, paused.angles)
        if piece.last_layer < self._forward.num_layers:
            return StepResult()
        del self._paused[piece.request_id]
        layout = paused.step.layout
        home, index = layout.find(layout.num_tokens - 1)
        last = paused.hidden[index : index + 1] if home == self._sp.axis.rank else paused.hidden[:0]
        counts = [int(rank == home) for rank in range(self._sp.axis.size)]
        return StepResult(self._sample([piece.request_id], counts, last), self._gather_tally(paused.step))

    def _gather_tally(self, step: PrefillStep) -> Tensor | None:
        if step.csa is None:
            return None
        mine = step.csa.tally.encode().unsqueeze(0).to(self._device)
        return gather_tokens(mine, self._replica, [1] * self._replica.axis.size, "gather_csa").wait()

    def _start_prefill(self, request_id: int, prompt: NewPrompt) -> _PausedPrefill:
        rank = self._sp.axis.rank
        self._cache.grant(request_id, list(prompt.blocks[rank]))
        num_rows = -(-len(prompt.token_ids) // self._sp.axis.size)
        overlap = self._overlap and len(prompt.token_ids) >= OVERLAP_MIN_TOKENS
        sparse = prompt.strategy in ("csa", "dilated")  # whose messages have no small bound
        step = PrefillStep(
            cache=self._cache,
            wire=self._sp if overlap or sparse else self._small.for_messages(num_rows * self._row_bytes),
            request_id=request_id,
            strategy=prompt.strategy,
            num_tokens=len(prompt.token_ids),
            num_past=prompt.num_past,
            scale=self._scale,
            overlap=overlap,
            setting=self._csa,
            first_kv_head=self._tp_rank * self._cache.num_kv_heads,
        )
        known = self._sequences.get(request_id)
        history = [*(known.token_ids[: prompt.num_past] if known else ()), *prompt.token_ids]
        self._sequences[request_id] = _Sequence(prompt.params, history, len(history))
        places = step.layout.positions(rank)
        ids = [prompt.token_ids[place] for place in places]
        hidden, angles = self._embed(ids, [prompt.num_past + place for place in places])
        return _PausedPrefill(step, hidden, angles)

    def _decode(self, tokens: tuple[DecodeToken, ...]) -> Tokens:
        me = self._sp.axis.rank
        for token in tokens:
            if token.kv_rank == me and token.new_block is not None:
                self._cache.grant(token.request_id, [token.new_block])
        rows = [DecodeRow(token.request_id, token.home, token.kv_rank) for token in tokens]
        wire = self._small.for_messages(len(rows) * self._row_bytes)
        step = DecodeStep(cache=self._cache, wire=wire, rows=rows, scale=self._scale)
        self._context.step = step
        mine = [token for token in tokens if token.home == me]
        hidden, angles = self._embed([token.token_id for token in mine], [token.position for token in mine])
        hidden = self._layers(0, self._forward.num_layers, hidden, angles)
        return self._sample([token.request_id for token in tokens], step.home_counts, hidden)

    def _embed(self, token_ids: list[int], positions: list[int]) -> tuple[Tensor, Tensor]:
        """-> hidden [s/P, 1, h] and the rotary angles of these positions."""
        ids = torch.tensor(token_ids, dtype=torch.int64, device=self._device).unsqueeze(1)
        places = torch.tensor(positions, dtype=torch.int64, device=self._device)
        return self._forward.embed(ids), self._forward.angles(places)

    def _layers(self, first: int, last: int, hidden: Tensor, angles: Tensor) -> Tensor:
        for layer in range(first, last):
            hidden = self._forward.layer(layer, hidden, angles)
        self._context.step = None
        return hidden

    def _sample(self, request_ids: list[int], home_counts: list[int], hidden: Tensor) -> Tokens:
        """hidden [b/P, 1, h] of the requests at home here -> the tokens of all requests, on every rank.

        `request_ids` are sorted by home rank; each is sampled on its home rank only.
        """
        before = sum(home_counts[: self._sp.axis.rank])
        mine = request_ids[before : before + len(hidden)]
        logits = self._forward.logits(hidden)[:, 0] if mine else hidden.new_empty(0)
        sampled = [self._sample_one(request_id, row) for request_id, row in zip(mine, logits, strict=True)]
        num_top = max(self._sequences[request_id].params.logprobs or 0 for request_id in request_ids)
        packed = encode_sampled(sampled, num_top).to(self._device)
        wire = self._small.for_messages(len(request_ids) * packed.shape[1] * packed.element_size())
        tokens = decode_sampled(gather_tokens(packed, wire, home_counts, "gather_sampled").wait())
        for request_id, token in zip(request_ids, tokens, strict=True):
            if token is not None:
                self._sequences[request_id].token_ids.append(token.token_id)
        return dict(zip(request_ids, tokens, strict=True))

    def _sample_one(self, request_id: int, logits: Tensor) -> SampledToken | None:
        sequence = self._sequences[request_id]
        eos = () if sequence.params.ignore_eos else self._forward.model.eos_token_ids
        try:
            return sample(logits, sequence.params, sequence.token_ids, sequence.num_generated, eos)
        except PoisonedLogits:
            return None
