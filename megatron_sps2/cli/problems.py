"""What is wrong with a world of ranks, in plain sentences: value, rule, fix. Pure; measures nothing.

Problems keep a job from running; warnings spoil what it is worth.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_sps2.parallel.probe import Clock, Pair

MAX_OFFSET_MS = 100.0
# Of links of one kind, within hosts or between them: a slower one than this share of the median is named.
SLOW_LINK = 0.25
NEEDED = ("python", "torch", "megatron-core", "megatron_sps2", "numpy", "transformers")
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one rank needs of the memory at `place` (a host, or a device of it), and what is free there."""

    rank: int
    place: str
    needed_bytes: int
    free_bytes: int


def reach_problems(unreached: Sequence[Sequence[int]], hosts: Sequence[str]) -> list[str]:
    """unreached[r]: the ranks that rank r did not hear."""
    return [
        f"{_at(rank, hosts)} did not get what {_at(other, hosts)} sent; every rank must reach every other "
        "one: look at the network and the firewall between them"
        for rank, others in enumerate(unreached)
        for other in others
    ]


def version_problems(versions: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """Ranks whose libraries differ from those of most ranks, or that lack one."""
    found = []
    for package in dict.fromkeys(name for each in versions for name in each):
        held = [each.get(package, "not installed") for each in versions]
        usual = Counter(held).most_common(1)[0][0]  # the first rank's, where two are as frequent
        for other in dict.fromkeys(held):
            ranks = [rank for rank, value in enumerate(held) if value == other]
            if other != usual:
                found.append(
                    f"{package} is {other} on {spell_ranks(ranks, hosts)} and {usual} elsewhere; every rank "
                    f"must have the same: install {package} {usual} there"
                )
        if usual == "not installed" and package in NEEDED:
            found.append(f"{package} is not installed on any rank; ranks cannot compute without it")
    return found


def memory_problems(needs: Sequence[Need], longest: int) -> list[str]:
    """Places whose ranks together need more than is free; `longest` is the request they are sized for."""
    at: dict[str, list[Need]] = defaultdict(list)
    for need in needs:
        at[need.place].append(need)
    found = []
    for place, sharing in at.items():
        needed, free = sum(need.needed_bytes for need in sharing), min(need.free_bytes for need in sharing)
        if needed > free:
            found.append(
                f"{spell_ranks([need.rank for need in sharing])} need {_gib(needed)} on {place} for a "
                f"request of {longest:,} tokens and {_gib(free)} are free; weights, KV and activations must "
                "fit: use more ranks (--sp, --tp) on more hosts, a lower --max-model-len, or --dtype bfloat16"
            )
    return found


def clock_warnings(clocks: Sequence[Clock], hosts: Sequence[str]) -> list[str]:
    """Clocks that are surely too far from rank 0's."""
    return [
        f"the clock of {_at(clock.rank, hosts)} is {abs(clock.offset_ms):,.0f} ms "
        f"{'ahead of' if clock.offset_ms > 0 else 'behind'} that of {_at(0, hosts)}, +- "
        f"{clock.plus_minus_ms:.1f}; beyond {MAX_OFFSET_MS:.0f} ms logs and traces of hosts do not line up: "
        "run an NTP or PTP service on both"
        for clock in clocks
        if abs(clock.offset_ms) - clock.plus_minus_ms > MAX_OFFSET_MS
    ]


def link_warnings(pairs: Sequence[Pair], hosts: Sequence[str]) -> list[str]:
    """Pairs far slower than those of their kind: within hosts, or between them."""
    kinds: dict[bool, list[Pair]] = defaultdict(list)
    for pair in pairs:
        kinds[hosts[pair.ranks[0]] == hosts[pair.ranks[1]]].append(pair)
    found = []
    for within, alike in kinds.items():
        usual = statistics.median(pair.mb_per_s for pair in alike)
        for pair in alike:
            if pair.mb_per_s < SLOW_LINK * usual:
                a, b = pair.ranks
                found.append(
                    f"between {_at(a, hosts)} and {_at(b, hosts)} {pair.mb_per_s:,.0f} MB/s pass and "
                    f"{usual:,.0f} between most ranks {'of one host' if within else 'of two hosts'}; all "
                    f"wait for the slowest link, which should have {100 * SLOW_LINK:.0f}% of that: look at "
                    "its cable, port and driver, or leave the host out"
                )
    return found


def spell_ranks(ranks: Sequence[int], hosts: Sequence[str] = ()) -> str:
    """'rank 3 (host a)', 'ranks 0-2 and 5 (hosts a, b)'."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    there = dict.fromkeys(hosts[rank] for rank in sorted(ranks)) if hosts else {}
    where = f" (host{'s' if len(there) > 1 else ''} {', '.join(there)})" if there else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{where}"


def _at(rank: int, hosts: Sequence[str]) -> str:
    return spell_ranks([rank], hosts)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f} GiB"
