"""All peers and ours on one model and the same prompts, in turns: python -m benchmarks.peers.run

A peer that is not installed, breaks or takes too long is named with the reason; the others go on.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.peers.asked import Asked, Measured, PeerAbsent
from benchmarks.peers.model_files import model_files, prompt
from benchmarks.peers.peers import ATTENTION_PEERS, MODEL_PEERS, REFERENCE, Peer, choose
from benchmarks.peers.table import Cell, agreement, as_json, ratios, ratios_table, times_table

WARM_UP_TOKENS = 512
# Of an answer's own tokens, and those that prompts make while others are prefilled.
ROOM = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """What every peer is asked alike. num_tokens: decoded ones, whose rate is shown."""

    name: str
    request: dict[str, Any]
    num_tokens: int = 0


class Turns:
    """The drivers of some peers, started when they are first asked, and what they answered."""

    def __init__(self, peers: dict[str, Peer], files: dict[str, str], args: argparse.Namespace) -> None:
        self._peers, self._files, self._args = peers, files, args
        self._running: dict[str, Asked] = {}
        # Why a peer cannot be started; it is not tried again.
        self._broken: dict[str, str] = {}
        self.what: dict[str, str] = {}

    def ask(self, name: str, workload: Workload) -> Measured:
        if name in self._broken:
            raise PeerAbsent(self._broken[name])
        if name not in self._running or not self._running[name].is_running:
            self._start(name, workload)
        return self._running[name].ask(workload.request, self._args.limit_s)

    def close(self, name: str) -> None:
        if (running := self._running.pop(name, None)) and running.is_running:
            running.close()

    def close_all(self) -> None:
        for name in list(self._running):
            self.close(name)

    def _start(self, name: str, workload: Workload) -> None:
        """What is slow once only is asked untimed."""
        args, peer = self._args, self._peers[name]
        longest = max([*args.lengths, args.decode_context]) + ROOM
        flags = {
            "model": self._files[peer.form],
            "max-length": longest,
            "decode-length": args.decode_context + ROOM,
            "num-decodes": args.decodes,
            "threads": args.threads,
        }
        log = Path(self._files["logs"]) / f"{name}.log"
        try:
            asked = Asked(peer, [f"--{flag}={value}" for flag, value in flags.items()], log, args.threads)
            self._running[name] = asked
            warm_up: dict[str, Any] = {"op": "prefill", "ids": prompt(WARM_UP_TOKENS, 0)}
            if workload.request["op"] == "attention":
                warm_up = {"op": "attention", "num_tokens": WARM_UP_TOKENS}
            asked.ask(warm_up, args.limit_s)
        except PeerAbsent as reason:
            self._broken[name] = str(reason)
            raise
        self.what[name] = asked.what


def main() -> None:
    args = _parse()
    tables: dict[str, Any] = {}
    with model_files() as files, TemporaryDirectory(prefix="peers-logs-") as logs:
        files["logs"] = args.logs or logs
        if peers := choose(args.peers, MODEL_PEERS):
            tables["model"] = measure(peers, _workloads(args), files, args)
        if args.attention and (peers := choose(args.peers, ATTENTION_PEERS)):
            layers = [
                Workload(f"attention {n}", {"op": "attention", "num_tokens": n}) for n in args.attention
            ]
            tables["attention"] = measure(peers, layers, files, args)
    if args.json:
        flags = {name: value for name, value in vars(args).items() if name not in ("logs", "json")}
        about = {"flags": flags, "machine": platform.platform(), "processor": _processor()}
        Path(args.json).write_text(json.dumps({**about, **tables}, indent=1) + "\n")


def measure(
    peers: dict[str, Peer], workloads: list[Workload], files: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """Prints the tables of these peers and workloads, and returns them for the JSON file."""
    results = {workload.name: {name: Cell() for name in peers} for workload in workloads}
    turns = Turns(peers, files, args)
    try:
        for name, workload in _order(list(peers), workloads, args, turns):
            take(turns, name, workload, results[workload.name][name])
    finally:
        turns.close_all()
    right = _reference(workloads, files, args)
    found = ratios(results, [name for name, peer in peers.items() if peer.is_ours])
    same = agreement(results, right)
    print(times_table(results, {each.name: each.num_tokens for each in workloads}), end="\n\n")
    print(ratios_table(found), end="\n\n")
    for name, what in turns.what.items():
        tokens = f"; first tokens as in fp32: {same[name]}" if name in same else ""
        print(f"{name}: {what}{tokens}")
    return {**as_json(results, found), "what": turns.what, "agreement": same}


def take(turns: Turns, name: str, workload: Workload, cell: Cell) -> None:
    """One turn. What failed once at a workload is not tried at it again."""
    if cell.absent:
        return
    try:
        answer = turns.ask(name, workload)
    except PeerAbsent as reason:
        cell.absent = str(reason)
        print(f"# {workload.name}, {name}: {reason}", flush=True)
        return
    cell.seconds.append(answer.seconds)
    cell.others.append(answer.others)
    cell.tokens = answer.tokens
    print(f"# {workload.name}, {name}: {answer.seconds:.3f} s, others {answer.others:.0%}", flush=True)


def _order(
    names: list[str], workloads: list[Workload], args: argparse.Namespace, turns: Turns
) -> Iterator[tuple[str, Workload]]:
    """Turns at each workload; or, with one driver alive at a time, each peer's workloads in a row."""
    for number in range(args.rounds):
        # Each goes first in turn.
        turned = names[number % len(names) :] + names[: number % len(names)]
        if not args.one_at_a_time:
            yield from ((name, workload) for workload in workloads for name in turned)
            continue
        for name in turned:
            yield from ((name, workload) for workload in workloads)
            turns.close(name)


def _workloads(args: argparse.Namespace) -> list[Workload]:
    found = [
        Workload(f"prefill {length}", {"op": "prefill", "ids": prompt(length, 1)}) for length in args.lengths
    ]
    if args.decodes:
        prompts = [prompt(args.decode_context, 2 + i) for i in range(args.decodes)]
        request = {"op": "decode", "prompts": prompts, "num_tokens": args.decode_tokens}
        name = f"{args.decodes} decodes at {args.decode_context}"
        found.append(Workload(name, request, args.decodes * args.decode_tokens))
    return found


def _reference(
    workloads: list[Workload], files: dict[str, str], args: argparse.Namespace
) -> dict[str, list[int]]:
    """First tokens by transformers in fp32, by workload, of prompts that are short enough for it."""
    turns, right = Turns({"reference": REFERENCE}, files, args), {}
    for workload in workloads:
        request = workload.request
        prompts = request.get("prompts", [request["ids"]] if "ids" in request else [])
        if not prompts or max(map(len, prompts)) > args.reference_length:
            continue
        asks = [Workload(workload.name, {"op": "prefill", "ids": ids}) for ids in prompts]
        try:
            right[workload.name] = [turns.ask("reference", each).tokens[0] for each in asks]
        except PeerAbsent as reason:
            print(f"# {workload.name}: no reference tokens: {reason}", flush=True)
    turns.close_all()
    return right


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", default=["all"], help="names, or all")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 32768])
    parser.add_argument("--decodes", type=int, default=8, help="prompts that decode together; 0: no decode")
    parser.add_argument("--decode-context", type=int, default=4096)
    parser.add_argument("--decode-tokens", type=int, default=64, help="of each prompt")
    parser.add_argument("--attention", type=int, nargs="*", default=[4096, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of each peer, or ranks of one thread")
    parser.add_argument("--limit-s", type=float, default=400.0, help="of one request")
    parser.add_argument(
        "--reference-length", type=int, default=4096, help="longest prompt compared with fp32"
    )
    parser.add_argument("--one-at-a-time", action="store_true", help="for little memory: one driver alive")
    parser.add_argument("--logs", help="folder to keep the drivers' own output in")
    parser.add_argument("--json", help="file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
