"""Freed memory stays in the process: page faults are counted, in a process of their own."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from megatron_sps2.model.heap import keep_freed_memory
from tests.ranks import run_ranks

NUM_ROUNDS = 8


def _faults_of_large_buffers() -> int:
    """Page faults of filling and freeing a 64 MB tensor 8 times."""
    torch.ones(16 * 1024 * 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(NUM_ROUNDS):
        torch.ones(16 * 1024 * 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _before_and_after() -> tuple[int, bool, int]:
    before, possible = _faults_of_large_buffers(), keep_freed_memory()
    # The kernel may take pages away by itself when memory is short; not three times in a row.
    return before, possible, min(_faults_of_large_buffers() for _ in range(3))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_large_buffers_are_reused_without_page_faults() -> None:
    ((before, possible, after),) = run_ranks(1, _before_and_after)
    assert possible
    # Control: without it every round faults its pages in again (few, where the kernel gives 2 MB pages).
    assert before >= NUM_ROUNDS * 32
    assert after < NUM_ROUNDS
