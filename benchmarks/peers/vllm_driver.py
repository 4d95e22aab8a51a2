"""vLLM on CPU, its engine in this process. --setting: whole or chunked prompts; eager, or compiled."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from benchmarks.peers.protocol import Answer, Driver, serve

# More tokens than asked, as prompts prefilled first decode while the last ones are prefilled.
MARGIN = 64


class Vllm(Driver):
    """Steps the engine itself, so that the time of each token is seen."""

    def __init__(self, args: argparse.Namespace) -> None:
        from vllm import LLM

        whole = {} if "chunked" in args.setting else {"max_num_batched_tokens": args.max_length}
        self._engine = LLM(
            args.model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=args.max_length,
            max_num_seqs=max(args.num_decodes, 2),
            enable_prefix_caching=False,
            enforce_eager="compiled" not in args.setting,
            **whole,
        ).llm_engine
        self._next_id = 0

    def prefill(self, ids: list[int]) -> Answer:
        start = time.perf_counter()
        self._add(ids, 1)
        token = self._finish()[0].outputs[0].token_ids[0]
        return time.perf_counter() - start, [token]

    def decode(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        for ids in prompts:
            self._add(ids, num_tokens + MARGIN)
        seen: dict[str, list[int]] = {}
        while len(seen) < len(prompts):
            self._step(seen)
        goal = {key: len(tokens) + num_tokens for key, tokens in seen.items()}
        assert max(goal.values()) <= num_tokens + MARGIN, "prompts were prefilled too far apart"
        start = time.perf_counter()
        while any(len(seen[key]) < goal[key] for key in goal):
            self._step(seen)
        seconds = time.perf_counter() - start
        self._finish()
        return seconds, [seen[key][0] for key in sorted(seen, key=int)]

    def _add(self, ids: list[int], num_tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._next_id), {"prompt_token_ids": ids}, params)
        self._next_id += 1

    def _step(self, seen: dict[str, list[int]]) -> None:
        for output in self._engine.step():
            if output.outputs[0].token_ids:
                seen[output.request_id] = list(output.outputs[0].token_ids)

    def _finish(self) -> list[Any]:
        done: list[Any] = []
        while self._engine.has_unfinished_requests():
            done += [output for output in self._engine.step() if output.finished]
        return done


def build(args: argparse.Namespace) -> tuple[Driver, str]:
    """The settings are environment variables, read when vllm is imported."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB: 200K tokens of the model here
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{args.threads - 1}"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import vllm

    return Vllm(args), f"vllm {vllm.__version__}"


if __name__ == "__main__":
    serve(build, __doc__)
