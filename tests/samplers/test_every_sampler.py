"""Samplers: shapes, weights, unbiasedness with its bound, prefixes.

What any sampler has to keep (reproducibility, causality of weights, exactness with as many samples
as keys...) is in the conformance suite, which runs over the built-in ones too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from hyperframe import HyperAttention, samplers
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.samplers.base import AbstractSampler

INDEPENDENT = [
    "uniform", "row_norm", "leverage", "importance(tile_size=4, num_queries=5)",
    "kde(num_queries=5)",
]  # fmt: skip
NAMES = [*INDEPENDENT, "stratified", "centroid", "auto"]
FALSE_ALARM = 1e-6


def tensors(
    seed: int = 0, *, num_queries: int = 30, num_keys: int = 30, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, 3, generator=g).to(dtype)
    key = torch.randn(2, 2, num_keys, 3, generator=g).to(dtype)
    # norms between 0.5 and 3, so that rare keys stay within the reach of a test
    length = 0.5 + 2.5 * torch.rand(2, 2, num_keys, 1, generator=g)
    value = torch.nn.functional.normalize(torch.randn(2, 2, num_keys, 5, generator=g), dim=-1)
    return query, key, (value * length).to(dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_samples", [0, 1, 7, 100])
def test_a_sample_is_an_index_and_a_weight_for_every_key_head(
    name: str, dtype: torch.dtype, num_samples: int
) -> None:
    sample = samplers.create(name).sample(
        *tensors(dtype=dtype), num_samples=num_samples, generator=generator()
    )
    assert sample.index.shape == sample.log_weight.shape == (2, 2, num_samples)
    assert sample.num_samples == num_samples
    assert sample.index.dtype == torch.int64
    assert sample.log_weight.dtype == torch.float32
    assert ((sample.index >= 0) & (sample.index < 30)).all()
    # one key of each run or group: few keys are taken once; others draw them again
    used = min(30, num_samples) if name in ("stratified", "centroid", "auto") else num_samples
    assert (sample.log_weight.isfinite().sum(-1) == used).all()
    assert (sample.log_weight.isfinite() | (sample.log_weight == -torch.inf)).all()


@pytest.mark.parametrize("name", NAMES)
def test_without_a_generator_torchs_global_one_draws(name: str) -> None:
    sampler, args = samplers.create(name), tensors()
    torch.manual_seed(3)
    first = sampler.sample(*args, num_samples=20)
    torch.manual_seed(3)
    assert torch.equal(sampler.sample(*args, num_samples=20).index, first.index)
    assert not torch.equal(sampler.sample(*args, num_samples=20).index, first.index)


@pytest.mark.statistical
@pytest.mark.parametrize("name", INDEPENDENT)
def test_weights_are_the_inverse_of_the_frequencies(name: str) -> None:
    draws, args = 40_000, tensors()
    sample = samplers.create(name).sample(*args, num_samples=draws, generator=generator(2))
    # the count of each key is binomial with p = 1 / (m weight), exactly; checks: all samplers,
    # 4 heads, 30 keys, two-sided, together 1e-6
    tail = FALSE_ALARM / (len(INDEPENDENT) * 4 * 30 * 2)
    for index, log_weight in zip(
        sample.index.flatten(0, 1), sample.log_weight.flatten(0, 1), strict=True
    ):
        probabilities = []
        for key in range(30):
            drawn = index == key
            weights = log_weight[drawn].unique()
            assert len(weights) == 1  # a key has one weight
            probabilities.append(1 / (draws * weights.exp().item()))
            count = int(drawn.sum())
            low = binom.ppf(tail, draws, probabilities[-1])
            assert low <= count <= binom.isf(tail, draws, probabilities[-1])
        assert math.isclose(sum(probabilities), 1, rel_tol=1e-5)


@pytest.mark.statistical
@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_weighted_sum_over_the_sample_is_unbiased(name: str) -> None:
    draws = 40_000
    query, key, value = tensors()
    sample = samplers.create(name).sample(
        query, key, value, num_samples=draws, generator=generator(3)
    )
    f = (0.5 * key.double().sum(-1)).exp()  # any positive function of a key
    terms = sample.log_weight.double().exp() * draws * f.gather(-1, sample.index)
    p_inverse = torch.zeros_like(f).scatter_(-1, sample.index, sample.log_weight.double().exp())
    p_inverse *= draws
    total = f.sum(-1)
    # Bernstein: draws are independent in [0, b] with variance s^2, so that the mean is off by
    # more than sqrt(2 s^2 L / N) + b L / (3 N) with probability at most 2 exp(-L)
    log_term = math.log(2 * len(INDEPENDENT) * 4 / FALSE_ALARM)  # two-sided, 4 heads
    variance = (p_inverse * f.square()).sum(-1) - total.square()
    radius = (2 * variance * log_term / draws).sqrt()
    radius += (p_inverse * f).amax(-1) * log_term / (3 * draws)
    assert (radius < 0.1 * total).all()  # the bound says something
    assert ((terms.mean(-1) - total).abs() <= radius).all()


# ------------------------------------------------------------------------------- prefixes


@given(
    name=st.sampled_from(NAMES),
    num_keys=st.integers(1, 40),
    num_queries=st.integers(1, 40),
    tile=st.integers(1, 20),
    num_samples=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_a_prefix_sample_never_leaves_its_prefix_and_takes_short_ones_whole(
    name: str, num_keys: int, num_queries: int, tile: int, num_samples: int, seed: int
) -> None:
    query, key, value = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    rows = torch.arange(tile, num_queries + tile, tile).clamp(max=num_queries)
    prefixes = (rows + num_keys - num_queries).clamp(min=0)
    sample = samplers.create(name).sample_prefixes(
        query, key, value, num_samples=num_samples, prefixes=prefixes, generator=generator(seed)
    )
    assert sample.index.shape == sample.log_weight.shape == (2, 2, len(prefixes), num_samples)
    assert sample.log_weight.dtype == torch.float32
    used = sample.log_weight > float("-inf")
    assert ((sample.index >= 0) & (sample.index < num_keys)).all()
    assert ((sample.index < prefixes[:, None]) | ~used).all()
    assert not sample.log_weight.isnan().any()
    for t, length in enumerate(prefixes.tolist()):
        if length <= num_samples:
            for index, weight in zip(
                sample.index[:, :, t].flatten(0, 1),
                sample.log_weight[:, :, t].flatten(0, 1),
                strict=True,
            ):
                assert index[:length].tolist() == list(range(length))
                assert (weight[:length] == 0).all()
                assert (weight[length:] == float("-inf")).all()
        else:
            assert used[:, :, t].all()


@pytest.mark.statistical
@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("num_queries", [30, 20])
def test_prefix_weights_are_the_inverse_of_the_frequencies(name: str, num_queries: int) -> None:
    draws, copies = 20, 2000
    query, key, value = (x[:1].expand(copies, -1, -1, -1) for x in tensors(num_queries=num_queries))
    prefixes = torch.tensor([22, 30])
    sample = samplers.create(name).sample_prefixes(
        query, key, value, num_samples=draws, prefixes=prefixes, generator=generator(5)
    )
    trials = draws * copies
    # as above; all samplers, 2 query lengths, 2 heads, at most 52 keys, two-sided
    tail = FALSE_ALARM / (len(INDEPENDENT) * 2 * 2 * 52 * 2)
    for head in range(2):
        for t, length in enumerate(prefixes.tolist()):
            index = sample.index[:, head, t].flatten()
            log_weight = sample.log_weight[:, head, t].flatten()
            total = 0.0
            for j in range(length):
                weights = log_weight[index == j]
                assert weights.max() - weights.min() < 1e-5
                p = 1 / (draws * weights[0].exp().item())
                total += p
                low, high = binom.ppf(tail, trials, p), binom.isf(tail, trials, p)
                assert low <= int((index == j).sum()) <= high
            assert math.isclose(total, 1, rel_tol=1e-5)


def test_what_every_row_of_a_tile_sees_does_move_its_weights() -> None:
    # what some row may not see moves none: that is a check of the conformance suite
    query, key, value = tensors(num_queries=24)
    other = value.clone()
    other[:, :, 3] *= 9
    prefixes = torch.tensor([14, 22, 30])
    first, second = (
        samplers.create("row_norm").sample_prefixes(
            query, key, v, num_samples=9, prefixes=prefixes, generator=generator(7)
        )
        for v in (value, other)
    )
    assert not torch.equal(first.log_weight[:, :, 2], second.log_weight[:, :, 2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zeros", [slice(None), slice(0, 10), slice(7, 30), slice(12, 13)])
def test_zero_values_have_finite_weights(name: str, zeros: slice) -> None:
    query, key, value = tensors()
    value[:, :, zeros] = 0
    sampler = samplers.create(name)
    sample = sampler.sample(query, key, value, num_samples=20, generator=generator())
    assert sample.log_weight.isfinite().all()
    prefixes = torch.tensor([10, 20, 30])
    per_tile = sampler.sample_prefixes(
        query, key, value, num_samples=5, prefixes=prefixes, generator=generator()
    )
    assert per_tile.log_weight.isfinite().all()
    if zeros == slice(None) and name in ("uniform", "row_norm"):  # nothing to go by: uniform
        torch.testing.assert_close(sample.log_weight, torch.full((2, 2, 20), math.log(30 / 20)))


def test_every_built_in_sampler_is_tested_here() -> None:
    assert {samplers.create(name).name for name in NAMES} == set(samplers._BUILTINS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value, error", [(-1, ArgumentError), (True, ArgumentTypeError),
                                          (2.0, ArgumentTypeError)])  # fmt: skip
def test_a_bad_number_of_samples_is_refused(
    name: str, value: object, error: type[Exception]
) -> None:
    sampler = samplers.create(name)
    with pytest.raises(error, match=f"{sampler.name}: num_samples={value}"):
        sampler.sample(*tensors(), num_samples=value)
    with pytest.raises(error, match=f"{sampler.name}: num_samples={value}"):
        sampler.sample_prefixes(*tensors(), num_samples=value, prefixes=torch.tensor([30]))


@dataclass(frozen=True, kw_only=True)
class ByPosition(AbstractSampler):
    """Everything a new sampler has to say."""

    def density(  # type: ignore[no-untyped-def]
        self, query, key, value
    ):
        return torch.arange(1.0, key.shape[2] + 1).expand(key.shape[:3])


def test_a_density_is_all_that_a_new_sampler_needs() -> None:
    sample = ByPosition().sample(*tensors(), num_samples=10, generator=generator())
    p = (sample.index + 1).double() / (30 * 31 / 2)
    torch.testing.assert_close(sample.log_weight.double(), -(10 * p).log(), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("is_causal, causal", [(False, "single_pass"), (True, "recursive")])
def test_a_sampler_that_takes_a_scale_gets_that_of_the_call(is_causal: bool, causal: str) -> None:
    scales = []

    @dataclass(frozen=True, kw_only=True)
    class Scaled(AbstractSampler):
        def density(self, query, key, value, *, scale=None):  # type: ignore[no-untyped-def]
            scales.append(scale)
            return key.new_ones(key.shape[:3])

    attention = HyperAttention(
        detector="sliding_window(width=3)", sampler=Scaled(), num_samples=3, min_seq_len=4,
        causal=causal,
    )  # fmt: skip
    attention(*tensors(), is_causal=is_causal, scale=0.3)
    assert set(scales) == {0.3}
    Scaled().sample(*tensors(), num_samples=3)
    assert scales[-1] is None


def test_methods_that_were_written_without_a_scale_run_as_they_are() -> None:
    called = []

    @dataclass(frozen=True, kw_only=True)
    class Older(AbstractSampler):
        def density(self, query, key, value):  # type: ignore[no-untyped-def]
            return None

        def sample(self, query, key, value, *, num_samples, generator=None):  # type: ignore[no-untyped-def]
            called.append("sample")
            return super().sample(query, key, value, num_samples=num_samples, generator=generator)

        def sample_prefixes(self, *args, **options):  # type: ignore[no-untyped-def]
            called.append("sample_prefixes")
            return super().sample_prefixes(*args, **options)

        def draws(self, query, key, value, *, num_samples, generator=None):  # type: ignore[no-untyped-def]
            called.append("draws")
            return super().draws(query, key, value, num_samples=num_samples, generator=generator)

    attention = HyperAttention(
        detector="sliding_window(width=3)", sampler=Older(), num_samples=3, min_seq_len=0
    )
    attention(*tensors(), scale=0.3)
    attention(*tensors(), scale=0.3, is_causal=True)
    assert called == ["draws", "sample", "draws", "sample_prefixes"]
