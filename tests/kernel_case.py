"""One compilation of a kernel, as production launches it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One compilation of `kernel` in `module` (under megatron_sps2.ops.kernels).

    `signature` gives the type of each argument that is not a constant, as Triton writes it. Pointers and the
    arguments named in `aligned` are multiples of 16, as Triton finds them in a launch.
    """

    name: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
    # Products must run on Hopper's tensor cores, wgmma.
    multiplies: bool = False
    # Bytes a thread may keep in local memory; None: any, where speed does not count.
    max_stack: int | None = field(default=0)
