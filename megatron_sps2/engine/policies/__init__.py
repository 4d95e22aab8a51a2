"""Scheduling policies, a class and a file each: they say what runs next, the scheduler makes it a plan."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sps2.engine.policies.choice import Choice, Desk, Policy, PolicyConfig
from megatron_sps2.engine.policies.fcfs import FcfsPolicy
from megatron_sps2.engine.policies.sarathi import SarathiPolicy
from megatron_sps2.engine.policies.sps2 import Sps2Policy

POLICIES: dict[str, Callable[[PolicyConfig], Policy]] = {
    "sps2": Sps2Policy,
    "sarathi": SarathiPolicy,
    "fcfs": FcfsPolicy,
}

__all__ = ["POLICIES", "Choice", "Desk", "Policy", "PolicyConfig"]
