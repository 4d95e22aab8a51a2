"""Bytes sent per rank and layer by each strategy, as method.md sections 2, 3 and 5 give them.

Plain arithmetic, the mean over the sp ranks; the ledger holds what was really sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.config import ModelConfig, ParallelConfig

LSE_BYTES = 4  # a partial's log-sum-exp travels in fp32
# The collectives that the formulas speak of, by the names under which the ledger books them.
PREFILL_COLLECTIVES = (
    *("seq_to_heads_k", "seq_to_heads_q", "seq_to_heads_v", "heads_to_seq"),
    *("exchange_k", "exchange_v", "gather_queries", "return_partials", "exchange_window"),
)
# Of CSA and of the paper's variant; CSA's tail goes by gather_queries and return_partials.
CSA_COLLECTIVES = (
    *("csa_probes", "csa_sums", "csa_index", "csa_kept"),
    *("dilated_in", "dilated_out", "gather_queries", "return_partials"),
)
# A recorded decode step gathers rows, with their K and V.
DECODE_COLLECTIVES = ("gather_queries", "gather_rows", "return_partials")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Formulas for one model shape on one rank grid; `element_size` is bytes per element."""

    model: ModelConfig
    parallel: ParallelConfig
    element_size: int

    @property
    def _others(self) -> float:
        """(P-1)/P: the share of the sequence that lies on other ranks."""
        return (self.parallel.sp_size - 1) / self.parallel.sp_size

    def _row(self, num_heads: int) -> float:
        """Bytes of one token's `num_heads` heads on one tp rank."""
        return num_heads * self.model.head_dim * self.element_size / self.parallel.tp_size

    def ulysses(self, num_tokens: int) -> float:
        """(2 n d + 2 n_kv d) (S/T) e (P-1)/P^2: Q and outputs, K and V, each token's heads spread out.

        With fewer KV heads than ranks a KV head is sent to every rank whose queries read it; see
        `layout.split_heads`. The formula counts each once.
        """
        heads = 2 * self.model.num_attention_heads + 2 * self.model.num_query_groups
        return self._row(heads) * num_tokens * self._others / self.parallel.sp_size

    def pass_kv(self, num_tokens: int) -> float:
        """2 n_kv d S e (P-1)/P / T: every rank sends its K and V to all others."""
        return self._row(2 * self.model.num_query_groups) * num_tokens * self._others

    def pass_q(self, num_tokens: int) -> float:
        """2 n d S e (P-1)/P / T + 4 n S (P-1)/P / T: queries out, partial outputs and their LSE back."""
        lse = self.model.num_attention_heads * LSE_BYTES / self.parallel.tp_size
        return (self._row(2 * self.model.num_attention_heads) + lse) * num_tokens * self._others

    def windowed(self, num_halo_tokens: int) -> float:
        """2 n_kv d e H / P / T: K and V of the H tokens that other ranks' segments see; a windowed layer."""
        return self._row(2 * self.model.num_query_groups) * num_halo_tokens / self.parallel.sp_size

    def decode(self, batch_size: int) -> float:
        """2 B n d e (P-1)/P + 4 B n (P-1)/P, over T: the same trip as pass_q, whatever the context length."""
        return self.pass_q(batch_size)

    def recorded_decode(self, rows_per_rank: int) -> float:
        """b (P-1) ((2 n + 2 n_kv) d e + 4 n) / T, b rows a rank: queries, K and V to all, partials back."""
        model, others = self.model, self.parallel.sp_size - 1
        lse = model.num_attention_heads * LSE_BYTES / self.parallel.tp_size
        row = self._row(2 * model.num_attention_heads + 2 * model.num_query_groups)
        return rows_per_rank * others * (row + lse)

    def moved_kv(self, num_tokens: int) -> float:
        """2 n_kv d e a token: K and V of new tokens that are kept away from home (sum over the sp ranks)."""
        return self._row(2 * self.model.num_query_groups) * num_tokens

    def tp_all_reduce(self, num_tokens: int) -> float:
        """4 h (S/P) e (T-1)/T: two ring all-reduces of the hidden states."""
        tp_size = self.parallel.tp_size
        rows = num_tokens / self.parallel.sp_size
        return 4 * self.model.hidden_size * rows * self.element_size * (tp_size - 1) / tp_size
