"""Memory in large pages: asked for where Linux has them, harmless everywhere else."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from megatron_sps2.attention.huge_pages import prefer_huge_pages

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="madvise of large pages is Linux's")
def test_linux_is_asked_for_large_pages_of_this_memory_alone() -> None:
    asked, other = (torch.empty(16 * MIB, dtype=torch.uint8) for _ in range(2))
    if not prefer_huge_pages(asked):
        pytest.skip("this kernel has no large pages")
    assert "hg" in flags_at(asked.data_ptr() + 8 * MIB)
    assert "hg" not in flags_at(other.data_ptr() + 8 * MIB)


def flags_at(address: int) -> list[str]:
    """VmFlags of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("no mapping holds the address")


@pytest.mark.parametrize("num_bytes", [0, 1, mmap.PAGESIZE - 1])
def test_memory_of_less_than_a_page_is_left_alone(num_bytes: int) -> None:
    assert not prefer_huge_pages(torch.empty(num_bytes, dtype=torch.uint8))


def test_without_madvise_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not prefer_huge_pages(torch.empty(16 * MIB, dtype=torch.uint8))
