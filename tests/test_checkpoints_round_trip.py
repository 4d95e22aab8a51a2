"""Checkpoints of one format to another and back: the same bits, at any tp and pp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints_tools.convert import convert
from megatron_sps2.model.manifest import read_manifest
from tests.families import save_family

FAMILIES = ("llama2", "llama3", "qwen2", "qwen2-yarn", "qwen3", "smollm3", "smollm2", "gpt2")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}


def equal(first: Path, second: Path) -> bool:
    """Every weight bit by bit."""
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family as Hugging Face has it."""
    found = {}
    for name in FAMILIES:
        found[name] = tmp_path_factory.mktemp(name) / "hf"
        save_family(name, found[name])
    return found


CASES = [
    *((name, tp, 1) for name in FAMILIES if name != "smollm2" for tp in (1, 2)),
    *((name, 1, 2) for name in FAMILIES if name != "smollm3"),
    ("llama2", 4, 1),
    ("llama2", 4, 2),
    ("smollm2", 3, 1),
    ("smollm3", 2, 5),
]


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_hf_core_legacy_core_hf_gives_the_same_bits(
    name: str, tp: int, pp: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    convert(folders[name], tmp_path / "core")
    convert(tmp_path / "core", tmp_path / "legacy", to="megatron-legacy", tp_size=tp, pp_size=pp)
    convert(tmp_path / "legacy", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "hf", to="hf")
    assert equal(folders[name], tmp_path / "hf")
    one, other = (read_manifest(tmp_path / each) for each in ("core", "again"))
    assert one.model == other.model and one.content_id == other.content_id
    shards = sorted(path.parent.name for path in tmp_path.glob("legacy/release/*/model_optim_rng.pt"))
    assert len(shards) == tp * pp


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_as_hugging_face_is_what_transformers_read_before(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Config and all: the same logits."""
    convert(folders[name], tmp_path / "core")
    convert(tmp_path / "core", tmp_path / "hf", to="hf")
    ids = torch.randint(251, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (folders[name], tmp_path / "hf")
        ]
    assert torch.equal(*logits)


def test_control_another_weight_is_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    other: Any = AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.bias[3] += 1e-6
    other.save_pretrained(tmp_path)
    assert not equal(folders["qwen2"], tmp_path)
