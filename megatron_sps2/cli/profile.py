"""`sps2 profile`: measures this machine's ranks through the real engine and writes a profile."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sps2 import __version__
from megatron_sps2.cli.arguments import parallel_config
from megatron_sps2.cli.generate import check_engine_flags, engine_config
from megatron_sps2.cli.world import in_world
from megatron_sps2.config import ScheduleConfig
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.simulator.setting import SHORT_PROMPT_TOKENS

if TYPE_CHECKING:
    from megatron_sps2.engine.engine import Engine
    from megatron_sps2.simulator.fit import Observation

LONGEST = 8192
MAX_NUM_SEQS = 8
# Tokens of answers beside the longest prompt.
ANSWERS = 256


def run(args: argparse.Namespace) -> int:
    return in_world(args, _measure, _check)


def _check(args: argparse.Namespace) -> None:
    check_engine_flags(args)
    if not 0 < args.budget_s < math.inf:
        raise ValueError(f"--budget-s {args.budget_s} must be a number of seconds above 0")
    if not Path(args.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {args.out}: its folder does not exist")
    if _longest(args) <= ANSWERS + 64:
        raise ValueError(
            f"--max-model-len {_longest(args)} is too short to measure; use at least {ANSWERS + 65}"
        )


def _longest(args: argparse.Namespace) -> int:
    return int(args.max_model_len or min(LONGEST, load_model_config(args.checkpoint).max_seq_len))


def _measure(args: argparse.Namespace) -> int:
    """On every rank; the first one writes."""
    from megatron_sps2.engine.build import build_engine
    from megatron_sps2.simulator.counter import Counter
    from megatron_sps2.simulator.measure import StepLog, walk

    schedule = ScheduleConfig(max_num_seqs=MAX_NUM_SEQS, short_prompt_tokens=SHORT_PROMPT_TOKENS)
    engine = build_engine(replace(engine_config(args, _longest(args)), schedule=schedule))
    args.heart.watch(engine.ledger.activity)
    if not engine.is_leader:
        engine.follow()
        return 0
    parallel = parallel_config(args)
    counter = Counter(
        model=engine.model,
        parallel=parallel,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        devices_per_node=parallel.world_size,
    )
    log = StepLog(counter)
    walk(engine, log, _longest(args) - ANSWERS, args.budget_s, tell=_tell)
    engine.stop()
    _write(args, engine, log.observations())
    return 0


def _write(args: argparse.Namespace, engine: Engine, observations: list[Observation]) -> None:
    from megatron_sps2.simulator.fit import as_profile, fit
    from megatron_sps2.simulator.profile import save_profile

    parallel = parallel_config(args)
    found = fit(observations, parallel.sp_size * parallel.tp_size)
    profile = as_profile(
        found,
        name=Path(args.out).stem,
        source=f"measured by sps2 profile {__version__}",
        dtype=args.dtype,
        memory_bytes=_memory(args.device, parallel.world_size),
        devices_per_node=parallel.world_size,
        notes={
            "machine": platform.processor() or platform.machine(),
            "sp": parallel.sp_size,
            "tp": parallel.tp_size,
            "num_layers": engine.model.num_layers,
            "hidden_size": engine.model.hidden_size,
        },
    )
    save_profile(profile, Path(args.out))
    print(
        f"{args.out}: {found.num_steps} steps; half of them within {found.median_error:.1%} of the fit, "
        f"nine of ten within {found.p90_error:.1%}"
    )
    if found.unpriced:
        _tell(
            f"{', '.join(found.unpriced)} could not be told from the rest, and count as free; use a larger "
            "--budget-s or --max-model-len, and a machine that does nothing else"
        )


def _tell(line: str) -> None:
    print(f"sps2: {line}", file=sys.stderr, flush=True)


def _memory(device: str, num_ranks: int) -> int:
    """In bytes, of a rank's device; ranks on CPU share the host's."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[1])
    from megatron_sps2.parallel.host import host_memory

    return host_memory()[0] // num_ranks
