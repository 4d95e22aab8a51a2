"""The theory of a prefill's time: linear work, attention over pairs of tokens, both shared by the ranks.

Three numbers, each from one measured point; every other point is a prediction. Knows no plots and no ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One length on sp ranks: medians over rounds of means over ranks; bytes are per rank and layer."""

    mode: str
    sp: int
    tokens: int
    strategy: str
    ttft_s: float
    attention_s: float
    attention_cpu_s: float
    bytes_sent: float
    bytes_formula: float
    # Share of the causal pairs of a query and a key that are attended to; 1 of exact attention.
    kept: float = 1.0
    # Of CSA's attention by span.
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkModel:
    """Seconds of one rank alone: a per token outside attention, c per token^2 in it, l per token in CSA's."""

    linear_s: float
    pair_s: float
    csa_linear_s: float
    # Ranks beyond these share them.
    cores: int

    def attention(self, tokens: int, sp: int, *, kept: float = 1.0, csa: bool = False) -> float:
        """c kept S^2 / P, with l S / P of CSA: of one of P ranks that have a core each."""
        linear = self.csa_linear_s * tokens if csa else 0.0
        return (linear + self.pair_s * kept * tokens**2) / sp

    def ttft(self, tokens: int, sp: int, *, kept: float = 1.0, csa: bool = False) -> float:
        """a S / P and attention, P at most the cores."""
        workers = min(sp, self.cores)
        return self.linear_s * tokens / workers + self.attention(tokens, workers, kept=kept, csa=csa)


def fit(rows: Sequence[Row], cores: int) -> WorkModel:
    """a and c from the longest exact prompt on the fewest ranks, l from the longest with CSA.

    Raises ValueError where no exact prompt was measured: the theory hangs on one.
    """
    exact = _longest(row for row in rows if row.mode == "exact")
    if exact is None:
        raise ValueError("no exact prompt was measured, and all lines start from one; add exact to --modes")
    workers = min(exact.sp, cores)
    pair_s = exact.attention_s * workers / exact.tokens**2
    csa = _longest(row for row in rows if row.mode == "csa")
    rest = 0.0
    if csa is not None:
        work = csa.attention_s * min(csa.sp, cores)
        rest = max(0.0, work - pair_s * csa.kept * csa.tokens**2) / csa.tokens
    linear_s = max(0.0, exact.ttft_s - exact.attention_s) * workers / exact.tokens
    return WorkModel(linear_s=linear_s, pair_s=pair_s, csa_linear_s=rest, cores=cores)


def kept_pairs(density: float, segment_size: int, tokens: int) -> float:
    """Share of causal pairs: all within a segment, `density` of those with keys of earlier segments."""
    own = min(1.0, segment_size / tokens)
    return own + density * (1 - own)


def why_not(tokens: int, last: tuple[int, float] | None, limit_s: float, segment_size: int = 0) -> str:
    """Why a prompt is left out; empty where it is not. `last`: the length and seconds of the one before.

    The whole of the last time is taken to grow with the square of the length, so it is at most that.
    segment_size is CSA's, 0 of exact attention.
    """
    if tokens <= segment_size:
        return f"one segment of {segment_size} tokens has no far keys"
    seconds = last[1] * (tokens / last[0]) ** 2 if last else 0.0
    if seconds > limit_s:
        return f"would take up to {seconds:.0f} s, and --limit-s is {limit_s:.0f}"
    return ""


def _longest(rows: Iterable[Row]) -> Row | None:
    """On the fewest ranks."""
    return max(rows, key=lambda row: (-row.sp, row.tokens), default=None)
