"""`sps2 bench compare`: what is refused, servers that are lost, and one whole run."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sps2.bench import fleet
from megatron_sps2.bench.fleet import Fleet, Server
from megatron_sps2.bench.turns import Turn
from megatron_sps2.cli import bench_compare
from megatron_sps2.cli.bench_compare import prepare
from megatron_sps2.cli.main import parse_args
from megatron_sps2.model.manifest import write_manifest
from tests.compared import model, turn
from tests.sps2_command import ROOT, make_checkpoint


def test_a_server_that_does_not_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        Fleet({"sps2-csa": ("--checkpoint", str(tmp_path / "none"))}) as servers,
        pytest.raises(RuntimeError, match="setting sps2-csa did not start.*exit code 2.*\n.*does not exist"),
    ):
        servers.start()


def test_a_server_that_has_ended_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("first\n" * 20 + "rank 1 was killed\n")
    process = subprocess.Popen(("false",))
    process.wait()
    server = Server(process, "http://127.0.0.1:9", tmp_path / "log")
    with pytest.raises(RuntimeError, match="setting fcfs was lost.*exit code 1.*\n") as caught:
        server.check_alive("fcfs")
    assert str(caught.value).endswith("rank 1 was killed") and str(caught.value).count("first") == 14


def compare_args(folder: Path, *more: object) -> argparse.Namespace:
    """Of a checkpoint that has a shape and no weights."""
    (folder / "c").mkdir()
    write_manifest(folder / "c", model(num_heads=9, num_groups=3), "float32", "")
    (folder / "trace.csv").write_text("prompt_tokens,output_tokens\n" + "5,3\n" * 4)
    line = ("--checkpoint", folder / "c", "--trace", folder / "trace.csv", "--trace-format", "csv", *more)
    return parse_args(["bench", "compare", *map(str, line)])


def test_servers_differ_in_their_setting_and_in_nothing_else(tmp_path: Path) -> None:
    more = ("--settings", "sps2-csa,fcfs", "--sp", 2, "--layouts", "fit", "--serve-flags", "--max-num-seqs 8")
    wanted = prepare(compare_args(tmp_path, *more, "--kv-cache-gib", 0.5, "--kv-cache-dtype", "fp8"))
    assert list(wanted.left_out) == ["sp1tp2"]
    csa, fcfs = (wanted.flags[each.name] for each in wanted.settings)
    same = csa[: csa.index("--sp")]
    assert same == fcfs[: fcfs.index("--sp")]
    assert csa[len(same) :] == wanted.settings[0].serve_flags
    assert same[4:8] == ("--kv-cache-dtype", "fp8", "--kv-cache-gib", "0.5") and same[-2:] == (
        "--max-num-seqs",
        "8",
    )
    assert same[same.index("--max-model-len") + 1] == "512"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--settings", "fcfs@sp1tp2"), "tp_size=2 does not divide"),
        (("--loads", "4,fast"), "--loads '4,fast' must be numbers"),
        (("--rounds", 5), "4 requests cannot be cut into 5 rounds"),
        (("--max-model-len", 513), r"--max-model-len 513 must lie in 2..512"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_server_starts(
    tmp_path: Path, more: tuple[object, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        prepare(compare_args(tmp_path, *more))


def test_a_run_that_loses_a_server_keeps_the_rounds_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(args: object, wanted: object, corpus: object, turns: list[Turn]) -> None:
        turns += [turn(name, 0, 1.0, "abc") for name in ("sps2-exact", "fcfs")]
        raise RuntimeError("the server of setting fcfs ended")

    monkeypatch.setattr(bench_compare, "_measure", lose)
    more = ("--settings", "sps2-exact,fcfs", "--json", tmp_path / "out.json")
    with pytest.raises(RuntimeError, match="setting fcfs ended"):
        bench_compare.run(compare_args(tmp_path, *more))
    found = json.loads((tmp_path / "out.json").read_text())
    assert "setting fcfs ended" in found["error"] and "cut short by" in capsys.readouterr().out
    assert [each["completed"] for each in found["results"]] == [1, 1]


def test_one_run_gives_ratios_and_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "COMMAND", (sys.executable, "-m", "tests.serve_or_stub"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    lines = [
        {"timestamp": 40 * i, "input_length": 700 + 90 * i, "output_length": 6, "hash_ids": [0, i + 1]}
        for i in range(4)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = (
        *("bench", "compare", "--checkpoint", make_checkpoint(tmp_path, num_hidden_layers=2)),
        *("--settings", "sps2-exact,sarathi-64", "--trace", tmp_path / "trace.jsonl"),
        *("--length-scale", 0.5, "--rounds", 2, "--loads", "1,0.5", "--num-warmups", 1),
        *("--kv-cache-gib", 0.01, "--max-model-len", 1024, "--json", tmp_path / "out.json"),
    )
    assert bench_compare.run(parse_args(list(map(str, args)))) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(each["load"], each["setting"], each["completed"]) for each in found["results"]] == [
        (load, name, 4) for load in (1.0, 0.5) for name in ("sps2-exact", "sarathi-64")
    ]
    for each in found["results"]:
        assert (each["total_input_tokens"], each["total_output_tokens"]) == (1670, 12)
    assert [each["agreement"]["num_requests"] for each in found["results"][1::2]] == [4, 4]
    assert found["results"][1]["mean_itl_ms"] >= 50  # the stub's
    ratio = found["ratios_to_sarathi"]["0.5"]["to_best"]["sps2-exact"]["e2e"]["mean"]
    assert 0 < ratio["min"] <= ratio["ratio"] <= ratio["max"]
    assert found["rounds"] == 2 and "--policy sarathi" in found["settings"]["sarathi-64"]
