"""All sections one after another; a case that fails is told and does not stop the others."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback

import torch

from benchmarks.gpu import attention, ceilings, csa, decode, moves, serving, step, table
from benchmarks.gpu.case import Absent, Bench, Case, Cases, Outcome, Size
from benchmarks.gpu.machine import machine

SECTIONS: dict[str, Cases] = {
    "ceilings": ceilings.cases,
    "prefill": attention.cases,
    "decode": decode.cases,
    "moves": moves.cases,
    "csa": csa.cases,
    "step": step.cases,
    "serving": serving.cases,
}


def run_sections(args: argparse.Namespace) -> int:
    """-> exit code: 1 where a check or a case failed. What is absent is named and no failure."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu --tiny only tries this script", file=sys.stderr)
        return 1
    unknown = set(args.only or ()) - set(SECTIONS)
    if unknown:
        print(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    size: Size = "tiny" if args.tiny else "quick" if args.quick else "full"
    bench = Bench(device=torch.device("cuda:0" if args.device == "cuda" else "cpu"), size=size)
    start, outcomes = time.perf_counter(), list[Outcome]()
    facts = machine(bench.device)
    for name, cases in SECTIONS.items():
        if not args.only or name in args.only:
            for case in cases(bench):
                outcomes.append(_run(name, case))
                # After each: a run that is cut short leaves what it has found.
                text = table.write(args.out, facts, outcomes, time.perf_counter() - start)
    print(text, end="")
    return int(any(each.status in ("wrong", "error") for each in outcomes))


def _is_not_installed(error: Exception) -> bool:
    """Somebody else's module: one of our own that is not found is a mistake of ours."""
    name = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    return bool(name) and name.partition(".")[0] not in ("megatron_sps2", "benchmarks", "checkpoints_tools")


def _run(section: str, case: Case) -> Outcome:
    start = time.perf_counter()
    try:
        row = case.measure()
        right = row.check is None or row.check.passed
        outcome = Outcome(section=section, case=case.name, status="ok" if right else "wrong", row=row)
    except Exception as error:  # The outermost loop: whatever a kernel does, the others are measured.
        absent = isinstance(error, Absent) or _is_not_installed(error)
        detail = str(error) if absent else traceback.format_exc(limit=-12)
        outcome = Outcome(
            section=section, case=case.name, status="absent" if absent else "error", detail=detail
        )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    told = f"{section}: {case.name}: {outcome.status}, {time.perf_counter() - start:.1f} s"
    print(told, file=sys.stderr, flush=True)
    return outcome
