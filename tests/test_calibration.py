"""Budgets calibrated for a small random model, checked by queries that had no part in choosing the keys."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_tools.convert import convert
from megatron_sps2.attention.csa import csa
from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.config import ModelConfig
from megatron_sps2.csa_setting import PRESETS, CsaSetting, load_setting, save_setting
from megatron_sps2.engine import calibration
from megatron_sps2.engine.calibration import Calibration, base_setting, calibrate, check_length
from megatron_sps2.engine.trade_off import TradeOff, compare
from megatron_sps2.engine.trial import ExactStep, Trial
from megatron_sps2.engine.trial_prefill import csa_run
from megatron_sps2.model.manifest import load_model_config
from tests.ranks import run_ranks
from tests.tiny_llama import prompt, save_hf_llama

SHAPE = replace(
    PRESETS["default"], num_sinks=1, window=4, tail=8, num_probes=8, segment_size=512, max_segment_size=2048
)
SEGMENT_SIZE, NUM_TOKENS = 32, 250
FLOOR = 0.9
# Sums of fp32 shares of attention, in another order.
TOLERANCE = 1e-5
BUDGETS = [pytest.param(True, id="adaptive"), pytest.param(False, id="fixed")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    save_hf_llama(folder / "hf", 4, 2)
    convert(folder / "hf", folder / "checkpoint")
    return folder / "checkpoint"


def base(adaptive: bool, floor: float = FLOOR) -> CsaSetting:
    return base_setting(SHAPE, floor, adaptive=adaptive, segment_size=SEGMENT_SIZE)


def samples(count: int) -> list[list[int]]:
    return [prompt(NUM_TOKENS, seed).tolist() for seed in range(count)]


class Witness:
    """Runs exactly; on the way csa selects, and a plain softmax says what held-out queries would keep."""

    def __init__(self, setting: CsaSetting, model: ModelConfig) -> None:
        self._plan = CsaPlan(setting, NUM_TOKENS, 1)
        self._run = csa_run(setting, NUM_TOKENS, model, self._observe)
        self._kept: dict[tuple[int, int], Tensor] = {}
        self.mass = torch.zeros(model.num_layers, model.num_query_groups, dtype=torch.float64)

    def _observe(self, layer: int, heads: range, reader: int, kept: Tensor) -> None:
        for head, own in zip(heads, kept, strict=True):
            self._kept[reader, head] = own.flatten().clone()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        csa(q, k, v, self._run, layer)
        keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("ind,jnd->nij", q[:, 0].double(), keys[:, 0].double()) * q.shape[3] ** -0.5
        scores.masked_fill_(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        shares = scores.softmax(-1).unflatten(0, (k.shape[2], -1))  # [n_kv, g, s, s]
        for (reader, head), kept in self._kept.items():
            start = self._plan.segments[reader].start
            rows = [start + row for row in calibration.held_out_rows(self._plan, reader, 0)]
            lost = shares[head][:, rows, :start].masked_fill(kept, 0.0).sum(-1).mean()
            self.mass[layer, head] += (1 - lost) / len(self._plan.readers)
        return ExactStep().attend(layer, q, k, v)


def witnessed(trial: Trial, setting: CsaSetting) -> Tensor:
    """[layers, KV heads]"""
    witness = Witness(setting, trial.model)
    trial.hidden(samples(1)[0], witness)
    return witness.mass


def lowered(setting: CsaSetting) -> CsaSetting:
    """Every budget by one candidate."""

    def lower(value: Any, candidates: tuple[float, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(lower(one, candidates) for one in value)
        return candidates[max(0, candidates.index(value) - 1)]

    if setting.floors is not None:
        return replace(setting, floors=lower(setting.floors, calibration.FLOORS))
    return replace(setting, densities=lower(setting.densities, calibration.SHARES))


def calibrated_and_witnessed(folder: Path, adaptive: bool) -> tuple[Calibration, Tensor, Tensor]:
    """On a rank: what was found, what queries witness of it, and of the next lower budgets."""
    trial = Trial.load(folder)
    found = calibrate(trial, samples(1), base(adaptive), FLOOR)
    return found, witnessed(trial, found.setting), witnessed(trial, lowered(found.setting))


@pytest.mark.parametrize("adaptive", BUDGETS)
def test_held_out_queries_keep_the_wished_attention_and_less_with_the_next_lower_budgets(
    checkpoint: Path, adaptive: bool
) -> None:
    [(found, mass, less)] = run_ranks(1, calibrated_and_witnessed, checkpoint, adaptive)
    torch.testing.assert_close(
        torch.tensor(found.kept_mass, dtype=torch.float64), mass, atol=TOLERANCE, rtol=0
    )
    assert mass.min() >= FLOOR - TOLERANCE
    assert less.max() < FLOOR  # no head of this model is content with the lowest candidate


def densities_by_csa(folder: Path, adaptive: bool) -> tuple[Calibration, list[list[float]]]:
    """On a rank: what was found, and what csa itself keeps of two samples by it."""
    trial, texts = Trial.load(folder), samples(2)
    found = calibrate(trial, texts, base(adaptive), FLOOR)
    kept = []
    for token_ids in texts:
        run = csa_run(found.setting, NUM_TOKENS, trial.model)
        trial.hidden(token_ids, _AlsoCsa(run))
        kept.append(run.tally)
    counts = sum(tally._counts for tally in kept)
    return found, (counts[..., 2] / counts[..., 3]).tolist()


class _AlsoCsa:
    """Exact, with csa counting beside it."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        csa(q, k, v, self._run, layer)
        return ExactStep().attend(layer, q, k, v)


@pytest.mark.parametrize("adaptive", BUDGETS)
def test_csa_keeps_as_many_keys_as_the_calibration_says(checkpoint: Path, adaptive: bool) -> None:
    [(found, kept)] = run_ranks(1, densities_by_csa, checkpoint, adaptive)
    torch.testing.assert_close(torch.tensor(found.density), torch.tensor(kept), atol=1e-6, rtol=0)
    assert min(map(min, kept)) > 0 and max(map(max, kept)) < 1


def floor_one(folder: Path, adaptive: bool) -> Calibration:
    return calibrate(Trial.load(folder), samples(1), base(adaptive, 1.0), 1.0)


@pytest.mark.parametrize("adaptive", BUDGETS)
def test_a_floor_of_one_keeps_everything(checkpoint: Path, adaptive: bool) -> None:
    [found] = run_ranks(1, floor_one, checkpoint, adaptive)
    assert {value for row in found.density for value in row} == {1.0}
    assert {value for row in found.kept_mass for value in row} == {1.0}


def run_from_file(folder: Path, file: Path) -> TradeOff:
    """On a rank: a calibration, written and read, against exact attention and `local`."""
    trial = Trial.load(folder)
    save_setting(calibrate(trial, samples(2), base(True), FLOOR).setting, file)
    alike = {
        "segment_size": SEGMENT_SIZE,
        "max_segment_size": None,
        "tail": SHAPE.tail,
        "num_probes": SHAPE.num_probes,
    }
    local, full = (replace(PRESETS[name], **alike) for name in ("local", "full"))
    return compare(trial, samples(1)[0], 200, [load_setting(file), local, full], 4)


def test_a_calibration_that_was_written_loads_and_runs_better_than_no_far_keys(
    checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "budgets.json"
    [found] = run_ranks(1, run_from_file, checkpoint, file)
    calibrated, local, full = found.settings
    assert load_setting(file).name == calibrated.name == f"calibrated-{FLOOR}"
    assert abs(calibrated.perplexity_ratio - 1) < abs(local.perplexity_ratio - 1)
    assert local.density == 0 < calibrated.density < full.density == 1
    assert local.bytes_ratio < calibrated.bytes_ratio < full.bytes_ratio
    assert calibrated.kept_mass and local.kept_mass and calibrated.kept_mass > local.kept_mass
    assert full.perplexity_ratio == pytest.approx(1, abs=1e-4)  # CSA that keeps all is exact
    assert all(one.speed_ratio > 0 for one in found.settings)


def test_budgets_for_another_model_are_refused(checkpoint: Path) -> None:
    model = load_model_config(checkpoint)
    table = ((0.9,) * model.num_query_groups,) * model.num_layers
    own = CsaSetting(floors=table, content_id="abc")
    own.check_model(model, "abc")
    with pytest.raises(ValueError, match="calibrated for a model with content id 'abc'"):
        own.check_model(model, "def")
    with pytest.raises(ValueError, match="has budgets for 3 layers"):
        replace(own, floors=(*table, table[0])).check_model(model, "abc")


def test_held_out_rows_are_no_probes_and_the_same_for_a_seed() -> None:
    plan = CsaPlan(replace(base(True), segment_size=64), NUM_TOKENS, 1)
    draw = functools.partial(calibration.held_out_rows, plan)
    for reader in plan.readers:
        rows = draw(reader, 3)
        assert rows == draw(reader, 3) == sorted(set(rows))
        assert not set(rows) & set(plan.probes(reader)) and max(rows) < plan.num_rows(reader)
    assert draw(2, 0) != draw(2, 1)


def test_segments_grow_with_the_prompt_only_where_they_are_the_usual_ones() -> None:
    usual = base_setting(SHAPE, FLOOR, adaptive=True, segment_size=512)
    assert usual.max_segment_size == 2048
    assert base_setting(SHAPE, FLOOR, adaptive=False, segment_size=512).max_segment_size is None
    assert base(True).max_segment_size is None and base(True).segment_size == SEGMENT_SIZE


@pytest.mark.parametrize("floor", [0, -0.1, 1.01, float("nan")])
def test_a_floor_that_cannot_be_wished_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match="must lie above 0"):
        base(True, floor)


@pytest.mark.parametrize("num_tokens", [48, 513])
def test_samples_of_a_length_that_measures_nothing_are_refused(checkpoint: Path, num_tokens: int) -> None:
    model = load_model_config(checkpoint)  # max_seq_len 512
    with pytest.raises(ValueError, match=f"samples of {num_tokens} tokens: must be 49 .* to 512"):
        check_length(base(True), num_tokens, model)
    check_length(base(True), 49, model)
