"""Which attention and strategy serve a prompt, and how it lays the prompt's tokens out. Plain integers."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sps2.config import AttentionConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.parallel.layout import (
    TokenLayout,
    by_segments,
    contiguous,
    on_one_rank,
    split_heads,
    zigzag,
)

# A prompt that lives on one rank; not for users to choose.
LOCAL = "local"
# Causal work is level when a rank holds an early and a late segment; ulysses levels it by heads instead.
LAYOUTS: dict[str, Callable[[int, int, int], TokenLayout]] = {
    "ulysses": contiguous,
    "pass_kv": zigzag,
    "pass_q": zigzag,
    "dilated": contiguous,
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


def wants_csa(
    mode: str, attention: AttentionConfig, setting: CsaSetting, num_tokens: int, num_past: int
) -> bool:
    """Whether a prompt of num_tokens runs with CSA. The same on any number of ranks.

    A prompt whose sinks and windows are all of its past would keep every key, and is sooner done exactly. One
    that follows a cached context is exact: CSA has no place for it.
    """
    if mode == "exact" or num_past or num_tokens <= setting.for_prompt(num_tokens).whole_tokens:
        return False
    return mode == "csa" or num_tokens >= (attention.csa_min_tokens or setting.break_even_tokens)


def csa_strategy(setting: CsaSetting) -> str:
    return "dilated" if setting.selector == "dilated" else "csa"


def lay_out(
    strategy: str,
    num_tokens: int,
    sp_size: int,
    setting: CsaSetting | None,
    *,
    unit: int = 1,
    home: int | None = None,
    turn: int = 0,
) -> TokenLayout:
    """Where a prompt's tokens lie; `setting` is CSA's, `home` the rank of a prompt that lives on one.

    `turn`: what rank r would hold goes to rank r + turn, as a chunk may have fewer tokens for some ranks.
    Ranks get whole units of `unit` tokens: with a KV block's size, a full block holds neighbouring tokens.
    """
    if home is not None:
        return on_one_rank(num_tokens, sp_size, home)
    if strategy == "csa":
        assert setting is not None, "csa without its setting"
        return by_segments(num_tokens, sp_size, setting.for_prompt(num_tokens).segment_size)
    return LAYOUTS[strategy](num_tokens, sp_size, unit).turned(turn)


def most_uneven(setting: CsaSetting, num_tokens: int, sp_size: int) -> int:
    """Tokens that a rank may hold beyond an even share of a prompt of at most num_tokens.

    CSA lays out whole segments; a prompt of a whole number of them is the most uneven of its kind, but for a
    last one that is nearly empty.
    """
    strategy, found, length = csa_strategy(setting), 0, 0
    while length < num_tokens:
        length = min(length + setting.for_prompt(length).segment_size, num_tokens)
        for tokens in (length, min(length + 1, num_tokens)):
            most = max(lay_out(strategy, tokens, sp_size, setting).tokens_per_rank)
            found = max(found, most - tokens // sp_size)
    return found
