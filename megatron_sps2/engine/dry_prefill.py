"""The largest prefill steps that a configuration allows, to be run for their memory alone.

Plans and block numbers; runs nothing. Layers of a kind need as much as each other: one of each kind will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_sps2.attention.strategy import choose_strategy, csa_strategy, lay_out, wants_csa
from megatron_sps2.config import CacheConfig, ModelConfig, SamplingParams
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.engine.plan import Blocks, NewPrompt, PrefillPiece, StepPlan

PARAMS = SamplingParams(max_tokens=1)
STRIDE = 7919  # a prime: token ids that do not repeat for a while


@dataclass(frozen=True, slots=True, kw_only=True)
class DryPrefill:
    """Plans of one step, a layer of each kind in each; requests are 0, 1, ..."""

    plans: tuple[StepPlan, ...]
    cache: CacheConfig  # just large enough
    # What every rank has of request 0 before: its blocks, and how many tokens, which are the nearest ones.
    past_blocks: tuple[int, ...]
    num_past: int


def dry_prefills(config: EngineConfig, model: ModelConfig) -> Iterator[DryPrefill]:
    """What may need most: exactly, and with CSA where requests can ask for it."""
    lengths, num_past = largest_step(config)
    for strategy in _strategies(config, model, num_past):
        yield _dry_prefill(config, model, strategy, lengths, num_past)


def largest_step(config: EngineConfig) -> tuple[list[int], int]:
    """New tokens of each prompt, and those that are cached before the first one's."""
    longest, schedule = config.max_model_len, config.schedule
    batched = schedule.max_num_batched_tokens
    if schedule.policy == "sarathi":  # the last chunk of the longest prompt
        return [min(batched, longest)], max(0, longest - batched)
    if schedule.policy == "sps2":  # whose batches of short prompts have so many on each rank
        batched = config.parallel.sp_size * max(batched, schedule.short_prompt_tokens)
    whole, rest = divmod(max(batched, longest), longest)
    return [longest] * whole + [rest] * bool(rest), 0


def max_started_tokens(config: EngineConfig) -> int | None:
    """Of long prefills that pause between layers: as asked for, else those of a largest step, and as many
    again; None where none pause."""
    if config.schedule.policy != "sps2":
        return None
    return config.schedule.max_started_tokens or 2 * sum(largest_step(config)[0])


def layers_of_each_kind(model: ModelConfig) -> list[int]:
    """Rising: the first layer with a window and the first without, as far as there are."""
    kinds = {layer in model.window_layers: layer for layer in reversed(range(model.num_layers))}
    return sorted(kinds.values())


def _strategies(config: EngineConfig, model: ModelConfig, num_past: int) -> Iterator[str]:
    tp_size, setting = config.parallel.tp_size, config.csa
    yield choose_strategy(
        config.attention.strategy,
        num_heads=model.num_attention_heads // tp_size,
        num_kv_heads=model.num_query_groups // tp_size,
        sp_size=config.parallel.sp_size,
        num_past=num_past,
    )
    if setting and wants_csa("csa", config.attention, setting, config.max_model_len, num_past):
        yield csa_strategy(setting)


def _dry_prefill(
    config: EngineConfig, model: ModelConfig, strategy: str, lengths: Sequence[int], num_past: int
) -> DryPrefill:
    sp_size, size = config.parallel.sp_size, config.block_size
    past = -(-num_past // sp_size)
    # Falling, so that no two are neighbours: a cache that was long in use looks like this.
    past_blocks = tuple(reversed(range(-(-past // size))))
    taken, pieces = [len(past_blocks)] * sp_size, list[PrefillPiece]()
    for request_id, length in enumerate(lengths):
        ends = [
            first - (-tokens // size)
            for first, tokens in zip(taken, _tokens_per_rank(config, strategy, length), strict=True)
        ]
        blocks = tuple(tuple(range(first, end)) for first, end in zip(taken, ends, strict=True))
        taken = ends
        prompt = _prompt(model, num_past + length)
        pieces.append(_piece(request_id, num_past, strategy, blocks, prompt))
    return DryPrefill(
        plans=tuple(_of_layer(pieces, layer) for layer in layers_of_each_kind(model)),
        cache=CacheConfig(num_blocks=max(taken), block_size=size),
        past_blocks=past_blocks,
        num_past=past,
    )


def _tokens_per_rank(config: EngineConfig, strategy: str, length: int) -> Sequence[int]:
    unit = config.block_size if config.schedule.prefix_caching else 1
    return lay_out(strategy, length, config.parallel.sp_size, config.csa, unit=unit).tokens_per_rank


def _prompt(model: ModelConfig, num_tokens: int) -> NewPrompt:
    ids = tuple(STRIDE * place % model.vocab_size for place in range(num_tokens))
    return NewPrompt(token_ids=ids, params=PARAMS)


def _piece(request_id: int, start: int, strategy: str, blocks: Blocks, prompt: NewPrompt) -> PrefillPiece:
    """All tokens of the prompt behind `start`, through the first layer."""
    return PrefillPiece(
        request_id=request_id,
        start=start,
        stop=len(prompt.token_ids),
        first_layer=0,
        last_layer=1,
        strategy=strategy,
        blocks=blocks,
        prompt=prompt,
    )


def _of_layer(pieces: Sequence[PrefillPiece], layer: int) -> StepPlan:
    """The same rows through another layer than 0, which is the first."""
    if layer == 0:
        return StepPlan(pieces=tuple(pieces))
    values = {"first_layer": layer, "last_layer": layer + 1, "blocks": (), "prompt": None}
    return StepPlan(pieces=tuple(replace(piece, **values) for piece in pieces))  # type: ignore[arg-type]
