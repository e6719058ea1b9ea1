"""Without replacement: no key twice, exact probabilities, and nothing left to vary at m = n."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

import hyperframe.samplers.base as base
import hyperframe.samplers.distinct as module
from hyperframe import HyperAttention, samplers
from hyperframe.errors import ArgumentTypeError
from hyperframe.randomness import Stream
from hyperframe.rectangles import causal_levels, level_rectangles
from hyperframe.samplers import RowNorm, Uniform
from hyperframe.samplers.base import AbstractSampler
from hyperframe.samplers.distinct import distinct_places, inclusion_probabilities
from hyperframe.samples import KeySample
from hyperframe.testing import dense_attention

FALSE_ALARM = 1e-6
NAMES = ["uniform", "row_norm", "leverage"]


def sampler_of(name: str, replacement: bool = False) -> AbstractSampler:
    return samplers.create(f"{name}(replacement={replacement})")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    num_queries: int = 30, num_keys: int = 30, *, seed: int = 0, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = generator(seed)
    query = torch.randn(batch, 4, num_queries, 3, generator=g)
    key = torch.randn(batch, 2, num_keys, 3, generator=g)
    # some keys a hundred times as likely as others
    value = torch.randn(batch, 2, num_keys, 5, generator=g)
    return query, key, value * (1 + 9 * torch.rand(batch, 2, num_keys, 1, generator=g) ** 4)


# ------------------------------------------------------------------------------ permutations


def shuffle(draws: list[float], length: int) -> list[int]:
    """Fisher and Yates, one exchange after another."""
    places = list(range(length))
    for s, draw in enumerate(draws):
        other = s + min(int(draw * (length - s)), length - s - 1)
        places[s], places[other] = places[other], places[s]
    return places[: len(draws)]


@given(
    length=st.integers(1, 60), seed=st.integers(0, 1000), share=st.floats(0, 1),
    coarse=st.booleans(),
)  # fmt: skip
def test_all_steps_at_once_are_the_shuffle_step_by_step(
    length: int, seed: int, share: float, coarse: bool
) -> None:
    m = max(1, round(share * length))
    draws = torch.rand(3, 2, m, generator=generator(seed), dtype=torch.float64)
    if coarse:  # long chains: the same few places again and again
        draws = (4 * draws).floor() / 4
    found = distinct_places(draws, torch.tensor([length]))
    for mine, drawn in zip(found.flatten(0, 1), draws.flatten(0, 1), strict=True):
        assert mine.tolist() == shuffle(drawn.tolist(), length)


@pytest.mark.parametrize("length, m", [(5, 3), (4, 4), (6, 2), (7, 1), (1, 1)])
def test_every_ordered_choice_is_equally_likely(length: int, m: int) -> None:
    """Exact: over all outcomes of the draws, each choice comes once."""
    found: Counter[tuple[int, ...]] = Counter()
    for outcome in itertools.product(*(range(length - s) for s in range(m))):
        draws = [(x + 0.5) / (length - s) for s, x in enumerate(outcome)]
        places = distinct_places(torch.tensor(draws).double(), torch.tensor([length]))
        found[tuple(places.tolist())] += 1
    assert found == Counter(itertools.permutations(range(length), m))


# ------------------------------------------------------------------------------ probabilities


@given(
    length=st.integers(2, 50), seed=st.integers(0, 1000), share=st.floats(0, 1),
    power=st.sampled_from([0, 1, 6]),
)  # fmt: skip
def test_inclusion_probabilities_are_min_1_c_p_and_add_up_to_m(
    length: int, seed: int, share: float, power: int
) -> None:
    m = min(length - 1, max(1, round(share * length)))
    p = (1e-3 + torch.rand(3, length, generator=generator(seed), dtype=torch.float64)) ** power
    found = inclusion_probabilities(p, m)
    torch.testing.assert_close(found.sum(-1), torch.full((3,), float(m)).double())
    for mine, density in zip(found, p, strict=True):
        below = mine < 1
        assert below.any()
        c = float((mine / density)[below][0])
        torch.testing.assert_close(mine, (c * density).clamp(max=1), rtol=1e-9, atol=1e-12)


def expectation(draw: Any, line: torch.Tensor, start: Any) -> Any:
    """The exact mean, over the start, of 1 for drawn keys and of their weights; and the outcomes.

    What is drawn changes only where a point reaches the end of a key: between such starts it is
    constant.
    """
    ends = torch.cat([torch.tensor([0.0, 1.0]).double(), line.cumsum(0) % 1]).sort().values
    drawn, weights = torch.zeros(2, len(line), dtype=torch.float64)
    outcomes = []
    for low, high in itertools.pairwise(ends.tolist()):
        if high - low < 1e-9:
            continue
        start((low + high) / 2)
        sample = draw()
        index, weight = sample.index.flatten(), sample.log_weight.flatten().double().exp()
        outcomes.append(index[weight > 0])
        drawn.index_add_(0, index, (high - low) * (weight > 0).double())
        weights.index_add_(0, index, (high - low) * weight)
    return drawn, weights, outcomes


@pytest.mark.parametrize("num_keys, m", [(9, 4), (12, 1), (10, 9), (30, 12)])
def test_over_all_starts_every_key_has_its_probability_and_the_mean_weight_1(
    num_keys: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact, so that E[sum_s w_s f(j_s)] = sum_j f(j) for every f."""
    value = tensors(num_keys=num_keys)[2][:1, :1]
    shuffled = torch.rand(1, 1, num_keys, generator=generator(1), dtype=torch.float64)
    order = shuffled.argsort(-1).flatten()
    density = value.double().square().sum(-1).flatten()
    probability = inclusion_probabilities(torch.maximum(density, 0.01 * density.mean()), m)

    def start(u: float) -> None:
        draws = {num_keys: shuffled, 1: torch.full((1, 1, 1), u, dtype=torch.float64)}
        monkeypatch.setattr(module, "uniform", lambda shape, device, g: draws[shape[-1]])

    drawn, weights, outcomes = expectation(
        lambda: RowNorm(replacement=False).sample(value, value, value, num_samples=m),
        probability[order], start,
    )  # fmt: skip
    assert all(len(x) == m == len(x.unique()) for x in outcomes)
    torch.testing.assert_close(drawn, probability, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-6, atol=0)


@pytest.mark.parametrize("length, seen, m", [(20, 14, 6), (9, 4, 8), (40, 40, 5), (24, 0, 7),
                                             (21, 20, 20)])  # fmt: skip
def test_over_all_starts_a_prefix_has_the_probabilities_that_are_written_down(
    length: int, seen: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_keys = 44
    value = tensors(num_keys=num_keys)[2][:1, :1]
    query = value[:, :, : num_keys - seen]  # the first tile's rows see `seen` keys at least
    p = value.double().square().sum(-1).flatten()[:seen]
    uniformly = min(1.0, max(0.01, m / length)) if seen else 1.0
    line = torch.full((length,), m / length, dtype=torch.float64)
    line[:seen] *= (1 - uniformly) * seen * p / p.sum() + uniformly
    torch.testing.assert_close(line.sum(), torch.tensor(float(m)).double())

    def start(u: float) -> None:
        monkeypatch.setattr(
            base, "uniform", lambda shape, device, g: torch.full(shape, u, dtype=torch.float64)
        )

    drawn, weights, outcomes = expectation(
        lambda: RowNorm(replacement=False).sample_prefixes(
            query, value, value, num_samples=m, prefixes=torch.tensor([length])
        ),
        line, start,
    )  # fmt: skip
    assert all(len(x) == len(x.unique()) for x in outcomes)
    torch.testing.assert_close(drawn, line.clamp(max=1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(weights, torch.ones_like(weights), rtol=1e-6, atol=0)


@pytest.mark.statistical
@pytest.mark.parametrize("form", ["sample", "prefixes", "rectangles"])
@pytest.mark.parametrize("name", NAMES)
def test_the_frequency_of_a_key_is_the_inverse_of_its_weight(name: str, form: str) -> None:
    copies, m = 4000, 7
    inputs = [x[:1].expand(copies, -1, -1, -1) for x in tensors(batch=1)]
    sampler = sampler_of(name)
    if form == "sample":
        sample, tiles = sampler.sample(*inputs, num_samples=m, generator=generator(2)), [30]
    elif form == "prefixes":
        tiles = [11, 22, 30]
        sample = sampler.sample_prefixes(
            *inputs, num_samples=m, prefixes=torch.tensor(tiles), generator=generator(3)
        )
    else:
        tiles = [13, 8]
        rectangles = ((13, 30, 0, 13), (8, 30, 0, 8))
        drawn = sampler.sample_rectangles(
            *inputs, num_samples=m, rectangles=rectangles, generator=generator(4)
        )
        assert (drawn is None) == (name != "uniform")
        if drawn is None:
            return
        sample = drawn
    index, log_weight = (
        x.view(copies, 2, len(tiles), m) for x in (sample.index, sample.log_weight)
    )
    # a key is in a sample or not, in each copy with the probability 1 / weight: its count is
    # binomial. 3 samplers, 6 lists, 2 heads, at most 30 keys, two-sided: together 1e-6
    tail = FALSE_ALARM / (3 * 6 * 2 * 30 * 2)
    for head, (tile, length) in itertools.product(range(2), enumerate(tiles)):
        used = log_weight[:, head, tile] > -torch.inf
        total = 0.0
        for j in range(length):
            is_drawn = (index[:, head, tile] == j) & used
            assert (is_drawn.sum(-1) <= 1).all()
            weights = log_weight[:, head, tile][is_drawn]
            assert weights.max() - weights.min() < 1e-5  # a key has one weight
            p = min(1.0, 1 / weights[0].exp().item())
            total += p
            low, high = binom.ppf(tail, copies, p), binom.isf(tail, copies, p)
            assert low <= int(is_drawn.sum()) <= high
        assert total <= m * (1 + 1e-5)
        if form == "sample" or name == "uniform":
            assert total == pytest.approx(m, rel=1e-5)


# ------------------------------------------------------------------------------ laws


@given(
    name=st.sampled_from(NAMES), num_queries=st.integers(1, 40), num_keys=st.integers(1, 40),
    tile=st.integers(1, 20), m=st.integers(0, 20), seed=st.integers(0, 1000),
    zeros=st.booleans(),
)  # fmt: skip
def test_no_form_draws_a_key_twice(
    name: str, num_queries: int, num_keys: int, tile: int, m: int, seed: int, zeros: bool
) -> None:
    query, key, value = tensors(num_queries, num_keys, seed=seed)
    if zeros:
        key[:, :, ::2] = value[:, :, ::2] = 0
    sampler = sampler_of(name)
    rows = torch.arange(tile, num_queries + tile, tile).clamp(max=num_queries)
    prefixes = (rows + num_keys - num_queries).clamp(min=0)
    found = [
        (sampler.sample(query, key, value, num_samples=m, generator=generator(seed)), [num_keys]),
        (sampler.sample_prefixes(query, key, value, num_samples=m, prefixes=prefixes,
                                 generator=generator(seed)), prefixes.tolist()),
    ]  # fmt: skip
    rectangles = tuple(
        places
        for level in causal_levels(num_keys, tile)
        for places in level_rectangles(level, num_keys)
    )
    if rectangles and name == "uniform":
        sample = sampler.sample_rectangles(
            query, key, value, num_samples=m, rectangles=rectangles, generator=generator(seed)
        )
        assert sample is not None
        first = torch.tensor([places[2] for places in rectangles]).view(-1, 1)
        shifted = KeySample(index=sample.index - first, log_weight=sample.log_weight)
        found.append((shifted, [places[3] - places[2] for places in rectangles]))
    for sample, lengths in found:
        index = sample.index.view(2, 2, len(lengths), m)
        log_weight = sample.log_weight.view(index.shape)
        assert not log_weight.isnan().any()
        assert ((log_weight >= -1e-6) | (log_weight == -torch.inf)).all()  # 1 / pi
        for t, length in enumerate(lengths):
            for list_, weight in zip(
                index[:, :, t].flatten(0, 1), log_weight[:, :, t].flatten(0, 1), strict=True
            ):
                used = list_[weight > -torch.inf].tolist()
                assert len(set(used)) == len(used)
                assert all(0 <= j < length for j in used)
                if length <= m:
                    assert sorted(used) == list(range(length))
                    assert (weight[weight > -torch.inf] == 0).all()
                elif name == "uniform":
                    assert len(used) == m


@pytest.mark.parametrize("name", NAMES)
def test_what_some_row_of_a_tile_may_not_see_moves_none_of_its_weights(name: str) -> None:
    query, key, value = tensors(24, 30)
    prefixes = torch.tensor([14, 22, 30])  # tiles of 8 rows; the first row of a tile sees 7, 15, 23

    def draw(k: torch.Tensor, v: torch.Tensor) -> KeySample:
        return sampler_of(name).sample_prefixes(
            query, k, v, num_samples=9, prefixes=prefixes, generator=generator(7)
        )

    mine = draw(key, value)
    for t, seen in enumerate([7, 15, 23]):
        other_key, other = key.clone(), value.clone()
        other_key[:, :, seen:] *= torch.linspace(-3, 9, 30 - seen)[:, None]
        other[:, :, seen:] *= torch.linspace(3, 9, 30 - seen)[:, None]
        its = draw(other_key, other)
        assert torch.equal(mine.index[:, :, : t + 1], its.index[:, :, : t + 1])
        assert torch.equal(mine.log_weight[:, :, : t + 1], its.log_weight[:, :, : t + 1])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_generator_draws_the_same_and_heads_on_their_own(name: str) -> None:
    inputs, sampler = [x[:1, :1].expand(2, 2, -1, -1) for x in tensors()], sampler_of(name)
    g = generator(4)
    first, second = (sampler.sample(*inputs, num_samples=9, generator=g) for _ in range(2))
    again = sampler.sample(*inputs, num_samples=9, generator=generator(4))
    assert torch.equal(first.index, again.index)
    assert not torch.equal(first.index, second.index)
    assert len({tuple(x.tolist()) for x in first.index.flatten(0, 1)}) == 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_as_many_samples_as_keys_are_exact_attention(name: str, causal: str) -> None:
    inputs = tensors()
    for detector in ("sliding_window(width=3)", "sort_lsh(block_size=4)"):
        attention = HyperAttention(
            detector=detector, sampler=sampler_of(name), num_samples=30, causal=causal,
            min_seq_len=0 if causal == "single_pass" else 4,
        )  # fmt: skip
        for is_causal in (False, True):
            out, lse = attention(*inputs, is_causal=is_causal, return_lse=True)
            exact = dense_attention(*inputs, is_causal=is_causal)
            torch.testing.assert_close(out.double(), exact.out, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse.double(), exact.lse, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ variance


def sums_of(
    sampler: AbstractSampler, m: int, form: str, length: int = 40, copies: int = 8000
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sums of a function of the keys over many samples, in units of the sum; the terms."""
    value = 1 + torch.rand(1, 1, length, 2, generator=generator(), dtype=torch.float64)
    f = value.sum(-1).flatten() + torch.rand(length, generator=generator(1)).double()
    many = value.expand(copies, -1, -1, -1)
    if form == "sample":
        sample = sampler.sample(many, many, many, num_samples=m, generator=generator(2))
    else:
        query = torch.zeros(copies, 1, 1, 2, dtype=torch.float64)  # sees all but the last key
        sample = sampler.sample_prefixes(
            query, many, many, num_samples=m, prefixes=torch.tensor([length]),
            generator=generator(2),
        )  # fmt: skip
    terms = sample.log_weight.double().exp() * f[sample.index]
    return terms.flatten(1).sum(-1) / f.sum(), f / f.sum()


@pytest.mark.statistical
@pytest.mark.parametrize("m", [10, 30, 39])
def test_a_simple_random_sample_has_its_variance(m: int) -> None:
    """`n^2 (1 - m / n) S^2 / m`: `(n - m) / (n - 1)` of that of independent draws.

    Hoeffding: squared deviations lie in [0, b^2]; the mean of N is off by more than
    b^2 sqrt(L / (2 N)) with probability at most 2 exp(-L); 3 m, together 1e-6.
    """
    copies, n = 8000, 40
    sums, f = sums_of(Uniform(replacement=False), m, "sample")
    independent, _ = sums_of(Uniform(), m, "sample")
    expected = n**2 * (1 - m / n) * float(f.var(correction=1)) / m
    ordered = f.sort().values
    # the largest deviation: only the largest terms, or only the smallest
    most = max(float(n / m * ordered[-m:].sum() - 1), float(1 - n / m * ordered[:m].sum()))
    assert (sums - 1).abs().max() <= most * (1 + 1e-5)
    radius = most**2 * math.sqrt(math.log(3 * 2 / FALSE_ALARM) / (2 * copies))
    assert abs(float((sums - 1).square().mean()) - expected) <= radius
    assert radius < expected
    ratio = float((sums - 1).square().mean() / (independent - 1).square().mean())
    assert ratio < 1.5 * (n - m) / (n - 1)


@pytest.mark.parametrize("form", ["sample", "prefixes"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_vary_as_m_comes_to_n(name: str, form: str) -> None:
    sampler = sampler_of(name)
    errors = []
    for m in (10, 20, 36, 39, 40):
        sums, _ = sums_of(sampler, m, form, copies=500)
        errors.append(float((sums - 1).square().mean().sqrt()))
    assert errors[4] < 1e-7
    assert errors[3] < 0.02
    assert errors[3] < 0.25 * errors[0]
    independent, _ = sums_of(sampler_of(name, replacement=True), 36, form, copies=500)
    assert errors[2] < 0.5 * float((independent - 1).square().mean().sqrt())


# ------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_parameter_is_a_switch_and_its_spec_makes_an_equal_sampler(name: str) -> None:
    sampler = sampler_of(name)
    assert samplers.create(samplers.to_spec(sampler)) == sampler
    assert sampler.replace(replacement=True) == samplers.create(name)
    with pytest.raises(ArgumentTypeError, match=rf"{name}: replacement=0 has type int"):
        type(sampler)(replacement=0)


@dataclass(frozen=True, kw_only=True)
class ByPosition(AbstractSampler):
    replacement: bool = False

    def density(  # type: ignore[no-untyped-def]
        self, query, key, value
    ):
        return torch.arange(1.0, key.shape[2] + 1).expand(key.shape[:3])


def test_a_field_of_that_name_is_all_that_a_new_sampler_needs() -> None:
    sample = ByPosition().sample(*tensors(), num_samples=10, generator=generator())
    p = inclusion_probabilities(torch.arange(1.0, 31).double(), 10)
    torch.testing.assert_close(
        sample.log_weight.double(), -p[sample.index].log(), rtol=0, atol=1e-6
    )
    assert all(len(x.unique()) == 10 for x in sample.index.flatten(0, 1))


def test_a_subclass_with_another_density_draws_prefixes_by_it() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(samplers.Leverage):
        def density(  # type: ignore[no-untyped-def]
            self, query, key, value
        ):
            return torch.zeros(key.shape[:3])

    query, key, value = tensors()
    options: dict[str, Any] = {"num_samples": 5, "prefixes": torch.tensor([22, 30])}
    sample = Other().sample_prefixes(query, key, value, **options, generator=generator())
    uniformly = Uniform().sample_prefixes(query, key, value, **options, generator=generator())
    torch.testing.assert_close(sample.log_weight, uniformly.log_weight)


def test_prefixes_are_drawn_by_the_density_that_a_sampler_has_for_them() -> None:
    @dataclass(frozen=True, kw_only=True)
    class First(ByPosition):
        def prefix_density(  # type: ignore[no-untyped-def]
            self, query, key, value
        ):
            return (torch.arange(key.shape[2]) == 0).float().expand(key.shape[:3])

    query, key, value = tensors(8, 30)
    sample = First().sample_prefixes(
        query, key, value, num_samples=5, prefixes=torch.tensor([30]), generator=generator()
    )
    weight = sample.log_weight.masked_fill(sample.index != 0, -torch.inf).exp().sum(-1)
    torch.testing.assert_close(weight, torch.ones_like(weight))  # certain


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_all_forms_compile_to_one_graph() -> None:
    inputs, prefixes = tensors(24, 24), torch.tensor([12, 24])
    chosen = [sampler_of(name) for name in NAMES]

    def draw(*x: torch.Tensor) -> list[torch.Tensor]:
        options: dict[str, Any] = {"num_samples": 6, "generator": Stream(3)}
        found = []
        for sampler in chosen:
            found += [
                sampler.sample(*x, **options),
                sampler.sample_prefixes(*x, prefixes=prefixes, **options),
            ]
        return [tensor for one in found for tensor in (one.index, one.log_weight)]

    torch._dynamo.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for mine, its in zip(compiled(*inputs), draw(*inputs), strict=True):
        torch.testing.assert_close(mine, its)
