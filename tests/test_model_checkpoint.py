"""Checkpoints: saved at one tp size and loaded at another; what is broken is named, and nobody hangs."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoints_tools.convert import convert
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.model import checkpoint as checkpoint_module
from megatron_sps2.model.checkpoint import load_weights, save_model
from megatron_sps2.model.index import read_index, saved_tensors
from megatron_sps2.model.manifest import MANIFEST_NAME, load_model_config, read_manifest
from megatron_sps2.model.mapped_reader import MappedReader, _lies_in_order
from megatron_sps2.model.spec import build_gpt
from megatron_sps2.parallel.groups import ParallelGroups
from tests.ranks import RankFailed, run_ranks
from tests.tiny_llama import PlainAttention, forward, load_plain, prompt, save_hf_llama


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_hf_llama(folder / "hf", 6, 6)
    convert(folder / "hf", folder / "megatron")
    return folder / "megatron"


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "megatron"))


def _logits(folder: Path) -> np.ndarray:
    return forward(load_plain(folder), prompt(9)).numpy()


def _save_again(folder: Path, target: Path) -> None:
    # run_ranks marks its ranks as daemons, which may not have children; Megatron's writer is one.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    model = load_model_config(folder)
    pg = ParallelGroups.create(ParallelConfig(tp_size=dist.get_world_size())).to_megatron()
    gpt = build_gpt(model, pg, PlainAttention, torch.float32)
    load_weights(gpt, folder, pg)
    save_model(gpt, target, model, "float32", pg)


def test_saved_at_tp_2_it_loads_at_tp_1_and_3(original: Path, tmp_path: Path) -> None:
    (expected,) = run_ranks(1, _logits, original)
    run_ranks(2, _save_again, original, tmp_path / "tp2")
    assert not list(tmp_path.glob(".*")), "the partial folder is gone"
    for world_size in (1, 3):
        for found in run_ranks(world_size, _logits, tmp_path / "tp2"):
            # The same weights; tp adds fp32 sums in another order.
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_the_manifest_tells_model_dtype_and_sizes(original: Path) -> None:
    manifest = read_manifest(original)
    assert (manifest.dtype, manifest.model.num_attention_heads, manifest.model.eos_token_ids) == (
        "float32",
        6,
        (2,),
    )
    assert manifest.files.keys() >= {"release/.metadata", "release/common.pt"}
    assert (original / "latest_checkpointed_iteration.txt").read_text().strip() == "release"


def test_equal_weights_have_one_id_and_others_another(original: Path, tmp_path: Path) -> None:
    """Control: the same shape with one number changed by one rounding step."""
    mine = read_manifest(original).content_id
    assert len(mine) == 64
    source = Path(shutil.copytree(original.parent / "hf", tmp_path / "hf"))
    convert(source, tmp_path / "again")
    assert read_manifest(tmp_path / "again").content_id == mine
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nextafter(weights["model.norm.weight"][3], torch.tensor(9.0))
    save_file(weights, source / "model.safetensors")
    convert(source, tmp_path / "other")
    assert read_manifest(tmp_path / "other").model == read_manifest(original).model
    assert read_manifest(tmp_path / "other").content_id not in (mine, "")


def test_a_checkpoint_written_before_there_were_ids_loads(original: Path, checkpoint: Path) -> None:
    path = checkpoint / MANIFEST_NAME
    content = json.loads(path.read_text())
    del content["content_id"]
    path.write_text(json.dumps(content))
    assert read_manifest(checkpoint).content_id == ""
    (found,), (expected,) = run_ranks(1, _logits, checkpoint), run_ranks(1, _logits, original)
    np.testing.assert_array_equal(found, expected)


def test_saving_over_a_folder_of_other_things_is_refused_on_all_ranks(original: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").touch()
    with pytest.raises(RankFailed, match="OSError: .*never replaced"):
        run_ranks(2, _save_again, original, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_model_config(tmp_path / "nowhere")


def test_a_folder_without_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"has no {MANIFEST_NAME}"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version=99"),
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"files": None}, "cannot be understood"),
        ({"model": {"layers": 3}}, r"unknown model fields \['layers'\]"),
        ({"model": {}}, "'eos_token_ids' is missing"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_named(
    checkpoint: Path, change: dict[str, object], message: str
) -> None:
    path = checkpoint / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_model_config(checkpoint)


def test_a_manifest_that_is_not_json_is_named(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).write_text("{ half")
    with pytest.raises(ValueError, match=f"{MANIFEST_NAME} cannot be understood"):
        load_model_config(checkpoint)


def _cut_in_half(checkpoint: Path) -> str:
    path = max((checkpoint / "release").iterdir(), key=lambda path: path.stat().st_size)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size // 2)
    return f"{path.name} has {size // 2} bytes, {size} expected"


def test_a_truncated_file_is_named_with_both_sizes(checkpoint: Path) -> None:
    message = _cut_in_half(checkpoint)
    with pytest.raises(RankFailed, match=f"ValueError: .*{message}.*sps2 convert"):
        run_ranks(1, _logits, checkpoint)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "release" / "common.pt").unlink()
    with pytest.raises(RankFailed, match=r"FileNotFoundError: .*common\.pt is missing.*sps2 convert"):
        run_ranks(1, _logits, checkpoint)


def _error_of(folders: list[Path]) -> str:
    try:
        load_plain(folders[dist.get_rank()])
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_file_truncated_on_one_rank_only_is_an_error_on_all(original: Path, checkpoint: Path) -> None:
    message = _cut_in_half(checkpoint)
    whole, broken = run_ranks(2, _error_of, [original, checkpoint], timeout_s=60)
    assert message in broken and broken.startswith("rank 1: ")
    assert whole == broken


def test_a_tp_size_that_does_not_fit_the_heads_is_refused(tmp_path: Path) -> None:
    save_hf_llama(tmp_path / "hf", 9, 3)
    convert(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(RankFailed, match="ValueError: tp_size=2 does not divide num_attention_heads=9"):
        run_ranks(2, _logits, tmp_path / "megatron")


def _load_as(folder: Path, model: ModelConfig) -> None:
    pg = ParallelGroups.create(ParallelConfig()).to_megatron()
    load_weights(build_gpt(model, pg, PlainAttention, torch.float32), folder, pg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_embeddings": True}, "unexpected output_layer.weight"),
        (
            {"ffn_hidden_size": 192},
            r"mlp\.linear_fc1\.weight has shape \(2, 192, 48\), expected \(2, 384, 48\)",
        ),
        ({"num_layers": 3}, r"self_attention\.linear_qkv\.weight has shape \(2, 144, 48\), expected \(3, "),
        ({"hidden_size": 24}, r"word_embeddings\.weight has shape \(251, 48\), expected \(251, 24\)"),
        ({"vocab_size": 300}, r"word_embeddings\.weight has shape \(251, 48\), expected \(300, 48\)"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_named(
    original: Path, changes: dict[str, int], message: str
) -> None:
    model = replace(load_model_config(original), **changes)
    with pytest.raises(RankFailed, match=f"ValueError: the weights in .*{message}"):
        run_ranks(1, _load_as, original, model)


def test_a_model_that_wants_a_weight_the_files_lack_is_told_which(tmp_path: Path) -> None:
    save_hf_llama(tmp_path / "hf", 4, 4, tie_word_embeddings=True)
    model = convert(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(RankFailed, match=r"missing output_layer\.weight"):
        run_ranks(1, _load_as, tmp_path / "megatron", replace(model, tie_embeddings=False))


def _bytes_read(folder: Path) -> tuple[int, int, int]:
    """On a rank: bytes copied out of the files, bytes of its weights, weights that were read into a copy."""
    copied, whole = list[int](), MappedReader._copy

    def count(self: MappedReader, *args: Any) -> torch.Tensor:
        part = whole(self, *args)
        copied.append(part.nbytes)
        return part

    MappedReader._copy = count  # type: ignore[method-assign]
    model, pg = load_model_config(folder), ParallelGroups.create(_all_tp()).to_megatron()
    gpt = build_gpt(model, pg, PlainAttention, torch.float32)
    storages = {weight.untyped_storage().data_ptr() for weight in gpt.parameters()}
    plain, copies = checkpoint_module.dist_checkpointing.load, list[str]()

    def load(*args: Any, **kwargs: Any) -> Any:
        state = plain(*args, **kwargs)
        tensors = {name: each for name, each in state.items() if isinstance(each, torch.Tensor)}
        copies.extend(n for n, each in tensors.items() if each.untyped_storage().data_ptr() not in storages)
        return state

    with mock.patch.object(checkpoint_module.dist_checkpointing, "load", load):
        load_weights(gpt, folder, pg)
    return sum(copied), sum(weight.nbytes for weight in gpt.parameters()), len(copies)


def _all_tp() -> ParallelConfig:
    return ParallelConfig(tp_size=dist.get_world_size())


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_rank_reads_its_own_part_straight_into_its_weights(original: Path, tp_size: int) -> None:
    row = 64 * 4  # of the padding of a vocabulary, which no file holds: hidden size x float32
    for read, held, num_copies in run_ranks(tp_size, _bytes_read, original):
        assert held - 2 * row <= read <= held and num_copies == 0


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_index_runs_nothing(checkpoint: Path, tmp_path: Path) -> None:
    index = checkpoint / "release" / ".metadata"
    index.write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    manifest["files"]["release/.metadata"] = index.stat().st_size
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(RankFailed, match=r"\.metadata cannot be read: it names posix\.mkdir"):
        run_ranks(1, _logits, checkpoint)
    assert not (tmp_path / "evil").exists()
    pickle.loads(index.read_bytes())  # Control: it is hostile.
    assert (tmp_path / "evil").exists()


def test_a_hostile_index_reaches_nothing_through_a_module(tmp_path: Path) -> None:
    """It would give torch another idea of what a dtype is, and then ask it for os.mkdir by name."""
    module, path = b"torch.distributed.checkpoint.filesystem", str(tmp_path / "evil").encode()
    ops = b"\x80\x02c" + module + b"\ntorch\n}X\x05\x00\x00\x00dtypec" + module + b"\nCallable\nsb0"
    ops += b"ctorch\n_import_dotted_name\nX\x08\x00\x00\x00os.mkdir\x85R"
    ops += b"X" + len(path).to_bytes(4, "little") + path + b"\x85R."
    (tmp_path / ".metadata").write_bytes(ops)
    with pytest.raises(ValueError, match=r"it names torch\.distributed\.checkpoint\.filesystem\.torch"):
        read_index(tmp_path / ".metadata")
    assert not (tmp_path / "evil").exists()


def change_index(checkpoint: Path, name: str, change: Callable[[TensorStorageMetadata], None]) -> None:
    path = checkpoint / "release" / ".metadata"
    index = read_index(path)
    change(saved_tensors(index)[name])
    path.write_bytes(pickle.dumps(index))
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    manifest["files"]["release/.metadata"] = path.stat().st_size
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest))


def drop_a_chunk(tensor: TensorStorageMetadata) -> None:
    tensor.chunks.pop()


def make_integers(tensor: TensorStorageMetadata) -> None:
    tensor.properties.dtype = torch.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_a_chunk, r"of the \d+ values of .*linear_proj.weight the files hold"),
        (make_integers, "int32; only"),
    ],
)
def test_a_weight_that_is_not_whole_or_no_weight_is_named(
    change: Callable[[TensorStorageMetadata], None], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    """What is not stored would be whatever the memory held, and nobody told."""
    change_index(checkpoint, "decoder.layers.self_attention.linear_proj.weight", change)
    with pytest.raises(RankFailed, match=message):
        run_ranks(1, _logits, checkpoint)
    with pytest.raises(ValueError, match=message):
        convert(checkpoint, tmp_path / "hf", to="hf")


def test_a_hostile_file_beside_the_index_runs_nothing(checkpoint: Path, tmp_path: Path) -> None:
    common = checkpoint / "release" / "common.pt"
    torch.save({"more": Evil(tmp_path / "evil")}, common)
    manifest = json.loads((checkpoint / MANIFEST_NAME).read_text())
    manifest["files"]["release/common.pt"] = common.stat().st_size
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(RankFailed, match="ValueError: checkpoint .* cannot be read"):
        run_ranks(1, _logits, checkpoint)
    assert not (tmp_path / "evil").exists()


def test_what_does_not_lie_in_a_file_as_it_is_is_left_to_torch() -> None:
    weight = torch.arange(100.0)
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(weight, plain)
    assert _lies_in_order(weight, plain.getvalue())
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert not _lies_in_order(weight, packed.getvalue())
    assert not _lies_in_order(weight[10:], plain.getvalue()), "a part of what was saved"
    assert not _lies_in_order(weight.view(10, 10).T, plain.getvalue()), "saved in another order"
