"""What our engine makes of prompts on every rank of a world: logits at chosen positions, greedy tokens.

The exactness tests compare it with transformers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sps2.attention.core import PrefillStep, SequenceParallelAttention, StepContext
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.strategy import choose_strategy
from megatron_sps2.config import CacheConfig, SamplingParams
from megatron_sps2.engine.build import EngineConfig, assemble
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.ledger import Ledger
from tests.broken_wire import exchange_skipped

NUM_GENERATED = 64


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the positions whose logits are wanted."""

    ids: list[int]
    positions: list[int]


@dataclass(slots=True)
class RankResult:
    """The wanted positions of each prompt that this rank holds, and their logits [., v]; tokens on rank 0."""

    logits: list[tuple[list[int], Tensor]]
    tokens: list[list[int]] | None = None
    free_blocks: list[int] | None = None


def run_everything(config: EngineConfig, prompts: list[Prompt], skipped: bool = False) -> RankResult:
    """On a rank: prefills each prompt for its logits; then the engine answers all of them in one batch."""
    groups = ParallelGroups.create(config.parallel)
    context = StepContext()
    core = functools.partial(SequenceParallelAttention, context=context)
    forward = load_gpt(config.checkpoint, groups.to_megatron(), core, torch.float32)
    with exchange_skipped(skipped):
        sp = Wire(groups.sp, Ledger())
        wanted = [prompt for prompt in prompts if prompt.positions]
        result = RankResult([own_logits(forward, context, sp, prompt) for prompt in wanted])
    if skipped:
        return result
    engine = assemble(config, groups, forward, context)
    if not engine.is_leader:
        engine.follow()
        return result
    params = SamplingParams(max_tokens=NUM_GENERATED, ignore_eos=True)
    requests = [engine.add_request(prompt.ids, params) for prompt in prompts]
    while any(request.finish_reason is None for request in requests):
        engine.step()
    for request in requests:
        engine.release(request)
    engine.stop()
    result.tokens = [request.output_ids for request in requests]
    result.free_blocks = engine.blocks.num_free_blocks
    return result


def own_logits(
    forward: GptForward, context: StepContext, wire: Wire, prompt: Prompt
) -> tuple[list[int], Tensor]:
    """The prompt's wanted positions that this rank holds, and their logits [., v]."""
    model, sp_size, ids = forward.model, wire.axis.size, prompt.ids
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
    mine = [index for index, place in enumerate(places) if place in set(prompt.positions)]
    return [places[index] for index in mine], forward.logits(hidden[mine])[:, 0].clone()


def logits_error(results: list[RankResult], wanted: list[Tensor], prompts: list[Prompt]) -> float:
    """The largest error over all prompts and wanted positions, relative to the prompt's largest logit."""
    worst = 0.0
    for i, (want, prompt) in enumerate(zip(wanted, prompts, strict=True)):
        places = [place for result in results for place in result.logits[i][0]]
        assert set(places) == set(prompt.positions), "some position was computed by no rank"
        got = torch.full_like(want, torch.nan)
        rows = [prompt.positions.index(place) for place in places]
        got[rows] = torch.cat([result.logits[i][1] for result in results])
        worst = max(worst, ((got - want).abs().max() / want.abs().max()).item())
    return worst
