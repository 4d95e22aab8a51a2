"""StepPlan -> Work, for one model on one rank grid. Knows what runs, not how long it takes.

Projections and MLP by rows, attention by the pairs it computes, bytes by parallel/traffic.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sps2.attention.strategy import LOCAL, lay_out
from megatron_sps2.config import DType, KVCacheDType, ModelConfig, ParallelConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.plan import DecodeToken, PrefillPiece, StepPlan
from megatron_sps2.engine.rank_memory import ELEMENT_SIZE, kv_layer_bytes
from megatron_sps2.parallel.layout import split_heads
from megatron_sps2.parallel.traffic import Traffic
from megatron_sps2.simulator.attended import CsaKeys, causal_pairs
from megatron_sps2.simulator.grid import Grid
from megatron_sps2.simulator.work import Work

# Collectives of a prompt in one layer, all heads at once.
COLLECTIVES = {"ulysses": 4, "pass_kv": 2, "pass_q": 2, "csa": 7, "dilated": 4}
WINDOW_COLLECTIVES = 1
DECODE_COLLECTIVES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """Counts the busiest rank: layouts are level to a token, so it stands for all."""

    model: ModelConfig
    parallel: ParallelConfig
    dtype: DType
    devices_per_node: int
    csa: CsaSetting | None = None
    csa_beyond: float | None = None  # see CsaKeys
    kv_cache_dtype: KVCacheDType = "auto"

    def work(self, plan: StepPlan, num_ended: int | None = None) -> Work:
        """`num_ended`: prompts whose last token is in the plan; None: all that reach the last layer."""
        if plan.is_empty:
            return Work()
        num_layers = plan.pieces[0].last_layer - plan.pieces[0].first_layer if plan.pieces else self._layers
        ends = bool(plan.pieces) and plan.pieces[0].last_layer == self._layers
        if num_ended is None:
            num_ended = len(plan.pieces) if ends else 0
        rows = self._rows(plan)
        layer = self._linear(rows) + Work(layers=1, piece_layers=len(plan.pieces))
        total = layer.times(num_layers) + self._decode(plan.decode) + Work(steps=1)
        for piece in plan.pieces:
            total += self._piece(piece)
        sampled = num_ended + len(plan.decode)
        return total + self._sampling(sampled) if sampled else total

    @property
    def _layers(self) -> int:
        return self.model.num_layers

    @property
    def _size(self) -> int:
        return ELEMENT_SIZE[self.dtype]

    @property
    def _traffic(self) -> Traffic:
        return Traffic(model=self.model, parallel=self.parallel, element_size=self._size)

    @property
    def _grid(self) -> Grid:
        return Grid(parallel=self.parallel, devices_per_node=self.devices_per_node)

    def _rows(self, plan: StepPlan) -> int:
        """Tokens whose projections and MLP the busiest rank computes."""
        rows = [0] * self.parallel.sp_size
        for piece in plan.pieces:
            for rank, count in enumerate(self._tokens_per_rank(piece)):
                rows[rank] += count
        for token in plan.decode:
            rows[token.home] += 1
        return max(rows)

    def _tokens_per_rank(self, piece: PrefillPiece) -> Sequence[int]:
        layout = lay_out(
            piece.strategy,
            piece.stop - piece.start,
            self.parallel.sp_size,
            self.csa,
            home=piece.home,
            turn=piece.turn,
        )
        return layout.tokens_per_rank

    def _linear(self, rows: int) -> Work:
        """One layer's projections and MLP, and the sums over tp that follow them."""
        model, tp_size = self.model, self.parallel.tp_size
        attention = 2 * (model.num_attention_heads + model.num_query_groups) * model.head_dim
        mlp = (2 + model.gated) * model.ffn_hidden_size
        experts = max(1, model.experts_per_token)
        touched = min(model.num_experts, rows * experts) if model.num_experts else 1
        sums = self._traffic.tp_all_reduce(rows * self.parallel.sp_size)
        return Work(
            matmul_flops=2 * rows * (attention + experts * mlp) * model.hidden_size / tp_size,
            weight_bytes=(attention + touched * mlp) * model.hidden_size * self._size / tp_size,
        ) + self._grid.tp_sent(sums, 2)

    def _sampling(self, count: int) -> Work:
        """The last norm's rows to logits, on the ranks where they are; the busiest has its share."""
        rows = -(-count // self.parallel.sp_size)
        weights = self.model.vocab_size * self.model.hidden_size / self.parallel.tp_size
        return Work(
            samples=rows, matmul_flops=2 * rows * weights, weight_bytes=weights * self._size
        ) + self._grid.sp_sent(0, 1)

    # Prompts.

    def _piece(self, piece: PrefillPiece) -> Work:
        """Its attention and what its heads cost on the wire, over its layers."""
        windowed = set(self.model.window_layers)
        layers = range(piece.first_layer, piece.last_layer)
        num_windowed = sum(layer in windowed for layer in layers)
        work = self._attention(piece, None).times(len(layers) - num_windowed)
        if num_windowed:
            work += self._attention(piece, self.model.window).times(num_windowed)
        return work

    def _attention(self, piece: PrefillPiece, window: int | None) -> Work:
        """Of one layer. Two matmuls, of two operations to a pair and dimension."""
        num_tokens = piece.stop - piece.start
        heads, pairs = self.model.num_attention_heads / self.parallel.tp_size, self._pairs(piece, window)
        share = self._busiest_share(piece, window)
        work = Work(attention_flops=4 * pairs * heads * self.model.head_dim * share)
        if self.parallel.sp_size == 1 or piece.strategy == LOCAL:
            return work
        count = COLLECTIVES[piece.strategy] if window is None else WINDOW_COLLECTIVES
        return work + self._grid.exchange(self._bytes(piece, num_tokens, window), count)

    def _pairs(self, piece: PrefillPiece, window: int | None) -> float:
        if window is None and piece.strategy in ("csa", "dilated"):
            return self._csa_keys(piece.stop - piece.start).pairs
        return causal_pairs(piece.start, piece.stop, window)

    def _busiest_share(self, piece: PrefillPiece, window: int | None) -> float:
        sp_size, tp_size = self.parallel.sp_size, self.parallel.tp_size
        if piece.strategy == LOCAL:
            return 1.0
        if window is None and piece.strategy == "ulysses":
            heads = self.model.num_attention_heads // tp_size
            groups = split_heads(heads, self.model.num_query_groups // tp_size, sp_size)
            return max(sum(each.num_queries for each in held) for held in groups) / heads
        return 1 / sp_size

    def _bytes(self, piece: PrefillPiece, num_tokens: int, window: int | None) -> float:
        traffic, sp_size = self._traffic, self.parallel.sp_size
        if window is not None:
            return traffic.windowed(min(num_tokens, window * (2 * sp_size - 1)))
        if piece.strategy in ("csa", "dilated"):
            keys = self._csa_keys(num_tokens)
            row = self.model.num_attention_heads * self.model.head_dim * self._size / self.parallel.tp_size
            return keys.share_sent(sp_size) * traffic.pass_kv(num_tokens) + keys.probe_rows(sp_size) * row
        found: float = getattr(traffic, piece.strategy)(num_tokens)
        return found

    def _csa_keys(self, num_tokens: int) -> CsaKeys:
        assert self.csa is not None, "CSA without its setting"
        return CsaKeys.of(self.csa, num_tokens, self.csa_beyond)

    # Answers.

    def _decode(self, tokens: Sequence[DecodeToken]) -> Work:
        """All layers of a launched step: what the busiest rank reads of its KV, and the queries' trip."""
        if not tokens:
            return Work()
        num_windowed, num_layers = len(self.model.window_layers), self._layers
        spread = [token for token in tokens if token.spread]
        window = self.model.window or 0
        keys = (num_layers - num_windowed) * self._busiest_keys(tokens, None)
        keys += num_windowed * self._busiest_keys(tokens, window) if num_windowed else 0
        row = kv_layer_bytes(self.model, self.parallel.tp_size, self.dtype, self.kv_cache_dtype)
        work = Work(kv_bytes=keys * row, row_layers=num_layers * self._busiest_rows(tokens))
        if spread and self.parallel.sp_size > 1:
            trip = self._grid.sp_sent(self._traffic.decode(len(spread)), DECODE_COLLECTIVES)
            work += trip.times(num_layers)
        return work

    def _busiest_keys(self, tokens: Sequence[DecodeToken], window: int | None) -> float:
        held = [0.0] * self.parallel.sp_size
        everywhere = 0.0
        for token in tokens:
            seen = token.position + 1 if window is None else min(token.position + 1, window)
            if token.spread:
                everywhere += seen / self.parallel.sp_size
            else:
                held[token.home] += seen
        return max(held) + everywhere

    def _busiest_rows(self, tokens: Sequence[DecodeToken]) -> int:
        """Sequences in which a rank has keys to read."""
        local = [0] * self.parallel.sp_size
        for token in tokens:
            if not token.spread:
                local[token.home] += 1
        return max(local) + sum(token.spread for token in tokens)
