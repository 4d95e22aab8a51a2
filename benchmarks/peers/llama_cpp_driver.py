"""llama.cpp by the C functions of llama-cpp-python: a GGUF file in bf16; KV cache in f16, its default."""

from __future__ import annotations

import argparse
import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.protocol import Answer, Driver, serve

# Tokens of a call; llama.cpp cuts them into its micro-batches.
BATCH = 2048


class LlamaCpp(Driver):
    """Two contexts of one model: a cache for one long prompt, and one split evenly over decoding prompts."""

    def __init__(self, args: argparse.Namespace) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            args.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {args.model}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._single = _context(model, args.max_length, 1, args.threads)
        self._many = _context(model, args.num_decodes * args.decode_length, args.num_decodes, args.threads)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def prefill(self, ids: list[int]) -> Answer:
        _clear(self._single)
        start = time.perf_counter()
        token = self._prompt(self._single, ids, 0)
        return time.perf_counter() - start, [token]

    def decode(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        _clear(self._many)
        first = tokens = [self._prompt(self._many, ids, index) for index, ids in enumerate(prompts)]
        start = time.perf_counter()
        for step in range(num_tokens):
            rows = [(token, len(prompts[i]) + step, i, True) for i, token in enumerate(tokens)]
            self._run(self._many, rows)
            tokens = [self._likeliest(self._many, i) for i in range(len(prompts))]
        return time.perf_counter() - start, first

    def _prompt(self, context: Any, ids: list[int], sequence: int) -> int:
        """Runs a whole prompt -> its first token."""
        for begin in range(0, len(ids), BATCH):
            part = ids[begin : begin + BATCH]
            rows = [(token, begin + i, sequence, begin + i == len(ids) - 1) for i, token in enumerate(part)]
            self._run(context, rows)
        return self._likeliest(context, -1)

    def _run(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) of each row, in one call."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status} for {len(rows)} tokens")

    def _likeliest(self, context: Any, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, row)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self._vocab_size,)).argmax())


def _context(model: Any, num_tokens: int, num_sequences: int, num_threads: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = num_tokens, num_sequences
    params.n_batch = BATCH
    params.n_threads = params.n_threads_batch = num_threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp has no context of {num_tokens} tokens")
    return context


def _clear(context: Any) -> None:
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)


def build(args: argparse.Namespace) -> tuple[Driver, str]:
    return LlamaCpp(args), f"llama-cpp-python {llama_cpp.__version__}, bf16"


if __name__ == "__main__":
    serve(build, __doc__)
