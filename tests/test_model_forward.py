"""Our Megatron forward against transformers, at several tp sizes and head counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from checkpoints_tools.convert import convert
from tests.ranks import run_ranks
from tests.tiny_llama import HEADS, VOCAB_SIZE, PlainAttention, forward, load_plain, prompt, save_hf_llama

# fp32 sums taken in another order; logits are of order 1 to 10.
TOLERANCE = 1e-4
CASES = [(name, tied) for name in HEADS for tied in (False, True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[Path, Tensor]]:
    """Checkpoint folder, and transformers' logits of prompt(37), of every case."""
    made = {}
    for name, tied in CASES:
        folder = tmp_path_factory.mktemp(f"{name}-{tied}")
        hf = save_hf_llama(folder / "hf", *HEADS[name], tie_word_embeddings=tied)
        convert(folder / "hf", folder / "megatron")
        with torch.inference_mode():
            made[name, tied] = (folder / "megatron", hf(prompt(37)[None]).logits[0])
    return made


def _logits_of_all(folders: list[Path]) -> list[np.ndarray]:
    return [forward(load_plain(folder), prompt(37)).numpy() for folder in folders]


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_logits_equal_transformers(models: dict[tuple[str, bool], tuple[Path, Tensor]], tp_size: int) -> None:
    fits = [case for case in CASES if not any(heads % tp_size for heads in HEADS[case[0]])]
    assert fits
    for logits in run_ranks(tp_size, _logits_of_all, [models[case][0] for case in fits]):
        for case, found in zip(fits, logits, strict=True):
            assert found.shape == (37, VOCAB_SIZE) and found.dtype == np.float32
            torch.testing.assert_close(
                torch.from_numpy(found), models[case][1], atol=TOLERANCE, rtol=TOLERANCE
            )


def _logits_without_all_reduce(folder: Path) -> np.ndarray:
    gpt = load_plain(folder)
    alone = gpt.gpt.pg_collection.cp
    for layer in gpt.gpt.decoder.layers:
        layer.self_attention.linear_proj.tp_group = alone
    return forward(gpt, prompt(37)).numpy()


def test_control_without_the_tp_all_reduce_logits_are_wrong(
    models: dict[tuple[str, bool], tuple[Path, Tensor]],
) -> None:
    folder, expected = models["gqa-8-2", False]
    for found in run_ranks(2, _logits_without_all_reduce, folder):
        assert np.abs(found - expected.numpy()).max() > 0.1


def _interleaved(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    gpt = load_plain(folder)
    prompts = [prompt(11, seed=1), prompt(5, seed=2)]
    hidden = [gpt.embed(ids[:, None], torch.arange(len(ids))) for ids in prompts]
    angles = [gpt.angles(torch.arange(len(ids))) for ids in prompts]
    for index in range(gpt.num_layers):
        hidden = [gpt.layer(index, h, gpt.angles_of(index, a)) for h, a in zip(hidden, angles, strict=True)]
    return [
        (gpt.logits(h)[:, 0].numpy(), forward(gpt, ids).numpy())
        for h, ids in zip(hidden, prompts, strict=True)
    ]


def test_a_prefill_paused_between_layers_gives_the_same_bits(
    models: dict[tuple[str, bool], tuple[Path, Tensor]],
) -> None:
    for paused, straight in run_ranks(1, _interleaved, models["mha-4", False][0])[0]:
        assert np.array_equal(paused, straight)


class _CountingAttention(PlainAttention):
    shapes: list[tuple[int, ...]] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: object) -> Tensor:
        self.shapes.extend((tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return super().forward(q, k, v, mask, **kwargs)


def _no_tokens(folder: Path) -> tuple[tuple[int, ...], list[tuple[int, ...]], bool]:
    gpt = load_plain(folder)
    for layer in gpt.gpt.decoder.layers:
        layer.self_attention.core_attention = _CountingAttention()
    logits = forward(gpt, prompt(0))
    return tuple(logits.shape), _CountingAttention.shapes, parallel_state.is_initialized()


def test_a_rank_without_tokens_still_enters_the_core_attention_of_every_layer(
    models: dict[tuple[str, bool], tuple[Path, Tensor]],
) -> None:
    for shape, entered, initialised in run_ranks(2, _no_tokens, models["gqa-8-2", True][0]):
        assert shape == (0, VOCAB_SIZE)
        assert entered == [(0, 1, 4, 8), (0, 1, 1, 8), (0, 1, 1, 8)] * 2  # q, k, v of tp 2, in 2 layers
        assert not initialised, "Megatron's global parallel_state must stay unused"


def _bf16_logits(folder: Path) -> tuple[np.ndarray, torch.dtype]:
    gpt = load_plain(folder, torch.bfloat16)
    return forward(gpt, prompt(37)).numpy(), gpt.embed(prompt(1)[:, None], torch.zeros(1)).dtype


def test_weights_are_cast_when_loaded(models: dict[tuple[str, bool], tuple[Path, Tensor]]) -> None:
    folder, expected = models["gqa-8-2", False]
    for found, dtype in run_ranks(2, _bf16_logits, folder):
        assert dtype == torch.bfloat16
        # bf16 keeps 8 bits: a few percent of the spread of the logits after two layers.
        assert np.abs(found - expected.numpy()).mean() < 0.05 * expected.std()
