"""One request's logits to one token: penalties, filters, a stateless draw, log-probabilities.

Works on the CPU in float64. Equal logits give equal tokens everywhere. Logits that differ by rounding
(another tp or sp, bf16) nearly always do: the noise belongs to (seed, position, token id), so a token changes
only if the two best scores, or a filter's boundary, are as close as that rounding. Knows no rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_sps2.config import SamplingParams
from megatron_sps2.engine.sampled_token import SampledToken

Logits = NDArray[np.float32]
# Tokens below this share of the likeliest one are sorted only when the nucleus of top-p reaches into them.
TAIL_WEIGHT = 1e-4


class PoisonedLogits(RuntimeError):
    """No token can be chosen from a request's logits; other requests of the batch are unharmed."""


def sample(
    logits: Tensor,
    params: SamplingParams,
    history: Sequence[int],
    num_generated: int,
    eos_token_ids: Sequence[int],
) -> SampledToken:
    """Logits [v] (no padding of the vocabulary) -> the next token of one request.

    `history` is prompt and output so far, `num_generated` the length of that output. Order: repetition
    penalty, min_tokens, temperature, top-k, top-p, min-p, draw. Equal arguments give equal tokens; logits
    that differ by rounding nearly always do.
    Raises PoisonedLogits, also where min_tokens forbids every possible token.
    """
    raw = logits.detach().to("cpu", torch.float32).numpy()
    assert raw.ndim == 1, f"logits of one request are [v], not {raw.shape}"
    _check_finite(raw)
    shaped = _penalise(raw, params, history)
    if num_generated < params.min_tokens:
        shaped = _forbid(shaped, (*eos_token_ids, *params.stop_token_ids), params)
    # numpy's argmax promises the first of equals, torch's does not
    token_id = _draw(shaped, params, num_generated) if params.temperature else int(np.argmax(shaped))
    return _with_logprobs(token_id, raw, params.logprobs)


def score(logits: Tensor, token_id: int, num_top: int) -> SampledToken:
    """Logits [v] where `token_id` came next: its log-probability and the `num_top` likeliest."""
    return _with_logprobs(token_id, logits.detach().to("cpu", torch.float32).numpy(), num_top)


def uniforms(seed: int, position: int, ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """Numbers in (0, 1), each of (seed, position, its id) alone: nothing to carry, nothing to restore.

    SplitMix64, whose state after n steps is key + n * odd constant, read at n = id.
    """
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    x = ids.astype(np.uint64)  # a copy; in place from here, as fresh pages cost more than the arithmetic
    x *= np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(int.from_bytes(digest, "big"))
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return _open_unit(x)


def _open_unit(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """52 of the 64 bits and a half: exact in float64, so neither 0 nor 1 can come of rounding."""
    unit = (bits >> np.uint64(12)).astype(np.float64)
    unit += 0.5
    unit *= 2.0**-52
    return unit


def _check_finite(raw: Logits) -> None:
    top = float(raw.max())  # NaN wins every max, so one pass finds all three
    if not math.isfinite(top):
        num_nan = int(np.isnan(raw).sum())
        raise PoisonedLogits(f"logits are not usable: largest is {top}, {num_nan} of {raw.size} are NaN")


def _penalise(raw: Logits, params: SamplingParams, history: Sequence[int]) -> Logits:
    if params.repetition_penalty == 1.0 or len(history) == 0:
        return raw
    ids, largest = np.asarray(history, dtype=np.int64), np.finfo(np.float32).max
    seen = raw[ids].astype(np.float64)
    with np.errstate(over="ignore"):
        scaled = np.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty)
    # Repeated ids write the same value. The bounds keep an absurd penalty from making an inf.
    shaped = raw.copy()
    shaped[ids] = np.where(np.isfinite(seen), np.clip(scaled, -largest, largest), seen)
    return shaped


def _forbid(shaped: Logits, token_ids: Sequence[int], params: SamplingParams) -> Logits:
    shaped = shaped.copy()
    shaped[[i for i in token_ids if 0 <= i < shaped.size]] = -np.inf
    if shaped.max() == -np.inf:
        raise PoisonedLogits(
            f"min_tokens={params.min_tokens} forbids eos and stop_token_ids, and no other token is possible; "
            "lower min_tokens or shorten stop_token_ids"
        )
    return shaped


def _draw(shaped: Logits, params: SamplingParams, position: int) -> int:
    """Gumbel-max: the argmax of logits / T + Gumbel noise over the kept ids is a draw from their softmax.

    An inverse CDF would need one random number, but every rounding moves all later steps of the CDF.
    """
    with np.errstate(over="ignore"):
        scaled = (shaped.astype(np.float64) - shaped.max()) / params.temperature  # at most 0
    ids = _kept(shaped, scaled, params)
    scores = scaled if ids.size == scaled.size else scaled[ids]
    scores -= np.log(-np.log(uniforms(params.seed, position, ids)))
    return int(ids[np.argmax(scores)])  # the lower id of equals; a forbidden one stays at -inf


def _kept(
    shaped: Logits, scaled: NDArray[np.float64], params: SamplingParams, tail_weight: float = TAIL_WEIGHT
) -> NDArray[np.int64]:
    """The ids that top-k, top-p and min-p keep, rising. Each keeps a beginning of the descending order."""
    ids = np.arange(shaped.size)
    if not params.top_k and params.top_p == 1 and not params.min_p:
        return ids
    if params.top_k:
        ids = _descending(shaped, ids, params.top_k)
    weights = np.exp(scaled[ids])  # at most 1
    if params.top_p < 1:
        nucleus = _nucleus(shaped[ids], weights, params, tail_weight)
        ids, weights = ids[nucleus], weights[nucleus]
    return np.sort(ids[weights >= params.min_p])


def _nucleus(
    values: Logits, weights: NDArray[np.float64], params: SamplingParams, tail_weight: float
) -> NDArray[np.int64]:
    """Indices of the fewest largest `values` whose `weights` sum to top_p of all."""
    wanted = params.top_p * float(weights.sum())
    candidates = np.flatnonzero(weights)
    head = np.flatnonzero(weights >= (params.min_p or tail_weight))
    # What min_p drops is never needed; what lies past the end of the nucleus need not be sorted.
    if params.min_p or weights[head].sum() > wanted * (1 + 1e-9):
        candidates = head
    order = _descending(values, candidates, candidates.size)
    return order[: 1 + int(np.searchsorted(np.cumsum(weights[order]), wanted))]


def _descending(values: Logits, ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The `count` of `ids` with the largest values, largest first, lower id first among equals.

    Sorts one 64-bit key (value above, id below): all keys differ, so any sort gives the same order.
    """
    if count < ids.size:
        least = np.partition(values[ids], ids.size - count)[ids.size - count]
        ids = ids[values[ids] >= least]  # with all that equal the last one
    bits = (values[ids] + np.float32(0)).view(np.uint32)  # + 0 turns -0.0 into 0.0
    # The bits of floats, flipped so that they order as the floats do.
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    keys = ((~rising).astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)
    return (np.sort(keys)[:count] & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _with_logprobs(token_id: int, raw: Logits, num_top: int | None) -> SampledToken:
    if num_top is None:
        return SampledToken(token_id)
    shifted = raw.astype(np.float64) - raw.max()
    logprobs = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    top = _descending(raw, np.arange(raw.size), min(num_top, raw.size)) if num_top else ()
    return SampledToken(token_id, float(logprobs[token_id]), tuple((int(i), float(logprobs[i])) for i in top))


def encode_sampled(tokens: Sequence[SampledToken | None], num_top: int) -> Tensor:
    """Tokens of b requests -> fp64 [b, 2 + 2 * num_top], to travel in one collective; NaN where nothing is.

    Row: id, logprob, num_top ids, their logprobs. None stands for a request whose logits were poisoned.
    """
    packed = torch.full((len(tokens), 2 + 2 * num_top), math.nan, dtype=torch.float64)
    for row, token in zip(packed, tokens, strict=True):
        if token is None:
            continue
        num = len(token.top_logprobs)
        assert num <= num_top, f"{num} top logprobs do not fit num_top={num_top}"
        row[0] = token.token_id
        if token.logprob is not None:
            row[1] = token.logprob
        if num:
            ids, logprobs = zip(*token.top_logprobs, strict=True)
            row[2 : 2 + num] = torch.tensor(ids, dtype=torch.float64)
            row[2 + num_top : 2 + num_top + num] = torch.tensor(logprobs, dtype=torch.float64)
    return packed


def decode_sampled(packed: Tensor) -> list[SampledToken | None]:
    """What encode_sampled was given: fp64 [b, 2 + 2 * num_top] -> b tokens."""
    num_top = (packed.shape[1] - 2) // 2
    return [_decode_row(row, num_top) for row in packed.tolist()]


def _decode_row(row: list[float], num_top: int) -> SampledToken | None:
    if math.isnan(row[0]):
        return None
    pairs = zip(row[2 : 2 + num_top], row[2 + num_top :], strict=True)
    top = tuple((int(i), logprob) for i, logprob in pairs if not math.isnan(i))
    return SampledToken(int(row[0]), None if math.isnan(row[1]) else row[1], top)
