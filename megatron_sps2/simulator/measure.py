"""Runs the real engine and notes what its steps take: a trace as it comes, a walk over lengths and batches.

On the rank that schedules; the others follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_sps2.config import SamplingParams
from megatron_sps2.engine.engine import Engine
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.engine.request import Request
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.counter import Counter
from megatron_sps2.simulator.fit import Observation
from megatron_sps2.simulator.outcome import Served

# Answers decode at these batch sizes, so many steps at each.
BATCHES = (1, 2, 4, 8)
DECODE_STEPS = 6
IDLE_S = 0.001


@dataclass(frozen=True, slots=True)
class StepLog:
    """What ran and for how long. Counts nothing until it is asked: steps follow each other as in life."""

    counter: Counter
    steps: list[tuple[StepPlan, int, float]] = field(default_factory=list)  # plan, prompts ended, seconds

    def observations(self) -> list[Observation]:
        return [Observation(self.counter.work(plan, ended), seconds) for plan, ended, seconds in self.steps]

    def step(self, engine: Engine) -> None:
        start = time.perf_counter()
        news = engine.step()
        seconds = time.perf_counter() - start
        plan = engine.last_plan
        if not plan.is_empty:
            numbers = {piece.request_id for piece in plan.pieces}
            ended = sum(each.has_token and each.request.request_id in numbers for each in news)
            self.steps.append((plan, ended, seconds))
        for each in news:
            if each.request.finish_reason is not None:
                engine.release(each.request)


def replay(engine: Engine, planned: Sequence[Arrival], log: StepLog, seed: int = 0) -> list[Served]:
    """Every request is added when it comes, or after the step that runs then, as the server does it."""
    rng, start = np.random.default_rng(seed), time.perf_counter()
    prompts = [_prompt(rng, engine, each.num_prompt_tokens) for each in planned]
    requests: list[Request] = []
    while len(requests) < len(planned) or engine.has_work:
        while (
            len(requests) < len(planned) and planned[len(requests)].arrival_s <= time.perf_counter() - start
        ):
            one = planned[len(requests)]
            request = engine.add_request(prompts[len(requests)], _answer(one.num_output_tokens))
            request.arrived_at = start + one.arrival_s
            requests.append(request)
        if engine.has_work:
            log.step(engine)
        else:
            time.sleep(IDLE_S)
    return [
        Served(
            arrival_s=one.arrival_s,
            num_prompt_tokens=one.num_prompt_tokens,
            token_times=tuple(at - start for at in request.token_times),
            error=request.error,
            num_preemptions=request.num_preemptions,
            num_pauses=request.num_pauses,
        )
        for one, request in zip(planned, requests, strict=True)
    ]


def walk(
    engine: Engine,
    log: StepLog,
    longest: int,
    budget_s: float,
    seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Prompts of rising lengths, and decodes of rising batches over each, until the seconds are spent.

    Every length is visited once, whatever it takes.
    """
    rng, end = np.random.default_rng(seed), time.perf_counter() + budget_s
    warm = StepLog(log.counter)
    _fill(engine, warm, rng, 64, 2)
    for length, most in visits(longest, rng):
        before, begun = len(log.steps), time.perf_counter()
        num_answers = _fill(engine, log, rng, length, most, end)
        took = time.perf_counter() - begun
        steps = len(log.steps) - before
        tell(f"{length} tokens: {steps} steps, batches up to {num_answers}, {took:.1f} s")
        if most > min(BATCHES) and time.perf_counter() >= end:
            return


def visits(longest: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """(tokens, answers at once): all lengths soon, with few answers, then with many, and once more.

    64 and its doubles, each a little off: a length that is new costs more, as in life.
    """
    sizes, size = list[int](), 64
    while size < longest:
        sizes.append(size)
        size *= 2
    for most in (min(BATCHES), max(BATCHES), max(BATCHES)):
        for each in sizes:
            yield min(longest, each + int(rng.integers(each // 4))), most


def _fill(
    engine: Engine, log: StepLog, rng: np.random.Generator, length: int, most: int, end: float = np.inf
) -> int:
    """Adds answers over `length` tokens one by one, decoding at each batch size -> how many ran."""
    running: list[Request] = []
    while len(running) < most and (not running or time.perf_counter() < end):
        room = engine.max_model_len - length
        request = engine.add_request(_prompt(rng, engine, length), _answer(room))
        while not request.output and request.finish_reason is None:
            log.step(engine)
        running.append(request)
        if len(running) in BATCHES:
            for _ in range(DECODE_STEPS):
                log.step(engine)
    for request in running:
        engine.abort(request)
    return len(running)


def _answer(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def _prompt(rng: np.random.Generator, engine: Engine, length: int) -> list[int]:
    ids: list[int] = rng.integers(engine.model.vocab_size, size=length).tolist()
    return ids
