"""`sps2 verify` and `sps2 inspect` on checkpoints of every format, as users call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.convert import convert, reshard
from checkpoints_tools.inspect import inspect
from checkpoints_tools.verify import verify
from tests.families import save_family
from tests.sps2_command import sps2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in three formats; in bfloat16; and with one value changed."""
    root = tmp_path_factory.mktemp("models")
    save_family("qwen2", root / "hf")
    convert(root / "hf", root / "core")
    convert(root / "core", root / "legacy", to="megatron-legacy", tp_size=2, pp_size=2)
    convert(root / "core", root / "half", dtype="bfloat16")
    convert(root / "core", root / "changed", to="hf")
    weights = load_file(root / "changed" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][7, 11] += 0.5
    save_file(weights, root / "changed" / "model.safetensors")
    return root


@pytest.mark.parametrize("other", ["core", "legacy"])
def test_the_same_model_in_another_format_is_equal(other: str, models: Path) -> None:
    done = sps2("verify", models / "hf", models / other, "--logits")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("equal: 26 weights, ") and "logits differ by 0.0e+00" in done.stdout


def test_the_first_difference_is_printed(models: Path) -> None:
    done = sps2("verify", models / "core", models / "changed")
    assert done.returncode == 1
    assert "model.layers.1.mlp.up_proj.weight: 1 of 6144 values differ, most at [7, 11]" in done.stdout


def test_another_dtype_is_equal_by_value_only(models: Path) -> None:
    strict = sps2("verify", models / "core", models / "half")
    assert strict.returncode == 1 and "dtype torch.float32 and torch.bfloat16" in strict.stdout
    loose = sps2("verify", models / "core", models / "half", "--tolerance", 0.01, "--logits")
    assert loose.returncode == 0 and "values differ by " in loose.stdout, loose.stdout
    assert sps2("verify", models / "core", models / "half", "--tolerance", 1e-6).returncode == 1


def test_another_shape_is_a_difference_of_configs(models: Path, tmp_path: Path) -> None:
    save_family("qwen3", tmp_path / "hf")
    done = sps2("verify", models / "core", tmp_path / "hf")
    assert done.returncode == 1 and done.stdout.startswith("config: "), done.stdout


def test_a_checkpoint_cut_otherwise_is_the_same_model(models: Path, tmp_path: Path) -> None:
    done = sps2("reshard", models / "legacy", tmp_path / "whole", "--tp", 1, "--pp", 2)
    assert done.returncode == 0, done.stderr
    assert inspect(tmp_path / "whole")["shards"] == {"tp": 1, "pp": 2}
    assert verify(models / "core", tmp_path / "whole").difference is None
    with pytest.raises(FileExistsError):
        reshard(models / "legacy", tmp_path / "whole", tp_size=2)


def test_what_cannot_be_read_is_a_mistake_of_the_user(models: Path, tmp_path: Path) -> None:
    done = sps2("verify", models / "core", tmp_path / "nowhere")
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "kind", "shards"),
    [("hf", "hf", None), ("core", "megatron", None), ("legacy", "megatron-legacy", {"tp": 2, "pp": 2})],
)
def test_inspect_tells_what_a_checkpoint_is(
    name: str, kind: str, shards: dict[str, int] | None, models: Path
) -> None:
    found = json.loads(sps2("inspect", models / name, "--json").stdout)
    assert (found["format"], found["dtype"], found["shards"]) == (kind, "float32", shards)
    weights = load_file(models / "hf" / "model.safetensors")
    assert found["num_params"] == sum(torch.Size(each.shape).numel() for each in weights.values())
    assert found["num_weights"] == len(weights)
    assert found["model"]["qkv_bias"] and found["model"]["num_query_groups"] == 2
    assert found["tp_sizes"] == [1, 2]
    assert "num_query_groups" in sps2("inspect", models / name).stdout
