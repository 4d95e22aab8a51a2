"""benchmarks/peers without any peer: what drivers and the run say to each other, and the tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.peers import peers
from benchmarks.peers.asked import Asked, PeerAbsent
from benchmarks.peers.gguf_file import gguf_name, interleave
from benchmarks.peers.install import _steps
from benchmarks.peers.peers import MODEL_PEERS, Peer, choose
from benchmarks.peers.table import Cell, agreement, as_json, ratios, ratios_table, times_table

FLAGS = ["--model=none", "--max-length=9", "--decode-length=9", "--num-decodes=1"]
RESULTS = {
    "prefill 4096": {
        "sps2_exact": Cell([2.0, 1.0], [7], [0.0, 0.3]),
        "slow": Cell([6.0, 4.0], [7]),
        "fast": Cell([3.0, 2.5], [8]),
        "gone": Cell(absent="not installed"),
    },
    "8 decodes at 4096": {
        "sps2_exact": Cell([4.0], [1, 2]),
        "slow": Cell([2.0], [1, 2]),
        "fast": Cell(absent="no decode"),
        "gone": Cell(absent="not installed"),
    },
    "prefill 32768": {"sps2_exact": Cell([1.0]), "fast": Cell(absent="more than 400 s")},
}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    asked = Asked(Peer("tests.peer_driver"), FLAGS, tmp_path_factory.mktemp("peer") / "log", 2)
    yield asked
    if asked.is_running:
        asked.close()


def test_a_driver_answers_in_turn_whatever_it_prints_and_whatever_fails(fake: Asked) -> None:
    assert fake.what == "fake on 2 threads"
    with pytest.raises(PeerAbsent, match="^ValueError: an empty prompt$"):
        fake.ask({"op": "prefill", "ids": []}, 10)
    with pytest.raises(PeerAbsent, match="no decode on CPU"):
        fake.ask({"op": "decode", "prompts": [[1]], "num_tokens": 1}, 10)
    answer = fake.ask({"op": "prefill", "ids": [5, 6]}, 10)
    assert (answer.seconds, answer.tokens) == (0.5, [5])
    with pytest.raises(PeerAbsent, match=r"^more than 0 s$"):
        fake.ask({"op": "prefill", "ids": [1, 2, 3, 4]}, 0.1)
    assert not fake.is_running


def test_a_peer_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerAbsent, match="^ImportError: no such kernel$"):
        Asked(Peer("tests.peer_driver", "broken"), FLAGS, tmp_path / "log", 2)
    monkeypatch.setattr(peers, "HOME", tmp_path)
    with pytest.raises(PeerAbsent, match="run python -m benchmarks.peers.install vllm"):
        Asked(MODEL_PEERS["vllm"], FLAGS, tmp_path / "log", 2)


def test_ratios_are_to_the_fastest_peer_that_is_there() -> None:
    first, second = ratios(RESULTS, ["sps2_exact"])
    assert (first.workload, first.peer, first.best) == ("prefill 4096", "fast", 2.5)
    assert first.median == pytest.approx(2.75 / 1.5)
    # Ours is slower there, and says so; at 32768 nobody else has finished.
    assert (second.workload, second.peer, second.best) == ("8 decodes at 4096", "slow", 0.5)
    assert "| 8 decodes at 4096 | sps2_exact | slow | 0.50x | 0.50x |" in ratios_table([first, second])


def test_the_table_names_absent_peers_with_the_reason() -> None:
    lines = times_table(RESULTS, {"8 decodes at 4096": 512}).splitlines()
    assert lines[0] == "| best / median, s | sps2_exact | slow | fast | gone |"
    assert lines[2] == "| prefill 4096 | 1 / 1.5 | 4 / 5 | 2.5 / 2.75 | - [1] |"
    assert lines[3] == "| 8 decodes at 4096 | 4 / 4, 128 tokens/s | 2 / 2, 256 tokens/s | - [2] | - [1] |"
    assert lines[6:] == ["[1] gone: not installed", "[2] fast: no decode", "[3] fast: more than 400 s"]
    kept = as_json(RESULTS, [])["results"]["prefill 4096"]
    assert (kept["slow"]["best"], kept["gone"]["absent"]) == (4.0, "not installed")


def test_first_tokens_are_counted_against_the_reference() -> None:
    right = {"prefill 4096": [7], "8 decodes at 4096": [1, 3]}
    assert agreement(RESULTS, right) == {"sps2_exact": "2 of 3", "slow": "2 of 3", "fast": "0 of 1"}


def test_peers_are_chosen_by_name_and_unknown_ones_refused() -> None:
    assert list(choose(["llama_cpp", "sps2_csa"], MODEL_PEERS)) == ["sps2_csa", "llama_cpp"]
    assert choose(["all"], MODEL_PEERS) == MODEL_PEERS
    with pytest.raises(ValueError, match="peers vlm are not known"):
        choose(["vlm"], MODEL_PEERS)


def test_torch_is_installed_first_and_alone() -> None:
    assert _steps("# why\ntorch==1\na==2\nb==3\n") == [["torch==1"], ["a==2", "b==3"]]
    assert _steps("a==2\n") == [["a==2"]]


def test_interleaved_rows_turn_by_neighbours_as_plain_rows_do_by_halves() -> None:
    weight, heads, d = torch.randn(12, 5, dtype=torch.float64), 2, 6
    hidden, angles = torch.randn(5, dtype=torch.float64), torch.randn(d // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    plain = (weight @ hidden).view(heads, 2, d // 2)
    by_halves = torch.complex(plain[:, 0], plain[:, 1]) * turn
    mixed = (interleave(weight, heads) @ hidden).view(heads, d // 2, 2)
    by_neighbours = torch.view_as_complex(mixed) * turn
    torch.testing.assert_close(by_neighbours, by_halves)
    # Control: without it they differ.
    wrong = torch.view_as_complex((weight @ hidden).view(heads, d // 2, 2)) * turn
    assert not torch.allclose(wrong, by_halves)
    assert gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
