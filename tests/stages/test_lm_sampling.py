"""Choosing a token: Hugging Face's warping, draws from seed and position, one or many at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stages.lm_sampling import Controls, Sampling, choose, choose_rows, distribution, uniform

samplings = st.builds(
    Sampling,
    temperature=st.floats(0.1, 3.0),
    top_p=st.floats(0.01, 1.0),
    top_k=st.integers(0, 40),
    greedy=st.booleans(),
)


def random_logits(seed: int, rows: int = 1, size: int = 60) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def hugging_face(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The probabilities that ``generate`` would draw from."""
    warped = TemperatureLogitsWarper(sampling.temperature)(None, logits[None])
    if sampling.top_k:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p < 1:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)
    return warped.softmax(-1)[0]


@settings(max_examples=100, deadline=None)
@given(sampling=samplings, seed=st.integers(0, 1000))
def test_the_distribution_is_hugging_faces(sampling: Sampling, seed: int) -> None:
    logits = random_logits(seed)[0]
    logits[::7] = float("-inf")
    p = torch.from_numpy(distribution(logits.numpy(), sampling))
    torch.testing.assert_close(p / p.sum(), hugging_face(logits, sampling), atol=1e-6, rtol=1e-4)


def test_a_mask_is_a_logit_of_minus_infinity() -> None:
    logits = random_logits(0)[0]
    mask = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = logits.masked_fill(~mask, float("-inf"))
    np.testing.assert_array_equal(
        distribution(logits.numpy(), Sampling(), mask.numpy()),
        distribution(masked.numpy(), Sampling()),
    )


def test_tokens_that_tie_at_the_cut_all_stay() -> None:
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.2], np.float32))
    kept = distribution(logits, Sampling(temperature=1, top_p=0.5)) > 0
    assert kept.tolist() == [True] * 4
    kept = distribution(logits, Sampling(temperature=1, top_p=1, top_k=2)) > 0
    assert kept.tolist() == [True] * 4


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    sampling = Sampling(temperature=1.3, top_p=0.9, seed=3)
    draws = [choose(logits, sampling, None, sampling.draw(i)) for i in range(4000)]
    frequencies = torch.bincount(torch.tensor(draws), minlength=5) / 4000
    torch.testing.assert_close(frequencies, hugging_face(logits, sampling), atol=0.03, rtol=0)


@given(seed=st.integers(-(2**70), 2**70), position=st.integers(0, 5000))
def test_a_draw_is_a_float32_below_one_and_repeats(seed: int, position: int) -> None:
    u = uniform(seed, position)
    assert 0 <= u < 1 and float(np.float32(u)) == u == uniform(seed, position)


def test_draws_are_even_over_positions_and_over_seeds() -> None:
    for draws in (
        [uniform(7, i) for i in range(4000)],
        [uniform(i, 7) for i in range(4000)],
    ):
        counts, _ = np.histogram(draws, bins=10, range=(0, 1))
        assert abs(counts - 400).max() < 80
        assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.05


def test_without_a_seed_torchs_generator_decides() -> None:
    torch.manual_seed(0)
    first = [Sampling().draw(0) for _ in range(5)]
    torch.manual_seed(0)
    assert [Sampling().draw(9) for _ in range(5)] == first and len(set(first)) == 5


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), rows=st.integers(1, 6))
def test_many_rows_are_chosen_as_each_alone(data: st.DataObject, seed: int, rows: int) -> None:
    logits = random_logits(seed, rows)
    allowed = torch.rand(rows, 60, generator=torch.Generator().manual_seed(seed)) < 0.7
    allowed[:, 5] = True
    logits[:, 3] = logits[:, 5]
    each = [data.draw(samplings) for _ in range(rows)]
    draws = [uniform(seed, row) for row in range(rows)]
    chosen = choose_rows(logits, ~allowed, Controls.of(each, draws))
    expected = [choose(*given) for given in zip(logits, each, allowed, draws, strict=True)]
    assert chosen.tolist() == expected


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-24])
def test_the_ends_of_a_draw_give_tokens_that_are_possible(draw: float) -> None:
    logits = torch.tensor([-50.0, 1.0, 0.5, -50.0])
    sampling = Sampling(top_p=0.9)
    expected = 1 if draw == 0 else 2
    assert choose(logits, sampling, None, draw) == expected
    rows = choose_rows(
        logits[None], torch.zeros(1, 4, dtype=torch.bool), Controls.of([sampling], [draw])
    )
    assert rows.tolist() == [expected]


def test_a_mask_that_allows_nothing_is_refused() -> None:
    for sampling in (Sampling(), Sampling(greedy=True)):
        with pytest.raises(ValueError, match="allows no token"):
            choose(torch.zeros(4), sampling, torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_bad_sampling_is_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)
