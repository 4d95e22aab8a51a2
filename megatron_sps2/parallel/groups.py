"""One rank grid (dp, sp, tp) and its process groups, handed around as values.

tp is innermost, so that tp ranks are neighbours on one node. Knows no models.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_sps2.config import ParallelConfig

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True, slots=True)
class Axis:
    """A process group as this rank sees it; `ranks` are world ranks in the group's order."""

    group: dist.ProcessGroup
    rank: int
    size: int
    ranks: tuple[int, ...]


def axis_of(group: dist.ProcessGroup) -> Axis:
    """A group made elsewhere, as an axis."""
    return Axis(
        group, dist.get_rank(group), dist.get_world_size(group), tuple(dist.get_process_group_ranks(group))
    )


def world_axis() -> Axis:
    """All ranks of the initialised world."""
    assert dist.group.WORLD is not None
    return axis_of(dist.group.WORLD)


def rank_grid(parallel: ParallelConfig) -> list[tuple[int, int, int]]:
    """(dp_rank, sp_rank, tp_rank) of every world rank, in order of rank."""
    return list(product(range(parallel.dp_size), range(parallel.sp_size), range(parallel.tp_size)))


def slices(parallel: ParallelConfig, *varying: str) -> list[tuple[int, ...]]:
    """The world ranks of each group whose members differ only in the `varying` axes ('dp', 'sp', 'tp')."""
    names = ("dp", "sp", "tp")
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(rank_grid(parallel)):
        fixed = tuple(index for name, index in zip(names, place, strict=True) if name not in varying)
        groups.setdefault(fixed, []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGroups:
    """Every group this rank is a member of.

    `engine` is one serving replica (sp x tp), `replicas` the ranks that hold the same weights (dp x sp),
    `alone` this rank by itself.
    """

    config: ParallelConfig
    dp: Axis
    sp: Axis
    tp: Axis
    engine: Axis
    replicas: Axis
    world: Axis
    alone: Axis

    @classmethod
    def create(
        cls, config: ParallelConfig, backend: str | None = None, timeout: timedelta | None = None
    ) -> ParallelGroups:
        """Collective over the whole world; torch.distributed must be initialised.

        `timeout` is for every collective of these groups, torch's default (half an hour on gloo) if None.

        Raises RuntimeError when the world does not have dp x sp x tp ranks.
        """
        world_size = dist.get_world_size()
        if world_size != config.world_size:
            raise RuntimeError(
                f"world_size={world_size} but dp_size={config.dp_size} x sp_size={config.sp_size} x "
                f"tp_size={config.tp_size} = {config.world_size}; start {config.world_size} ranks"
            )
        axes = {
            "dp": ("dp",),
            "sp": ("sp",),
            "tp": ("tp",),
            "engine": ("sp", "tp"),
            "replicas": ("dp", "sp"),
            "world": ("dp", "sp", "tp"),
            "alone": (),
        }
        return cls(
            config=config,
            **{name: _own_axis(slices(config, *axis), backend, timeout) for name, axis in axes.items()},
        )

    def to_megatron(self) -> ProcessGroupCollection:
        """Megatron's view: tp and replicas; cp and pp are singletons, so it never splits a sequence.

        Experts are cut over tp like any MLP and never spread over ranks.
        """
        from megatron.core.process_groups_config import ProcessGroupCollection

        tp, alone, replicas = self.tp.group, self.alone.group, self.replicas.group
        return ProcessGroupCollection(
            **dict.fromkeys(("tp", "mp", "tp_cp", "expt_tp"), tp),
            **dict.fromkeys(("cp", "pp", "embd", "pos_embd", "ep", "tp_ep", "tp_dp_cp"), alone),
            **dict.fromkeys(("dp", "dp_cp", "expt_dp", "intra_dp_cp"), replicas),
        )


def _own_axis(groups: list[tuple[int, ...]], backend: str | None, timeout: timedelta | None) -> Axis:
    """Creates all `groups` (every rank must, in the same order) and returns the one this rank is in."""
    me = dist.get_rank()
    mine: Axis | None = None
    for ranks in groups:
        group = dist.new_group(list(ranks), backend=backend, timeout=timeout)
        if me in ranks:
            mine = Axis(group, ranks.index(me), len(ranks), ranks)
    assert mine is not None, f"rank {me} is in none of {groups}"
    return mine
