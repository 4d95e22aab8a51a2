from dataclasses import dataclass
from collections.abc import Callable, Iterator
from megatron_sps2.ops.kept import KeySelector, TorchSelector, attend_kept
@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    name: str
    key_selector: type[KeySelector]
    attend_kept: Callable[..., Iterator[None]]
TORCH = Kernels(name="torch", key_selector=TorchSelector, attend_kept=attend_kept)
def triton_kernels():
    from dataclasses import replace
    from megatron_sps2.ops.kernels.csa_select import TritonSelector
    from megatron_sps2.ops.kernels.csa_attend import attend_kept
    return replace(TORCH, name="triton", key_selector=TritonSelector, attend_kept=attend_kept)
