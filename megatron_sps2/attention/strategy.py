"""Which prefill strategy serves a prompt and how it lays the prompt's tokens out. Plain integers."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sps2.parallel.layout import TokenLayout, contiguous, split_heads, zigzag

# Causal work is level when a rank holds an early and a late segment; ulysses levels it by heads instead.
LAYOUTS: dict[str, Callable[[int, int], TokenLayout]] = {
    "ulysses": contiguous,
    "pass_kv": zigzag,
    "pass_q": zigzag,
}


def choose_strategy(wanted: str, *, num_heads: int, num_kv_heads: int, sp_size: int, num_past: int) -> str:
    """'auto' resolved: pass_q onto a cached context, ulysses where KV heads divide evenly, else pass_kv.

    Head counts are those of one tp rank. Raises ValueError for a strategy that cannot run here.
    """
    if wanted == "auto":
        if num_past:
            return "pass_q"
        return "ulysses" if num_kv_heads % sp_size == 0 else "pass_kv"
    if num_past and wanted != "pass_q":
        raise ValueError(f"strategy={wanted!r} cannot prefill onto a cached context; use 'pass_q' or 'auto'")
    if wanted == "ulysses":
        split_heads(num_heads, num_kv_heads, sp_size)
    return wanted
