"""What our engine makes of prompts on every rank of a world: logits at chosen positions, greedy tokens.

The exactness tests compare it with transformers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sps2.attention.core import PrefillStep, SequenceParallelAttention, StepContext
from megatron_sps2.config import SamplingParams
from megatron_sps2.engine.build import EngineConfig, assemble
from megatron_sps2.engine.engine import Engine
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.parallel.groups import ParallelGroups
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


def run_everything(
    config: EngineConfig, prompts: list[Prompt], num_tokens: int = NUM_GENERATED, skipped: bool = False
) -> RankResult:
    """On a rank: the engine answers all prompts in one batch; logits are those of its own prefills."""
    groups = ParallelGroups.create(config.parallel)
    context = StepContext()
    core = functools.partial(SequenceParallelAttention, context=context)
    forward = load_gpt(config.checkpoint, groups.to_megatron(), core, getattr(torch, config.dtype))
    engine = assemble(config, groups, forward, context)
    found = watch_prefills(forward, context, groups.sp.rank, prompts)
    result = RankResult([])
    with exchange_skipped(skipped):
        if engine.is_leader:
            result.tokens = answer(engine, prompts, num_tokens)
            result.free_blocks = engine.blocks.num_free_blocks
        else:
            engine.follow()
    result.logits = [found[i] for i in range(len(prompts))]
    return result


def answer(engine: Engine, prompts: list[Prompt], num_tokens: int) -> list[list[int]]:
    """On rank 0: greedy tokens; request i is prompt i."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    requests = [engine.add_request(prompt.ids, params) for prompt in prompts]
    while any(request.finish_reason is None for request in requests):
        engine.step()
    for request in requests:
        engine.release(request)
    engine.stop()
    return [request.output_ids for request in requests]


def watch_prefills(
    forward: GptForward, context: StepContext, rank: int, prompts: list[Prompt]
) -> dict[int, tuple[list[int], Tensor]]:
    """From now on, by request: its wanted positions that this rank prefilled, and their logits [., v]."""
    plain, found = forward.layer, dict[int, tuple[list[int], Tensor]]()

    def layer(index: int, hidden: Tensor, angles: Tensor) -> Tensor:
        out = plain(index, hidden, angles)
        step = context.step
        if index == forward.num_layers - 1 and isinstance(step, PrefillStep):
            wanted = set(prompts[step.request_id].positions)
            places = step.layout.positions(rank)
            mine = [row for row, place in enumerate(places) if place in wanted]
            rows = forward.logits(out[mine])[:, 0].clone()
            found[step.request_id] = [places[row] for row in mine], rows
        return out

    forward.layer = layer  # type: ignore[method-assign]
    return found


def gathered_logits(results: list[RankResult], like: list[Tensor], prompts: list[Prompt]) -> list[Tensor]:
    """Of each prompt the logits at its wanted positions, in their order; `like` gives the shapes."""
    whole = []
    for i, (shape, prompt) in enumerate(zip(like, prompts, strict=True)):
        places = [place for result in results for place in result.logits[i][0]]
        assert set(places) == set(prompt.positions), "some position was computed by no rank"
        rows = [prompt.positions.index(place) for place in places]
        whole.append(torch.full_like(shape, torch.nan))
        whole[-1][rows] = torch.cat([result.logits[i][1] for result in results])
    return whole


def logits_error(results: list[RankResult], wanted: list[Tensor], prompts: list[Prompt]) -> float:
    """The largest error over all prompts and wanted positions, relative to the prompt's largest logit."""
    found = gathered_logits(results, wanted, prompts)
    errors = [(got - want).abs().max() / want.abs().max() for got, want in zip(found, wanted, strict=True)]
    return max(error.item() for error in errors)
