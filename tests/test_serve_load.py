"""Many requests at once, of all lengths: each is answered as if it were alone, under every policy."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from benchmarks.served import Server, serve
from tests.sps2_command import make_checkpoint
from tests.tiny_llama import VOCAB_SIZE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NUM_REQUESTS, NUM_TOKENS = 64, 8
SIZE = ("--max-model-len", 8192, "--max-num-seqs", 32)


def prompts() -> list[list[int]]:
    """64 prompts of 16 to 6,000 tokens, most of them short; some begin alike."""
    draw = random.Random(0)
    lengths = [16, 6000, *(int(16 * 375 ** draw.random()) for _ in range(NUM_REQUESTS - 2))]
    head = [draw.randrange(3, VOCAB_SIZE) for _ in range(6000)]
    own = [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
    return [
        ids if i % 4 else [*head[: len(ids) * 3 // 4], *ids[len(ids) * 3 // 4 :]] for i, ids in enumerate(own)
    ]


async def _ask(client: AsyncOpenAI, ids: list[int]) -> str:
    answer = await client.completions.create(
        model="tiny", prompt=ids, max_tokens=NUM_TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text


async def _ask_all(server: Server, at_once: bool) -> list[str]:
    async with AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        if at_once:
            return await asyncio.gather(*(_ask(client, ids) for ids in prompts()))
        return [await _ask(client, ids) for ids in prompts()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of few heads and layers: 80,000 tokens of prompts are read seven times."""
    return make_checkpoint(tmp_path_factory.mktemp("load"), num_heads=3, num_kv_heads=1, num_hidden_layers=3)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[str]:
    """Each request's answer where no other runs, and no prefix is shared."""
    flags = ("--served-model-name", "tiny", "--no-enable-prefix-caching", "--policy", "fcfs")
    with serve(checkpoint, *SIZE, *flags) as server:
        return asyncio.run(_ask_all(server, at_once=False))


@pytest.mark.parametrize("sp", [1, 2])
@pytest.mark.parametrize("policy", ["sps2", "sarathi", "fcfs"])
def test_answers_under_load_are_those_of_single_requests(
    checkpoint: Path, alone: list[str], policy: str, sp: int
) -> None:
    """Blocks for about a third of what they need at once, so that most wait for others to end."""
    flags = ("--served-model-name", "tiny", "--policy", policy, "--sp", sp, "--num-kv-blocks", 260 // sp)
    with serve(checkpoint, *SIZE, *flags) as server:
        assert asyncio.run(_ask_all(server, at_once=True)) == alone
        assert server.metric("sps2:kv_blocks_leaked") == 0
        assert server.metric("sps2:request_success_total") == NUM_REQUESTS
        assert server.metric("sps2:prefix_cache_hits_total") > 0
