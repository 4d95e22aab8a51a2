"""--deepspeed-config FILE: DeepSpeed's JSON, read for what serving shares with it: axes, dtype, tokens.

Names are those of deepspeed/runtime/config.py and deepspeed/inference/config.py. Gives settings by the names
of our flags; knows no argparse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Said = tuple[str, str, Any]  # DeepSpeed's key, our flag, its value

# What trains, measures or injects kernels: without a meaning here.
SKIPPED = frozenset(
    {
        *("activation_checkpointing", "aio", "amp", "checkpoint", "checkpoint_writer", "comms_logger"),
        *("communication_data_type", "compile", "csv_monitor", "comet", "curriculum_learning"),
        *("data_efficiency", "data_types", "dataloader_drop_last", "datastates_ckpt", "disable_allgather"),
        *("disable_python_gc", "dump_state", "elasticity", "eigenvalue", "flops_profiler"),
        *("gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping"),
        *("gradient_predivide_factor", "hybrid_engine", "log_level", "managed_gradient_accumulation"),
        *("memory_breakdown", "monitor_config", "nebula", "optimizer", "pipeline", "prescale_gradients"),
        *("progressive_layer_drop", "scheduler", "seq_parallel_communication_data_type", "sparse_gradients"),
        *("steps_per_print", "tensorboard", "timers", "torch_autocast", "train_batch_size"),
        *("train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size", "wandb"),
        *("wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("zero_optimization", "zero"),
        *("enable_cuda_graph", "injection_dict", "injection_policy", "injection_policy_tuple"),
        *("keep_module_on_host", "kernel_inject", "min_out_tokens", "min_tokens", "replace_method"),
        *("replace_with_kernel_inject", "return_tuple", "set_empty_params", "state_manager", "manager"),
        *("training_mp_size", "transposed_mode", "triangular_masking", "tm", "triton_autotune", "use_triton"),
    }
)
SKIPPED_IN_TP = frozenset(
    {
        *("dtype", "injection_policy_tuple", "keep_module_on_host", "kernel_inject", "mpu"),
        *("partition_config", "preset_model", "replace_with_kernel_inject", "tp_grain_size", "tp_group"),
        *("tp_overlap_comm", "vocab_parallel_ce_backend", "vocab_parallel_lm_head"),
    }
)
DTYPE_NAMES = {
    **dict.fromkeys(("torch.float32", "float32", "fp32", "float"), "float32"),
    **dict.fromkeys(("torch.bfloat16", "bfloat16", "bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("torch.float16", "float16", "fp16", "half"), "float16"),
}
SIZES = {"sequence_parallel_size": "sp", "data_parallel_size": "dp", "mp_size": "tp"}
TOKENS = ("max_out_tokens", "max_tokens")
PRECISIONS = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16"}
TP = ("tensor_parallel", "tp")
READ = (*TP, *SIZES, *PRECISIONS, "dtype", *TOKENS)
# A value that DeepSpeed's callers fill in: sizes are then chosen here too, all else is left to our flags.
AUTO = "auto"


def read_deepspeed(path: str) -> tuple[Settings, list[str]]:
    """(settings by the names of our flags, the keys that were skipped).

    Raises OSError, or ValueError for what is no such file, is unknown, or contradicts itself.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}; DeepSpeed's configuration is a JSON object")
    unknown = [key for key in content if key not in READ and key not in SKIPPED]
    if unknown:
        raise ValueError(
            f"{unknown[0]} is not known here; of DeepSpeed's keys {', '.join(READ)} are read, and those of "
            f"training skipped: remove {unknown[0]}, or say it by a flag of sps2"
        )
    return _settled(_said(content)), [key for key in content if key in SKIPPED]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As DeepSpeed does: a key that stands twice would lose one of its values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} stands twice; keep one of them")
    return found


def _settled(said: Iterator[Said]) -> Settings:
    settings: Settings = {}
    first: dict[str, str] = {}
    for key, flag, value in said:
        if settings.setdefault(flag, value) != value:
            raise ValueError(
                f"{first[flag]} says {settings[flag]} and {key} says {value}; both are --{flag}, keep one"
            )
        first.setdefault(flag, key)
    return settings


def _said(content: Settings) -> Iterator[Said]:
    for key in TP:
        if key in content:
            yield from _said_of_tp(key, _object(key, content[key]))
    for key, flag in SIZES.items():
        if key in content:
            yield key, flag, _size(key, content[key])
    for key, dtype in PRECISIONS.items():
        if key in content and _is_enabled(f"{key}.enabled", _object(key, content[key]).get("enabled", False)):
            yield f"{key}.enabled", "dtype", dtype
    if (dtype := content.get("dtype", AUTO)) != AUTO:
        yield "dtype", "dtype", _dtype(dtype)
    for key in TOKENS:
        if key in content and (count := _size(key, content[key])) != AUTO:
            yield key, "max-model-len", count


def _said_of_tp(name: str, content: Settings) -> Iterator[Said]:
    """The block of inference, {"tp_size": 2}, or of training, {"autotp_size": 2, "tp": {"tp_size": 2}}."""
    for key, value in content.items():
        full = f"{name}.{key}"
        if key in TP:
            yield from _said_of_tp(full, _object(full, value))
        elif key == "enabled":
            if not _is_enabled(full, value):
                yield full, "tp", 1
        elif key == "tp_size" or (key == "autotp_size" and value != 0):  # 0: not by this key
            yield full, "tp", _size(full, value)
        elif key != "autotp_size" and key not in SKIPPED_IN_TP:
            raise ValueError(f"{full} is not known here; tp_size and autotp_size are read: remove it")


def _object(key: str, value: Any) -> Settings:
    if not isinstance(value, dict):
        raise ValueError(f"{key} = {value!r} must be an object, such as {{}}")
    return value


def _size(key: str, value: Any) -> int | str:
    if value == AUTO:
        return AUTO
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f'{key} = {value!r} must be an integer of at least 1, or "{AUTO}"')
    return value


def _is_enabled(key: str, value: Any) -> bool:
    if value != AUTO and not isinstance(value, bool):
        raise ValueError(f'{key} = {value!r} must be true, false or "{AUTO}"')
    return value is True


def _dtype(value: Any) -> str:
    if value not in DTYPE_NAMES:
        raise ValueError(f"dtype = {value!r} is not served; use one of {', '.join(DTYPE_NAMES)}")
    return DTYPE_NAMES[value]
