"""Which ranks share a machine, and what follows: tp inside a node, cores for each rank. Plain values."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sps2.config import ParallelConfig
from megatron_sps2.parallel.hello import Hello
from megatron_sps2.parallel.host import Cores, in_order, numa_nodes


def check_tp_inside_nodes(parallel: ParallelConfig, hellos: Sequence[Hello]) -> None:
    """Raises ValueError for a tp group whose ranks lie on several nodes: tp talks twice in every layer."""
    for first in range(0, len(hellos), parallel.tp_size):
        group = hellos[first : first + parallel.tp_size]
        if len({each.node for each in group}) > 1:
            hosts = ", ".join(f"rank {each.rank} on {each.host}" for each in group)
            fewest = min(_ranks_per_node(hellos).values())
            raise ValueError(
                f"tp_size={parallel.tp_size} would cross nodes ({hosts}), and tp exchanges in every layer; "
                f"use --tp {fewest} or a divisor of it and spread the rest over --sp, or allow it by "
                "--allow-tp-across-nodes"
            )


def _ranks_per_node(hellos: Sequence[Hello]) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for hello in hellos:
        counts[hello.node] = counts.get(hello.node, 0) + 1
    return counts


def own_cores(mine: Hello, hellos: Sequence[Hello]) -> Cores | None:
    """The cores that this rank should keep to; None where it had better be left alone.

    Ranks of a node that may all run on the same cores get neighbouring ones of equal number, of one NUMA node
    where they can. A launcher that gave them different cores has bound them already.
    """
    local = [each for each in hellos if each.node == mine.node]
    if len({each.cores for each in local}) > 1 or len(mine.cores) < len(local) or len(local) == 1:
        return None
    place = [each.rank for each in local].index(mine.rank)
    return split_cores(in_order(mine.cores), len(local), numa_nodes())[place]


def num_threads(mine: Hello, hellos: Sequence[Hello]) -> int:
    """Compute threads of this rank: its share of the cores that its node's ranks may run on; at least 1."""
    local = [each for each in hellos if each.node == mine.node]
    is_shared = len({each.cores for each in local}) == 1
    return max(1, len(mine.cores) // (len(local) if is_shared else 1))


def split_cores(cores: Cores, num_ranks: int, numa: Sequence[Cores]) -> list[Cores]:
    """`cores` for each of `num_ranks` ranks, none shared; ranks are dealt to NUMA nodes in blocks."""
    nodes = [tuple(core for core in cores if core in node) for node in numa]
    nodes = [node for node in nodes if node]
    is_even = nodes and sum(map(len, nodes)) == len(cores) and num_ranks % len(nodes) == 0
    per_node = num_ranks // len(nodes) if is_even else 0
    if not per_node or any(len(node) < per_node for node in nodes):
        nodes, per_node = [cores], num_ranks
    return [part for node in nodes for part in _equal_parts(node, per_node)]


def _equal_parts(cores: Cores, count: int) -> list[Cores]:
    size = len(cores) // count
    return [cores[i * size : (i + 1) * size] for i in range(count)]
