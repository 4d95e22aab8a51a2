"""benchmarks/gpu on CPU with toy shapes: that it runs to its end, and tells what is wrong. No speeds."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.case import Bench, Case, Check, Outcome, Row
from benchmarks.gpu.checks import attended, compare, poisoned
from benchmarks.gpu.run import main
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.table import markdown
from megatron_sps2.ops.attend import attend, attend_reference
from tests.sps2_command import ROOT, environ

# The module that holds a section's kernels, for those that run nothing without them.
MODULES = {"prefill": "prefill", "decode": "decode", "moves": "append", "csa": "csa_attend"}


def _is_written(module: str) -> bool:
    return all(find_spec(f"megatron_sps2.ops.{name}") for name in ("kernels", f"kernels.{module}"))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """main() asks for it; what it sets is undone for the tests after these."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.slow
@pytest.mark.triton
def test_the_script_runs_all_its_sections_to_the_end(tmp_path: Path) -> None:
    command = (sys.executable, ROOT / "benchmarks/gpu/run.py", "--out", tmp_path, "--device", "cpu", "--tiny")
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environ(), cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "results.md").read_text()
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    statuses: dict[str, set[str]] = {name: set() for name in SECTIONS}
    for outcome in found["outcomes"]:
        statuses[outcome["section"]].add(outcome["status"])
        assert outcome["status"] != "absent" or outcome["detail"], outcome
    assert statuses["ceilings"] == {"ok"} and "ok" in statuses["step"] and "ok" in statuses["serving"]
    for section, module in MODULES.items():
        assert statuses[section] == {"ok" if _is_written(module) else "absent"}, section


NOT_NEEDED = ("megatron", "deepspeed", "transformers", "psutil", "rich", "msgspec", "zmq", "fastapi")
WITHOUT_THEM = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({NOT_NEEDED}))
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.triton
def test_kernels_are_measured_where_the_requirements_are_not_installed(tmp_path: Path) -> None:
    script = (ROOT / "benchmarks/gpu/run.py", "--out", tmp_path, "--device", "cpu", "--tiny")
    command = (sys.executable, "-c", WITHOUT_THEM, *script, "--only", "ceilings", "decode", "step", "serving")
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environ())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    absent = {(each["section"], each["detail"]) for each in found if each["status"] == "absent"}
    assert any(section == "serving" and "megatron" in detail for section, detail in absent), absent
    assert {each["status"] for each in found if each["section"] == "ceilings"} == {"ok"}
    if _is_written("decode"):
        assert {each["status"] for each in found if each["section"] == "decode"} == {"ok"}


def _blurred(q: Tensor, k: Tensor, v: Tensor, *, scale: float, diagonal: int | None) -> Any:
    return attend(q, k, v, scale=0.8 * scale, diagonal=diagonal)


def _half_written(q: Tensor, k: Tensor, v: Tensor, *, scale: float, diagonal: int | None) -> Any:
    right, out = attend(q, k, v, scale=scale, diagonal=diagonal), torch.empty_like(q)
    out[:, :, ::2] = right[0][:, :, ::2]
    return out, right[1]


def _raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("attend_prefill", "status", "told"),
    [
        (attend, "ok", ""),
        (_blurred, "wrong", "WRONG"),
        (_half_written, "wrong", "not finite"),
        (_raising, "error", "ERROR: RuntimeError: an illegal memory access was encountered"),
    ],
)
def test_a_wrong_kernel_is_told_and_does_not_stop_the_others(
    attend_prefill: Callable[..., Any],
    status: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    planted = types.ModuleType("prefill")
    planted.attend_prefill = attend_prefill  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron_sps2.ops.kernels.prefill", planted)
    flags = ["--out", str(tmp_path), "--device", "cpu", "--tiny", "--only", "ceilings", "prefill"]
    assert main(flags) == (status != "ok")
    found = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    cases = [(each["section"], each["status"]) for each in found]
    assert cases == [("ceilings", "ok")] * 2 + [("prefill", status)] * 3
    assert told in capsys.readouterr().out
    assert ("Traceback" in found[-1]["detail"]) == (status == "error")


def test_a_rate_is_shown_beside_the_ceiling_of_its_unit() -> None:
    rows = [
        Outcome(section="ceilings", case="copy", status="ok", row=Row(shape="", rate=4.0, unit="TB/s")),
        Outcome(section="decode", case="equal", status="ok", row=Row(shape="s", rate=3.0, unit="TB/s")),
        Outcome(section="csa", case="layer", status="ok", row=Row(shape="s", ratios={"dense": 5.0})),
    ]
    lines = markdown({"device": "none"}, rows).splitlines()
    assert "| 3 TB/s | 75% |" in lines[-2] and "| dense 5.00x |" in lines[-1]


def test_a_check_fails_on_what_is_not_a_number() -> None:
    assert Check(error=0.1, limit=0.1, num_not_finite=0).passed
    assert not Check(error=float("nan"), limit=0.1, num_not_finite=0).passed
    x = torch.ones(4)
    assert not compare((torch.tensor([1.0, torch.inf]),), ((x, x),), 1.0).passed
    with poisoned():
        assert torch.empty(3).isnan().all() and x.new_empty(2).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("diagonal", [None, 3])
def test_the_sampled_reference_is_attention(diagonal: int | None) -> None:
    q, k, v = torch.randn(9, 1, 4, 8), torch.randn(12, 1, 2, 8), torch.randn(12, 1, 2, 8)
    rows = torch.tensor([0, 4, 8])
    seen = None if diagonal is None else rows + diagonal
    found = attended(q[rows, 0], k[:, 0], v[:, 0], 0.3, seen)
    out, lse = attend_reference(q, k, v, scale=0.3, diagonal=diagonal)
    torch.testing.assert_close(found[0].float(), out[rows, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1].float(), lse[rows, 0], atol=1e-5, rtol=1e-5)


def test_every_case_can_be_listed_at_every_size() -> None:
    for size in ("full", "quick", "tiny"):
        bench = Bench(device=torch.device("cpu"), size=size)  # type: ignore[arg-type]
        for cases in SECTIONS.values():
            assert all(isinstance(case, Case) and case.name for case in cases(bench))


def test_a_measurement_on_cpu_needs_to_be_tiny(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--device", "cpu"])
