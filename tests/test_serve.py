"""The real server with real ranks, through OpenAI's own client: every kind of request and refusal."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from transformers import LlamaForCausalLM

from benchmarks.served import Server, serve
from tests.sps2_command import make_checkpoint, words
from tests.tiny_llama import VOCAB_SIZE, prompt

pytestmark = pytest.mark.slow

KEY = "a-secret"
# Words of their own: the first three tokens have none.
SHORT, LONG = (prompt(n, seed=n).clamp(min=3).tolist() for n in (20, 900))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and the model it was made of in hf/."""
    folder = tmp_path_factory.mktemp("serve")
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    flags = ("--sp", 2, "--max-model-len", 4096, "--served-model-name", "tiny", "--api-key", KEY)
    with serve(folder / "checkpoint", *flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder / "hf").eval()
    model.generation_config.eos_token_id = None  # as with ignore_eos
    return model


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, ids: list[int], num_tokens: int) -> str:
    """The text of the likeliest tokens; special ones have none."""
    out = model.generate(torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False)
    return words(token for token in out[0, len(ids) :].tolist() if token > 2)


def complete(client: OpenAI, ids: Any, **more: Any) -> Any:
    values = {"model": "tiny", "max_tokens": 12, "temperature": 0, **more}
    return client.completions.create(prompt=ids, extra_body={"ignore_eos": True}, **values)


@pytest.mark.parametrize("ids", [SHORT, LONG], ids=["on one rank", "on all ranks"])
def test_a_completion_is_what_transformers_says(
    client: OpenAI, model: LlamaForCausalLM, ids: list[int]
) -> None:
    answer = complete(client, ids)
    assert answer.choices[0].text == greedy(model, ids, 12)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    timings = answer.model_extra["timings"]
    assert timings["sp_size"] == (1 if ids is SHORT else 2) and timings["ttft_ms"] > 0


def test_a_text_prompt_several_prompts_and_choices_come_in_order(
    client: OpenAI, model: LlamaForCausalLM
) -> None:
    wanted = [greedy(model, ids, 12) for ids in (SHORT, LONG)]
    answer = complete(client, [words(SHORT), words(LONG)], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [wanted[0], wanted[0], wanted[1], wanted[1]]
    answer = complete(client, [SHORT, LONG])
    assert [choice.text for choice in answer.choices] == wanted


def test_a_stream_joins_to_the_same_text_and_ends_with_usage(client: OpenAI) -> None:
    whole = complete(client, LONG).choices[0].text
    chunks = list(complete(client, LONG, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    whole = complete(client, SHORT).choices[0].text.split()
    stop = next(word for i, word in enumerate(whole) if i >= 3 and word not in whole[:i])
    cut = complete(client, SHORT, stop=[stop]).choices[0]
    assert cut.text.split() == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_seeds_draw_the_same_again_and_choices_differ(client: OpenAI) -> None:
    def draw(seed: int) -> list[str]:
        answer = complete(client, SHORT, temperature=1.5, seed=seed, n=3)
        return [choice.text for choice in answer.choices]

    first = draw(7)
    assert first == draw(7) and len(set(first)) == 3 and first != draw(99)


def test_logprobs_and_echo_score_the_prompt_as_transformers_does(
    client: OpenAI, model: LlamaForCausalLM
) -> None:
    """What lm-eval reads: the prompt's tokens with their log-probabilities, the first without."""
    for ids in (SHORT, LONG):
        logprobs = complete(client, ids, echo=True, logprobs=2, max_tokens=1).choices[0].logprobs
        with torch.inference_mode():
            scores = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        wanted = scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert len(logprobs.token_logprobs) == len(ids) + 1 and logprobs.token_logprobs[0] is None
        found = torch.tensor(logprobs.token_logprobs[1 : len(ids)])
        assert torch.allclose(found, wanted, atol=1e-4)  # fp32, sums of thousands of terms
        best = scores[:-1].topk(2).values
        tops = [sorted(each.values(), reverse=True)[:2] for each in logprobs.top_logprobs[1 : len(ids)]]
        assert torch.allclose(torch.tensor(tops), best, atol=1e-4)


def test_a_chat_goes_through_the_template_and_streams(client: OpenAI, model: LlamaForCausalLM) -> None:
    messages: Any = [{"role": "user", "content": words(SHORT)}]
    ids = [3, *SHORT, 4]  # the template's words around the message
    wanted = greedy(model, ids, 8)
    values: Any = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 8}
    answer = client.chat.completions.create(
        **values, extra_body={"ignore_eos": True}, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].message.content == wanted and answer.choices[0].message.role == "assistant"
    content = answer.choices[0].logprobs.content
    assert [each.token for each in content if each.token] == wanted.split()
    assert all(len(each.top_logprobs) == 3 for each in content)
    stream = client.chat.completions.create(**values, extra_body={"ignore_eos": True}, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == wanted


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model": "other"}, openai.NotFoundError, "other"),
        ({"max_tokens": 5000}, openai.BadRequestError, "4096"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"prompt": []}, openai.BadRequestError, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, openai.BadRequestError, str(VOCAB_SIZE)),
        ({"extra_body": {"attention": "csa"}}, openai.BadRequestError, "attention"),
    ],
)
def test_a_mistake_is_named_with_its_value(
    client: OpenAI, change: dict[str, Any], error: type[Exception], says: str
) -> None:
    values: dict[str, Any] = {"model": "tiny", "prompt": SHORT, "max_tokens": 4, **change}
    with pytest.raises(error, match=says):
        client.completions.create(**values)


def test_a_wrong_key_is_refused(server: Server) -> None:
    client = OpenAI(base_url=f"{server.base_url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_megatron_clients_are_answered(server: Server, model: LlamaForCausalLM) -> None:
    body = {"prompts": [words(SHORT)], "tokens_to_generate": 6, "top_k": 1, "logprobs": True}
    request = urllib.request.Request(
        f"{server.base_url}/api",
        data=json.dumps(body).encode(),
        method="PUT",
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        found = json.load(reply)
    wanted = greedy(model, SHORT, 6)
    assert found["text"][0].split()[: len(SHORT) + 3] == [*words(SHORT).split(), *wanted.split()[:3]]
    assert len(found["segments"][0]) == len(found["tokens"][0])


def test_a_shared_prefix_is_found_and_changes_nothing(
    server: Server, client: OpenAI, model: LlamaForCausalLM
) -> None:
    head = prompt(640, seed=5).tolist()
    tails = [prompt(30, seed=seed).tolist() for seed in (6, 7)]
    answers = [complete(client, head + tail) for tail in tails]
    assert [each.choices[0].text for each in answers] == [greedy(model, head + t, 12) for t in tails]
    assert answers[1].usage.prompt_tokens_details.cached_tokens == 640
    assert server.metric("sps2:prefix_cache_hits_total") >= 640


def test_health_and_metrics_tell_of_every_rank(server: Server) -> None:
    assert server.json("/health")
    metrics = server.metrics()
    for name in ("sps2:kv_blocks_leaked", "sps2:rank_up", "sps2:kv_blocks_used"):
        ranks = [key for key in metrics if key.startswith(name + "{")]
        assert len(ranks) == 2, f"{name}: {ranks}"
    assert server.metric("sps2:kv_blocks_leaked") == 0
    assert server.metric("sps2:generation_tokens_total") > 0
    assert server.metric("sps2:bytes_sent_total") > 0
