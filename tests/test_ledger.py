"""The ledger keeps phases and collectives apart."""

from __future__ import annotations

import pickle

import pytest

from megatron_sps2.parallel.ledger import Ledger


def test_bytes_are_booked_by_phase_and_collective() -> None:
    ledger = Ledger()
    with ledger.phase("prefill"):
        ledger.add("exchange_k", 5)
        ledger.add("exchange_v", 7)
        ledger.add("exchange_k", 10)
    with ledger.phase("decode"):
        ledger.add("exchange_k", 100)
    assert ledger.total("prefill") == 22
    assert ledger.total("prefill", "exchange_k") == 15
    assert ledger.total("prefill", "exchange_k", "exchange_v") == 22
    assert ledger.total("decode") == 100
    assert ledger.by_collective("prefill") == {"exchange_k": 15, "exchange_v": 7}


def test_phases_nest_and_end_with_an_error_too() -> None:
    ledger = Ledger()
    with ledger.phase("prefill"):
        with pytest.raises(KeyError), ledger.phase("decode"):
            ledger.add("x", 1)
            raise KeyError
        ledger.add("x", 10)
    ledger.add("x", 100)
    assert [ledger.total(phase) for phase in ("decode", "prefill", "setup")] == [1, 10, 100]


def test_what_was_never_sent_is_zero_and_asking_books_nothing() -> None:
    ledger = Ledger()
    assert ledger.total("prefill") == ledger.total("prefill", "x") == 0
    assert ledger.by_collective("prefill") == {}
    ledger.add("x", 3)
    ledger.clear()
    assert ledger.by_collective("setup") == {}


def test_a_ledger_travels_between_ranks() -> None:
    ledger = Ledger()
    ledger.add("x", 3)
    assert pickle.loads(pickle.dumps(ledger)).by_collective("setup") == {"x": 3}
