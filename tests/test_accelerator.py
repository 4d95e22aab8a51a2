"""A model on a device that is not the CPU: which tensor of a step would be on the wrong one.

Nothing is computed: the device is torch's `meta`, which has shapes and no memory, and where torch is built
for CUDA also fake tensors on `cuda`. Both need no GPU. A step that mixes devices fails as it would on one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.config import AttentionConfig, ModelConfig, SamplingParams, ScheduleConfig
from megatron_sps2.engine.build import EngineConfig, assemble
from megatron_sps2.engine.runner import Runner, _Ask
from megatron_sps2.engine.sampler import SampledToken
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.model.rotary import turned_by
from megatron_sps2.model.spec import build_gpt
from megatron_sps2.parallel.groups import ParallelGroups
from tests.ranks import RankFailed, run_ranks

LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=2,
    head_dim=8,
    vocab_size=97,
    max_seq_len=2048,
)
GPT2 = replace(
    LLAMA,
    num_query_groups=8,
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    linear_bias=True,
    learned_positions=True,
    tie_embeddings=True,
)
GEMMA = replace(LLAMA, is_gemma=True, activation="gelu_tanh", qk_norm=True, tie_embeddings=True)
MODELS = {"llama": LLAMA, "gpt2": GPT2, "gemma": GEMMA}
DEVICES = [
    "meta",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.version.cuda, reason="torch has no CUDA")),
]
# One is attended in tiles, one is short; both go on as decodes, in one batch.
PROMPT_LENGTHS = (1100, 5)
NUM_DECODED = 2


class OneDevice(TorchDispatchMode):
    """Every operator's tensors lie on one device, but for copies, indices and single numbers, as on CUDA."""

    FREE = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        devices = {x.device.type for x in tensors}
        if len(devices) > 1 and func.name() not in self.FREE:
            raise RuntimeError(f"{func.name()} mixes devices: {sorted(devices)}")
        return func(*args, **(kwargs or {}))


def _sample_nothing(runner: Runner, asks: Sequence[_Ask]) -> dict[int, SampledToken]:
    """Runner._sample with logits on the device; token 1 for everybody, as there are no numbers."""
    hidden = torch.cat([ask.part.hidden[ask.row][None] for ask in asks])
    logits = runner._forward.logits(hidden)
    assert logits.device.type == runner._device.type and logits.dtype == torch.float32
    assert logits.shape == (len(asks), 1, runner._forward.model.vocab_size)
    for ask in asks:
        runner._sequences[ask.request_id].token_ids.append(1)
    return {ask.request_id: SampledToken(1, 0.0) for ask in asks}


@contextlib.contextmanager
def _on_device(device: str) -> Iterator[None]:
    if device != "cuda":
        with OneDevice():
            yield
        return
    made = torch.tensor  # whose values stay with a fake tensor, and would need a GPU

    def without_values(data: Any, device: torch.device | str = "cpu", **kwargs: Any) -> Tensor:
        like = made(data, **kwargs)
        return torch.empty(like.shape, dtype=like.dtype, device=device)

    patched = mock.patch.object(torch, "tensor", without_values), mock.patch.object(GPTModel, "to", _to)
    with FakeTensorMode(), patched[0], patched[1]:
        yield


def _to(gpt: GPTModel, *, device: torch.device | str, dtype: torch.dtype) -> GPTModel:
    """GPTModel.to, which cannot exchange the elements of fake weights: here each is replaced."""
    for module in gpt.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(
                    weight.detach().to(device, dtype), requires_grad=False
                )
    return gpt


def _serve(model: ModelConfig, device: str, dtype: str, patches: Callable[[], Any]) -> list[int]:
    """Both prompts through the engine on one rank -> tokens of each answer."""
    config = EngineConfig(
        checkpoint="",
        dtype=dtype,  # type: ignore[arg-type]
        device=device,
        max_model_len=2048,
        attention=AttentionConfig(kernels="torch"),
        enforce_eager=True,
        schedule=ScheduleConfig(max_num_seqs=len(PROMPT_LENGTHS)),
    )
    groups, context = ParallelGroups.create(config.parallel), StepContext()
    core = functools.partial(SequenceParallelAttention, context=context)
    no_device = mock.patch.object(torch.cuda, "synchronize", lambda device=None: None)
    with _on_device(device), patches(), no_device, mock.patch.object(Runner, "_sample", _sample_nothing):
        gpt = build_gpt(model, groups.to_megatron(), core, getattr(torch, dtype), device)
        engine = assemble(config, groups, GptForward(gpt, model), context)
        params = SamplingParams(max_tokens=NUM_DECODED, ignore_eos=True)
        requests = [engine.add_request([3] * length, params) for length in PROMPT_LENGTHS]
        while any(request.finish_reason is None for request in requests):
            engine.step()
    return [len(request.output_ids) for request in requests]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("device", DEVICES)
def test_prefill_and_decode_keep_to_one_device(device: str, name: str, dtype: str) -> None:
    (answered,) = run_ranks(1, _serve, MODELS[name], device, dtype, contextlib.nullcontext)
    assert answered == [NUM_DECODED] * len(PROMPT_LENGTHS)


@contextlib.contextmanager
def _angles_left_on_the_host() -> Iterator[None]:
    def on_host(positions: Tensor, frequencies: Tensor) -> Tensor:
        return turned_by(torch.empty(positions.shape), torch.empty(frequencies.shape))

    with mock.patch("megatron_sps2.model.gpt.turned_by", on_host):
        yield


@pytest.mark.parametrize("device", DEVICES)
def test_control_a_tensor_left_on_the_host_is_found(device: str) -> None:
    with pytest.raises(RankFailed, match="mixes devices|two different devices"):
        run_ranks(1, _serve, LLAMA, device, "bfloat16", _angles_left_on_the_host)
