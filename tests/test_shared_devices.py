"""Ranks on one device cannot measure what is left for each: these are told so, and no others."""

from __future__ import annotations

from unittest import mock

import pytest

from megatron_sps2.config import ParallelConfig
from megatron_sps2.engine import device_memory
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.engine.measured_cache import _refuse_shared_devices, shared_device
from megatron_sps2.parallel.groups import ParallelGroups
from tests.ranks import RankFailed, run_ranks

CONFIG = EngineConfig(checkpoint="", parallel=ParallelConfig(sp_size=2), max_model_len=1000, device="cuda")


def test_ranks_that_share_a_device_are_told_to_say_the_size() -> None:
    places = [("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:0"), ("b", "cuda:1"), ("b", "cuda:0")]
    assert shared_device(places[:4]) == ""
    assert shared_device(places).startswith(
        "ranks 2 and 4 share cuda:0 of b"
    ) and "--kv-cache-gib" in shared_device(places)


def refuse_shared(names: list[str]) -> None:
    """On a rank, whose card has its place in `names`; the flag is the same on all."""
    groups = ParallelGroups.create(ParallelConfig(sp_size=2))
    with mock.patch.object(device_memory, "name_of", lambda _: names[groups.world.rank]):
        _refuse_shared_devices(CONFIG, groups.world)


def test_ranks_tell_their_cards_apart_not_what_they_call_them() -> None:
    run_ranks(2, refuse_shared, ["GPU-1", "GPU-2"])
    with pytest.raises(RankFailed, match="ranks 0 and 1 share GPU-1 of"):
        run_ranks(2, refuse_shared, ["GPU-1", "GPU-1"])
