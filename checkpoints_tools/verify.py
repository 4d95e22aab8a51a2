"""Are two checkpoints the same model? Of any format: by config, names, shapes, values, and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import megatron_sps2.model.eager  # noqa: F401  # isort: skip  # before anything of Megatron

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from checkpoints_tools.convert import open_source
from checkpoints_tools.core import alone
from checkpoints_tools.source import Source, check_weights
from checkpoints_tools.target import Progress
from megatron_sps2.config import ModelConfig
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.model.spec import build_gpt
from megatron_sps2.model.weights import hf_shapes, to_megatron

NUM_TOKENS = 64
# What only says where answers begin and end: formats differ in whether they keep it.
_NOT_THE_MODEL = ("bos_token_id", "eos_token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`difference` is the first one, None where there is none."""

    num_weights: int
    num_params: int
    largest_error: float = 0.0  # of all values, where a tolerance was given
    logits_error: float | None = None  # relative to the largest logit, where asked for
    difference: str | None = None


def verify(
    first: str | Path,
    second: str | Path,
    *,
    tolerance: float = 0.0,
    logits: bool = False,
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> Verdict:
    """Compares weight by weight, two in memory at a time; with `logits` both models as well.

    tolerance: 0 asks for the same bits; above, for values of any dtype within tolerance x the largest of a
    weight. logits: of NUM_TOKENS tokens, in float32. Raises as `convert` does for what cannot be read.
    """
    sources = [open_source(Path(each), trust_pickle=trust_pickle) for each in (first, second)]
    for source in sources:
        check_weights(source)
    shapes = hf_shapes(sources[0].model)
    count, params = len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())
    for found in _config_differences(sources[0].model, sources[1].model):
        return Verdict(num_weights=count, num_params=params, difference=found)
    largest = 0.0
    for done, name in enumerate(shapes, start=1):
        one, other = (source.fetch(name) for source in sources)
        error, found_here = _compare(name, one, other, tolerance)
        largest = max(largest, error)
        if found_here:
            return Verdict(num_weights=count, num_params=params, largest_error=largest, difference=found_here)
        if progress:
            progress("weights", done, count)
    logits_error = _logits_error(sources) if logits else None
    return Verdict(num_weights=count, num_params=params, largest_error=largest, logits_error=logits_error)


def _config_differences(one: ModelConfig, other: ModelConfig) -> Iterator[str]:
    second = asdict(other)
    for name, value in asdict(one).items():
        if value != second[name] and name not in _NOT_THE_MODEL:
            yield f"config: {name} is {value!r} and {second[name]!r}"


def _compare(name: str, one: Tensor, other: Tensor, tolerance: float) -> tuple[float, str | None]:
    """The largest difference, and what is to be said where it is too large."""
    if tolerance == 0 and one.dtype != other.dtype:
        return 0.0, f"{name}: dtype {one.dtype} and {other.dtype}; --tolerance compares them by value"
    if tolerance == 0 and torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
        return 0.0, None
    gaps = (one.float() - other.float()).abs().nan_to_num(nan=torch.inf)
    error, place = gaps.max().item(), torch.unravel_index(gaps.argmax(), gaps.shape)
    if tolerance > 0 and error <= tolerance * one.float().abs().max().item():
        return error, None
    at = tuple(int(index) for index in place)
    num = int((gaps > 0).sum())
    values = f"{one[at].item():g} and {other[at].item():g}"
    return error, f"{name}: {num} of {gaps.numel()} values differ, most at {list(at)}: {values}"


def _logits_error(sources: list[Source]) -> float:
    with alone() as pg_collection:
        one, other = (_logits(source, pg_collection) for source in sources)
    return ((one - other).abs().max() / one.abs().max()).item()


def _logits(source: Source, pg_collection: ProcessGroupCollection) -> Tensor:
    """[NUM_TOKENS, v] of tokens spread over the vocabulary."""
    model = source.model
    gpt = build_gpt(model, pg_collection, _plain_attention(model.softmax_scale), torch.float32)
    params = dict(gpt.named_parameters())
    with torch.no_grad():
        for name, weight in to_megatron(model, source.fetch):
            params[name].copy_(weight)
    forward = GptForward(gpt, model)
    length = min(NUM_TOKENS, model.max_seq_len)
    positions = torch.arange(length)
    hidden = forward.embed(positions[:, None] * 7919 % model.vocab_size, positions)
    angles = forward.angles(positions)
    for index in range(model.num_layers):
        hidden = forward.layer(index, hidden, angles)
    return forward.logits(hidden)[:, 0]


def _plain_attention(scale: float) -> type[nn.Module]:
    class Plain(nn.Module):
        """Causal attention of all tokens, on one rank."""

        def __init__(self, **kwargs: object) -> None:
            super().__init__()

        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: object) -> Tensor:
            """q [s, b, n, d], k and v [s, b, n_kv, d] -> [s, b, n*d]."""
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return out.permute(2, 0, 1, 3).flatten(2)

    return Plain
