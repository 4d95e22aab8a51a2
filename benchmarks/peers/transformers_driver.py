"""transformers' generate: SDPA attention, dynamic cache. --setting: the dtype, bfloat16 by default."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers

from benchmarks.peers.protocol import Answer, Driver, serve


class _Clock(transformers.StoppingCriteria):
    """Notes when each token of the batch is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Transformers(Driver):
    """Decodes all prompts as one batch, so they must be equally long."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def prefill(self, ids: list[int]) -> Answer:
        start = time.perf_counter()
        times, tokens = self._generate([ids], 1)
        return times[0] - start, tokens

    def decode(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        times, tokens = self._generate(prompts, num_tokens + 1)
        return times[-1] - times[0], tokens

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], num_tokens: int) -> tuple[list[float], list[int]]:
        clock, ids = _Clock(), torch.tensor(prompts)
        whole = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        return clock.times, whole[:, ids.shape[1]].tolist()


def build(args: argparse.Namespace) -> tuple[Driver, str]:
    torch.set_num_threads(args.threads)
    dtype = args.setting or "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).eval()
    return Transformers(model), f"transformers {transformers.__version__}, torch {torch.__version__}, {dtype}"


if __name__ == "__main__":
    serve(build, __doc__)
