"""CSA's settings: what they refuse and how they say it, the file, which one is chosen, and their tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sps2.attention.strategy import wants_csa
from megatron_sps2.config import AttentionConfig, ModelConfig
from megatron_sps2.csa_setting import (
    CALIBRATION_NAME,
    PRESETS,
    CsaSetting,
    choose_setting,
    load_setting,
    save_setting,
)

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=6,
    num_query_groups=3,
    head_dim=8,
    vocab_size=100,
    max_seq_len=512,
)
FLOORS = ((0.9, 0.8, 1.0), (0.5, 0.6, 0.7))
# [layer][KV head][level - 1], for three levels.
DENSITIES = (((0.5, 0.25), (1.0, 0.0), (0.1, 0.2)), ((0.3, 0.4), (0.5, 0.6), (0.7, 0.8)))
THREE_LEVELS: dict[str, Any] = {"group_sizes": (1, 2, 4), "degrees": (1, 2, 4)}
CALIBRATED = CsaSetting(name="mine", content_id="abc", floors=FLOORS, densities=DENSITIES, **THREE_LEVELS)

# Changed fields, and what the message must say: field, value, rule.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"selector": "topk"}, ["selector='topk'", "none, strided, scored, dilated"]),
    ({"segment_size": 0}, ["segment_size=0", "multiple of 8", "512"]),
    ({"segment_size": 4}, ["segment_size=4", "at least 8"]),
    ({"segment_size": 100}, ["segment_size=100", "multiple of 8"]),
    ({"max_segment_size": 256}, ["max_segment_size=256", "at least segment_size (512)"]),
    ({"num_sinks": -1}, ["num_sinks=-1", "0 or above"]),
    ({"window": -5}, ["window=-5", "0 or above"]),
    ({"tail": -1}, ["tail=-1", "0 or above"]),
    ({"num_probes": -1}, ["num_probes=-1", "0 or above"]),
    ({"num_probes": 0}, ["num_probes=0", "above 0"]),
    ({"floor": 1.01}, ["floor=1.01", "between 0 and 1"]),
    ({"floor": -0.1}, ["floor=-0.1", "between 0 and 1"]),
    ({"floor": float("nan")}, ["floor=nan", "between 0 and 1"]),
    ({"group_sizes": (2, 4)}, ["group_sizes=(2, 4)", "begin with 1"]),
    ({"group_sizes": (1, 2, 3), "degrees": (1, 2, 3)}, ["group_sizes=(1, 2, 3)", "divide the next"]),
    ({"group_sizes": (1, 4, 2), "degrees": (1, 2, 3)}, ["group_sizes=(1, 4, 2)", "divide the next"]),
    ({"group_sizes": (1, 1)}, ["group_sizes=(1, 1)", "divide the next"]),
    ({"group_sizes": (1, 0)}, ["group_sizes=(1, 0)"]),
    ({"group_sizes": (1, -2)}, ["group_sizes=(1, -2)"]),
    ({"group_sizes": (1,), "degrees": (1,)}, ["group_sizes=(1,)"]),
    ({"group_sizes": (), "degrees": ()}, ["group_sizes=()"]),
    ({"degrees": ()}, ["degrees=()", "as many as group_sizes (2)"]),
    ({"degrees": (1, 2, 4)}, ["degrees=(1, 2, 4)", "as many as group_sizes (2)"]),
    ({"degrees": (2, 4)}, ["degrees=(2, 4)", "begin with 1"]),
    ({"degrees": (1, 0.5)}, ["degrees=(1, 0.5)", "at least 1"]),
    ({"degrees": (1, 0)}, ["degrees=(1, 0)", "at least 1"]),
    ({"degrees": (1, float("nan"))}, ["degrees=(1, nan)", "at least 1"]),
    ({"selector": "strided", "degrees": (1, 2.5)}, ["degrees=(1, 2.5)", "integers"]),
    ({"selector": "dilated", "degrees": (1, 2.5)}, ["degrees=(1, 2.5)", "integers"]),
    ({"selector": "strided", "degrees": (1, float("inf"))}, ["degrees=(1, inf)", "integers"]),
    ({"floors": ((0.5, 1.5),)}, ["floors=", "1.5", "between 0 and 1"]),
    ({"densities": (((0.5,), (-0.5,)),)}, ["densities=", "-0.5", "between 0 and 1"]),
    ({"densities": (((0.5, 0.5), (0.5,)),), **THREE_LEVELS}, ["densities="]),
    ({"densities": (((0.5, 0.5),),)}, ["densities="]),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_bad_setting_is_refused_with_value_and_rule(changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError, match="CSA setting 'mine'") as caught:
        CsaSetting(name="mine", **changes)
    assert [part for part in said if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"segment_size": 8},
        {"floor": 0.0},
        {"floor": 1.0},
        {"num_probes": 0, "selector": "strided"},
        {"num_probes": 0, "selector": "none"},
        {"degrees": (1, 2.5)},
        {"group_sizes": (1, 3, 6), "degrees": (1, 1, 1)},
    ],
    ids=str,
)
def test_settings_at_the_edge_of_the_rules_are_taken(changes: dict[str, Any]) -> None:
    CsaSetting(**changes)


# JSON values of a wrong type: key, value.
MISTYPED: list[tuple[str, Any]] = [
    ("segment_size", "512"),
    ("segment_size", 512.0),
    ("segment_size", None),
    ("max_segment_size", "1024"),
    ("num_sinks", "4"),
    ("window", 12.5),
    ("tail", [64]),
    ("num_probes", True),
    ("floor", "0.95"),
    ("group_sizes", 2),
    ("group_sizes", "12"),
    ("group_sizes", [1, "2"]),
    ("degrees", {"1": 8}),
    ("degrees", [1, "8"]),
    ("floors", [0.9, 0.8]),
    ("floors", 0.9),
    ("floors", [["0.9"]]),
    ("densities", [[0.5]]),
    ("selector", ["scored"]),
    ("name", 3),
    ("content_id", 7),
]


@pytest.mark.parametrize(("key", "value"), MISTYPED, ids=str)
def test_a_value_of_the_wrong_json_type_is_refused_by_its_key(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(ValueError) as caught:
        load_setting(path)
    assert str(path) in str(caught.value) and key in str(caught.value)
    assert "not supported between" not in str(caught.value), "Python's own words, not a rule"


@pytest.mark.parametrize("text", ["[1, 2]", '"default"', "{", "", "\x00"])
def test_a_file_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        load_setting(path)


def test_unknown_keys_are_named_beside_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"floor": 0.9, "budget": 3, "Window": 1}')
    with pytest.raises(ValueError, match=r"unknown keys \['Window', 'budget'\].*known are .*'window'"):
        load_setting(path)


def test_a_bad_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"floor": 2}')
    with pytest.raises(ValueError, match=r"bad\.json: CSA setting 'bad': floor=2 must lie between 0 and 1"):
        load_setting(path)


def test_an_unknown_name_is_answered_with_the_presets() -> None:
    with pytest.raises(FileNotFoundError, match="'defualt' is no preset.*default, careful.*and no file"):
        load_setting("defualt")


@pytest.mark.parametrize("setting", [*PRESETS.values(), CALIBRATED], ids=lambda setting: setting.name)
def test_a_saved_setting_is_loaded_as_it_was(setting: CsaSetting, tmp_path: Path) -> None:
    save_setting(setting, tmp_path / "saved.json")
    assert load_setting(tmp_path / "saved.json") == setting
    assert hash(load_setting(tmp_path / "saved.json")) == hash(setting)


def test_a_file_may_say_little_and_is_then_named_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "tight.json"
    path.write_text('{"floor": 0.9, "group_sizes": [1, 2, 8], "degrees": [1, 4, 16]}')
    want = CsaSetting(name="tight", floor=0.9, group_sizes=(1, 2, 8), degrees=(1, 4, 16))
    assert load_setting(str(path)) == want


def test_presets_carry_their_names_and_go_by_them() -> None:
    assert {name: load_setting(name).name for name in PRESETS} == {name: name for name in PRESETS}


def test_the_user_is_heard_before_the_file_beside_the_checkpoint_and_that_before_the_default(
    tmp_path: Path,
) -> None:
    assert choose_setting(None, tmp_path) == PRESETS["default"]
    save_setting(CALIBRATED, tmp_path / CALIBRATION_NAME)
    assert choose_setting(None, tmp_path) == CALIBRATED
    assert choose_setting("careful", str(tmp_path)) == PRESETS["careful"]
    other = replace(CALIBRATED, name="other")
    save_setting(other, tmp_path / "other.json")
    assert choose_setting(str(tmp_path / "other.json"), tmp_path) == other


def test_a_calibration_of_another_model_is_refused() -> None:
    CALIBRATED.check_model(MODEL, "abc")
    with pytest.raises(ValueError, match="'mine' was calibrated.*'abc'.*'xyz'.*sps2 csa calibrate.*preset"):
        CALIBRATED.check_model(MODEL, "xyz")


@pytest.mark.parametrize(
    "changes",
    [
        {"floors": FLOORS[:1]},
        {"floors": ((0.9, 0.9), (0.9, 0.9))},
        {"floors": ((0.9, 0.9, 0.9), (0.9, 0.9))},
        {"densities": DENSITIES[:1]},
        {"densities": tuple(layer[:2] for layer in DENSITIES)},
    ],
    ids=str,
)
def test_tables_of_another_shape_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'mine' has budgets for .* the model has 2 of 3; .*calibrate"):
        replace(CALIBRATED, **changes).check_model(MODEL, "abc")


def test_a_setting_without_tables_fits_every_model() -> None:
    for setting in PRESETS.values():
        setting.check_model(MODEL, "anything")


def test_segments_double_with_the_prompt_up_to_the_largest() -> None:
    setting = CsaSetting(max_segment_size=2048)
    lengths = (1, 7168, 7169, 40548, 40549, 229376, 229377, 10**6)
    sizes = [setting.for_prompt(length).segment_size for length in lengths]
    assert sizes == [512, 512, 1024, 1024, 2048, 2048, 2048, 2048]
    assert CsaSetting(max_segment_size=1500).for_prompt(10**6).segment_size == 1024, "always a doubling"
    assert CsaSetting().for_prompt(10**6) == CsaSetting()
    grown = setting.for_prompt(10**5)
    assert grown.for_prompt(10**9) == grown == replace(setting, segment_size=2048, max_segment_size=None)


def test_a_level_is_the_lowest_whose_group_holds_both_and_the_widest_beyond() -> None:
    setting = CsaSetting(**THREE_LEVELS)
    levels = [[setting.level_of(reader, segment) for segment in range(reader + 1)] for reader in range(10)]
    assert levels[3] == [2, 2, 1, 0]
    assert levels[6] == [2, 2, 2, 2, 2, 2, 0]
    assert levels[7] == [2, 2, 2, 2, 2, 2, 1, 0]
    assert levels[9] == [2] * 8 + [1, 0]


def test_budgets_come_from_the_tables_where_there_are_any() -> None:
    plain = CsaSetting(floor=0.9, group_sizes=(1, 2, 4), degrees=(1, 2, 5))
    assert plain.floor_of(1, 2) == 0.9
    assert [plain.density_of(1, 2, level) for level in (1, 2)] == [0.5, 0.2]
    assert CALIBRATED.floor_of(0, 2) == 1.0 and CALIBRATED.floor_of(1, 0) == 0.5
    assert CALIBRATED.density_of(0, 1, 2) == 0.0 and CALIBRATED.density_of(1, 2, 1) == 0.7


def test_only_the_scored_selector_with_a_floor_is_adaptive() -> None:
    assert CsaSetting(floor=0.9).is_adaptive and CsaSetting(floors=FLOORS).is_adaptive
    assert not CsaSetting().is_adaptive and not CsaSetting(densities=(((0.5,),),)).is_adaptive
    assert not CsaSetting(selector="strided", floor=0.9).is_adaptive


@pytest.mark.parametrize(
    ("num_sinks", "window", "whole"),
    [(4, 512, 1024), (0, 512, 1024), (4, 507, 512), (4, 508, 1024), (0, 0, 512), (4, 1024, 1536)],
)
def test_prompts_that_would_keep_every_key_run_exactly(num_sinks: int, window: int, whole: int) -> None:
    setting = CsaSetting(segment_size=512, num_sinks=num_sinks, window=window)
    assert setting.whole_tokens == whole
    assert not wants_csa("csa", AttentionConfig(), setting, whole, 0)
    assert wants_csa("csa", AttentionConfig(), setting, whole + 1, 0)
