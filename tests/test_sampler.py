"""Sampler: meaning of every filter, stateless randomness, log-probabilities, packing for the wire."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from megatron_sps2.config import SamplingParams
from megatron_sps2.engine.sampler import (
    PoisonedLogits,
    SampledToken,
    _kept,
    _open_unit,
    decode_sampled,
    encode_sampled,
    sample,
    uniforms,
)

VOCAB = 300


def random_logits(seed: int = 0, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draws(logits: Tensor, num: int, history: tuple[int, ...] = (), **params: Any) -> np.ndarray:
    """One token for each of `num` seeds."""
    return np.array(
        [sample(logits, SamplingParams(seed=s, **params), history, 0, ()).token_id for s in range(num)]
    )


def kept(logits: Tensor, params: dict[str, Any], **options: float) -> list[int]:
    config, values = SamplingParams(**params), logits.numpy()
    scaled = (values.astype(np.float64) - values.max()) / config.temperature
    return _kept(values, scaled, config, **options).tolist()


def by_transformers(logits: Tensor, processors: list[Any], history: tuple[int, ...] = ()) -> Tensor:
    """Probabilities [v] that transformers would sample from."""
    scores, ids = logits[None].clone(), torch.tensor([list(history)], dtype=torch.long)
    for process in processors:
        scores = process(ids, scores)
    return scores[0].double().softmax(-1)


def assert_frequencies(tokens: np.ndarray, probabilities: Tensor) -> None:
    """Each frequency within 5 standard errors (1e-6 a token, seeds fixed); nothing impossible drawn."""
    p = probabilities.numpy()
    counts = np.bincount(tokens, minlength=p.size)
    assert counts[p == 0].sum() == 0
    error = np.abs(counts / len(tokens) - p)
    bound = 5 * np.sqrt(p * (1 - p) / len(tokens)) + 2 / len(tokens)
    assert (error <= bound).all(), f"worst token {(error - bound).argmax()}"


FILTERS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
    "hot": ({"temperature": 2.5}, [hf.TemperatureLogitsWarper(2.5)]),
    "top_k": ({"temperature": 1.0, "top_k": 7}, [hf.TopKLogitsWarper(7)]),
    "top_p": ({"temperature": 1.0, "top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
    "tiny top_p": ({"temperature": 1.0, "top_p": 1e-9}, [hf.TopPLogitsWarper(1e-9)]),
    "min_p": ({"temperature": 1.0, "min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
    "low min_p": ({"temperature": 1.0, "min_p": 1e-5}, [hf.MinPLogitsWarper(1e-5)]),
    "all": (
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
        [
            hf.TemperatureLogitsWarper(1.5),
            hf.TopKLogitsWarper(40),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_draws_what_transformers_would(name: str) -> None:
    params, processors = FILTERS[name]
    logits = random_logits()
    expected = by_transformers(logits, processors)
    tokens = draws(logits, 3000, **params)
    assert_frequencies(tokens, expected)
    if (expected > 0).sum() < 20:  # few enough that 3000 draws meet every likely one
        assert set(tokens) >= set(np.flatnonzero(expected.numpy() > 0.005))


def test_the_frequency_check_notices_a_wrong_filter() -> None:
    logits = random_logits()
    with pytest.raises(AssertionError):
        assert_frequencies(draws(logits, 3000, temperature=1.0), by_transformers(logits, FILTERS["top_p"][1]))
    with pytest.raises(AssertionError):
        assert_frequencies(
            draws(logits, 3000, temperature=0.9), by_transformers(logits, [hf.TemperatureLogitsWarper(0.7)])
        )


@pytest.mark.parametrize("seed", range(20))
def test_the_kept_set_is_exactly_that_of_transformers(seed: int) -> None:
    logits = random_logits(seed, scale=1.0)
    for params, processors in FILTERS.values():
        assert kept(logits, params) == np.flatnonzero(by_transformers(logits, processors)).tolist()


def test_repetition_penalty_covers_prompt_and_output_as_transformers_does() -> None:
    logits, history = random_logits(), (5, 9, 9, 250, 5, int(random_logits().argmax()))
    expected = by_transformers(logits, [hf.RepetitionPenaltyLogitsProcessor(1.7)], history)
    assert_frequencies(draws(logits, 3000, history, temperature=1.0, repetition_penalty=1.7), expected)
    greedy = sample(logits, SamplingParams(repetition_penalty=1.7), history, 3, ())
    assert greedy.token_id == int(expected.argmax()) != int(logits.argmax())


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_an_absurd_penalty_still_gives_a_token(penalty: float) -> None:
    """Positive logits end as the largest float or as 0, negative ones as about 0 or the lowest float."""
    with np.errstate(invalid="raise"):
        tokens = draws(random_logits(), 50, tuple(range(VOCAB)), temperature=1.0, repetition_penalty=penalty)
    assert (random_logits()[tokens] > 0).all()


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(1000)
    logits[[900, 17, 400]] = 2.0
    assert sample(logits, SamplingParams(), (), 0, ()).token_id == 17


def test_top_k_keeps_exactly_k_and_the_lowest_ids_among_equals() -> None:
    assert set(draws(torch.zeros(50), 200, temperature=1.0, top_k=3)) == {0, 1, 2}
    assert set(draws(random_logits(), 20, temperature=1.0, top_k=1)) == {int(random_logits().argmax())}


def test_negative_zero_equals_zero_in_the_order() -> None:
    assert set(draws(torch.tensor([-0.0, 0.0, -1.0]), 50, temperature=1.0, top_k=1)) == {0}


def test_min_tokens_forbids_eos_and_stop_ids_until_it_is_reached() -> None:
    logits = torch.tensor([0.0, 5.0, 4.0, 1.0])
    params = SamplingParams(min_tokens=2, stop_token_ids=(2, 77))
    assert [sample(logits, params, (), n, (1,)).token_id for n in range(4)] == [3, 3, 1, 1]
    drawn = {
        sample(logits, SamplingParams(min_tokens=2, temperature=1.0, seed=s), (), 0, (1,)).token_id
        for s in range(100)
    }
    assert 1 not in drawn


def test_min_tokens_that_forbids_everything_is_refused() -> None:
    with pytest.raises(PoisonedLogits, match="min_tokens=2"):
        sample(torch.zeros(2), SamplingParams(min_tokens=2), (), 0, (0, 1))


def test_sampling_leaves_the_logits_alone() -> None:
    logits = random_logits()
    before = logits.clone()
    params = SamplingParams(temperature=0.5, repetition_penalty=2.0, min_tokens=3, logprobs=2)
    sample(logits, params, (1, 2), 0, (3,))
    assert torch.equal(logits, before)


def test_a_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def answer(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        return [sample(random_logits(n), params, (), n, ()).token_id for n in range(30)]

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)


def test_known_draws_stay_the_same_across_releases() -> None:
    tokens = [
        sample(random_logits(0), SamplingParams(temperature=1.0, seed=1234), (), n, ()).token_id
        for n in range(3)
    ]
    assert uniforms(1234, 5, np.arange(3)).round(6).tolist() == [0.673151, 0.172463, 0.132029]
    assert tokens == [59, 59, 69]


def assert_uniform_and_independent(u: np.ndarray) -> None:
    """u [seeds, positions, ids]: Kolmogorov-Smirnov, and no correlation of neighbours on any axis."""
    values = np.sort(u, axis=None)
    distance = np.abs(values - (np.arange(values.size) + 0.5) / values.size).max()
    assert distance * np.sqrt(values.size) < 2.2  # passed by chance 99.99% of the time
    for axis in range(u.ndim):
        for step in (1, 2, 7):
            a = np.take(u, range(u.shape[axis] - step), axis).ravel()
            b = np.take(u, range(step, u.shape[axis]), axis).ravel()
            correlation = np.corrcoef(a, b)[0, 1]
            assert abs(correlation) < 5 / np.sqrt(a.size), f"axis {axis}, step {step}: {correlation}"


def noise_grid() -> np.ndarray:
    return np.array([[uniforms(seed, n, np.arange(100)) for n in range(40)] for seed in range(-20, 20)])


def test_noise_is_uniform_and_independent_over_seeds_positions_and_ids() -> None:
    assert_uniform_and_independent(noise_grid())
    far = [[uniforms(s, n, np.arange(131_000, 131_072)) for n in range(8000, 8040)] for s in range(20)]
    assert_uniform_and_independent(np.array(far))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_noise_check_notices_one_neighbour_leaking_into_another(axis: int) -> None:
    u = noise_grid()
    with pytest.raises(AssertionError, match=f"axis {axis}, step 1"):
        leaks = np.random.default_rng(0).random(u.shape) < 0.05
        assert_uniform_and_independent(np.where(leaks, np.roll(u, 1, axis), u))
    with pytest.raises(AssertionError):
        assert_uniform_and_independent(u**1.02)


def test_the_noise_of_an_id_does_not_depend_on_which_others_are_asked_for() -> None:
    ids = np.array([131_071, 0, 40_000, 7])
    assert uniforms(3, 9, ids).tolist() == uniforms(3, 9, np.arange(131_072))[ids].tolist()


def test_noise_is_finite_at_the_ends_of_its_range() -> None:
    u = _open_unit(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert 0 < u[0] < u[1] < 1
    assert np.isfinite(np.log(-np.log(u))).all()


FILTERS_OF_NOISE = [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}]


def num_changed(logits: Tensor, noise: float, num: int, **params: Any) -> int:
    noisy = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) * noise
    return int((draws(logits, num, **params) != draws(noisy, num, **params)).sum())


@pytest.mark.parametrize("params", FILTERS_OF_NOISE)
def test_noise_of_another_summation_order_changes_no_token(params: dict[str, Any]) -> None:
    """A draw changes only where the two best scores are within about 1e-6 of each other."""
    assert num_changed(random_logits(vocab=2000), 1e-6, 200, temperature=0.8, **params) == 0


@pytest.mark.parametrize("params", FILTERS_OF_NOISE)
def test_noise_of_bf16_changes_few_tokens(params: dict[str, Any]) -> None:
    """0.05 is a rounding of bf16 on logits of about 10 to 20; large noise shows that the count counts."""
    logits = random_logits(vocab=50_000) + 10
    assert 0 < num_changed(logits, 0.05, 300, temperature=0.8, **params) < 30
    assert num_changed(logits, 5.0, 50, temperature=0.8, **params) > 25


@pytest.mark.parametrize("params", [{"top_p": 0.97}, {"top_p": 0.5}, {"top_p": 0.999, "min_p": 1e-6}])
def test_skipping_the_tail_of_the_order_changes_nothing(params: dict[str, Any]) -> None:
    logits, params = random_logits(vocab=2000, scale=2.0), {"temperature": 1.0, **params}
    full = kept(logits, params, tail_weight=1e-300)
    assert kept(logits, params) == full
    assert kept(logits, params, tail_weight=0.5) == full


@pytest.mark.parametrize("temperature", [1e-6, 1e-310])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    assert set(draws(random_logits(), 20, temperature=temperature)) == {int(random_logits().argmax())}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((100,), -math.inf)
    logits[[3, 40]] = torch.tensor([0.0, 1.0])
    assert set(draws(logits, 100, temperature=5.0)) == {3, 40}
    assert set(draws(logits, 100, temperature=5.0, top_k=10)) == {3, 40}
    assert set(draws(logits, 100, temperature=1e300, top_p=0.999)) == {3, 40}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_sample_as_their_fp32_values(dtype: torch.dtype) -> None:
    logits = random_logits().to(dtype)
    params = SamplingParams(temperature=1.0, seed=4)
    assert sample(logits, params, (), 0, ()) == sample(logits.float(), params, (), 0, ())


@pytest.mark.parametrize("poison", [[math.nan], [math.inf], [-math.inf] * VOCAB])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_poisoned_logits_are_named_before_any_token_comes_of_them(
    poison: list[float], temperature: float
) -> None:
    logits = random_logits()
    logits[: len(poison)] = torch.tensor(poison)
    with pytest.raises(PoisonedLogits, match="not usable"):
        sample(logits, SamplingParams(temperature=temperature), (), 0, ())


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits()
    params = SamplingParams(temperature=0.3, repetition_penalty=3.0, top_k=5, logprobs=4, seed=2)
    token = sample(logits, params, tuple(range(VOCAB)), 0, ())
    expected = logits.log_softmax(-1)
    ids, values = zip(*token.top_logprobs, strict=True)
    assert list(ids) == expected.topk(4).indices.tolist()
    # fp32 log-softmax of torch against ours rounded from fp64: a few units in the last place
    torch.testing.assert_close(torch.tensor(values), expected.topk(4).values, rtol=1e-6, atol=1e-6)
    assert token.logprob == pytest.approx(float(expected[token.token_id]), rel=1e-6)


def test_logprobs_may_be_off_or_without_alternatives() -> None:
    logits = random_logits()
    assert sample(logits, SamplingParams(), (), 0, ()).logprob is None
    bare = sample(logits, SamplingParams(logprobs=0), (), 0, ())
    assert bare.logprob is not None and bare.top_logprobs == ()
    assert len(sample(torch.zeros(3), SamplingParams(logprobs=20), (), 0, ()).top_logprobs) == 3


def test_tokens_travel_in_one_tensor_unchanged() -> None:
    tokens = [
        SampledToken(151_935, -0.1, ((151_935, -0.1), (7, -2.5))),
        SampledToken(0),
        None,
        SampledToken(2**40 + 1, -math.inf, ((1, -math.inf),)),
        sample(random_logits(), SamplingParams(logprobs=3), (), 0, ()),
    ]
    packed = encode_sampled(tokens, 3)
    assert packed.shape == (5, 8) and packed.dtype == torch.float64
    assert decode_sampled(packed) == tokens
    assert decode_sampled(encode_sampled(tokens[1:3], 0)) == tokens[1:3]
    assert decode_sampled(encode_sampled([], 2)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_tensor_gives_the_tokens_of_its_cpu_copy() -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=3, logprobs=3)
    for n in range(20):
        logits = random_logits(n, vocab=50_000)
        assert sample(logits.cuda(), params, (1, 2), n, (0,)) == sample(logits, params, (1, 2), n, (0,))
