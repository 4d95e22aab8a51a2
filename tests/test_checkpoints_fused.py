"""Phi-3: a Llama that stores q, k and v as one weight, and gate and up. It comes back with Llama's names."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_tools.convert import convert
from checkpoints_tools.families import FAMILIES
from checkpoints_tools.inspect import inspect
from checkpoints_tools.verify import verify
from tests.families import save_family

# 8 query and 2 KV heads of 8, ffn 96: as tests/families.py makes it.
ROWS = {
    "qkv_proj": {"q_proj": 64, "k_proj": 16, "v_proj": 16},
    "gate_up_proj": {"gate_proj": 96, "up_proj": 96},
}
QKV = "model.layers.1.self_attn.qkv_proj.weight"
# Of the largest logit. fp32 in another order of sums.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi3") / "hf"
    save_family("phi3", folder)
    return folder


@pytest.fixture
def changed(phi3: Path, tmp_path: Path) -> Path:
    """A copy whose config and weights a test may change."""
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).write_bytes((phi3 / name).read_bytes())
    return tmp_path / "hf"


def cut_by_hand(fused: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by Phi-3's names -> by Llama's."""
    found = {}
    for name, weight in fused.items():
        kind = name.split(".")[-2]
        rows = ROWS.get(kind, {kind: len(weight)})
        for part, each in zip(rows, weight.split(list(rows.values())), strict=True):
            found[name.replace(kind, part)] = each
    return found


def logits(folder: Path) -> Tensor:
    """Of transformers."""
    ids = torch.randint(251, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def logits_error(first: Path, second: Path) -> float:
    one, other = logits(first), logits(second)
    return ((one - other).abs().max() / one.abs().max()).item()


def test_it_comes_back_as_what_it_computes_bit_by_bit(phi3: Path, tmp_path: Path) -> None:
    convert(phi3, tmp_path / "core")
    convert(tmp_path / "core", tmp_path / "legacy", to="megatron-legacy", tp_size=2, pp_size=2)
    convert(tmp_path / "legacy", tmp_path / "hf", to="hf")
    found, expected = load_file(tmp_path / "hf" / "model.safetensors"), load_file(phi3 / "model.safetensors")
    assert len(expected) == 15 and expected[QKV].shape == (96, 64)
    expected = cut_by_hand(expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (
        json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "mistral"
    )  # as it has a window
    assert logits_error(phi3, tmp_path / "hf") < TOLERANCE


def test_verify_and_inspect_see_the_parts(phi3: Path, tmp_path: Path) -> None:
    convert(phi3, tmp_path / "llama", to="hf")
    verdict = verify(phi3, tmp_path / "llama", logits=True)
    assert verdict.difference is None and verdict.logits_error == 0
    one, other = inspect(phi3), inspect(tmp_path / "llama")
    for key in ("format", "num_weights", "num_params", "tp_sizes", "model"):
        assert one[key] == other[key]


@pytest.mark.parametrize(
    ("whole", "parts"),
    [("gate_up_proj", ("up_proj", "gate_proj")), ("qkv_proj", ("q_proj", "v_proj", "k_proj"))],
)
def test_control_parts_in_another_order_give_other_logits(
    whole: str, parts: tuple[str, ...], phi3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = FAMILIES["phi3"]
    wrong = dataclasses.replace(family, fused={**family.fused, whole: parts})
    monkeypatch.setitem(FAMILIES, "phi3", wrong)
    convert(phi3, tmp_path / "hf", to="hf")
    assert logits_error(phi3, tmp_path / "hf") > 10 * TOLERANCE


def test_pickled_files_are_cut_alike(phi3: Path, changed: Path, tmp_path: Path) -> None:
    torch.save(load_file(changed / "model.safetensors"), changed / "pytorch_model.bin")
    (changed / "model.safetensors").unlink()
    convert(changed, tmp_path / "out", to="hf")
    assert verify(phi3, tmp_path / "out").difference is None


@pytest.mark.parametrize("shape", [(97, 64), (95, 64), (64,)])
def test_a_fused_weight_of_another_size_is_named(
    shape: tuple[int, ...], changed: Path, tmp_path: Path
) -> None:
    weights = load_file(changed / "model.safetensors")
    save_file(weights | {QKV: torch.zeros(shape)}, changed / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(f"{QKV} has shape {shape}, expected 96 rows")):
        convert(changed, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rotary_factor": 0.75}, "partial_rotary_factor=0.75 is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling of type 'longrope' is not supported"),
        # Older configs. transformers takes them for longrope.
        *(
            ({"rope_scaling": {"type": kind, "long_factor": [1.0], "short_factor": [1.0]}}, "type 'longrope'")
            for kind in ("su", "yarn")
        ),
    ],
)
def test_what_is_not_computed_is_refused(
    changes: dict[str, object], message: str, changed: Path, tmp_path: Path
) -> None:
    config = json.loads((changed / "config.json").read_text())
    del config["rope_parameters"]
    (changed / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        convert(changed, tmp_path / "out")
