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
    _draw,
    decode_sampled,
    encode_sampled,
    sample,
    uniform,
)

VOCAB = 300


def random_logits(seed: int = 0, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draws(logits: Tensor, num: int, history: tuple[int, ...] = (), **params: Any) -> np.ndarray:
    """One token for each of `num` seeds."""
    return np.array(
        [sample(logits, SamplingParams(seed=s, **params), history, 0, ()).token_id for s in range(num)]
    )


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
    """The last kept token is drawn when u is next to 1, the first when u is 0."""
    logits = random_logits(seed, scale=1.0)
    for params, processors in FILTERS.values():
        expected = by_transformers(logits, processors)
        config = SamplingParams(**params)
        last = _draw(logits.numpy(), config, 1 - 2**-53)
        assert last == int(torch.where(expected > 0, expected, torch.inf).argmin())
        assert _draw(logits.numpy(), config, 0.0) == int(expected.argmax())


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
    assert [round(uniform(1234, n), 6) for n in range(3)] == [0.104472, 0.024934, 0.948194]
    assert len(set(tokens)) > 1


def test_uniform_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    for values in ([uniform(s, 3) for s in range(4000)], [uniform(-3, n) for n in range(4000)]):
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        chi2 = ((counts - 200) ** 2 / 200).sum()
        assert chi2 < 45.3  # 99.93% point of chi-squared with 19 degrees of freedom
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.08  # 5 standard errors of 1/sqrt(4000)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}])
def test_noise_of_another_summation_order_changes_no_token(params: dict[str, Any]) -> None:
    """A draw changes only when u falls within about 1e-6 of a step of the CDF: 200 draws, at most one."""
    logits = random_logits(vocab=2000)
    noisy = logits + torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 1e-6
    changed = (
        draws(logits, 200, temperature=0.8, **params) != draws(noisy, 200, temperature=0.8, **params)
    ).sum()
    assert changed <= 1


@pytest.mark.parametrize("params", [{}, {"top_p": 0.97}, {"min_p": 1e-5}, {"top_p": 0.999, "min_p": 1e-6}])
def test_skipping_the_tail_of_the_order_changes_nothing(params: dict[str, Any]) -> None:
    logits = random_logits(vocab=2000, scale=2.0).numpy()
    config = SamplingParams(temperature=1.0, **params)
    for u in [*(uniform(s, 0) for s in range(200)), 0.0, 0.999, 1 - 1e-9, 1 - 2**-53]:
        full = _draw(logits, config, u, tail_weight=1e-300)
        assert _draw(logits, config, u) == full
        assert _draw(logits, config, u, tail_weight=0.5) == full


@pytest.mark.parametrize("temperature", [1e-6, 1e-310])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    assert set(draws(random_logits(), 20, temperature=temperature)) == {int(random_logits().argmax())}


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((100,), -math.inf)
    logits[[3, 40]] = torch.tensor([0.0, 1.0])
    assert set(draws(logits, 100, temperature=5.0)) == {3, 40}
    assert set(draws(logits, 100, temperature=5.0, top_k=10)) == {3, 40}
    for top_k in (0, 10):  # u * mass may round up to the whole mass
        assert _draw(logits.numpy(), SamplingParams(temperature=5.0, top_k=top_k), 1.0) == 3


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
