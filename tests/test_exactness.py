"""The main promise: at every (tp, sp) logits and greedy tokens are those of Hugging Face transformers."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import PrefillStep, SequenceParallelAttention, StepContext
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.strategy import choose_strategy
from megatron_sps2.config import CacheConfig, ParallelConfig, SamplingParams
from megatron_sps2.engine.build import EngineConfig, assemble
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.ledger import Ledger
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks
from tests.tiny_llama import prompt, save_hf_llama

# name: (query heads, KV heads, tied embeddings, tp sizes that fit)
MODELS = {
    "mha-4": (4, 4, False, (1, 2)),
    "gqa-8-2": (8, 2, True, (1, 2)),
    "gqa-9-3": (9, 3, True, (1, 3)),
    "mha-6": (6, 6, False, (1, 2, 3)),
}
LENGTHS = (1, 7, 257, 4097)
NUM_GENERATED = 64
# Of the largest logit. fp32 sums in another order over 4,097 keys and 2 layers; measured below 1e-5.
TOLERANCE = 1e-3


Rows = tuple[list[int], Tensor]


class Reference:
    """A random model: its converted checkpoint, and what transformers makes of each prompt."""

    def __init__(self, folder: Path, num_heads: int, num_kv_heads: int, tied: bool) -> None:
        hf = save_hf_llama(
            folder / "hf", num_heads, num_kv_heads, tie_word_embeddings=tied, max_position_embeddings=8192
        )
        self.checkpoint = folder / "megatron"
        convert(folder / "hf", self.checkpoint)
        self.prompts = [prompt(length, seed=length).tolist() for length in LENGTHS]
        with torch.inference_mode():
            self.logits = [hf(torch.tensor([ids])).logits[0] for ids in self.prompts]
        self.tokens = [greedy(hf, ids) for ids in self.prompts]


def greedy(hf: LlamaForCausalLM, ids: list[int]) -> list[int]:
    """NUM_GENERATED tokens by transformers' own generate."""
    whole = hf.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=NUM_GENERATED,
        min_new_tokens=NUM_GENERATED,
        do_sample=False,
        eos_token_id=None,
    )
    return whole[0, len(ids) :].tolist()


@functools.cache
def reference(name: str, root: Path) -> Reference:
    num_heads, num_kv_heads, tied, _ = MODELS[name]
    return Reference(root / name, num_heads, num_kv_heads, tied)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def run_everything(
    config: EngineConfig, prompts: list[list[int]], skipped: bool = False
) -> tuple[list[Rows], list[list[int]] | None, list[int]]:
    """On a rank: logits of the tokens held here; on rank 0 the greedy tokens, all prompts in one batch."""
    groups = ParallelGroups.create(config.parallel)
    context = StepContext()
    core = functools.partial(SequenceParallelAttention, context=context)
    forward = load_gpt(config.checkpoint, groups.to_megatron(), core, torch.float32)
    with exchange_skipped(skipped):
        logits = [own_logits(forward, context, Wire(groups.sp, Ledger()), ids) for ids in prompts]
        if skipped:
            return logits, None, []
    engine = assemble(config, groups, forward, context)
    if not engine.is_leader:
        engine.follow()
        return logits, None, []
    params = SamplingParams(max_tokens=NUM_GENERATED, ignore_eos=True)
    requests = [engine.add_request(ids, params) for ids in prompts]
    while any(request.finish_reason is None for request in requests):
        engine.step()
    for request in requests:
        engine.release(request)
    engine.stop()
    return logits, [request.output_ids for request in requests], engine.blocks.num_free_blocks


def own_logits(forward: GptForward, context: StepContext, wire: Wire, ids: list[int]) -> Rows:
    """Positions and logits [s/P, v] of the tokens that this rank holds in a prefill of `ids`."""
    model, sp_size = forward.model, wire.axis.size
    tp_size = forward.gpt.pg_collection.tp.size()
    heads = {
        "num_heads": model.num_attention_heads // tp_size,
        "num_kv_heads": model.num_query_groups // tp_size,
    }
    cache = KVCache(
        CacheConfig(num_blocks=-(-len(ids) // 64) + 1),
        num_layers=model.num_layers,
        num_kv_heads=heads["num_kv_heads"],
        head_dim=model.head_dim,
        dtype=torch.float32,
    )
    cache.grant(0, list(range(cache.config.num_blocks)))
    context.step = step = PrefillStep(
        cache=cache,
        wire=wire,
        request_id=0,
        strategy=choose_strategy("auto", **heads, sp_size=sp_size, num_past=0),
        num_tokens=len(ids),
        num_past=0,
        scale=model.head_dim**-0.5,
        overlap=True,
    )
    places = step.layout.positions(wire.axis.rank)
    hidden = forward.embed(torch.tensor(ids)[places].reshape(-1, 1))
    angles = forward.angles(torch.tensor(places, dtype=torch.int64))
    for layer in range(forward.num_layers):
        hidden = forward.layer(layer, hidden, angles)
    return places, forward.logits(hidden)[:, 0]


def logits_error(results: list[Any], wanted: list[Tensor]) -> float:
    """The largest error over all prompts and positions, relative to the prompt's largest logit."""
    worst = 0.0
    for i, want in enumerate(wanted):
        places = [place for rank in results for place in rank[0][i][0]]
        assert set(places) == set(range(len(want))), "some position was computed by no rank"
        got = torch.full_like(want, torch.nan)
        got[places] = torch.cat([rank[0][i][1] for rank in results])
        worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
    return worst


CASES = [(name, tp, sp) for name, (*_, tps) in MODELS.items() for tp in tps for sp in (1, 2, 3, 4)]


@pytest.mark.parametrize(("name", "tp_size", "sp_size"), CASES)
def test_logits_and_greedy_tokens_equal_transformers(
    name: str, tp_size: int, sp_size: int, root: Path
) -> None:
    want = reference(name, root)
    config = EngineConfig(
        checkpoint=str(want.checkpoint),
        parallel=ParallelConfig(sp_size=sp_size, tp_size=tp_size),
        max_model_len=max(LENGTHS) + NUM_GENERATED,
        max_num_seqs=len(LENGTHS),
        layers_per_piece=1,  # Prefills pause between their layers, and decodes run meanwhile.
    )
    results = run_ranks(sp_size * tp_size, run_everything, config, want.prompts)
    assert logits_error(results, want.logits) < TOLERANCE
    assert results[0][1] == want.tokens
    assert results[0][2] == [config.sized_cache().num_blocks] * sp_size, "blocks were not all given back"


@pytest.mark.parametrize("name", ["gqa-8-2", "gqa-9-3"])
def test_control_without_exchange_logits_are_wrong(name: str, root: Path) -> None:
    want = reference(name, root)
    config = EngineConfig(checkpoint=str(want.checkpoint), parallel=ParallelConfig(sp_size=2))
    results = run_ranks(2, run_everything, config, want.prompts[:3], True)
    assert logits_error(results, want.logits[:3]) > 10 * TOLERANCE


@pytest.mark.parametrize("strategy", ["ulysses", "pass_kv", "pass_q"])
def test_every_strategy_gives_the_same_tokens(strategy: str, root: Path) -> None:
    want = reference("gqa-8-2", root)
    config = EngineConfig(
        checkpoint=str(want.checkpoint),
        parallel=ParallelConfig(sp_size=2),
        max_model_len=max(LENGTHS) + NUM_GENERATED,
        max_num_seqs=len(LENGTHS),
    )
    config = replace(config, attention=replace(config.attention, strategy=strategy))
    assert run_ranks(2, run_everything, config, want.prompts)[0][1] == want.tokens
