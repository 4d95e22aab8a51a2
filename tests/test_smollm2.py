"""SmolLM2-135M, a real model whose 9 query and 3 KV heads divide by neither 2 nor 4, against transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from checkpoints_tools.convert import convert
from megatron_sps2.config import ParallelConfig, ScheduleConfig
from megatron_sps2.engine.build import EngineConfig
from megatron_sps2.engine.tokenizer import load_tokenizer
from tests.ranks import run_ranks
from tests.sharded_run import Prompt, logits_error, run_everything

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.busy, pytest.mark.timeout(900)]

LENGTHS = (1, 7, 257, 4097)
# Of the largest logit (about 40). fp32 through 30 layers; measured below 2e-5.
TOLERANCE = 1e-4
# Decode steps of more ranks than cores take up to a second each: these get fewer tokens, 9 or 12 ranks few.
# 64 tokens at every layout: test_exactness.
NUM_CORES, MANY_RANKS = 2, 9
NUM_GENERATED, NUM_GENERATED_CROWDED, NUM_GENERATED_MANY = 32, 24, 6
# After 8,000 tokens, at three layouts.
NUM_GENERATED_LONG = 16
# (tp, sp) that are compared with transformers at 4,097 tokens; sp 1 and 4 are compared with sp 2 at 8,000.
READ_LONG = ((1, 2), (1, 3), (3, 2))
# All lengths and 64 tokens at every layout: SPS2_THOROUGH=1 python -m pytest tests/test_smollm2.py
IS_THOROUGH = "SPS2_THOROUGH" in os.environ
if IS_THOROUGH:
    NUM_GENERATED = NUM_GENERATED_CROWDED = NUM_GENERATED_MANY = 64


@pytest.fixture(scope="module")
def text_ids(smollm2_checkpoint: Path) -> list[int]:
    """Over 9,000 token ids of real text: the demo's prompt, again and again."""
    text = (Path(__file__).parent.parent / "examples" / "prompt.txt").read_text()
    return load_tokenizer(smollm2_checkpoint).encode("\n\n".join([text] * 3))


@pytest.fixture(scope="module")
def prompts(text_ids: list[int]) -> list[Prompt]:
    """Logits are compared at 20 positions and the last one: all of 4,097 would be 800 MB."""
    places = [sorted({*range(0, length, max(1, length // 20)), length - 1}) for length in LENGTHS]
    return [Prompt(text_ids[:length], chosen) for length, chosen in zip(LENGTHS, places, strict=True)]


@pytest.fixture(scope="module")
def reference(
    smollm2_gguf: Path, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits at the chosen positions and greedy tokens, by transformers.

    test_checkpoints_gguf holds our weights against those that transformers itself reads, which takes long.
    """
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(smollm2_gguf, folder, to="hf")
    hf = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    found = [read_and_go_on(hf, prompt) for prompt in prompts]
    return [logits for logits, _ in found], [tokens for _, tokens in found]


@torch.inference_mode()
def read_and_go_on(hf: LlamaForCausalLM, prompt: Prompt) -> tuple[torch.Tensor, list[int]]:
    """The prompt is read once for both: its logits, and NUM_GENERATED greedy tokens."""
    read = hf.model(torch.tensor([prompt.ids]), use_cache=True)
    logits, tokens = hf.lm_head(read.last_hidden_state[0, prompt.positions]), list[int]()
    while len(tokens) < NUM_GENERATED:
        tokens.append(int(hf.lm_head(read.last_hidden_state[0, -1]).argmax()))
        read = hf.model(torch.tensor([tokens[-1:]]), past_key_values=read.past_key_values, use_cache=True)
    return logits, tokens


def config_for(checkpoint: Path, tp_size: int, sp_size: int, max_model_len: int) -> EngineConfig:
    return EngineConfig(
        checkpoint=str(checkpoint),
        parallel=ParallelConfig(sp_size=sp_size, tp_size=tp_size),
        max_model_len=max_model_len,
        # Prefills are paused at tp 1 only, for the same reason.
        schedule=ScheduleConfig(max_num_seqs=len(LENGTHS), layers_per_piece=None if tp_size == 1 else 30),
    )


@pytest.mark.parametrize("sp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tp_size", [1, 3])
def test_smollm2_equals_transformers(
    tp_size: int,
    sp_size: int,
    smollm2_checkpoint: Path,
    prompts: list[Prompt],
    reference: tuple[list[torch.Tensor], list[list[int]]],
) -> None:
    logits, tokens = reference
    config = config_for(smollm2_checkpoint, tp_size, sp_size, max(LENGTHS) + NUM_GENERATED)
    num_tokens = NUM_GENERATED if tp_size * sp_size <= NUM_CORES else NUM_GENERATED_CROWDED
    if tp_size * sp_size >= MANY_RANKS:
        num_tokens = NUM_GENERATED_MANY
    if (tp_size, sp_size) not in READ_LONG and not IS_THOROUGH:
        prompts, logits, tokens = prompts[:-1], logits[:-1], tokens[:-1]
    results = run_ranks(tp_size * sp_size, run_everything, config, prompts, num_tokens, timeout_s=600)
    assert logits_error(results, logits, prompts) < TOLERANCE
    assert results[0].tokens == [each[:num_tokens] for each in tokens]


def test_control_without_exchange_smollm2_is_wrong(
    smollm2_checkpoint: Path,
    prompts: list[Prompt],
    reference: tuple[list[torch.Tensor], list[list[int]]],
) -> None:
    config = config_for(smollm2_checkpoint, 1, 2, 512)
    results = run_ranks(2, run_everything, config, prompts[1:3], 2, True)
    assert logits_error(results, reference[0][1:3], prompts[1:3]) > 10 * TOLERANCE


def test_smollm2_says_the_same_at_sp_1_2_and_4(smollm2_checkpoint: Path, text_ids: list[int]) -> None:
    """At 8,000 tokens, near its context's end; up to 4,097 it is compared with transformers above."""
    length = 8000
    prompt = Prompt(text_ids[:length], [])
    answers = []
    for sp_size in (1, 2, 4):
        config = config_for(smollm2_checkpoint, 1, sp_size, length + NUM_GENERATED_LONG)
        results = run_ranks(sp_size, run_everything, config, [prompt], NUM_GENERATED_LONG, timeout_s=600)
        answers.append(results[0].tokens)
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0][0]) == NUM_GENERATED_LONG
