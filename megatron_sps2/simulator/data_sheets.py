"""Profiles of NVIDIA's data-centre GPUs from public data sheets. None of them was measured.

A sheet's peak is multiplied by the share of it that well-tuned kernels are known to reach; both are noted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_sps2.simulator.profile import DeviceProfile, Link, Overheads, read_profile

SOURCE = "data sheet, not measured"
# Shares of the peak. Matmuls of large batches reach 60 to 75% of dense tensor-core peaks, FlashAttention 2 on
# A100 and 3 on H100 about 50 to 70%, streaming reads 80 to 90% of HBM, NCCL 75 to 85% of a link.
MATMUL, ATTENTION, MEMORY, LINK = 0.65, 0.5, 0.8, 0.8
# CUDA graphs off: tens of kernels a layer, and a plan made in Python and broadcast.
OVERHEADS = Overheads(step_s=2e-3, layer_s=60e-6, piece_layer_s=40e-6, row_layer_s=2e-6, sample_s=50e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """Peaks, as printed: dense FLOP/s of bfloat16, bytes, bytes per second and direction."""

    name: str
    flops: float
    tf32: float
    memory_bytes: int
    memory_bandwidth: float
    nvlink: float
    network: float  # of one GPU, in a node of eight with a card each

    def profile(self) -> DeviceProfile:
        half = {"bfloat16": self.flops, "float16": self.flops, "float32": self.tf32}
        return DeviceProfile(
            name=self.name,
            source=SOURCE,
            matmul_flops={dtype: MATMUL * peak for dtype, peak in half.items()},
            attention_flops={dtype: ATTENTION * peak for dtype, peak in half.items()},
            weight_bandwidth=MEMORY * self.memory_bandwidth,
            kv_bandwidth=MEMORY * self.memory_bandwidth,
            intra=Link(bandwidth=LINK * self.nvlink, latency_s=10e-6),
            inter=Link(bandwidth=LINK * self.network, latency_s=20e-6),
            memory_bytes=self.memory_bytes,
            devices_per_node=8,
            overheads=OVERHEADS,
            memory_overlap=1.0,
            exchange_overlap=0.8,
            notes={
                "achievable": {"matmul": MATMUL, "attention": ATTENTION, "memory": MEMORY, "links": LINK},
                "float32": "TF32 on tensor cores",
            },
        )


# NVIDIA's data sheets of H100 SXM, H200 SXM and A100 80GB SXM, dense; nodes are those of DGX: NDR InfiniBand
# of 400 Gbit/s to each GPU beside Hopper, HDR of 200 Gbit/s beside A100.
SHEETS = {
    sheet.name: sheet
    for sheet in (
        Sheet(
            name="h100",
            flops=989e12,
            tf32=494e12,
            memory_bytes=80 * 10**9,
            memory_bandwidth=3.35e12,
            nvlink=450e9,
            network=50e9,
        ),
        Sheet(
            name="h200",
            flops=989e12,
            tf32=494e12,
            memory_bytes=141 * 10**9,
            memory_bandwidth=4.8e12,
            nvlink=450e9,
            network=50e9,
        ),
        Sheet(
            name="a100",
            flops=312e12,
            tf32=156e12,
            memory_bytes=80 * 10**9,
            memory_bandwidth=2.039e12,
            nvlink=300e9,
            network=25e9,
        ),
    )
}


def load_profile(name_or_file: str) -> DeviceProfile:
    """A shipped profile by name, or the one in a JSON file. Raises FileNotFoundError or ValueError."""
    if name_or_file in SHEETS:
        return SHEETS[name_or_file].profile()
    path = Path(name_or_file)
    if not path.is_file():
        raise FileNotFoundError(
            f"profile {name_or_file!r} is none of {', '.join(SHEETS)} and no file; `sps2 profile` writes one"
        )
    return read_profile(path)
