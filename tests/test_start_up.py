"""What starting took: the memory that is told is this process's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_sps2.engine.start_up import peak_bytes

HALF_GIB = 1 << 29


def test_the_peak_is_what_this_process_has_held_and_stays() -> None:
    before = peak_bytes()
    held = bytearray(before + HALF_GIB)
    del held
    assert peak_bytes() > before + HALF_GIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_program_that_a_large_one_starts_does_not_show_its_memory() -> None:
    child = "from megatron_sps2.engine.start_up import peak_bytes; print(peak_bytes())"
    plain = "import resource; print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    large = bytearray(HALF_GIB)
    for i in range(0, HALF_GIB, 4096):
        large[i] = 1
    ours, getrusage = (
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for code in (child, plain)
    )
    del large
    assert ours < HALF_GIB
    # Control: getrusage tells the other thing.
    assert getrusage > HALF_GIB
