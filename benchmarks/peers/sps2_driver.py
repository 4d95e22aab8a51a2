"""Our own engine: sp ranks of one thread. --setting: exact or csa; CSA's budgets are fixed, as a random model
attends to everything (benchmarks/csa_speed.py)."""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.peers.protocol import Answer, Driver, serve
from benchmarks.peers.ranks import PATIENCE, become_rank_0
from megatron_sps2.config import AttentionConfig, CacheConfig, ParallelConfig, SamplingParams, ScheduleConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.build import EngineConfig, build_engine
from megatron_sps2.engine.request import Request

# More tokens than asked, as prompts prefilled first decode while the last ones are prefilled.
MARGIN = 256


class Sps2(Driver):
    """Rank 0 steps the engine; the other ranks follow it."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = build_engine(config)

    def prefill(self, ids: list[int]) -> Answer:
        start = time.perf_counter()
        request = self._add(ids, 1)
        while request.finish_reason is None:
            self._engine.step()
        seconds = time.perf_counter() - start
        self._engine.release(request)
        return seconds, request.output_ids[:1]

    def decode(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        requests = [self._add(ids, num_tokens + MARGIN) for ids in prompts]
        while not all(request.output for request in requests):
            self._engine.step()
        goals = [len(request.output) + num_tokens for request in requests]
        assert max(goals) <= num_tokens + MARGIN, "prompts were prefilled too far apart"
        start = time.perf_counter()
        while any(len(request.output) < goal for request, goal in zip(requests, goals, strict=True)):
            self._engine.step()
        seconds = time.perf_counter() - start
        for request in requests:
            self._engine.abort(request)
        return seconds, [request.output_ids[0] for request in requests]

    def _add(self, ids: list[int], num_tokens: int) -> Request:
        return self._engine.add_request(ids, SamplingParams(max_tokens=num_tokens, ignore_eos=True))


def follow(config: EngineConfig) -> None:
    build_engine(config).follow()


def _config(args: argparse.Namespace) -> EngineConfig:
    mode: Any = args.setting or "exact"
    # segment, probes and share of keys kept: the defaults of benchmarks/csa_speed.py.
    csa = CsaSetting(
        name="fixed", segment_size=512, max_segment_size=2048, num_probes=16, degrees=(1, 1 / 0.03)
    )
    num_tokens = max(args.max_length, args.num_decodes * (args.decode_length + MARGIN))
    return EngineConfig(
        checkpoint=args.model,
        parallel=ParallelConfig(sp_size=args.threads),
        attention=AttentionConfig(mode=mode),
        csa=csa if mode == "csa" else None,
        dtype="bfloat16",
        max_model_len=args.max_length,
        schedule=ScheduleConfig(max_num_seqs=max(1, args.num_decodes)),
        cache=CacheConfig(num_blocks=num_tokens // 64 + args.num_decodes),  # twice what is needed on 2 ranks
        timeout_s=PATIENCE.total_seconds(),
    )


def build(args: argparse.Namespace) -> tuple[Driver, str]:
    config = _config(args)
    become_rank_0(args.threads, follow, config)
    return Sps2(config), f"megatron_sps2, {config.attention.mode}, sp {args.threads}"


if __name__ == "__main__":
    serve(build, __doc__)
