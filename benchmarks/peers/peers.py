"""The peers by name: which driver, which environment, which file of the model. Ours are in the same list."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = "benchmarks.peers"
HOME = Path.home() / ".cache" / "megatron_sps2" / "peers"


@dataclass(frozen=True, slots=True)
class Peer:
    """How one driver is started."""

    module: str  # run as python -m
    setting: str = ""
    # Folder under HOME with an environment of its own; None: the Python that runs this.
    environment: str | None = None
    # Of the model's three forms: hf, megatron, gguf.
    form: str = "hf"
    # Ranks of one thread; else one process with as many threads.
    has_ranks: bool = False
    is_ours: bool = False

    @property
    def python(self) -> Path:
        return (
            Path(sys.executable) if self.environment is None else HOME / self.environment / "bin" / "python"
        )

    def missing(self) -> str | None:
        """Why it cannot be started, before it is tried."""
        if self.python.exists():
            return None
        return f"not installed; run python -m benchmarks.peers.install {self.environment}"


MODEL_PEERS = {
    "sps2_exact": Peer(f"{HERE}.sps2_driver", "exact", form="megatron", has_ranks=True, is_ours=True),
    "sps2_csa": Peer(f"{HERE}.sps2_driver", "csa", form="megatron", has_ranks=True, is_ours=True),
    "transformers": Peer(f"{HERE}.transformers_driver"),
    "vllm": Peer(f"{HERE}.vllm_driver", "whole-compiled", "vllm"),
    "vllm_chunked": Peer(f"{HERE}.vllm_driver", "chunked-compiled", "vllm"),
    "llama_cpp": Peer(f"{HERE}.llama_cpp_driver", environment="llama_cpp", form="gguf"),
    "megatron_tp": Peer(f"{HERE}.megatron_tp_driver", form="megatron", has_ranks=True),
}
ATTENTION_PEERS = {
    "ulysses": Peer(f"{HERE}.attention_driver", "ulysses", is_ours=True, has_ranks=True),
    "pass_kv": Peer(f"{HERE}.attention_driver", "pass_kv", is_ours=True, has_ranks=True),
    "deepspeed": Peer(f"{HERE}.attention_driver", "deepspeed", has_ranks=True),
    "yunchang_ulysses": Peer(f"{HERE}.attention_driver", "yunchang_ulysses", "yunchang", has_ranks=True),
    "yunchang_ring": Peer(f"{HERE}.attention_driver", "yunchang_ring", "yunchang", has_ranks=True),
}
# What all tokens are compared with; not timed.
REFERENCE = Peer(f"{HERE}.transformers_driver", "float32")


def choose(names: list[str], known: dict[str, Peer]) -> dict[str, Peer]:
    """The named ones of `known`, in its order; all for 'all'. Raises ValueError for a name nobody has."""
    everyone = MODEL_PEERS | ATTENTION_PEERS
    if unknown := [name for name in names if name != "all" and name not in everyone]:
        raise ValueError(
            f"peers {', '.join(unknown)} are not known; use all or some of {', '.join(everyone)}"
        )
    return {name: peer for name, peer in known.items() if "all" in names or name in names}
