"""What kernels must know of where they run. Knows devices, not shapes."""

from __future__ import annotations

import torch
import triton

# Of an H100 or H200: what the interpreter plays, so that it runs the launches that such a card gets.
HOPPER = (9, 0)
HOPPER_MULTIPROCESSORS = 132


def interpreting() -> bool:
    """Triton's interpreter runs the kernels (TRITON_INTERPRET=1): tl.dot of bf16 and fp16 is wrong there."""
    return bool(triton.knobs.runtime.interpret)


def num_multiprocessors(device: torch.device) -> int:
    """How many programs of full size run at a time."""
    if device.type != "cuda":
        return HOPPER_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability, (9, 0) for Hopper."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else HOPPER
