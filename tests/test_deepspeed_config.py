"""--deepspeed-config FILE: what DeepSpeed's users have written down becomes our flags."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_sps2.cli.deepspeed_config import DTYPE_NAMES, READ, SKIPPED, read_deepspeed
from megatron_sps2.cli.main import main, parse_args
from tests.sps2_command import ROOT

EXAMPLE = ROOT / "launch" / "deepspeed.json"
# As a training script has it.
TRAINING = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True},
    "tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True},
}


def read(tmp_path: Path, content: Any) -> dict[str, Any]:
    (tmp_path / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_deepspeed(str(tmp_path / "ds.json"))[0]


def parse(tmp_path: Path, content: Any, *flags: str, command: str = "serve") -> argparse.Namespace:
    (tmp_path / "ds.json").write_text(json.dumps(content))
    args = ("--checkpoint", "A", "--deepspeed-config", str(tmp_path / "ds.json"), *flags)
    return parse_args([command, *args])


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        ({}, {}),
        ({"tensor_parallel": {"tp_size": 4}}, {"tp": 4}),
        ({"tp": {"tp_size": 4, "enabled": True}}, {"tp": 4}),
        ({"tensor_parallel": {"enabled": False}}, {"tp": 1}),
        ({"tensor_parallel": {"autotp_size": 2, "tp": {"tp_size": 2}}}, {"tp": 2}),
        ({"tensor_parallel": {"autotp_size": 0}}, {}),
        ({"mp_size": 2}, {"tp": 2}),
        ({"sequence_parallel_size": 8, "data_parallel_size": 2}, {"sp": 8, "dp": 2}),
        ({"tp": {"tp_size": "auto"}, "sequence_parallel_size": "auto"}, {"tp": "auto", "sp": "auto"}),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, {"dtype": "bfloat16"}),
        ({"bfloat16": {"enabled": True}}, {"dtype": "bfloat16"}),
        ({"fp16": {"enabled": True, "loss_scale": 0}}, {"dtype": "float16"}),
        ({"bf16": {"enabled": "auto"}, "fp16": {}}, {}),
        ({"dtype": "half"}, {"dtype": "float16"}),
        ({"dtype": "bf16", "bf16": {"enabled": True}}, {"dtype": "bfloat16"}),
        ({"max_out_tokens": 4096}, {"max-model-len": 4096}),
        ({"max_tokens": 4096}, {"max-model-len": 4096}),
        (TRAINING, {"tp": 2, "dtype": "bfloat16"}),
    ],
)
def test_deepspeeds_names_become_ours(
    tmp_path: Path, content: dict[str, Any], settings: dict[str, Any]
) -> None:
    assert read(tmp_path, content) == settings


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            {"quant": {"enabled": True}},
            "^quant is not known here; of DeepSpeed's keys tensor_parallel, ",
        ),
        ({"tensor_parallel": {"size": 2}}, r"^tensor_parallel\.size is not known here"),
        ({"tp": {"tp_size": 2}, "mp_size": 4}, r"^tp\.tp_size says 2 and mp_size says 4; both are --tp"),
        (
            {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
            r"^bf16\.enabled says bfloat16 and fp16\.enabled says float16",
        ),
        ({"dtype": "int8"}, "^dtype = 'int8' is not served"),
        (
            {"sequence_parallel_size": 0},
            '^sequence_parallel_size = 0 must be an integer .* or "auto"',
        ),
        ({"max_out_tokens": True}, "^max_out_tokens = True must be an integer"),
        ({"tp": 2}, "^tp = 2 must be an object"),
        ({"bf16": {"enabled": 1}}, r"^bf16\.enabled = 1 must be true, false"),
        ([], "^it holds a list"),
        ('{"mp_size": 1, "mp_size": 2}', "^mp_size stands twice"),
        ("{", "Expecting property name"),
    ],
)
def test_a_configuration_with_a_mistake_is_refused(tmp_path: Path, content: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path, content)


def test_the_users_flags_and_the_toml_file_win(tmp_path: Path) -> None:
    content = {"sequence_parallel_size": 4, "tp": {"tp_size": 2}, "dtype": "bf16", "max_out_tokens": 99}
    args = parse(tmp_path, content)
    assert (args.sp, args.tp, args.dtype, args.max_model_len) == (4, 2, "bfloat16", 99)
    args = parse(tmp_path, content, "--context-parallel-size", "8")
    assert (args.sp, args.tp) == (8, 2)
    (tmp_path / "run.toml").write_text("sp = 3\n")
    args = parse(tmp_path, content, "--config", str(tmp_path / "run.toml"), "--tp=1")
    assert (args.sp, args.tp, args.dtype) == (3, 1, "bfloat16")


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "doctor"])
def test_every_command_that_starts_ranks_reads_the_example(command: str) -> None:
    prompt = ("--prompt", "x") if command == "generate" else ()
    args = parse_args([command, "--checkpoint", "A", *prompt, "--deepspeed_config", str(EXAMPLE)])
    assert (args.sp, args.tp, args.dtype, args.max_model_len) == (2, 1, "bfloat16", 8192)


def test_replicas_are_refused_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(tmp_path, {"data_parallel_size": 2}).dp == 2
    assert parse(tmp_path, {"data_parallel_size": 1}, command="chat").sp == 1
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, {"data_parallel_size": 2}, command="chat")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert f"--deepspeed-config {tmp_path}/ds.json: data_parallel_size = 2 must be 1" in said


def test_what_only_trains_is_skipped_with_a_line_at_info(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(TRAINING))
    level = logging.getLogger().level
    try:
        for wanted in ("info", "warning"):
            flags = ("--deepspeed-config", str(tmp_path / "ds.json"), "--log-level", wanted)
            assert main(["doctor", *flags, "--json"]) == 0
            said = capsys.readouterr().err
            skipped = "not used here: train_batch_size, gradient_accumulation_steps, optimizer, zero_opt"
            assert (skipped in said) == (wanted == "info")
    finally:
        logging.getLogger().setLevel(level)


def test_every_key_of_deepspeeds_inference_is_decided_upon() -> None:
    """Held against the installed DeepSpeed: a new key of its must be read, skipped, or refused knowingly."""
    config = pytest.importorskip("deepspeed.inference.config")
    refused = {
        *("quant", "moe", "ep_size", "ep_group", "expert_group", "ep_mp_group", "expert_mp_group"),
        *("moe_experts", "moe_type", "mpu", "config", "args", "base_dir", "checkpoint_config", "ckpt_config"),
        *("save_mp_checkpoint_path",),
    }
    fields = config.DeepSpeedInferenceConfig.model_fields
    names = {*fields, *(field.alias for field in fields.values() if field.alias)}
    assert names <= {*READ, *SKIPPED} | refused
    assert not refused & {*READ, *SKIPPED}
    for name, dtype in DTYPE_NAMES.items():
        assert str(config.DtypeEnum.from_str(name).value[0]) == f"torch.{dtype}"
