"""Compiles the cases of `tests.kernel_cases` for sm_90, which needs no GPU, and prints the outcome as JSON.

Run as `python -m tests.compile_kernels` without TRITON_INTERPRET: a process in which kernels are compiled.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from importlib import import_module

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernel_case import Case
from tests.kernel_cases import CASES

TARGET = GPUTarget("cuda", 90, 32)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """Bytes of shared memory of a program, registers and bytes of stack of a thread, wgmma in the code."""

    shared: int
    registers: int
    stack: int
    num_wgmma: int


def compile_case(case: Case) -> Compiled:
    kernel = getattr(import_module(f"megatron_sps2.ops.kernels.{case.module}"), case.kernel)
    types = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
    signature = {name: types[name] for name in kernel.arg_names}
    pointers = {name for name, kind in signature.items() if kind.startswith("*")}
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=case.constants,
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(signature)
            if name in pointers.union(case.aligned)
        },
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    registers, stack = resources(compiled.asm["cubin"])
    return Compiled(
        shared=compiled.metadata.shared,
        registers=registers,
        stack=stack,
        num_wgmma=compiled.asm["ptx"].count("wgmma.mma_async"),
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, where spilled registers go, of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout)
    assert found, told.stdout
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    print(json.dumps({case.name: dataclasses.asdict(compile_case(case)) for case in CASES}))
