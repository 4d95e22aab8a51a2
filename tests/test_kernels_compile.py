"""Every kernel compiles for an H100 or H200 as production launches it, within what such a card has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernel_case import Case  # noqa: E402
from tests.kernel_cases import CASES  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.slow]
MAX_SHARED = 227 * 1024
ROOT = Path(__file__).parent.parent
Results = dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What came out for each case, of one process: this one may interpret kernels, and then compiles none."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Said so as to be asked for alike in every version of Triton: a * b + c is one operation.
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DEFAULT_FP_FUSION": "1"}
    told = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    results: Results = json.loads(told.stdout)
    return results


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel_fits_a_hopper_gpu(case: Case, compiled: Results) -> None:
    found = compiled[case.name]
    assert found["shared"] <= MAX_SHARED
    assert case.max_stack is None or found["stack"] <= case.max_stack
    assert (found["num_wgmma"] > 0) == case.multiplies


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
