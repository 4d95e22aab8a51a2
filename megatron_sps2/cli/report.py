"""What a run measured, as a table for people and as JSON for machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_sps2.attention.strategy import lay_out
from megatron_sps2.attention.window import halo_tokens
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.engine.rank_memory import ELEMENT_SIZE
from megatron_sps2.engine.request import Request
from megatron_sps2.engine.start_up import StartUp, in_words, start_up_json
from megatron_sps2.parallel.ledger import Ledger
from megatron_sps2.parallel.traffic import CSA_COLLECTIVES, DECODE_COLLECTIVES, PREFILL_COLLECTIVES, Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One finished request; `ledgers` of all ranks of the replica, tp innermost."""

    request: Request
    text: str
    model: ModelConfig
    parallel: ParallelConfig
    dtype: str
    strategy: str
    kv_tokens_per_rank: list[int]
    ledgers: list[Ledger]
    start_up: list[StartUp]  # of all ranks of the world

    @property
    def ttft_ms(self) -> float:
        return 1e3 * (self.request.token_times[0] - self.request.arrived_at)

    @property
    def tbt_ms(self) -> dict[str, float | None]:
        """Time between tokens; None with fewer than two tokens."""
        gaps = 1e3 * np.diff(self.request.token_times)
        if not len(gaps):
            return {"mean": None, "p50": None, "p99": None}
        p50, p99 = np.percentile(gaps, [50, 99])
        return {"mean": float(gaps.mean()), "p50": float(p50), "p99": float(p99)}

    @property
    def num_decode_steps(self) -> int:
        return max(0, len(self.request.output) - 1)

    def to_json(self) -> dict[str, Any]:
        found = {
            "text": self.text,
            "token_ids": self.request.output_ids,
            "prompt_tokens": self.request.num_prompt_tokens,
            "finish_reason": str(self.request.finish_reason),
            "ttft_ms": self.ttft_ms,
            "tbt_ms": self.tbt_ms,
            "kv_tokens_per_rank": self.kv_tokens_per_rank,
            "start_up": start_up_json(self.start_up),
            "ledger": {"prefill": self.prefill_traffic(), "decode": self.decode_traffic()},
        }
        if self.request.csa is not None:
            found["csa"] = self.request.csa.to_json()
        if self.request.params.logprobs is not None:
            found["logprobs"] = [
                {"token_id": t.token_id, "logprob": t.logprob, "top": dict(t.top_logprobs)}
                for t in self.request.output
            ]
        return found

    def prefill_traffic(self) -> dict[str, Any]:
        """Bytes per rank and layer of the prompt's attention, beside the formula (the mean over ranks).

        CSA's formula is that of the keys it chose to send.
        """
        if self.request.csa is not None:
            formula = self.request.csa.bytes_formula / (self.model.num_layers * len(self.ledgers))
            return {"strategy": self.strategy, **self._compare("prefill", CSA_COLLECTIVES, 1, formula)}
        formula = self._exact_formula(self.request.num_prompt_tokens)
        return {"strategy": self.strategy, **self._compare("prefill", PREFILL_COLLECTIVES, 1, formula)}

    def _exact_formula(self, num_tokens: int) -> float:
        """The mean over layers, of which some may have windows."""
        whole: float = getattr(self._traffic, self.strategy)(num_tokens)
        if self.model.window is None:
            return whole
        layout = lay_out(self.strategy, num_tokens, self.parallel.sp_size, None)
        near = self._traffic.windowed(halo_tokens(layout, self.model.window))
        share = len(self.model.window_layers) / self.model.num_layers
        return (1 - share) * whole + share * near

    def decode_traffic(self) -> dict[str, Any]:
        """The same for one decode step, launched or recorded."""
        recorded = any(ledger.total("decode", "gather_rows") for ledger in self.ledgers)
        formula = self._traffic.recorded_decode(1) if recorded else self._traffic.decode(1)
        return self._compare("decode", DECODE_COLLECTIVES, self.num_decode_steps, formula)

    @property
    def _traffic(self) -> Traffic:
        return Traffic(model=self.model, parallel=self.parallel, element_size=ELEMENT_SIZE[self.dtype])

    def _compare(
        self, phase: str, collectives: tuple[str, ...], num_steps: int, formula: float
    ) -> dict[str, Any]:
        share = self.model.num_layers * max(1, num_steps)
        measured = [ledger.total(phase, *collectives) / share for ledger in self.ledgers]
        return {
            "bytes_per_rank_per_layer": measured,
            "mean_bytes_per_rank_per_layer": sum(measured) / len(measured),
            "formula_bytes_per_rank_per_layer": formula if num_steps else 0.0,
            "bytes_by_collective_per_rank": [ledger.by_collective(phase) for ledger in self.ledgers],
        }


def print_table(report: Report) -> None:
    """The end table of `sps2 generate --report`."""
    table = Table(
        show_header=False,
        title=f"sp {report.parallel.sp_size} x tp {report.parallel.tp_size}, {report.dtype}",
    )
    for name, value in _rows(report):
        table.add_row(name, value)
    Console().print(table)


def _rows(report: Report) -> list[tuple[str, str]]:
    tbt, num_tokens = report.tbt_ms, len(report.request.output)
    prefill, decode = report.prefill_traffic(), report.decode_traffic()
    seconds = report.request.token_times[-1] - report.request.token_times[0]
    prompt_speed = report.request.num_prompt_tokens / report.ttft_ms * 1e3

    def beside(found: dict[str, Any]) -> str:
        measured, formula = found["mean_bytes_per_rank_per_layer"], found["formula_bytes_per_rank_per_layer"]
        return f"{measured:,.0f} B (formula {formula:,.0f} B)"

    csa = report.request.csa
    kept = f"{csa.kept_mass:.2%}" if csa and csa.kept_mass is not None else "not measured"
    sparse = (
        []
        if csa is None
        else [
            (f"CSA ({csa.setting}): attention kept", kept),
            ("CSA: far keys kept", f"{csa.density:.2%}"),
            ("CSA: time", ", ".join(f"{name} {1e3 * s:,.0f} ms" for name, s in csa.seconds.items())),
            ("CSA: sent, and exact would send", f"{csa.bytes_sent:,} B, {csa.bytes_exact:,} B"),
        ]
    )
    return [
        ("loaded in", in_words(report.start_up)),
        ("prompt tokens", f"{report.request.num_prompt_tokens:,}"),
        ("answer tokens", f"{num_tokens:,}, ended by {report.request.finish_reason}"),
        ("TTFT", f"{report.ttft_ms:,.0f} ms ({prompt_speed:,.0f} tokens/s)"),
        ("TBT p50 / p99", f"{tbt['p50']:,.1f} / {tbt['p99']:,.1f} ms" if tbt["p50"] is not None else "-"),
        ("decode tokens/s", f"{(num_tokens - 1) / seconds:,.1f}" if seconds else "-"),
        ("KV tokens held per rank", " + ".join(f"{count:,}" for count in report.kv_tokens_per_rank)),
        (f"prefill sent per rank and layer ({prefill['strategy']})", beside(prefill)),
        ("decode sent per rank, layer and token", beside(decode)),
        *sparse,
    ]
