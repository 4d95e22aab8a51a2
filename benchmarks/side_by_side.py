"""Our ranks and transformers on one random model, taking turns in one run.

transformers runs in this process with as many threads as we have ranks; each rank has one thread. Ranks that
wait for their turn sleep in a collective.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.engine_ranks import EngineRanks
from benchmarks.meter import Meter, Note
from checkpoints_tools.convert import convert
from megatron_sps2.attention.csa_tally import CsaReport
from megatron_sps2.config import AttentionMode, DType, ParallelConfig, SamplingParams
from megatron_sps2.engine.build import EngineConfig
from megatron_sps2.engine.engine import Engine

VOCAB_SIZE = 32000
MAX_LENGTH = 70000


@dataclass(frozen=True, slots=True)
class Times:
    """One answer: seconds to the first token, and between each two tokens after it."""

    ttft: float
    gaps: list[float]

    @property
    def tbt(self) -> float:
        return float(np.median(self.gaps))


@dataclass(frozen=True, slots=True)
class Answer:
    """Of our ranks: times, tokens, KV tokens held per rank, and what CSA did."""

    times: Times
    tokens: list[int]
    held: list[int]
    csa: CsaReport | None


def random_llama() -> LlamaForCausalLM:
    """8 layers, hidden 512, 8 query and 4 KV heads of 64: 56M parameters, the shape of the peers' table."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=8,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_LENGTH,
    )
    return LlamaForCausalLM(config).eval()


def prompt(length: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()


class _Clock(BaseStreamer):
    """Notes when transformers hands out each token; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def run_transformers(hf: LlamaForCausalLM, ids: list[int], num_tokens: int) -> tuple[Times, list[int]]:
    """transformers' generate: SDPA attention, dynamic cache."""
    clock, start = _Clock(), time.perf_counter()
    with torch.inference_mode():
        whole = hf.generate(  # type: ignore[misc]
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=clock,
        )
    tokens = clock.times[1:]
    return Times(tokens[0] - start, np.diff(tokens).tolist()), whole[0, len(ids) :].tolist()


class Ours:
    """Our engine on `parallel` ranks in processes of their own; `metered` ones note each prompt's prefill."""

    def __init__(self, config: EngineConfig, *, metered: bool = False) -> None:
        self._metered = metered
        self._ranks = EngineRanks(config, partial(_program, config=config, metered=metered))
        # Bytes of KV cache on one rank / bytes one rank alone would need for max_model_len tokens.
        self.kv_share: float = self._ranks.receive()

    def run(self, ids: list[int], num_tokens: int, attention: AttentionMode | None = None) -> Answer:
        answer: Answer = self._ranks.ask((ids, num_tokens, attention))
        return answer

    def close(self) -> list[list[Note]]:
        """Ends the ranks. Of metered ones: each rank's notes, a prompt after the other as they were run."""
        self._ranks.finish()
        try:
            notes: list[list[Note]] = self._ranks.receive() if self._metered else []
            return notes
        finally:
            self._ranks.close()


def _program(engine: Engine, pipe: Connection, config: EngineConfig, metered: bool) -> None:
    meter = Meter(engine) if metered else None
    if engine.is_leader:
        _lead(engine, config, pipe)
    else:
        engine.follow()
    if meter:
        notes = engine.gather(meter.notes)
        if engine.is_leader:
            pipe.send(notes)


def _lead(engine: Engine, config: EngineConfig, pipe: Connection) -> None:
    """Rank 0: runs what comes through the pipe until it is None."""
    model, element_size = engine.model, getattr(torch, config.dtype).itemsize
    per_token = 2 * model.num_layers * model.num_query_groups * model.head_dim * element_size
    pipe.send(engine.kv_bytes / (per_token * config.max_model_len))
    while (job := pipe.recv()) is not None:
        ids, num_tokens, attention = job
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        request = engine.add_request(ids, params, attention)
        while request.finish_reason is None:
            engine.step()
        held = engine.blocks.tokens_per_rank(request.request_id)
        engine.release(request)
        times = [request.arrived_at, *request.token_times]
        found = Times(times[1] - times[0], np.diff(times[1:]).tolist())
        pipe.send(Answer(found, request.output_ids, held, request.csa))
    engine.stop()


@contextmanager
def pair(
    dtype: DType, parallel: ParallelConfig, max_model_len: int
) -> Iterator[tuple[LlamaForCausalLM, Ours]]:
    """The same random weights in transformers (here) and in our ranks (processes of their own)."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the ranks; this process has read it already
    torch.set_num_threads(parallel.world_size)
    hf = random_llama()
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(f"{folder}/hf")
        convert(f"{folder}/hf", f"{folder}/megatron")
        config = EngineConfig(
            checkpoint=f"{folder}/megatron", parallel=parallel, dtype=dtype, max_model_len=max_model_len
        )
        ours = Ours(config)
        try:
            yield hf.to(getattr(torch, dtype)), ours
        finally:
            ours.close()
