"""The loops of decode attention, compiled by Numba. See decode.py for what they compute.

All in one file: Numba compiles anew when the file of a function has changed, not those of what it calls.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numba import njit, types
from numba.extending import overload

# Keys whose scores are held at a time.
TILE = 64
# Nothing here may take NaN or infinity for impossible: a poisoned row must come out poisoned.
FAST = {"reassoc", "contract", "nsz", "arcp"}
# Below, exp(x) is as good as 0 beside the largest weight, which is 1.
LEAST = np.float32(-87.0)
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
# Of exp's Taylor series, for |x| <= ln(2) / 2: off by 2e-7 at most.
TERMS = tuple(np.float32(1 / math.factorial(n)) for n in range(7))
# Brings a float8's exponent, put into that of a fp32, to its place: biases are 7 and 127.
REBIAS = np.float32(2.0**120)


def compiled(function):
    """For the types of the first call; kept on disk where there is a place for it."""
    compile_ = functools.partial(njit, fastmath=FAST, error_model="numpy", nogil=True)
    try:
        return compile_(cache=True)(function)
    except RuntimeError:  # neither beside this file nor in a folder of the user's
        return compile_()(function)


def widen(stored):
    """A number as the cache stores it -> fp32: bf16 as uint16, float8_e4m3fn as uint8, fp32 as it is."""


@overload(widen)
def _widen(stored):
    if stored == types.uint16:
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    if stored == types.uint8:
        return _widen_e4m3
    return lambda stored: stored


def _widen_e4m3(stored):
    size = np.uint32(stored & np.uint8(127))
    sign = np.uint32(np.uint32(stored & np.uint8(128)) << np.uint32(24))
    # 127 stands for NaN; no other pattern does, and none for infinity.
    bits = np.uint32(0x7FC00000) if size == np.uint32(127) else np.uint32(size << np.uint32(20))
    return np.uint32(bits | sign).view(np.float32) * REBIAS


@compiled
def exp(x):
    """Of x <= 0, or NaN: a polynomial, so that the compiler can take many numbers at once."""
    x = LEAST if x < LEAST else x
    power = np.floor(x * LOG2_E + np.float32(0.5))
    rest = x - power * LN_2
    total = TERMS[6]
    total = total * rest + TERMS[5]
    total = total * rest + TERMS[4]
    total = total * rest + TERMS[3]
    total = total * rest + TERMS[2]
    total = total * rest + TERMS[1]
    total = total * rest + TERMS[0]
    exponent = np.uint32(np.int32(power) + np.int32(127))
    found = total * np.uint32(exponent << np.uint32(23)).view(np.float32)
    return found if x == x else x  # what NaN is as an integer, nobody says


@compiled
def score(queries, keys, first, count, scores, column):
    """queries [g, d] times keys [slots, d] from `first` on -> scores [g, TILE] from `column` on.

    Two queries and four keys at a time, so that each is read, and made fp32, less often; of an odd number of
    queries the last goes with itself.
    """
    group, dim = queries.shape
    whole = count // 4 * 4
    for j in range(0, whole, 4):
        slot, at = first + j, column + j
        key0, key1, key2, key3 = keys[slot], keys[slot + 1], keys[slot + 2], keys[slot + 3]
        for i in range(0, group, 2):
            other = min(i + 1, group - 1)
            sum0, sum1, sum2, sum3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            more0, more1, more2, more3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for x in range(dim):
                number, more = queries[i, x], queries[other, x]
                wide0, wide1, wide2, wide3 = widen(key0[x]), widen(key1[x]), widen(key2[x]), widen(key3[x])
                sum0 += number * wide0
                sum1 += number * wide1
                sum2 += number * wide2
                sum3 += number * wide3
                more0 += more * wide0
                more1 += more * wide1
                more2 += more * wide2
                more3 += more * wide3
            scores[i, at], scores[i, at + 1], scores[i, at + 2], scores[i, at + 3] = sum0, sum1, sum2, sum3
            scores[other, at], scores[other, at + 1] = more0, more1
            scores[other, at + 2], scores[other, at + 3] = more2, more3
    for j in range(whole, count):
        for i in range(group):
            total = np.float32(0)
            for x in range(dim):
                total += queries[i, x] * widen(keys[first + j, x])
            scores[i, column + j] = total


@compiled
def soften(scores, count, tops, totals, sums):
    """scores [g, TILE] become weights below the largest score so far; sums [g, d] and totals [g] follow."""
    group, dim = sums.shape
    for i in range(group):
        top = tops[i]
        for j in range(count):
            top = scores[i, j] if scores[i, j] > top else top
        shrink = exp(tops[i] - top)
        total = np.float32(0)
        for j in range(count):
            weight = exp(scores[i, j] - top)
            scores[i, j] = weight
            total += weight
        tops[i] = top
        totals[i] = totals[i] * shrink + total
        for x in range(dim):
            sums[i, x] *= shrink


@compiled
def add(weights, column, values, first, count, sums):
    """sums [g, d] += weights [g, TILE] from `column` on times values [slots, d] from `first` on."""
    group, dim = sums.shape
    whole = count // 4 * 4
    for j in range(0, whole, 4):
        at, slot = column + j, first + j
        value0, value1, value2, value3 = values[slot], values[slot + 1], values[slot + 2], values[slot + 3]
        for i in range(group):
            w0, w1, w2, w3 = weights[i, at], weights[i, at + 1], weights[i, at + 2], weights[i, at + 3]
            for x in range(dim):
                sums[i, x] += (
                    w0 * widen(value0[x])
                    + w1 * widen(value1[x])
                    + w2 * widen(value2[x])
                    + w3 * widen(value3[x])
                )
    for j in range(whole, count):
        for i in range(group):
            for x in range(dim):
                sums[i, x] += weights[i, column + j] * widen(values[first + j, x])


@compiled
def scale_columns(scores, column, scales, first, count):
    """scores [g, TILE] times the scales of slots from `first` on."""
    for i in range(scores.shape[0]):
        for j in range(count):
            scores[i, column + j] *= scales[first + j]


@compiled
def cut(starts, stops, size):
    """Tokens starts[row] <= t < stops[row] -> pieces int64 [p, 3] of so many at most: row, start, stop; and
    firsts int64 [b + 1]: a row's pieces are firsts[row] <= p < firsts[row + 1]."""
    firsts = np.zeros(len(starts) + 1, np.int64)
    for row in range(len(starts)):
        firsts[row + 1] = firsts[row] + max(0, stops[row] - starts[row] + size - 1) // size
    pieces = np.empty((firsts[-1], 3), np.int64)
    for row in range(len(starts)):
        for i in range(firsts[row], firsts[row + 1]):
            start = starts[row] + (i - firsts[row]) * size
            pieces[i, 0], pieces[i, 1], pieces[i, 2] = row, start, min(start + size, stops[row])
    return pieces, firsts


@compiled
def attend_pieces(
    queries,  # fp32 [b, n, d], scaled
    keys,  # [n_kv, slots, d], as stored
    values,
    key_scales,  # fp32 [n_kv, slots], or [n_kv, 0] where what is stored counts once
    value_scales,
    tables,  # int32 [b, m]
    block_size,
    pieces,  # int64 [p, 3]: a row, and its tokens start <= t < stop
    first,  # of the pieces' heads, this call does number `first` and every `step`-th from there
    step,
    outs,  # fp32 [p, n, d], written
    lses,  # fp32 [p, n], written
):
    num_heads, dim = queries.shape[1:]
    group, quantized = num_heads // len(keys), key_scales.shape[1] > 0
    scores, sums = np.empty((group, TILE), np.float32), np.empty((group, dim), np.float32)
    tops, totals = np.empty(group, np.float32), np.empty(group, np.float32)
    for item in range(first, len(pieces) * len(keys), step):
        piece, head = item // len(keys), item % len(keys)
        row, token, stop = pieces[piece]
        mine = slice(head * group, (head + 1) * group)
        sums[:], tops[:], totals[:] = 0, -np.inf, 0
        while token < stop:
            count = min(TILE, stop - token)
            column = 0
            while column < count:
                at = token + column
                slot = tables[row, at // block_size] * block_size + at % block_size
                length = min(block_size - at % block_size, count - column)
                score(queries[row, mine], keys[head], slot, length, scores, column)
                if quantized:
                    scale_columns(scores, column, key_scales[head], slot, length)
                column += length
            soften(scores, count, tops, totals, sums)
            column = 0
            while column < count:
                at = token + column
                slot = tables[row, at // block_size] * block_size + at % block_size
                length = min(block_size - at % block_size, count - column)
                if quantized:
                    scale_columns(scores, column, value_scales[head], slot, length)
                add(scores, column, values[head], slot, length, sums)
                column += length
            token += count
        for i in range(group):
            outs[piece, head * group + i] = sums[i] / totals[i]
            lses[piece, head * group + i] = tops[i] + np.log(totals[i])


@compiled
def join_pieces(outs, lses, firsts, out, lse):
    """outs [p, n, d] and lses [p, n] of pieces -> out [b, n, d], lse [b, n] of rows; firsts as of `cut`."""
    for row in range(len(out)):
        begin, end = firsts[row], firsts[row + 1]
        for head in range(out.shape[1]):
            top = np.float32(-np.inf)
            for piece in range(begin, end):
                top = lses[piece, head] if lses[piece, head] > top else top
            out[row, head] = 0
            total = np.float32(0)
            for piece in range(begin, end):
                weight = exp(lses[piece, head] - top)
                total += weight
                for x in range(out.shape[2]):
                    out[row, head, x] += weight * outs[piece, head, x]
            if begin < end:
                for x in range(out.shape[2]):
                    out[row, head, x] /= total
            lse[row, head] = top + np.log(total)  # -inf where there is no piece
