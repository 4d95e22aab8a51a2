"""`--sp auto --tp auto`: the layout for devices, a model and a longest prompt, and why."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sps2.cli import layout
from megatron_sps2.cli.layout import longest_wanted, settle_layout
from megatron_sps2.cli.main import parse_args
from megatron_sps2.config import ModelConfig
from megatron_sps2.engine.auto_layout import Devices, Wish, choose_layout
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel.groups import world_axis
from megatron_sps2.parallel.rank_env import RankEnv
from tests.ranks import run_ranks
from tests.sps2_command import answer, make_checkpoint, sps2, words, write_ids

LLAMA_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128256,
    max_seq_len=131072,
)
LLAMA_70B = replace(LLAMA_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64)
LLAMA_405B = replace(
    LLAMA_8B, num_layers=126, hidden_size=16384, ffn_hidden_size=53248, num_attention_heads=128
)
SMOLLM2 = ModelConfig(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=64,
    vocab_size=49152,
    max_seq_len=8192,
    tie_embeddings=True,
)
GPT2 = ModelConfig(
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    num_query_groups=12,
    head_dim=64,
    vocab_size=50257,
    max_seq_len=1024,
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    linear_bias=True,
    learned_positions=True,
    tie_embeddings=True,
)
K = 1024
GB = 10**9
A_NODE = Devices(count=8, per_node=8, free_bytes=80 * GB, kind="CUDA device")


def wish(model: ModelConfig, longest: int, **changes: Any) -> Wish:
    asked = Wish(
        model=model,
        longest=longest,
        dtype="bfloat16",
        block_size=64,
        output_copy=True,
        dp_size=1,
        sp_size=None,
        tp_size=None,
    )
    return replace(asked, **changes)


def grid(asked: Wish, devices: Devices) -> tuple[int, int, int]:
    chosen = choose_layout(asked, devices).parallel
    return chosen.dp_size, chosen.sp_size, chosen.tp_size


@pytest.mark.parametrize(
    ("asked", "devices", "expected"),
    [
        # 16 GB of weights fit a device: nothing is gained by tp.
        (wish(LLAMA_8B, 128 * K), A_NODE, (1, 8, 1)),
        (wish(LLAMA_8B, 128 * K, dtype="float32"), A_NODE, (1, 8, 1)),
        (wish(LLAMA_8B, 128 * K), replace(A_NODE, free_bytes=24 * GB), (1, 8, 1)),
        # The whole KV of one device, and what a prefill of 128K tokens holds, do not fit beside the weights.
        (wish(LLAMA_8B, 128 * K), replace(A_NODE, free_bytes=16 * GB), (1, 4, 2)),
        # Where fp8 keys and values take half of it, it does.
        (wish(LLAMA_8B, 128 * K), replace(A_NODE, free_bytes=22 * GB + GB // 2), (1, 4, 2)),
        (
            wish(LLAMA_8B, 128 * K, kv_cache_dtype="fp8"),
            replace(A_NODE, free_bytes=22 * GB + GB // 2),
            (1, 8, 1),
        ),
        # 141 GB: two devices would hold the weights and nothing else.
        (wish(LLAMA_70B, 128 * K), A_NODE, (1, 2, 4)),
        (wish(LLAMA_70B, 8 * K), replace(A_NODE, free_bytes=141 * GB), (1, 4, 2)),
        (wish(LLAMA_70B, 128 * K), replace(A_NODE, count=16), (1, 4, 4)),
        (wish(LLAMA_405B, 8 * K), replace(A_NODE, free_bytes=141 * GB), (1, 1, 8)),
        # 9 heads, 3 groups: tp is 1 or 3.
        (wish(SMOLLM2, 8 * K), A_NODE, (1, 8, 1)),
        (wish(SMOLLM2, 8 * K), replace(A_NODE, count=8, free_bytes=GB // 5), (1, 2, 3)),
        (wish(GPT2, K), replace(A_NODE, count=3, per_node=3), (1, 3, 1)),
        (wish(GPT2, K), replace(A_NODE, free_bytes=GB // 5), (1, 4, 2)),
        # Replicas share the devices.
        (wish(LLAMA_8B, 128 * K, dp_size=2), A_NODE, (2, 4, 1)),
        # A size that is given stays.
        (wish(LLAMA_8B, 128 * K, tp_size=4), A_NODE, (1, 2, 4)),
        (wish(LLAMA_70B, 128 * K, sp_size=1), A_NODE, (1, 1, 4)),
        (wish(LLAMA_8B, K, sp_size=2), replace(A_NODE, launched=True), (1, 2, 4)),
        (wish(LLAMA_8B, K, tp_size=2), replace(A_NODE, launched=True), (1, 4, 2)),
        # A tp group never crosses nodes: of 3 devices each, 2 would.
        (wish(LLAMA_8B, K), replace(A_NODE, count=6, per_node=3), (1, 6, 1)),
    ],
)
def test_the_fewest_tp_ranks_that_fit_and_the_rest_to_sp(
    asked: Wish, devices: Devices, expected: tuple[int, int, int]
) -> None:
    assert grid(asked, devices) == expected


@pytest.mark.parametrize(
    ("asked", "devices", "complaint"),
    [
        (
            wish(LLAMA_405B, 128 * K),
            A_NODE,
            r"131,072 tokens in bfloat16 fit no layout on 8 CUDA devices: --sp 1 --tp 8 needs 1\d\d\.\d GiB "
            r"\(9\d\.\d GiB weights, .* and 67\.1 GiB may be used of 74\.5 GiB free; use more devices, a",
        ),
        (wish(LLAMA_405B, 128 * K), A_NODE, "a lower --max-model-len, --kv-cache-dtype fp8$"),
        (wish(LLAMA_405B, 128 * K, kv_cache_dtype="fp8"), A_NODE, "a lower --max-model-len$"),
        # More nodes do not help: weights are cut within one.
        (wish(LLAMA_405B, 128 * K), replace(A_NODE, count=64), "fit no layout on 64 CUDA devices"),
        (wish(LLAMA_8B, K, tp_size=3), A_NODE, r"tp_size=3 does not divide .* use --tp 1 or 2 or 4 or 8"),
        (wish(LLAMA_8B, K, dp_size=9), A_NODE, "--dp 9 --sp auto --tp auto has no layout on 8 CUDA devices"),
        (
            wish(LLAMA_8B, K, sp_size=3),
            replace(A_NODE, launched=True),
            "--dp 1 --sp 3 --tp auto has no layout on 8 CUDA devices, 8 to a node: dp x sp x tp must be all",
        ),
    ],
)
def test_what_has_no_layout_is_refused_with_the_numbers(
    asked: Wish, devices: Devices, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        choose_layout(asked, devices)


def test_the_reason_names_the_numbers_it_was_chosen_by() -> None:
    why = choose_layout(wish(LLAMA_70B, 128 * K), A_NODE).why
    assert why.startswith("--sp 2 --tp 4 on 8 CUDA devices: a rank needs ")
    assert "131,072 tokens" in why and "67.1 GiB may be used of 74.5 GiB free; --tp 2 would need " in why
    assert "unused" not in why
    spare = choose_layout(wish(SMOLLM2, 8 * K, tp_size=3), A_NODE)
    assert spare.why.endswith("; 2 of them stay unused") and spare.parallel.world_size == 6


def test_a_layout_that_fits_with_less_memory_fits_with_more() -> None:
    """And never asks for fewer ranks of tp when there is less."""
    sizes = [
        choose_layout(wish(LLAMA_8B, 128 * K), replace(A_NODE, free_bytes=n * GB)).parallel.tp_size
        for n in range(12, 80, 3)
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1] == 1


# The command.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("auto"))


def flags(checkpoint: Path, *more: object) -> argparse.Namespace:
    return parse_args(["generate", "--checkpoint", str(checkpoint), *map(str, more)])


def test_the_longest_request_is_measured_by_the_prompt(checkpoint: Path, tmp_path: Path) -> None:
    model, ids = load_model_config(checkpoint), write_ids(tmp_path / "ids.json", range(3, 103))
    longest = {
        (*("--prompt", "x" * 1000), "--max-tokens", 9): 509,
        (*("--prompt-ids", ids), "--max-tokens", 1): -(-ids.stat().st_size // 2) + 1,
        ("--prompt", "-"): model.max_seq_len,
        (*("--prompt", "x"), "--max-tokens", 10**6): model.max_seq_len,
        (*("--prompt", "x"), "--max-model-len", 77): 77,
    }
    for given, expected in longest.items():
        assert longest_wanted(flags(checkpoint, *given), model) == expected


def test_numbers_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_args(["generate", "--checkpoint", "/none", "--prompt", "x", "--sp", "3"])
    settle_layout(args)
    assert (args.sp, args.tp, capsys.readouterr().err) == (3, 1, "")


def test_auto_gives_the_tokens_of_the_layout_it_chooses_and_says_why(checkpoint: Path) -> None:
    asked = ("--checkpoint", checkpoint, "--prompt", words(range(5, 25)), "--max-tokens", 8)
    done = sps2("generate", *asked, "--sp", "auto", "--tp", "auto", "--json")
    assert done.returncode == 0, done.stderr
    (why,) = done.stderr.splitlines()
    assert why.startswith("sps2: --sp 2 --tp 1 on 2 CPU ranks: a rank needs ")
    by_hand = answer(*asked, "--sp", 2)
    found = json.loads(done.stdout)
    assert found["token_ids"] == by_hand["token_ids"]
    assert len(found["kv_tokens_per_rank"]) == len(by_hand["kv_tokens_per_rank"]) == 2


def test_auto_without_a_checkpoint_is_refused() -> None:
    done = sps2("doctor", "--sp", "auto")
    assert done.returncode == 2 and "depend on the model; give --checkpoint, or numbers" in done.stderr


def test_under_a_launcher_all_its_ranks_are_used(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def settled(rank: int) -> tuple[int, int]:
        args = parse_args(["doctor", "--checkpoint", str(checkpoint), "--sp", "auto", "--tp", "3"])
        env = RankEnv(
            rank=rank, world_size=6, local_rank=rank % 3, local_world_size=3, init_method="", launcher="slurm"
        )
        settle_layout(args, env)
        return args.sp, args.tp

    assert settled(0) == (2, 3) and "--sp 2 --tp 3 on 6 CPU ranks" in capsys.readouterr().err
    assert settled(5) == (2, 3) and capsys.readouterr().err == ""


def _settle_in_world(checkpoint: Path, *given: str) -> tuple[int, int, str]:
    """On a rank whose device has half as much free as the one before it."""
    axis = world_axis()
    layout._free_bytes = lambda device, env: 10 * GB >> axis.rank  # type: ignore[assignment]
    args = parse_args(["generate", "--checkpoint", str(checkpoint), *given, "--sp", "auto", "--tp", "auto"])
    env = RankEnv(
        rank=axis.rank, world_size=2, local_rank=0, local_world_size=1, init_method="", launcher="slurm"
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            settle_layout(args, env)
    except OSError as error:
        return 0, 0, str(error)
    return args.sp, args.tp, said.getvalue()


def test_ranks_of_a_world_choose_alike_by_the_smallest_memory(checkpoint: Path) -> None:
    first, second = run_ranks(2, _settle_in_world, checkpoint, "--prompt", "x")
    assert first[:2] == second[:2] == (2, 1)
    assert "2 CPU ranks" in first[2] and "of 4.7 GiB free" in first[2] and second[2] == ""


def test_a_prompt_that_is_missing_is_told_on_every_rank(checkpoint: Path) -> None:
    first, second = run_ranks(2, _settle_in_world, checkpoint, "--prompt-file", "/no/such")
    assert first == second and "No such file or directory: '/no/such'" in first[2]
