"""The engine from Python, several prompts in one batch. Alone or under a launcher:

python examples/generate.py CHECKPOINT
torchrun --nproc-per-node 2 examples/generate.py CHECKPOINT
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch.distributed as dist

from megatron_sps2 import ParallelConfig, SamplingParams, ScheduleConfig
from megatron_sps2.engine.build import EngineConfig, build_engine
from megatron_sps2.engine.tokenizer import load_tokenizer
from megatron_sps2.parallel.rank_env import RankEnv, init_process_group

PROMPTS = ("The capital of France is", "Water boils at", "A prime number is")


def main(checkpoint: str) -> None:
    env = RankEnv.detect() or RankEnv.alone()
    init_process_group(env, "gloo", timedelta(minutes=5))
    parallel = ParallelConfig(sp_size=env.world_size)
    schedule = ScheduleConfig(max_num_seqs=len(PROMPTS))
    engine = build_engine(EngineConfig(checkpoint=checkpoint, parallel=parallel, schedule=schedule))
    if not engine.is_leader:
        engine.follow()
    else:
        tokenizer, params = load_tokenizer(checkpoint), SamplingParams(max_tokens=16)
        requests = [engine.add_request(tokenizer.encode(prompt), params) for prompt in PROMPTS]
        while any(request.finish_reason is None for request in requests):
            engine.step()
        for prompt, request in zip(PROMPTS, requests, strict=True):
            print(f"{prompt}|{tokenizer.decode(request.output_ids)!r}")
            engine.release(request)
        engine.stop()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
