"""From a trace's lengths to requests with prompts: scaled, clipped, as token ids, all drawn from a seed.

Equal hash ids give equal tokens, so that prefixes are shared as in the trace. Knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_sps2.bench.trace import BLOCK_TOKENS, Planned

# Streams of one seed: blocks by hash id, tokens by place in the trace.
_BLOCKS, _OWN = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadConfig:
    """How a trace becomes a workload."""

    time_scale: float = 1.0  # arrival times are multiplied by it: 2 is half the load
    length_scale: float = 1.0  # of prompts and outputs
    max_model_len: int | None = None  # prompt + output
    vocab_size: int = 1000  # ids are drawn below it
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("time_scale", "length_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and finite")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len} must be at least 2, a token in and one out")
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request to send."""

    index: int
    arrival_s: float
    prompt: list[int]
    num_output_tokens: int


def scaled(planned: Sequence[Planned], config: WorkloadConfig) -> list[Planned]:
    """Times and lengths scaled, then clipped to the model's context; no tokens yet."""
    return [_clipped(_scaled(each, config), config.max_model_len) for each in planned]


def build(
    planned: Sequence[Planned], config: WorkloadConfig, corpus: Sequence[int] | None = None
) -> list[Ask]:
    """`planned`, scaled and clipped, with prompts: slices of `corpus`, or random ids without one."""
    fitted = scaled(planned, config)
    longest = max((each.num_prompt_tokens for each in fitted), default=0)
    source = None if corpus is None else _checked(corpus, longest)
    return [
        Ask(
            index=i,
            arrival_s=each.arrival_s,
            prompt=_prompt(each, i, config, source),
            num_output_tokens=each.num_output_tokens,
        )
        for i, each in enumerate(fitted)
    ]


def num_clipped(planned: Sequence[Planned], config: WorkloadConfig) -> int:
    """Requests that are longer than the model's context."""
    whole = replace(config, max_model_len=None)
    return sum(a != b for a, b in zip(scaled(planned, config), scaled(planned, whole), strict=True))


def _scaled(one: Planned, config: WorkloadConfig) -> Planned:
    return replace(
        one,
        arrival_s=one.arrival_s * config.time_scale,
        num_prompt_tokens=max(1, round(one.num_prompt_tokens * config.length_scale)),
        num_output_tokens=max(1, round(one.num_output_tokens * config.length_scale)),
    )


def _clipped(one: Planned, max_model_len: int | None) -> Planned:
    """The output keeps its length up to half the context; the prompt gives way."""
    if max_model_len is None or one.num_prompt_tokens + one.num_output_tokens <= max_model_len:
        return one
    num_output = min(one.num_output_tokens, max(max_model_len // 2, max_model_len - one.num_prompt_tokens))
    return replace(one, num_prompt_tokens=max_model_len - num_output, num_output_tokens=num_output)


def _checked(corpus: Sequence[int], longest: int) -> np.ndarray:
    if len(corpus) < longest:
        raise ValueError(
            f"the text has {len(corpus)} tokens and the longest prompt {longest}; no prompt may repeat it: "
            "give a longer text"
        )
    return np.asarray(corpus, dtype=np.int64)


def _prompt(one: Planned, index: int, config: WorkloadConfig, corpus: np.ndarray | None) -> list[int]:
    if not one.hash_ids:
        return _draw((config.seed, _OWN, index), one.num_prompt_tokens, config.vocab_size, corpus).tolist()
    if corpus is not None:
        return _cut(one, config, corpus)
    size = int(np.ceil(BLOCK_TOKENS * config.length_scale))
    blocks = [
        _draw((config.seed, _BLOCKS, hash_id), size, config.vocab_size, None)[: end - start]
        for hash_id, start, end in _blocks(one, config)
    ]
    return np.concatenate(blocks)[: one.num_prompt_tokens].tolist()


def _blocks(one: Planned, config: WorkloadConfig) -> Iterator[tuple[int, int, int]]:
    """(hash id, first token, end) of each block that the prompt reaches.

    Scaled by its bounds, so that rounding never makes a block of the trace too long or too short.
    """
    bounds = [round(i * BLOCK_TOKENS * config.length_scale) for i in range(len(one.hash_ids) + 1)]
    for hash_id, start, end in zip(one.hash_ids, bounds, bounds[1:], strict=False):
        if start < one.num_prompt_tokens:
            yield hash_id, start, end


def _cut(one: Planned, config: WorkloadConfig, corpus: np.ndarray) -> list[int]:
    """A prompt that reads on in the text as long as its hash ids count on.

    An id stands for all of the prompt up to its block's end, so the block before an id is always the same one
    and equal ids still have equal tokens.
    """
    pieces, last_id, place = list[np.ndarray](), -2, 0
    for hash_id, start, end in _blocks(one, config):
        if hash_id != last_id + 1:
            place = int(np.random.default_rng((config.seed, _BLOCKS, hash_id)).integers(len(corpus)))
        pieces.append(np.arange(place, place + end - start) % len(corpus))
        last_id, place = hash_id, place + end - start
    return corpus[np.concatenate(pieces)[: one.num_prompt_tokens]].tolist()


def _draw(key: tuple[int, ...], size: int, vocab_size: int, corpus: np.ndarray | None) -> np.ndarray:
    rng = np.random.default_rng(key)
    if corpus is None:
        return rng.integers(vocab_size, size=size)
    start = int(rng.integers(len(corpus)))
    return corpus[(start + np.arange(size)) % len(corpus)]
