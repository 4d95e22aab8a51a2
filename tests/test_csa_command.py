"""CSA as a user meets it: the real model at sp 1 and 2, the command's JSON, its errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sps2.cli.main import main
from megatron_sps2.config import AttentionConfig, ParallelConfig, SamplingParams
from megatron_sps2.csa_setting import CALIBRATION_NAME, PRESETS, save_setting
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.build import EngineConfig
from megatron_sps2.engine.request import Request
from megatron_sps2.engine.scheduler import Scheduler
from megatron_sps2.engine.tokenizer import load_tokenizer
from tests.ranks import run_ranks
from tests.sharded_run import Prompt, logits_error, run_everything
from tests.sps2_command import answer, make_checkpoint, sps2, write_ids
from tests.test_csa_engine import CSA, MODEL, SMALL


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_says_the_same_at_sp_1_and_2_with_the_default_setting(smollm2_checkpoint: Path) -> None:
    text = (Path(__file__).parent.parent / "examples" / "prompt.txt").read_text()
    ids = load_tokenizer(smollm2_checkpoint).encode(text)[:2000]
    asked = Prompt(ids, [len(ids) - 1])
    runs = []
    for sp_size in (1, 2):
        config = EngineConfig(
            checkpoint=str(smollm2_checkpoint),
            parallel=ParallelConfig(sp_size=sp_size),
            attention=CSA,
            csa=PRESETS["default"],
            max_model_len=len(ids) + 8,
        )
        runs.append(run_ranks(sp_size, run_everything, config, [asked], 8))
    ((_, alone),) = runs[0][0].logits
    # 30 layers; a key at the edge of the budget may be kept by one and dropped by the other.
    assert len(ids) == 2000 and logits_error(runs[1], [alone], [asked]) < 1e-3
    assert runs[0][0].tokens == runs[1][0].tokens


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, a prompt of 300 tokens and a setting."""
    folder = tmp_path_factory.mktemp("command")
    checkpoint = make_checkpoint(folder)
    save_setting(replace(SMALL, name="tight", floor=0.8), folder / "tight.json")
    ids = write_ids(folder / "ids.json", [3 + i * i % 200 for i in range(300)])
    return checkpoint, ids, folder / "tight.json"


def flags(words: tuple[Path, Path, Path], setting: object) -> tuple[object, ...]:
    checkpoint, ids, _ = words
    return (
        *("--checkpoint", checkpoint, "--prompt-ids", ids, "--max-tokens", 4, "--ignore-eos"),
        *("--attention", "csa", "--csa-setting", setting),
    )


def test_the_command_tells_what_csa_kept_and_sent(words: tuple[Path, Path, Path]) -> None:
    alone, two = (answer(*flags(words, words[2]), "--sp", sp_size) for sp_size in (1, 2))
    assert two["token_ids"] == alone["token_ids"]
    assert two["csa"].keys() >= {"setting", "kept_mass", "density", "bytes_sent", "bytes_exact"}
    assert two["csa"]["setting"] == "tight" and two["csa"]["density"] == alone["csa"]["density"]
    assert 0.8 <= two["csa"]["kept_mass"] <= 1 and 0 < two["csa"]["density"] < 1
    assert alone["csa"]["bytes_sent"] == 0 < two["csa"]["bytes_sent"]
    prefill = two["ledger"]["prefill"]
    assert prefill["strategy"] == "csa"
    formula = prefill["formula_bytes_per_rank_per_layer"]
    assert prefill["mean_bytes_per_rank_per_layer"] == pytest.approx(formula)


def test_a_bad_setting_ends_the_command_with_one_line(words: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"floor": 1.5}')
    done = sps2("generate", *flags(words, tmp_path / "bad.json"), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sps2: error: ") and done.stderr.count("\n") == 1
    assert "bad.json" in done.stderr and "floor=1.5 must lie between 0 and 1" in done.stderr


BAD: list[tuple[dict[str, Any] | None, str]] = [
    (None, "is no preset"),
    ({"degrees": [1, 0.5]}, "degrees=(1, 0.5) must be at least 1"),
    ({"group_sizes": [1, 3, 4], "degrees": [1, 2, 4]}, "each divide the next"),
    ({"content_id": "another"}, "was calibrated for a model with content id 'another'"),
    ({"floors": [[0.9]]}, "has budgets for 1 layers of [1] KV heads"),
    ({"budget": 1}, "unknown keys ['budget']"),
]


@pytest.mark.parametrize(("content", "said"), BAD, ids=str)
def test_bad_settings_are_refused_before_anything_runs(
    content: dict[str, Any] | None,
    said: str,
    words: tuple[Path, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(json.dumps(content))
    assert main(["generate", *map(str, flags(words, path))]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1 and said in found.err


def test_exact_attention_does_not_mind_a_calibration_that_it_does_not_use(
    words: tuple[Path, Path, Path],
) -> None:
    checkpoint, ids, _ = words
    beside = checkpoint / CALIBRATION_NAME
    beside.write_text("{bad")
    try:
        asked = ("--checkpoint", checkpoint, "--prompt-ids", ids, "--max-tokens", 2, "--ignore-eos")
        assert "csa" not in answer(*asked)
        assert main(["generate", *map(str, asked), "--attention", "csa"]) == 2
    finally:
        beside.unlink()


def test_an_engine_without_csa_refuses_a_request_for_it() -> None:
    config = EngineConfig(checkpoint="", max_model_len=64)
    blocks = BlockManager(config.sized_cache(), 1)
    scheduler = Scheduler(MODEL, config.parallel, config.attention, blocks)
    request = Request(request_id=0, prompt_ids=(1,), params=SamplingParams(max_tokens=5), attention="csa")
    with pytest.raises(ValueError, match="attention='csa' on an engine without CSA; build it with a setting"):
        scheduler.add(request)
    with pytest.raises(ValueError, match="'auto' needs a CSA setting"):
        EngineConfig(checkpoint="", attention=AttentionConfig(mode="auto"))
