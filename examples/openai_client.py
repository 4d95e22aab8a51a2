"""The server through OpenAI's own client: a chat that streams, two choices with log-probabilities.

pip install openai; make serve; python examples/openai_client.py [http://127.0.0.1:8000]
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI


def main(base_url: str) -> None:
    client = OpenAI(base_url=f"{base_url}/v1", api_key=os.environ.get("SPS2_API_KEY", "none"))
    model = client.models.list().data[0].id

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name three primes."}],
        max_tokens=48,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    answer = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=4, logprobs=2, n=2, temperature=0.8, seed=7
    )
    for choice in answer.choices:
        logprobs = choice.logprobs.token_logprobs if choice.logprobs else None
        print(choice.index, repr(choice.text), choice.finish_reason, logprobs)
    # Beyond OpenAI: what the engine measured, and the attention to prefill with.
    answer = client.completions.create(
        model=model,
        prompt="Water boils at",
        max_tokens=8,
        temperature=0,
        extra_body={"attention": "exact", "ignore_eos": True},
    )
    print(repr(answer.choices[0].text), (answer.model_extra or {}).get("timings"))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
