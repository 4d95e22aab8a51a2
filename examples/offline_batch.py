"""Offline batches without HTTP: python examples/offline_batch.py CHECKPOINT [sequence-parallel ranks]"""

from __future__ import annotations

import sys

from megatron_sps2 import LLM, SamplingParams

PROMPTS = ("The capital of France is", "Water boils at", "A prime number is")


def main(checkpoint: str, sp: int) -> None:
    with LLM(checkpoint, sp=sp, policy="sps2", max_model_len=2048) as llm:
        for answer in llm.generate(PROMPTS, SamplingParams(max_tokens=16)):
            print(repr(answer.text), answer.finish_reason, answer.timings)
        print(llm.chat([{"role": "user", "content": "Say hello."}], SamplingParams(max_tokens=24)).text)


if __name__ == "__main__":  # The ranks are processes that import this file.
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 2)
