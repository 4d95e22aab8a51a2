"""The house stays as drawn: imports go downward, files say what they are and stay short, the CLI starts."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("megatron_sps2", "checkpoints_tools")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LAUNCHERS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
MAX_LINES = 400


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter in a process of its own, on the packages in `folder`."""
    code = "from importlinter.cli import lint_imports_command as run; run(['--no-cache'])"
    return subprocess.run(
        (sys.executable, "-c", code), cwd=folder, capture_output=True, text=True, timeout=120
    )


def copy_house(folder: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_floors_import_downward() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("megatron_sps2/config.py", "import megatron_sps2.ops", "Floors import strictly downward"),
        ("megatron_sps2/ops/__init__.py", "import megatron_sps2.parallel", "Floors import strictly downward"),
        (
            "megatron_sps2/parallel/__init__.py",
            "import megatron_sps2.engine",
            "Floors import strictly downward",
        ),
        ("megatron_sps2/bench/trace.py", "import megatron_sps2.engine", "bench knows endpoints"),
        ("checkpoints_tools/__init__.py", "import megatron_sps2.attention", "config and model only"),
        ("checkpoints_tools/__init__.py", "import megatron_sps2.engine", "never reaches the engine"),
        ("megatron_sps2/model/__init__.py", "import checkpoints_tools", "knows the converters"),
    ],
)
def test_control_a_planted_import_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    house = copy_house(tmp_path)
    with (house / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(house)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(contract in text and "BROKEN" in text for text in done.stdout.splitlines()), done.stdout


def test_control_a_new_floor_needs_a_place(tmp_path: Path) -> None:
    house = copy_house(tmp_path)
    (house / "megatron_sps2" / "attic").mkdir()
    (house / "megatron_sps2" / "attic" / "__init__.py").touch()
    assert lint_imports(house).returncode == 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} opens without a docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES, "past 400 lines: find the seam"


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launch_scripts_stop_at_the_first_error(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text and '"$@"' in text
    assert subprocess.run(("bash", "-n", str(path)), timeout=20).returncode == 0


@pytest.mark.parametrize(
    "module",
    [
        "engine.scheduler",
        "engine.policies",
        "cli.serve",
        "cli.bench",
        "server.protocol",
        "cli.simulate",
        "cli.plan",
        "cli.reshard",
        "cli.verify",
        "cli.inspect",
    ],
)
def test_who_plans_and_who_watches_needs_no_torch(module: str) -> None:
    code = f"import megatron_sps2.{module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run((sys.executable, "-c", code), cwd=ROOT, timeout=60).returncode == 0


def test_control_the_runner_needs_torch() -> None:
    code = "import megatron_sps2.engine.runner, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run((sys.executable, "-c", code), cwd=ROOT, timeout=60).returncode == 1


@pytest.mark.skipif(not (ROOT / "megatron_sps2" / "__main__.py").exists(), reason="no CLI yet")
def test_the_package_runs_as_a_module() -> None:
    command = (sys.executable, "-m", "megatron_sps2", "--help")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def is_compiler_loaded(module: str) -> bool:
    code = f"import {module}, sys; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    return bool(subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode)


def test_ranks_start_without_the_compiler() -> None:
    assert not is_compiler_loaded("megatron_sps2.engine.build")
    # Control: Megatron by itself loads it.
    assert is_compiler_loaded("megatron.core.models.gpt.gpt_model")


COUNT_DEVICES = """
import torch
asked = []
torch.cuda._is_compiled, torch.version.cuda = lambda: True, "13.0"
torch.cuda._device_count_nvml = lambda: 0
torch._C._cuda_getDeviceCount = lambda: asked.append(1) or 0  # After this no forked process can use a device.
import megatron_sps2.cli.preload
raise SystemExit(len(asked))
"""


def test_ranks_can_use_a_device_after_what_their_forkserver_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host with CUDA's tools, as the environment says."""
    monkeypatch.setenv("CUDA_HOME", "/usr")
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    command = (sys.executable, "-W", "ignore", "-c", COUNT_DEVICES)
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0
    # Control: torch by itself asks in a way that ends it.
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    assert subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True).returncode > 0


def collection_threshold(module: str) -> int:
    code = f"import {module}, gc; print(gc.get_threshold()[0])"
    return int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def test_a_command_looks_for_garbage_less_often() -> None:
    code = """if True:
        import gc, megatron_sps2.cli.main as cli
        try:
            cli.main(["--version"])
        finally:
            print(gc.get_threshold()[0])
    """
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split()[-1] == "10000"


def test_garbage_is_looked_for_less_often_in_our_processes_and_not_in_a_users() -> None:
    assert collection_threshold("megatron_sps2.cli.preload") == 10_000
    assert collection_threshold("megatron_sps2.llm") == 700
