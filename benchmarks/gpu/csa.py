"""A whole layer of CSA at one rank beside dense attention of the same prompt.

Random keys are all alike, and an adaptive budget would keep them all: here a few weigh much, as in a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.gpu.case import Absent, Bench, Case, Row
from benchmarks.gpu.checks import LIMITS, compare, poisoned, relative_error
from benchmarks.gpu.kernels import kernel, operation, optional
from benchmarks.gpu.timing import milliseconds

K = 1024
# Of all keys, those that weigh much, and by how much their scores are larger.
HEAVY, LIFT = 1 / 6, 9.0


def cases(bench: Bench) -> Iterator[Case]:
    for length in bench.pick(full=(32 * K, 128 * K), quick=(32 * K,), tiny=(64,)):
        yield Case(name="default preset", measure=partial(_measure, bench, length))


def _measure(bench: Bench, num_tokens: int) -> Row:
    dense, kernels = kernel("prefill", "attend_prefill"), _kernels()
    n, n_kv, d = bench.pick(full=(32, 8, 128), quick=(32, 8, 128), tiny=(4, 2, 16))
    device, dtype, scale = bench.device, torch.bfloat16, d**-0.5
    q, k, v = _peaked(bench, num_tokens, n, n_kv, d)
    run = _run(bench, num_tokens, n_kv, scale, kernels)
    csa = optional("megatron_sps2.attention.csa", "csa")
    watched = run(kernels)
    with poisoned():
        out = csa(q, k, v, watched, 0)
    # The torch set is the definition; it takes minutes where prompts are long.
    compared = num_tokens <= 32 * K
    pairs = [(out, csa(q, k, v, run(operation("kernel_set", "TORCH")), 0))] if compared else []
    check = compare((out,), pairs, 2 * LIMITS[dtype])
    again = run(kernels)  # one for all layers, as a prompt has
    taken = milliseconds(lambda _: csa(q, k, v, again, 0), device)
    dense_taken = milliseconds(lambda _: dense(q, k, v, scale=scale, diagonal=0), device)
    distance = relative_error(out, dense(q, k, v, scale=scale, diagonal=0)[0])
    return Row(
        shape=f"{num_tokens} tokens, {n}/{n_kv} heads of {d}, bf16",
        milliseconds=taken,
        check=check,
        ratios={"our dense": dense_taken / taken},
        note=f"{_density(watched):.1%} of keys kept, off dense by {distance:.3f}"
        + ("" if compared else "; too long to compare with torch's"),
    )


def _kernels() -> Any:
    """The Triton set. Raises Absent while CSA has no kernels in it."""
    kernel("csa_attend", "attend_kept")
    return operation("kernel_set", "triton_kernels")()


def _run(bench: Bench, num_tokens: int, n_kv: int, scale: float, kernels: Any) -> Any:
    """-> a function from a set of kernels to a CsaRun of one prompt on one rank."""
    from megatron_sps2.attention.csa_plan import CsaPlan
    from megatron_sps2.attention.csa_run import CsaRun
    from megatron_sps2.csa_setting import PRESETS, CsaSetting
    from megatron_sps2.parallel.collectives import Wire
    from megatron_sps2.parallel.groups import Axis
    from megatron_sps2.parallel.ledger import Ledger

    if "kernels" not in CsaRun.__dataclass_fields__:
        raise Absent("CsaRun takes no kernels")
    tally_type = optional("megatron_sps2.attention.csa_tally", "CsaTally")
    tiny = CsaSetting(segment_size=16, num_sinks=2, window=5, tail=7, num_probes=5, floor=0.9)
    plan = CsaPlan(bench.pick(full=PRESETS["default"], quick=PRESETS["default"], tiny=tiny), num_tokens, 1)
    wire = Wire(Axis(cast(Any, None), 0, 1, (0,)), Ledger())

    def run(kernels: Any) -> Any:
        tally = tally_type(1, n_kv, device=bench.device)
        return CsaRun(plan=plan, wire=wire, scale=scale, overlap=False, tally=tally, kernels=kernels)

    return run


def _density(run: Any) -> float:
    from megatron_sps2.attention.csa_tally import add_up

    tally = run.tally.encode().unsqueeze(0)
    sizes = {"tp_size": 1, "num_layers": 1, "bytes_exact": 1}
    return add_up(tally, setting="", bytes_formula=lambda _: 0, **sizes).density


def _peaked(bench: Bench, num_tokens: int, n: int, n_kv: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[s, 1, n, d]`: queries and some keys of a head share a direction."""
    made = [
        torch.randn(num_tokens, 1, heads, d, device=bench.device, dtype=torch.bfloat16)
        for heads in (n, n_kv, n_kv)
    ]
    direction = torch.nn.functional.normalize(torch.randn(n_kv, d, device=bench.device), dim=-1)
    lift = (LIFT * d**0.5) ** 0.5  # a heavy key's score grows by LIFT once it is scaled
    heavy = torch.rand(num_tokens, 1, n_kv, 1, device=bench.device) < HEAVY
    made[0] += lift * direction.repeat_interleave(n // n_kv, dim=0)
    made[1] += heavy * (lift * direction)
    return made[0], made[1], made[2]
