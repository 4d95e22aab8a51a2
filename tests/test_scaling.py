"""The theory of benchmarks.scaling by hand: lines from one point each, what is left out, the plots."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.scaling_plot import draw
from benchmarks.work_model import Row, fit, kept_pairs, why_not

SHAPE = {
    **{"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1536, "num_attention_heads": 8},
    **{"num_query_groups": 4, "head_dim": 64, "vocab_size": 32000, "max_seq_len": 4096},
}


def row(mode: str, sp: int, tokens: int, ttft_s: float, attention_s: float, kept: float = 1.0) -> Row:
    return Row(
        mode=mode,
        sp=sp,
        tokens=tokens,
        strategy="ulysses" if mode == "exact" else "csa",
        ttft_s=ttft_s,
        attention_s=attention_s,
        attention_cpu_s=attention_s / 2,
        bytes_sent=100.0 * (sp - 1),
        bytes_formula=100.0 * (sp - 1),
        kept=kept,
    )


# 1,000 tokens on one rank: 1 s outside attention, 2 s in it; CSA keeps a quarter of the pairs: 1.5 s.
ROWS = [
    row("exact", 1, 500, 9.0, 9.0),
    row("exact", 1, 1000, 3.0, 2.0),
    row("csa", 1, 1000, 2.5, 1.5, kept=0.25),
    row("exact", 2, 2000, 9.0, 9.0),
    row("exact", 2, 1000, 9.0, 9.0),
    row("csa", 2, 1000, 9.0, 9.0, kept=0.25),
]


def test_each_line_starts_from_the_longest_prompt_on_the_fewest_ranks() -> None:
    work = fit(ROWS, cores=2)
    assert work.pair_s == pytest.approx(2e-6)
    assert work.linear_s == pytest.approx(1e-3)
    # 1.5 s less a quarter of the 2 s of all pairs.
    assert work.csa_linear_s == pytest.approx(1e-3)


def test_the_lines_go_through_their_points() -> None:
    work = fit(ROWS, cores=2)
    assert work.attention(1000, 1) == pytest.approx(2.0)
    assert work.ttft(1000, 1) == pytest.approx(3.0)
    assert work.attention(1000, 1, kept=0.25, csa=True) == pytest.approx(1.5)
    assert work.ttft(1000, 1, kept=0.25, csa=True) == pytest.approx(2.5)


def test_exact_attention_grows_with_the_square_and_falls_with_the_ranks() -> None:
    work = fit(ROWS, cores=2)
    assert work.attention(2000, 1) == pytest.approx(8.0)
    assert work.attention(2000, 4) == pytest.approx(2.0)
    assert work.ttft(2000, 2) == pytest.approx(5.0)


def test_four_ranks_on_two_cores_are_no_faster_than_two() -> None:
    assert fit(ROWS, cores=2).ttft(1000, 4) == fit(ROWS, cores=2).ttft(1000, 2)
    # Control: with a core each they are.
    assert fit(ROWS, cores=4).ttft(1000, 4) == pytest.approx(fit(ROWS, cores=2).ttft(1000, 2) / 2)


def test_a_start_on_shared_cores_counts_the_cores_that_worked() -> None:
    work = fit([row("exact", 4, 1000, 3.0, 2.0)], cores=2)
    assert work.pair_s == pytest.approx(4e-6) and work.csa_linear_s == 0


def test_attention_that_was_cheaper_than_its_pairs_has_no_negative_rest() -> None:
    cheap = [replace(one, attention_s=0.1) if one.mode == "csa" else one for one in ROWS]
    assert fit(cheap, cores=2).csa_linear_s == 0


def test_without_an_exact_prompt_there_is_no_theory() -> None:
    with pytest.raises(ValueError, match="add exact to --modes"):
        fit([one for one in ROWS if one.mode == "csa"], cores=2)


def test_kept_pairs_are_the_own_segment_and_a_share_of_the_rest() -> None:
    # 4 segments: a quarter of the pairs are a segment's own, a tenth of the other three quarters is kept.
    assert kept_pairs(0.1, 256, 1024) == pytest.approx(0.25 + 0.075)
    assert kept_pairs(1.0, 256, 1024) == kept_pairs(0.1, 2048, 1024) == 1.0


def test_every_plot_is_written(tmp_path: Path) -> None:
    draw({"cores": 2, "model": SHAPE, "rows": [asdict(one) for one in ROWS]}, tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        *("scaling_attention.png", "scaling_bytes.png", "scaling_ttft.png")
    ]
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "figures").iterdir())


@pytest.mark.parametrize(
    ("tokens", "last", "segment_size", "why"),
    [
        (2048, (1024, 37.0), 0, ""),
        (2048, (1024, 38.0), 0, "would take up to 152 s, and --limit-s is 150"),
        (512, None, 0, ""),
        (512, None, 512, "one segment of 512 tokens has no far keys"),
        (513, None, 512, ""),
    ],
)
def test_what_is_left_out_is_told_why(
    tokens: int, last: tuple[int, float] | None, segment_size: int, why: str
) -> None:
    assert why_not(tokens, last, 150, segment_size) == why
