"""benchmarks/accuracy: one process computes what ranks compute, counts what they send, and says so."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.accuracy import main
from benchmarks.accuracy_compare import Comparison, Window, cut_windows, make_tasks
from benchmarks.accuracy_plot import draw, table
from benchmarks.accuracy_run import continuation_logits, greedy, lone_trial
from benchmarks.accuracy_settings import parse_settings
from benchmarks.tasks import Task
from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.config import KV_CACHE_DTYPES, AttentionConfig, ParallelConfig
from megatron_sps2.csa_setting import PRESETS, CsaSetting
from megatron_sps2.engine.build import EngineConfig, assemble
from megatron_sps2.engine.tokenizer import load_tokenizer
from megatron_sps2.engine.trial import AnswerStep, Trial
from megatron_sps2.engine.trial_prefill import CsaPrefill, ExactPrefill, PaperPrefill, make_prefill
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.traffic import CSA_COLLECTIVES
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks
from tests.rounded_attention import round_keys_and_values
from tests.sharded_run import Prompt, RankResult, answer, logits_error, watch_prefills
from tests.sps2_command import ROOT, environ, make_checkpoint, words
from tests.test_engine import hf_greedy
from tests.test_tokenizer import save_tokenizer
from tests.tiny_llama import VOCAB_SIZE, prompt, save_hf_llama

NUM_ANSWERED = 8
NUM_PROMPT = 150
SMALL = "segment_size=16:tail=8:window=5:num_probes=4"
SETTINGS = f"dense,full:{SMALL},default:{SMALL},strided:{SMALL}:degrees=1,4,4,4,paper:segment_size=16"
# Of the largest logit. fp32 sums in another order over 150 keys and 6 layers; measured below 1e-5.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("accuracy"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 words, each of them a token."""
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(words(3 + int(i) % (VOCAB_SIZE - 3) for i in prompt(400)))
    return path


def arguments(checkpoint: Path, text: Path, /, **changes: object) -> list[str]:
    values = {
        **{"checkpoint": checkpoint, "text": text, "tokens": 182, "continuation": 32, "sp": 2},
        **{"settings": SETTINGS, "needles": 0, "samples": 2, **changes},
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


# The whole command


@pytest.fixture(scope="module")
def rows(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `python benchmarks/accuracy.py` writes, run as a file from the root of the repository."""
    out = tmp_path_factory.mktemp("out") / "rows.json"
    command = [sys.executable, "benchmarks/accuracy.py", *arguments(checkpoint, text, needles=3, json=out)]
    done = subprocess.run(command, cwd=ROOT, env=environ(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| tokens | setting |")
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def test_every_setting_has_a_row_with_the_fields_that_checks_rely_on(rows: list[dict[str, Any]]) -> None:
    assert [row["setting"].split(":")[0] for row in rows] == ["dense", "full", "default", "strided", "paper"]
    for row in rows:
        assert row["perplexity"] > 1 and 0 <= row["needles_found"] <= row["needles"] == 3
        assert 0 < row["bytes_ratio_to_pass_kv"] < 2 and 0 < row["density"] <= 1
        if row["setting"].startswith("paper"):
            assert row["kept_mass"] is None
        else:
            assert 0 < row["kept_mass"] < 1.000001
        assert 0 <= row["agreement"] <= 1 and row["kl"] > -1e-6 and row["kl_first"] > -1e-6
        assert set(row["texts"]) == {"numbers"} and row["sp"] == 2 and row["tokens"] == 182


def test_all_keys_kept_is_dense(rows: list[dict[str, Any]]) -> None:
    dense, full = rows[:2]
    assert dense["bytes_ratio_to_pass_kv"] == dense["kept_mass"] == dense["density"] == 1
    assert dense["kl"] == 0 and dense["agreement"] == 1
    # Sums in another order, as above.
    assert full["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-4)
    assert full["kept_mass"] == pytest.approx(1, abs=1e-4) and full["density"] == 1
    assert full["kl"] == pytest.approx(0, abs=1e-4)


def test_control_dropped_keys_show(rows: list[dict[str, Any]]) -> None:
    for row in rows[2:]:
        rise = row["perplexity"] / rows[0]["perplexity"] - 1
        assert row["perplexity_rise"] == pytest.approx(rise, abs=1e-5) and row["perplexity_rise_error"] > 0
        assert row["density"] < 1 and row["kl"] > 1e-3
        assert row["perplexity"] != pytest.approx(rows[0]["perplexity"], rel=1e-4)


def test_the_module_runs_too_and_names_a_bad_setting() -> None:
    command = [sys.executable, "-m", "benchmarks.accuracy", "--checkpoint", "none", "--text", "none"]
    done = subprocess.run(
        [*command, "--settings", "dense,nosuch"], cwd=ROOT, env=environ(), capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "'nosuch' is no preset" in done.stderr and "default" in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": "dense:floor=1"}, "has no fields to change"),
        ({"settings": "default:flor=0.9"}, "is not FIELD=VALUE with a field of"),
        ({"settings": "default:floor=1.5"}, "must lie between 0 and 1"),
        ({"settings": "default:floor=high"}, "must be numbers, one"),
        ({"settings": "default:window=1.5"}, "must be whole numbers, one"),
        ({"settings": "strided:degrees=1,2"}, "must be as many as group_sizes"),
        ({"settings": "dense,,paper"}, "has an empty name"),
        ({"tokens": 32}, "must be above 0 and below --tokens"),
        ({"tokens": 999999}, "beyond the model's"),
        ({"samples": 0}, "--samples 0 must be at least 1"),
        ({"tokens": 401}, "has 400 tokens"),
        ({"text": "nosuch"}, "neither a file nor one of"),
    ],
)
def test_mistakes_end_with_a_message(
    changes: dict[str, Any], message: str, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments(checkpoint, text, **changes))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# Its parts


def test_settings_are_named_and_changed_on_the_command_line() -> None:
    names = "dense,strided:degrees=1,4,4.0,4:window=64,default:floor=none:selector=none,paper"
    found = parse_settings(names)
    assert list(found) == [
        *("dense", "strided:degrees=1,4,4.0,4:window=64", "default:floor=none:selector=none", "paper")
    ]
    dense, strided, default, paper = found.values()
    assert dense is None and strided and default and paper
    assert strided.degrees == (1, 4, 4, 4) and strided.window == 64 and strided.selector == "strided"
    assert default.floor is None and default.selector == "none"
    assert default.segment_size == PRESETS["default"].segment_size
    assert paper.name == "paper" and paper.selector == "dilated"


def test_windows_are_spread_evenly_over_a_text() -> None:
    windows = cut_windows("t", list(range(100)), 10, 3)
    assert [window.ids for window in windows] == [list(range(s, s + 10)) for s in (15, 45, 75)]
    assert cut_windows("t", list(range(10)), 10, 1)[0].ids == list(range(10))
    with pytest.raises(ValueError, match="'t' has 19 tokens, 2 samples of 10 would overlap"):
        cut_windows("t", list(range(19)), 10, 2)


def test_needles_lie_at_even_depths_and_texts_take_turns(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path))
    fillers = ["Apples were green in winter. " * 9, "Pears grew there during summer. " * 9]
    tasks = list(make_tasks(tokenizer, fillers, 600, 4, 2))
    assert [task.depth for task in tasks[:4]] == [0.125, 0.375, 0.625, 0.875]
    assert ["Apples" in tokenizer.decode(task.prompt_ids) for task in tasks[:4]] == [True, False] * 2
    kinds = dict.fromkeys(task.kind for task in tasks)
    assert list(kinds) == ["pass_key", "multi_key", "multi_value", "variable_tracking", "common_words"]
    assert len(tasks) == 12 and len({tuple(task.prompt_ids) for task in tasks}) == 12


def test_tasks_are_scored_by_what_the_model_answers(checkpoint: Path) -> None:
    ids, tokenizer = prompt(60, seed=2).tolist(), load_tokenizer(checkpoint)
    with lone_trial(checkpoint, torch.float32) as trial:
        first, second, *_ = words(greedy(trial, ids, ExactPrefill(), NUM_ANSWERED)).split()
        tasks = [
            Task("pass_key", ids, (second,), 2, 0.25),
            Task("pass_key", ids, (second,), 1, 0.75),  # too few tokens to say it
            Task("multi_value", ids, (first, "absent"), 2),
            Task("multi_value", ids, (first, second), 2),
        ]
        window = Window("t", ids)
        comparison = Comparison(
            trial=trial, tokenizer=tokenizer, num_prompt=50, windows=[window], tasks=tasks
        )
        row = comparison.measure("dense", lambda _: ExactPrefill())
    assert (row["needles_found"], row["needles"]) == (1, 2)
    assert row["needle_depths"] == [[0.25, True], [0.75, False]]
    assert row["ruler"] == {"multi_value": 0.75}


def test_a_table_and_a_plot_are_made_of_rows(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    assert "(+0.00 ± 0.00%)" in lines[2] and "0/3" in lines[2]
    pytest.importorskip("matplotlib")
    longer = [{**row, "tokens": 364} for row in rows]
    draw(rows + longer, tmp_path / "figures" / "plot.png")
    png = (tmp_path / "figures" / "plot.png").read_bytes()
    assert png[:4] == b"\x89PNG" and len(png) < 200_000


# Against real ranks


@dataclass(slots=True)
class Served:
    """Of a real rank."""

    result: RankResult
    sent: int


def serve(config: EngineConfig, prompts: list[Prompt], skipped: bool = False) -> Served:
    """On a rank: the engine's logits and greedy answer, and the bytes that CSA sent."""
    groups, context = ParallelGroups.create(config.parallel), StepContext()
    core = functools.partial(SequenceParallelAttention, context=context)
    forward = load_gpt(config.checkpoint, groups.to_megatron(), core, torch.float32)
    engine = assemble(config, groups, forward, context)
    found, result = watch_prefills(forward, context, groups.sp.rank, prompts), RankResult([])
    with exchange_skipped(skipped):
        if engine.is_leader:
            result.tokens = answer(engine, prompts, NUM_ANSWERED)
        else:
            engine.follow()
    result.logits = [found[0]]
    return Served(result, engine.ledger.total("prefill", *CSA_COLLECTIVES))


def setting_named(name: str) -> CsaSetting:
    setting = parse_settings(name)[name]
    assert setting is not None
    return setting


def served(checkpoint: Path, name: str, sp_size: int, ids: list[int], skipped: bool = False) -> list[Served]:
    config = EngineConfig(
        checkpoint=str(checkpoint),
        parallel=ParallelConfig(sp_size=sp_size),
        attention=AttentionConfig(mode="csa"),
        csa=setting_named(name),
    )
    prompts = [Prompt(ids, list(range(len(ids))))]
    return run_ranks(sp_size, serve, config, prompts, skipped)


def all_logits(trial: Trial, ids: list[int], prefill: CsaPrefill | PaperPrefill) -> Tensor:
    """[s, v]"""
    return trial.logits(trial.hidden(ids, AnswerStep(len(ids), prefill)))


@pytest.mark.parametrize(
    ("name", "sp_size"),
    [
        (f"default:{SMALL}:floor=0.8", 2),
        (f"default:{SMALL}:floor=0.8", 4),
        (f"strided:{SMALL}", 4),
        ("paper:segment_size=16", 2),
    ],
)
def test_one_process_gives_the_logits_answers_and_bytes_of_real_ranks(
    name: str, sp_size: int, checkpoint: Path
) -> None:
    ids = prompt(NUM_PROMPT, seed=1).tolist()
    prompts = [Prompt(ids, list(range(NUM_PROMPT)))]
    ranks = served(checkpoint, name, sp_size, ids)
    setting = setting_named(name)
    with lone_trial(checkpoint, torch.float32) as trial:
        prefill = make_prefill(setting, NUM_PROMPT, sp_size, trial.model)
        assert isinstance(prefill, CsaPrefill | PaperPrefill)
        logits = all_logits(trial, ids, prefill)
        again = make_prefill(setting, NUM_PROMPT, sp_size, trial.model)
        tokens = greedy(trial, ids, again, NUM_ANSWERED)
        # All at once, as for perplexity, instead of one by one.
        third = make_prefill(setting, NUM_PROMPT, sp_size, trial.model)
        followed = continuation_logits(trial, ids + tokens, NUM_PROMPT, third)
        num_layers = trial.model.num_layers
    assert logits_error([rank.result for rank in ranks], [logits], prompts) < TOLERANCE
    assert ranks[0].result.tokens is not None and ranks[0].result.tokens[0][: len(tokens)] == tokens
    assert followed.argmax(-1).tolist() == tokens
    sent = [count * num_layers for count in prefill.bytes_per_rank_per_layer()]
    assert sent == pytest.approx([rank.sent for rank in ranks], rel=1e-12)


def test_control_ranks_that_exchange_nothing_give_other_logits(checkpoint: Path) -> None:
    name, ids = f"strided:{SMALL}", prompt(NUM_PROMPT, seed=1).tolist()
    ranks = served(checkpoint, name, 2, ids, skipped=True)
    with lone_trial(checkpoint, torch.float32) as trial:
        prefill = make_prefill(setting_named(name), NUM_PROMPT, 2, trial.model)
        assert isinstance(prefill, CsaPrefill)
        logits = all_logits(trial, ids, prefill)
    prompts = [Prompt(ids, list(range(NUM_PROMPT)))]
    assert logits_error([rank.result for rank in ranks], [logits], prompts) > 100 * TOLERANCE


def test_fp8_is_measured_as_a_model_that_attends_to_rounded_keys(tmp_path: Path) -> None:
    """A prompt, what follows it all at once, and its greedy answer."""
    hf = save_hf_llama(tmp_path / "hf", 8, 2)
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    ids, num_prompt = prompt(90, seed=2).tolist(), 60
    with lone_trial(tmp_path / "checkpoint", torch.float32) as trial:
        plain, fp8 = (
            continuation_logits(trial, ids, num_prompt, ExactPrefill(), kept) for kept in KV_CACHE_DTYPES
        )
        tokens = greedy(trial, ids[:num_prompt], ExactPrefill(), NUM_ANSWERED, "fp8")
    round_keys_and_values(hf)
    with torch.inference_mode():
        wanted = hf(torch.tensor([ids[:-1]])).logits[0, num_prompt - 1 :]
        assert tokens == hf_greedy(hf, ids[:num_prompt], len(tokens)) and tokens
    scale = wanted.abs().max()
    assert (fp8 - wanted).abs().max() < TOLERANCE * scale
    assert (plain - wanted).abs().max() > 100 * TOLERANCE * scale, "the control: nothing would be rounded"


def test_the_command_measures_fp8_against_the_models_own_dtype(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "rows.json"
    more = {"settings": "dense", "samples": 1, "answer": 4, "json": out, "kv-cache-dtype": "fp8"}
    main(arguments(checkpoint, text, **more))
    (row,) = json.loads(out.read_text())
    assert row["kv_cache_dtype"] == "fp8" and row["kl"] > 1e-5 and row["perplexity_rise"] != 0
    assert row["equal_answer"] in (0, 0.25, 0.5, 0.75, 1)


def test_an_answer_agrees_until_the_first_difference(checkpoint: Path) -> None:
    ids, tokenizer = prompt(60, seed=2).tolist(), load_tokenizer(checkpoint)
    with lone_trial(checkpoint, torch.float32) as trial:
        comparison = Comparison(
            trial=trial,
            tokenizer=tokenizer,
            num_prompt=50,
            windows=[Window("t", ids)],
            tasks=[],
            answer_tokens=6,
        )
        assert comparison.measure("dense", lambda _: ExactPrefill())["equal_answer"] == 1
        assert comparison.measure("nothing", lambda _: NothingSeen())["equal_answer"] < 1


class NothingSeen(ExactPrefill):
    """The control: a prompt whose tokens see nothing."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)


def test_a_prompt_of_one_segment_is_exact_as_in_the_engine(checkpoint: Path) -> None:
    ids = prompt(40).tolist()
    with lone_trial(checkpoint, torch.float32) as trial:
        exact, short = (make_prefill(s, 24, 2, trial.model) for s in (None, PRESETS["local"]))
        a, b = (continuation_logits(trial, ids, 24, one) for one in (exact, short))
    assert torch.equal(a, b) and short.cost() == exact.cost()
