"""Damaged and hostile checkpoints: the file and the weight are named, nothing is run, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.convert import convert
from tests.families import save_family

EVIL = "evil-was-here"


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in three formats."""
    root = tmp_path_factory.mktemp("whole")
    save_family("llama2", root / "hf")
    convert(root / "hf", root / "core")
    convert(root / "core", root / "legacy", to="megatron-legacy", tp_size=2)
    return root


@pytest.fixture
def models(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "models")
    return tmp_path / "models"


def shard(models: Path, rank: int = 1) -> Path:
    return models / "legacy" / "release" / f"mp_rank_{rank:02}" / "model_optim_rng.pt"


def change_weights(models: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = models / "hf" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def change_shard(models: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(shard(models), weights_only=False)
    change(content)
    torch.save(content, shard(models))


def cut(path: Path, keep: float = 0.6) -> None:
    os.truncate(path, int(path.stat().st_size * keep))


def nan_in(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name].view(-1)[5] = torch.nan


def swapped(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name].T.contiguous()


def as_integers(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name].to(torch.int8)


Q, NORM, FC1 = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "decoder.layers.1.mlp.linear_fc1.weight",
)
DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "hf file truncated": (
        "hf",
        lambda models: cut(models / "hf" / "model.safetensors"),
        r"model\.safetensors .* cannot be read",
    ),
    "hf weight missing": (
        "hf",
        lambda models: change_weights(models, lambda weights: weights.pop(NORM)),
        r"model\.norm\.weight \(64,\) is missing",
    ),
    "hf shape swapped": (
        "hf",
        lambda models: change_weights(models, lambda weights: swapped(weights, "lm_head.weight")),
        r"lm_head\.weight has shape \(64, 251\), expected \(251, 64\)",
    ),
    "hf values NaN": (
        "hf",
        lambda models: change_weights(models, lambda weights: nan_in(weights, Q)),
        r"hf: 1 of 4096 values of model\.layers\.1\.self_attn\.q_proj\.weight are NaN",
    ),
    "hf dtype wrong": (
        "hf",
        lambda models: change_weights(models, lambda weights: as_integers(weights, Q)),
        r"q_proj\.weight is of dtype int8",
    ),
    "core file truncated": (
        "core",
        lambda models: cut(next((models / "core" / "release").glob("*.distcp"))),
        r"distcp has \d+ bytes, \d+ expected",
    ),
    "core file missing": (
        "core",
        lambda models: next((models / "core" / "release").glob("*.distcp")).unlink(),
        r"distcp is missing",
    ),
    "legacy shard missing": (
        "legacy",
        lambda models: shutil.rmtree(shard(models).parent),
        r"release holds the shards of tp 1, pp 1, its args say tp 2, pp 1",
    ),
    "legacy file truncated": ("legacy", lambda models: cut(shard(models)), r"mp_rank_01.* cannot be read"),
    "legacy weight missing": (
        "legacy",
        lambda models: change_shard(models, lambda content: content["model"].pop(FC1)),
        rf"mp_rank_01/model_optim_rng\.pt: {FC1} .* is missing",
    ),
    "legacy weight too many": (
        "legacy",
        lambda models: change_shard(
            models, lambda content: content["model"].update({f"{FC1[:-6]}bias": torch.ones(96)})
        ),
        r"mp_rank_01/model_optim_rng\.pt holds decoder\.layers\.1\.mlp\.linear_fc1\.bias, which",
    ),
    "legacy shape swapped": (
        "legacy",
        lambda models: change_shard(models, lambda content: swapped(content["model"], FC1)),
        rf"mp_rank_01/model_optim_rng\.pt: {FC1} has shape \(64, 96\), expected \(96, 64\)",
    ),
    "legacy values NaN": (
        "legacy",
        lambda models: change_shard(models, lambda content: nan_in(content["model"], FC1)),
        r"1 of 6144 values of model\.layers\.1\.mlp\.(gate|up)_proj\.weight are NaN",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_nothing_is_left_behind(kind: str, models: Path, tmp_path: Path) -> None:
    source, damage, message = DAMAGE[kind]
    damage(models)
    for to in ("megatron", "hf", "megatron-legacy"):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert(models / source, tmp_path / "out" / "target", to=to)  # type: ignore[arg-type]
        assert not list((tmp_path / "out").glob("*")), "half a checkpoint was left"


@pytest.mark.parametrize("source", ["hf", "core", "legacy"])
def test_control_what_is_whole_is_converted(source: str, models: Path, tmp_path: Path) -> None:
    convert(models / source, tmp_path / "out" / "target", to="hf")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["target"]


def test_a_hostile_shard_runs_nothing_until_it_is_trusted(models: Path, tmp_path: Path) -> None:
    change_shard(models, lambda content: content.update(opt=Evil(tmp_path / EVIL)))
    with pytest.raises(ValueError, match="mp_rank_01.*--trust-pickle"):
        convert(models / "legacy", tmp_path / "target")
    assert not (tmp_path / EVIL).exists()
    # Control: it is hostile.
    convert(models / "legacy", tmp_path / "target", trust_pickle=True)
    assert (tmp_path / EVIL).exists()


def test_a_hostile_bin_file_runs_nothing_until_it_is_trusted(models: Path, tmp_path: Path) -> None:
    weights = load_file(models / "hf" / "model.safetensors")
    (models / "hf" / "model.safetensors").unlink()
    torch.save({**weights, "more": Evil(tmp_path / EVIL)}, models / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not read.*--trust-pickle"):
        convert(models / "hf", tmp_path / "target")
    assert not (tmp_path / EVIL).exists()
    convert(models / "hf", tmp_path / "target", trust_pickle=True)
    assert (tmp_path / EVIL).exists()


def test_a_hostile_index_runs_nothing(models: Path, tmp_path: Path) -> None:
    index = models / "core" / "release" / ".metadata"
    index.write_bytes(pickle.dumps(Evil(tmp_path / EVIL)))
    manifest = models / "core" / "sps2_model.json"
    content = json.loads(manifest.read_text())
    content["files"]["release/.metadata"] = index.stat().st_size
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read: it names posix\.mkdir"):
        convert(models / "core", tmp_path / "target", to="hf")
    assert not (tmp_path / EVIL).exists()


def test_a_packed_archive_is_not_unpacked(models: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(shard(models)) as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    shutil.copyfile(bomb, shard(models))
    with pytest.raises(ValueError, match="mp_rank_01.* is packed"):
        convert(models / "legacy", tmp_path / "target")


def test_names_that_lead_outside_are_not_followed(models: Path, tmp_path: Path) -> None:
    shutil.move(models / "hf" / "model.safetensors", models / "outside.safetensors")
    names = load_file(models / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (models / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '\.\./outside\.safetensors', which is outside"):
        convert(models / "hf", tmp_path / "target")
