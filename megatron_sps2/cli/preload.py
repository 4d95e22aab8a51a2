"""What a forkserver imports once for all local ranks: they then start in 0.3 s instead of 10 s."""

import os

from megatron_sps2.parallel import garbage

garbage.look_less()
# Libraries ask for devices as they are imported; if not by NVML, no rank forked from here could use one.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch.distributed  # noqa: E402, F401

import megatron_sps2.engine.build  # noqa: E402
import megatron_sps2.ops.cpu.decode  # noqa: E402, F401
