"""Checkpoints that DeepSpeed's own engines write, of modules whose weights are called as Megatron-DeepSpeed
calls them. One step is taken before, that changes nothing: a universal checkpoint needs an optimizer's state.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.tiny_llama import VOCAB_SIZE

Weights = Mapping[str, Tensor]


class Bag(nn.Module):
    """Parameters under the names they are given; forward touches all of them."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        parts: dict[str, dict[str, Tensor]] = {}
        for name, weight in weights.items():
            first, _, rest = name.partition(".")
            if rest:
                parts.setdefault(first, {})[rest] = weight
            else:
                self.register_parameter(first, nn.Parameter(weight.clone()))
        for name, part in parts.items():
            self.add_module(name, Bag(part))

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(weight.sum() for weight in self.parameters())


class Grid:
    """What DeepSpeed asks of Megatron's mpu: every rank is a tp rank of its own."""

    def __init__(self) -> None:
        self.alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size()

    def get_model_parallel_group(self) -> Any:
        return dist.group.WORLD

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self.alone

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def how_to_merge(args: argparse.Namespace, *, tells_halves: bool = True) -> dict[str, Any]:
    """Which weights ds_to_universal merges in which way: what Megatron-DeepSpeed tells it."""
    is_cut_in_halves = args.swiglu and tells_halves
    return {
        "vocabulary_parameter_patterns": [r".*word_embeddings\.weight", r".*(output_layer|lm_head)\.weight"],
        "original_vocab_size": VOCAB_SIZE,
        "tp_replicated_parameter_patterns": [
            r"(.*layernorm|\d+)\.(weight|bias)",
            r".*position_embeddings\.weight",
            r".*(dense|dense_4h_to_h)\.bias",
        ],
        "parameter_with_row_parallelism_patterns": [r".*(dense|dense_4h_to_h)\.weight"],
        "parameter_with_2_sub_params_cat_dim_0": [r".*dense_h_to_4h\.weight"] if is_cut_in_halves else [],
    }


def write(
    shards: list[Weights], args: argparse.Namespace, folder: str, zero_stage: int, merging: Mapping[str, Any]
) -> None:
    """On every rank: an engine over this rank's shard, saved."""
    deepspeed = _deepspeed()
    module = Bag(shards[dist.get_rank()])
    engine = _engine(deepspeed, module, zero_stage, mpu=Grid())
    engine.backward(engine(torch.zeros(())))
    engine.step()
    _save(engine, folder, args, merging)


def write_pipeline(
    layers: list[list[Weights]], args: argparse.Namespace, folder: str, merging: Mapping[str, Any]
) -> None:
    """On every rank: a pipeline engine of one stage over this rank's shard of each layer, saved.

    Around the embedding lie functions without weights, as in Megatron-DeepSpeed; where the output reuses it,
    it is a tied layer.
    """
    deepspeed = _deepspeed()
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    embedding, *rest = layers[dist.get_rank()]
    first: Any = Bag(embedding)
    if "lm_head.weight" not in rest[-1]:
        first = deepspeed.pipe.TiedLayerSpec("embed", Bag, embedding, tied_weight_attr="word_embeddings")
    specs = [_nothing, first, _nothing, *(Bag(weights) for weights in rest)]
    module = deepspeed.pipe.PipelineModule(
        layers=specs,
        topology=PipeModelDataParallelTopology(num_pp=1, num_mp=dist.get_world_size(), num_dp=1),
        loss_fn=lambda found, _: found,
        activation_checkpoint_interval=0,
    )
    engine = _engine(deepspeed, module, 1, gradient_accumulation_steps=1)
    engine.train_batch(iter([(torch.zeros(1, requires_grad=True), torch.zeros(1))]))
    _save(engine, folder, args, merging)


def make_universal(step: Path, folder: Path) -> None:
    """DeepSpeed's own ds_to_universal."""
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=str(step),
            output_folder=str(folder),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=False,
            inject_missing_state=False,
        )
    )


def _nothing(x: Any) -> Any:
    return x


def _deepspeed() -> Any:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed

    # A collective that it would compile, for half a minute; gloo does the same.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo", dist_init_required=False)
    return deepspeed


def _engine(deepspeed: Any, module: nn.Module, zero_stage: int, mpu: Any = None, **config: int) -> Any:
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0),
        mpu=mpu,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            **config,
        },
    )
    return engine


def _save(engine: Any, folder: str, args: argparse.Namespace, merging: Mapping[str, Any]) -> None:
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 1, "universal_checkpoint_info": merging}
    engine.save_checkpoint(folder, client_state=state)
