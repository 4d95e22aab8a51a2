"""CSA in the whole engine: logits, answers, reports and bytes of a small Llama at every (tp, sp)."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.attention.csa_tally import CsaReport
from megatron_sps2.config import (
    AttentionConfig,
    AttentionMode,
    ModelConfig,
    ParallelConfig,
    SamplingParams,
    ScheduleConfig,
)
from megatron_sps2.csa_setting import PRESETS, CsaSetting
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.build import EngineConfig, assemble
from megatron_sps2.engine.engine import Engine
from megatron_sps2.engine.request import Request
from megatron_sps2.engine.scheduler import Scheduler
from megatron_sps2.engine.trial import Trial
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.ops.dilated import dilated_attention, paper_levels
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.layout import contiguous
from megatron_sps2.parallel.traffic import CSA_COLLECTIVES, Traffic
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks
from tests.sharded_run import Prompt, RankResult, logits_error, watch_prefills
from tests.tiny_llama import prompt, save_hf_llama

# Of the largest logit. fp32 sums in another order through 2 layers.
TOLERANCE = 1e-5
NUM_GENERATED = 6
LENGTHS = (40, 201)
CSA = AttentionConfig(mode="csa")

SMALL = CsaSetting(
    segment_size=16, num_sinks=2, window=5, tail=7, num_probes=5, group_sizes=(1, 2, 4), degrees=(1, 2, 6)
)
# [layer][KV head][level - 1] of 2 layers and 6 KV heads at most, cut to a model's.
DENSITIES = (((0.5, 0.1), (0.25, 0.5), (0.9, 0.0)) * 2, ((0.1, 0.4), (1.0, 0.2), (0.3, 0.3)) * 2)


@dataclass(frozen=True)
class Job:
    """One engine and the prompts that it serves, one after the other."""

    attention: AttentionConfig = CSA
    setting: CsaSetting = SMALL
    lengths: tuple[int, ...] = LENGTHS
    # Of each prompt; None is the engine's default.
    modes: tuple[AttentionMode | None, ...] = (None, None)
    # Tokens of a second turn of each prompt, after its answer.
    num_more: int = 0
    skipped: bool = False

    @property
    def prompts(self) -> list[Prompt]:
        ids = [prompt(length, seed=length).tolist() for length in self.lengths]
        return [Prompt(tokens, list(range(len(tokens)))) for tokens in ids]


@dataclass
class Served(RankResult):
    """Of one job, on one rank; from `reports` on rank 0 only."""

    bytes_sent: int = 0
    reports: list[CsaReport | None] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    turns: list[tuple[list[int], str, CsaReport | None]] = field(default_factory=list)


def jobs_for(num_kv_heads: int) -> dict[str, Job]:
    densities = tuple(layer[:num_kv_heads] for layer in DENSITIES)
    return {
        "exact": Job(attention=AttentionConfig(mode="exact")),
        "full": Job(setting=replace(SMALL, floor=1.0)),
        "degrees of 1": Job(setting=replace(SMALL, selector="strided", degrees=(1, 1, 1))),
        "adaptive": Job(setting=replace(SMALL, floor=0.8)),
        "two turns": Job(setting=replace(SMALL, floor=0.8), num_more=9),
        "by table": Job(setting=replace(SMALL, densities=densities)),
        "strided": Job(setting=replace(SMALL, selector="strided")),
        # Long enough for the pipeline.
        "long": Job(setting=replace(SMALL, floor=0.9, segment_size=128, window=16), lengths=(1100,)),
        # Segments of 64 and of 128 tokens.
        "growing": Job(
            setting=replace(SMALL, floor=0.8, segment_size=8, max_segment_size=128, num_probes=8),
            lengths=(90, 201),
        ),
        "paper": Job(setting=replace(PRESETS["paper"], segment_size=16, max_segment_size=None)),
    }


def serve(checkpoint: Path, parallel: ParallelConfig, jobs: dict[str, Job]) -> dict[str, Served]:
    """On a rank: every job by an engine of its own."""
    groups, found = ParallelGroups.create(parallel), {}
    for name, job in jobs.items():
        context = StepContext()
        core = functools.partial(SequenceParallelAttention, context=context)
        forward = load_gpt(checkpoint, groups.to_megatron(), core, torch.float32)
        config = EngineConfig(
            checkpoint=str(checkpoint),
            parallel=parallel,
            attention=job.attention,
            csa=job.setting,
            max_model_len=max(job.lengths) + 2 * NUM_GENERATED + job.num_more,
            schedule=ScheduleConfig(max_num_seqs=len(job.lengths)),
            block_size=8,
        )
        engine = assemble(config, groups, forward, context)
        logits = watch_prefills(forward, context, groups.sp.rank, job.prompts)
        with exchange_skipped(job.skipped):
            found[name] = _serve(engine, job)
        found[name].logits = [logits[i] for i in range(len(job.lengths))]
        found[name].bytes_sent = engine.ledger.total("prefill", *CSA_COLLECTIVES)
    return found


def _serve(engine: Engine, job: Job) -> Served:
    served = Served([])
    if not engine.is_leader:
        engine.follow()
        return served
    params = SamplingParams(max_tokens=NUM_GENERATED, ignore_eos=True)
    requests = [
        _finish(engine, engine.add_request(one.ids, params, mode), served)
        for one, mode in zip(job.prompts, job.modes, strict=False)
    ]
    served.tokens = [request.output_ids for request in requests]
    served.reports = [request.csa for request in requests]
    for request in requests if job.num_more else []:
        more = [request.output_ids[-1], *prompt(job.num_more, seed=1).tolist()]
        turn = engine.continue_request(request, more, params)
        while turn.finish_reason is None:
            engine.step()
        served.turns.append((turn.output_ids, engine.last_strategy, turn.csa))
    for request in requests:
        engine.release(request)
    engine.stop()
    served.free_blocks = engine.blocks.num_free_blocks
    return served


def _finish(engine: Engine, request: Request, served: Served) -> Request:
    while request.finish_reason is None:
        engine.step()
    served.strategies.append(engine.last_strategy)
    return request


class Model:
    """A random checkpoint and what worlds make of its jobs, each world once."""

    def __init__(self, folder: Path, num_heads: int, num_kv_heads: int) -> None:
        save_hf_llama(folder / "hf", num_heads, num_kv_heads, max_position_embeddings=2048)
        convert(folder / "hf", folder / "megatron")
        self.checkpoint, self.jobs = folder / "megatron", jobs_for(num_kv_heads)
        self.world = functools.cache(self._world)

    def _world(self, tp_size: int, sp_size: int) -> list[dict[str, Served]]:
        """By rank; tp innermost."""
        parallel = ParallelConfig(tp_size=tp_size, sp_size=sp_size)
        return run_ranks(tp_size * sp_size, serve, self.checkpoint, parallel, self.jobs)

    def ranks(self, tp_size: int, sp_size: int, job: str) -> list[Served]:
        return [rank[job] for rank in self.world(tp_size, sp_size)]

    def logits(self, job: str) -> list[Tensor]:
        """At one rank, of every prompt [s, v]."""
        (served,) = self.ranks(1, 1, job)
        return [rows for _, rows in served.logits]

    def error(self, tp_size: int, sp_size: int, job: str, want: str) -> float:
        """Of a job's logits, relative to the largest one of `want` at one rank."""
        ranks = self.ranks(tp_size, sp_size, job)
        return logits_error(ranks, self.logits(want), self.jobs[want].prompts)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    sizes = {"gqa-8-2": (8, 2), "gqa-9-3": (9, 3)}
    return {name: Model(tmp_path_factory.mktemp(name), *heads) for name, heads in sizes.items()}


GRIDS = [
    *(("gqa-8-2", tp, sp) for tp, sp in ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2))),
    ("gqa-9-3", 3, 1),
]
EVERYWHERE = pytest.mark.parametrize(("name", "tp_size", "sp_size"), GRIDS)
SPARSE = ("adaptive", "by table", "strided", "growing", "long")


@EVERYWHERE
@pytest.mark.parametrize("job", ["full", "degrees of 1"])
def test_csa_that_drops_nothing_is_exact(
    job: str, name: str, tp_size: int, sp_size: int, models: dict[str, Model]
) -> None:
    model = models[name]
    assert model.error(tp_size, sp_size, job, "exact") < TOLERANCE
    served, exact = model.ranks(tp_size, sp_size, job)[0], model.ranks(1, 1, "exact")[0]
    assert served.tokens == exact.tokens
    assert served.strategies == ["csa"] * 2 and "csa" not in exact.strategies
    assert [report.density for report in served.reports if report] == [1.0, 1.0]


@EVERYWHERE
@pytest.mark.parametrize("job", SPARSE)
def test_every_grid_computes_what_one_rank_computes(
    job: str, name: str, tp_size: int, sp_size: int, models: dict[str, Model]
) -> None:
    assert models[name].error(tp_size, sp_size, job, job) < TOLERANCE


@EVERYWHERE
@pytest.mark.parametrize("job", SPARSE)
def test_decode_after_csa_gives_the_tokens_of_one_rank(
    job: str, name: str, tp_size: int, sp_size: int, models: dict[str, Model]
) -> None:
    served, alone = (models[name].ranks(*grid, job)[0] for grid in ((tp_size, sp_size), (1, 1)))
    assert served.tokens == alone.tokens and len(served.tokens[0]) == NUM_GENERATED


@pytest.mark.parametrize("job", ["adaptive", "by table", "strided"])
def test_control_a_sparse_setting_is_not_exact(job: str, models: dict[str, Model]) -> None:
    assert models["gqa-8-2"].error(1, 1, job, "exact") > 100 * TOLERANCE


@EVERYWHERE
@pytest.mark.parametrize("job", [*SPARSE, "full"])
def test_a_report_says_what_was_kept_and_sent(
    job: str, name: str, tp_size: int, sp_size: int, models: dict[str, Model]
) -> None:
    model = models[name]
    ranks, (alone,) = model.ranks(tp_size, sp_size, job), model.ranks(1, 1, job)
    shape = load_model_config(model.checkpoint)
    traffic = Traffic(model=shape, parallel=ParallelConfig(tp_size=tp_size, sp_size=sp_size), element_size=4)
    strategy = model.ranks(tp_size, sp_size, "exact")[0].strategies[0]
    for report, want, length in zip(ranks[0].reports, alone.reports, model.jobs[job].lengths, strict=True):
        assert report and want and want.kept_mass is not None
        assert report.bytes_sent == report.bytes_formula
        assert report.bytes_exact == round(
            getattr(traffic, strategy)(length) * shape.num_layers * tp_size * sp_size
        )
        assert (report.bytes_sent == 0) == (sp_size == 1) and (report.bytes_exact == 0) == (sp_size == 1)
        assert report.density_table == want.density_table, "the same keys of the same heads of the model"
        assert report.density == want.density and (0 < report.density < 1) == (job != "full")
        assert report.kept_mass == pytest.approx(want.kept_mass, abs=1e-5) and report.kept_mass <= 1 + 1e-5
    assert sum(served.bytes_sent for served in ranks) == sum(r.bytes_sent for r in ranks[0].reports if r)


def test_the_kept_mass_of_an_answer_is_above_the_floor(models: dict[str, Model]) -> None:
    for name in models:
        for report in models[name].ranks(1, 1, "adaptive")[0].reports:
            assert report and report.kept_mass is not None and 0.8 <= report.kept_mass < 1
            assert min(mass for layer in report.mass_table for mass in layer if mass is not None) >= 0.8


@EVERYWHERE
def test_all_blocks_come_back(name: str, tp_size: int, sp_size: int, models: dict[str, Model]) -> None:
    for job, served in models[name].world(tp_size, sp_size)[0].items():
        assert served.free_blocks and len(served.free_blocks) == sp_size
        assert len(set(served.free_blocks)) == 1, job


@EVERYWHERE
def test_a_second_turn_after_csa_is_exact(
    name: str, tp_size: int, sp_size: int, models: dict[str, Model]
) -> None:
    served, alone = (models[name].ranks(*grid, "two turns")[0] for grid in ((tp_size, sp_size), (1, 1)))
    assert served.strategies == ["csa"] * 2
    assert [turn[1:] for turn in served.turns] == [("pass_q", None)] * 2
    assert [turn[0] for turn in served.turns] == [turn[0] for turn in alone.turns]


class Emulated:
    """The paper's attention for `num_ranks` ranks in one process."""

    def __init__(self, num_tokens: int, num_ranks: int) -> None:
        held = contiguous(num_tokens, num_ranks).segments
        self._boundaries = [0, *(segments[0].stop for segments in held)]
        self._levels = paper_levels(num_ranks)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, degrees = self._levels
        return dilated_attention(
            *(q, k, v),
            boundaries=self._boundaries,
            group_sizes=groups,
            degrees=degrees,
            scale=q.shape[3] ** -0.5,
        )


def emulated(checkpoint: Path, prompts: list[Prompt], num_ranks: int) -> list[Tensor]:
    """On a rank: logits [s, v] of every prompt."""
    trial = Trial.load(checkpoint)
    steps = [Emulated(len(one.ids), num_ranks) for one in prompts]
    return [trial.logits(trial.hidden(one.ids, step)) for one, step in zip(prompts, steps, strict=True)]


@pytest.mark.parametrize(("tp_size", "sp_size"), [(1, 2), (1, 4), (2, 2)])
def test_the_preset_paper_gives_what_its_emulation_gives(
    tp_size: int, sp_size: int, models: dict[str, Model]
) -> None:
    model, prompts = models["gqa-8-2"], models["gqa-8-2"].jobs["paper"].prompts
    (want,) = run_ranks(1, emulated, model.checkpoint, prompts, sp_size)
    ranks = model.ranks(tp_size, sp_size, "paper")
    assert logits_error(ranks, want, prompts) < TOLERANCE  # type: ignore[arg-type]
    assert ranks[0].strategies == ["dilated"] * 2
    for report in ranks[0].reports:
        assert report and report.kept_mass is None and 0 < report.density < 1
        assert report.bytes_sent == report.bytes_formula > 0
    assert sum(served.bytes_sent for served in ranks) == sum(r.bytes_sent for r in ranks[0].reports if r)


def test_control_without_exchange_the_engine_is_wrong(models: dict[str, Model]) -> None:
    model = models["gqa-8-2"]
    job = replace(model.jobs["adaptive"], skipped=True)
    ranks = [
        rank["skipped"]
        for rank in run_ranks(2, serve, model.checkpoint, ParallelConfig(sp_size=2), {"skipped": job})
    ]
    assert logits_error(ranks, model.logits("adaptive"), job.prompts) > 100 * TOLERANCE  # type: ignore[arg-type]


# Which attention a request gets, and its room.

AUTO = AttentionConfig(mode="auto", csa_min_tokens=100)


def test_auto_goes_by_length_and_a_request_may_ask_for_another(models: dict[str, Model]) -> None:
    jobs = {
        "auto": Job(attention=AUTO, lengths=(16, 99, 100), modes=(None,) * 3),
        "asked": Job(attention=AUTO, lengths=(16, 17, 99, 201), modes=("csa", "csa", "csa", "exact")),
        "exact": Job(attention=replace(AUTO, mode="exact", csa_min_tokens=202), modes=("csa", "auto")),
    }
    served = run_ranks(2, serve, models["gqa-8-2"].checkpoint, ParallelConfig(sp_size=2), jobs)[0]
    ran = {name: [report is not None for report in job.reports] for name, job in served.items()}
    assert ran["auto"] == [False, False, True]
    # A prompt of one segment has nothing far: it is exact, whatever was asked for.
    assert ran["asked"] == [False, True, True, False]
    assert ran["exact"] == [True, False], "201 tokens are one too few for auto"
    assert [name == "csa" for job in served.values() for name in job.strategies] == sum(ran.values(), [])


MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=8,
    vocab_size=100,
    max_seq_len=4096,
)


@pytest.mark.parametrize(
    ("mode", "asked"),
    [("csa", None), ("auto", None), ("csa", "exact"), ("auto", "csa"), ("exact", "csa"), ("exact", "auto")],
)
def test_the_cache_has_room_for_any_prompt_of_max_model_len(
    mode: AttentionMode, asked: AttentionMode | None
) -> None:
    """CSA lays out whole segments, so ranks hold uneven parts; also where only the request asks for it."""
    attention, refused = AttentionConfig(mode=mode, csa_min_tokens=50), []
    settings = [replace(SMALL, segment_size=size) for size in (16, 64)]
    settings.append(replace(SMALL, segment_size=8, max_segment_size=128))
    for num_ranks, length, setting in itertools.product(range(1, 9), range(1, 400, 13), settings):
        config = EngineConfig(
            checkpoint="",
            parallel=ParallelConfig(sp_size=num_ranks),
            attention=attention,
            csa=setting,
            max_model_len=length + 5,
            block_size=4,
        )
        blocks = BlockManager(config.sized_cache(), num_ranks)
        scheduler = Scheduler(MODEL, config.parallel, attention, blocks, csa=setting)
        params, ids = SamplingParams(max_tokens=5), (1,) * length
        request = Request(request_id=0, prompt_ids=ids, params=params, attention=asked or mode)
        try:
            scheduler.add(request)
            scheduler.schedule()
        except ValueError as error:
            refused.append((num_ranks, length, setting.segment_size, str(error)))
    assert refused[:3] == []
