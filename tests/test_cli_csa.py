"""`sps2 csa calibrate` and `sps2 csa report` as users run them, on a small random model."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sps2.cli.csa import cut_samples
from megatron_sps2.cli.main import main
from megatron_sps2.csa_setting import CALIBRATION_NAME, load_setting, save_setting
from megatron_sps2.model.manifest import read_manifest
from tests.sps2_command import answer, environ, make_checkpoint, sps2, words, write_ids
from tests.tiny_llama import prompt

NUM_TOKENS = 640
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samples of calibrate, or a prompt of NUM_TOKENS and its continuation for report."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(3 + i % 240 for i in prompt(NUM_TOKENS + 256).tolist()))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a calibration; tests must leave it so."""
    return make_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def calibrated(
    tmp_path_factory: pytest.TempPathFactory, text: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = make_checkpoint(tmp_path_factory.mktemp("calibrated"))
    flags = ("--tokens", 400, "--samples", 2, "--segment-size", 64, "--window", 16, "--floor", 0.8)
    return folder, sps2("csa", "calibrate", "--checkpoint", folder, "--text", text, *flags)


def test_calibrate_writes_budgets_for_this_model_beside_its_checkpoint(calibrated: Any) -> None:
    folder, done = calibrated
    assert done.returncode == 0, done.stderr
    assert "calibrated-0.8" in done.stdout and "2 samples of 400 tokens" in done.stdout
    setting, manifest = load_setting(folder / CALIBRATION_NAME), read_manifest(folder)
    setting.check_model(manifest.model, manifest.content_id)
    assert setting.content_id == manifest.content_id != ""
    assert setting.is_adaptive and setting.floor == 0.8
    assert (setting.segment_size, setting.window, setting.max_segment_size) == (64, 16, None)
    assert setting.floors is not None and [len(row) for row in setting.floors] == [3] * 6


def test_generate_takes_the_calibration_beside_the_checkpoint(calibrated: Any, tmp_path: Path) -> None:
    ids = write_ids(tmp_path / "ids.json", prompt(400).tolist())
    found = answer(
        *("--checkpoint", calibrated[0], "--prompt-ids", ids, "--attention", "csa", "--max-tokens", 1)
    )
    assert found["csa"]["setting"] == "calibrated-0.8"
    assert 0.5 < found["csa"]["kept_mass"] < 1 and 0 < found["csa"]["density"] < 1


def test_report_writes_images_and_one_page_that_holds_them(
    calibrated: Any, text: Path, tmp_path: Path
) -> None:
    folder, out = calibrated[0], tmp_path / "new" / "report"
    done = sps2(
        *("csa", "report", "--checkpoint", folder, "--text", text, "--tokens", NUM_TOKENS),
        *("--settings", "strided,local", "--sp", 4, "--out", out),
    )
    assert done.returncode == 0, done.stderr
    page = (out / "csa_report.html").read_text()
    images = sorted(out.glob("*.png"))
    assert [path.name for path in images] == ["density.png", "kept_mass.png", "trade_off.png"]
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert sorted(map(base64.b64decode, embedded)) == sorted(path.read_bytes() for path in images)
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 5000 for path in images)
    assert "http" not in page and page.count("src=") == 3  # nothing comes from elsewhere
    for name in ("exact", "calibrated-0.8", "strided", "local"):
        assert f"<td>{name}</td>" in page and name in done.stdout


def test_a_text_that_is_too_short_is_one_clear_line(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ("--text", text, "--tokens", 700, "--samples", 2, "--out", out)
    done = sps2("csa", "calibrate", "--checkpoint", checkpoint, *flags)
    assert done.returncode == 2 and done.stdout == "" and not out.exists()
    assert done.stderr.count("\n") == 1
    assert "the text has 896 tokens, too short for 2 samples of 700" in done.stderr


def test_samples_lie_evenly_and_do_not_overlap() -> None:
    ids = list(range(103))
    assert cut_samples(ids, 25, None) == [ids[at : at + 25] for at in (0, 25, 50, 75)]
    assert cut_samples(ids, 10, None) == [ids[at : at + 10] for at in (0, 25, 50, 75)]
    assert cut_samples(ids, 60, None) == [ids[:60]]
    assert cut_samples(ids, 30, 3) == [ids[at : at + 30] for at in (0, 34, 68)]
    for num_tokens, wanted in ((104, None), (52, 2)):
        with pytest.raises(ValueError, match="the text has 103 tokens, too short"):
            cut_samples(ids, num_tokens, wanted)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line that a command ends with before anything runs."""
    assert main(list(map(str, args))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sps2: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--floor", 0), "floor=0.0 must lie above 0"),
        (("--floor", 1.5), "floor=1.5 must lie above 0 and at most at 1"),
        (("--segment-size", 12), "segment_size=12 must be a multiple of 8"),
        (("--tokens", 500), "samples of 500 tokens: must be 593"),
        (("--tokens", 20000), "to 16384 (what the model allows)"),
        (("--window", -1), "window=-1 must be 0 or above"),
        (("--samples", 0), "--samples 0 must be at least 1"),
        (("--text", "/no/such.txt"), "--text /no/such.txt is not a file"),
        (("--checkpoint", "/no/such"), "checkpoint folder /no/such does not exist"),
        (("--out", "/no/such/folder/out.json"), "the folder of --out, does not exist"),
    ],
)
def test_calibrate_refuses_a_mistake(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str], flags: tuple, complaint: str
) -> None:
    command = ("csa", "calibrate", "--checkpoint", checkpoint, "--text", text)
    assert complaint in refused(capsys, *command, *flags)


def test_calibrate_replaces_a_file_only_when_told_to(
    calibrated: Any, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "csa", "calibrate", "--checkpoint", calibrated[0], "--text", text)
    assert f"{CALIBRATION_NAME} exists; --force replaces it" in said


@pytest.fixture
def of_another_model(calibrated: Any, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "other.json"
    save_setting(replace(load_setting(calibrated[0] / CALIBRATION_NAME), content_id="other"), path)
    yield path


def test_budgets_of_another_model_are_refused(
    checkpoint: Path, text: Path, of_another_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--checkpoint", checkpoint, "--csa-setting", of_another_model)
    report = ("csa", "report", *common, "--text", text, "--out", tmp_path / "out")
    for command in (report, ("generate", *common, "--prompt", "w3")):
        assert "was calibrated for a model with content id 'other'" in refused(capsys, *command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--sp", 0), "--sp 0 must be at least 1"),
        (("--settings", "fast,none-such"), "'none-such' is no preset"),
        (("--csa-setting", "paper"), "'paper' has no budgets to draw"),
        (("--tokens", 16384), "--tokens 16384 and a continuation of 256 are more than the model's 16384"),
        (("--text", "/no/such.txt"), "--text /no/such.txt is not a file"),
        (("--out", __file__), "is a file; give a folder"),
    ],
)
def test_report_refuses_a_mistake(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple,
    complaint: str,
) -> None:
    command = ("csa", "report", "--checkpoint", checkpoint, "--text", text, "--out", tmp_path / "out")
    assert complaint in refused(capsys, *command, *flags)


@pytest.mark.parametrize("args", [["csa"], ["csa", "draw"], ["csa", "calibrate"], ["csa", "report"]])
def test_a_command_without_what_it_needs_says_its_usage(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(args)
    assert "usage: sps2 csa" in capsys.readouterr().err


def test_the_command_is_known_without_torch_or_matplotlib() -> None:
    code = "import sys, megatron_sps2.cli.csa; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ())
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")
