"""How many keys a prompt's queries see, exactly, within a window or with CSA. Plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.csa_setting import PROBE_COST, CsaSetting

# Of the keys before sinks and window, the share that an adaptive setting keeps: 2.1% were measured on SmolLM2
# at 8,000 tokens (benchmarks/RESULTS.md), and 3% stand in its table of speeds.
BEYOND_WINDOW = 0.03


def causal_pairs(start: int, stop: int, window: int | None = None) -> float:
    """Pairs of a query at start <= i < stop and a key at or before it, among the last `window` keys."""
    pairs = (stop * (stop + 1) - start * (start + 1)) / 2
    if window is None or stop <= window:
        return pairs
    first = max(start, window)  # from here on a query sees `window` keys
    return causal_pairs(start, first) + (stop - first) * window


@dataclass(frozen=True, slots=True)
class CsaKeys:
    """What a setting keeps of a prompt of `num_tokens`, before any prompt is seen."""

    setting: CsaSetting
    num_tokens: int
    beyond: float  # share kept of the far keys that are no sinks and in no window

    @classmethod
    def of(cls, setting: CsaSetting, num_tokens: int, beyond: float | None = None) -> CsaKeys:
        if beyond is None:
            beyond = BEYOND_WINDOW if setting.is_adaptive else setting.expected_density
            beyond = 1.0 if setting.floor == 1 and setting.floors is None else beyond
        return cls(setting.for_prompt(num_tokens), num_tokens, beyond)

    @property
    def num_segments(self) -> int:
        return -(-self.num_tokens // self.setting.segment_size)

    @property
    def _near(self) -> int:
        return self.setting.num_sinks + self.setting.window

    def kept(self, num_earlier: float) -> float:
        """Keys that a segment keeps of so many before it."""
        near = min(num_earlier, self._near)
        return near + self.beyond * (num_earlier - near)

    @property
    def pairs(self) -> float:
        """Own segments, what is kept of the others, the probes' scores at their price, the tail."""
        size, setting = self.setting.segment_size, self.setting
        total = 0.0
        for segment in range(self.num_segments):
            earlier = segment * size
            queries = min(size, self.num_tokens - earlier)
            total += causal_pairs(0, queries) + queries * self.kept(earlier)
            if setting.selector == "scored":
                total += PROBE_COST * setting.num_probes * earlier
        return total + setting.tail * self.num_tokens

    def share_sent(self, num_ranks: int) -> float:
        """Of what pass_kv sends: only ranks with later segments receive, the union of what these keep.

        Contiguous: to later ranks, half of all. Zigzag: a rank's early segments go to all others, to earlier
        ranks for their late half alone; its late ones to earlier ranks. As if segments chose apart from each
        other: real ones share many of their keys.
        """
        readers = max(1.0, self.num_segments / num_ranks)
        if self.num_segments < 2 * num_ranks:
            return 0.5 * self._union(readers)
        return 0.25 * self._union(readers) + 0.5 * self._union(readers / 2)

    def _union(self, num_readers: float) -> float:
        """The share of a rank's keys that at least one of so many segments keeps."""
        near = num_readers * self._near / max(1.0, self.num_tokens / 2)
        return min(1.0, 1 - (1 - self.beyond) ** num_readers + near)

    def probe_rows(self, num_ranks: int) -> float:
        """Probe queries that a rank sends to earlier ranks: those of all its segments."""
        rows = self.setting.num_probes if self.setting.selector == "scored" else 0
        return self.num_segments / num_ranks * rows * (num_ranks - 1) / 2
