"""Randomness: explicit, seeded, spread over all seeds, the same on every machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe import HyperAttention, detectors, estimators, hyper_attention, samplers
from hyperframe.detectors import AbstractDetector
from hyperframe.detectors.heavy_columns import HeavyColumns
from hyperframe.detectors.union import Union
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.estimators import AbstractEstimator
from hyperframe.kernels.ops.random import random_uniform
from hyperframe.masks import ListMask
from hyperframe.randomness import (
    Stream,
    check_generator,
    draws_in_prefixes,
    fold_in,
    make_generator,
    normal,
    uniform,
)
from hyperframe.rowsums import RowSums
from hyperframe.samplers import AbstractSampler

CPU = torch.device("cpu")
integers = st.integers(-(2**70), 2**70)


@given(seed=integers, data=st.lists(integers, max_size=3))
def test_a_folded_seed_is_a_63_bit_number_that_depends_on_its_arguments_alone(
    seed: int, data: list[int]
) -> None:
    folded = fold_in(seed, *data)
    assert 0 <= folded < 2**63
    assert fold_in(seed, *data) == folded
    torch.Generator().manual_seed(folded)


def test_seeds_and_data_that_differ_give_seeds_that_differ() -> None:
    data = [(), *((a,) for a in range(50)), *((a, b) for a in range(9) for b in range(9))]
    seen = {fold_in(seed, *numbers) for seed in range(50) for numbers in data}
    # a birthday collision of 6,600 63-bit numbers has a chance of 2e-12
    assert len(seen) == 50 * (1 + 50 + 81)


def test_the_order_of_data_matters() -> None:
    assert fold_in(1, 2, 3) != fold_in(1, 3, 2) != fold_in(2, 1, 3)
    assert fold_in(0, 1) != fold_in(1, 0)


def test_neighbouring_seeds_differ_in_about_half_of_their_bits() -> None:
    flips = [(fold_in(s) ^ fold_in(s + 1)).bit_count() for s in range(2000)]
    # the mean of 2,000 sums of 63 fair bits: 31.5, within 5 standard errors (chance 6e-7)
    assert abs(sum(flips) / 2000 - 31.5) <= 5 * math.sqrt(63 / 4 / 2000)


def test_folded_seeds_are_what_they_always_were() -> None:
    # a change here changes the draws behind every seed that users have written down
    found = [fold_in(0), fold_in(1), fold_in(0, 1), fold_in(-1)]
    assert found == [
        2426572823872625407,
        5732950727793085071,
        6156086449524660550,
        2844572632055810722,
    ]


def test_a_generator_is_new_on_every_call_and_seeded() -> None:
    one, two, other = make_generator(3, "cpu"), make_generator(3, CPU), make_generator(4, "cpu")
    assert one is not two
    draws = [torch.rand(5, generator=g) for g in (one, two, other)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_without_a_seed_the_global_generator_gives_one() -> None:
    torch.manual_seed(1)
    first, second = make_generator(None, "cpu"), make_generator(None, "cpu")
    assert first.initial_seed() != second.initial_seed()
    torch.manual_seed(1)
    assert make_generator(None, "cpu").initial_seed() == first.initial_seed()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert make_generator(None, "cpu").initial_seed() == first.initial_seed()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniform_draws_lie_in_0_to_1_and_follow_the_generator(dtype: torch.dtype) -> None:
    draws = uniform((3, 1000), CPU, make_generator(0, "cpu"), dtype)
    assert draws.dtype == dtype
    assert draws.shape == (3, 1000)
    assert ((draws >= 0) & (draws < 1)).all()
    assert torch.equal(draws, uniform((3, 1000), CPU, make_generator(0, "cpu"), dtype))
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.statistical
def test_draws_have_the_moments_of_their_distributions() -> None:
    size = 40_000
    # means and variances, within 5 standard errors each: four checks, false alarms 2.3e-6
    u = uniform((size,), CPU, make_generator(2, "cpu"))
    z = normal((size,), CPU, make_generator(2, "cpu")).double()
    assert abs(u.mean() - 1 / 2) <= 5 * math.sqrt(1 / 12 / size)
    assert abs(u.var() - 1 / 12) <= 5 * math.sqrt(1 / 180 / size)
    assert abs(z.mean()) <= 5 * math.sqrt(1 / size)
    assert abs(z.var() - 1) <= 5 * math.sqrt(2 / size)


def test_draws_are_made_where_the_generator_lives_and_moved() -> None:
    # a CPU generator gives the same numbers for tensors anywhere; "meta" stands for anywhere
    assert uniform((4,), torch.device("meta"), make_generator(0, "cpu")).device.type == "meta"
    assert normal((4,), torch.device("meta"), make_generator(0, "cpu")).device.type == "meta"


def test_without_a_generator_the_global_one_draws() -> None:
    torch.manual_seed(0)
    first = [uniform((4,), CPU, None), normal((4,), CPU, None)]
    torch.manual_seed(0)
    assert torch.equal(uniform((4,), CPU, None), first[0])
    assert torch.equal(normal((4,), CPU, None), first[1])


# ------------------------------------------------------------------------------- streams

MODULUS = 1 << 64
seeds = st.integers(-(2**63), 2**63 - 1)


def splitmix(x: int) -> int:
    """The finaliser of splitmix64, in Python's integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % MODULUS
    return x ^ (x >> 31)


def by_hand(seed: int, stream: int, count: int) -> list[float]:
    golden = 0x9E3779B97F4A7C15
    key = splitmix((splitmix((seed + golden) % MODULUS) + stream * 0xD1342543DE82EF95) % MODULUS)
    return [(splitmix((key + i * golden) % MODULUS) >> 11) / 2**53 for i in range(count)]


@given(seed=seeds, stream=seeds)
def test_uniform_numbers_are_those_of_the_formula(seed: int, stream: int) -> None:
    found = random_uniform(torch.tensor(seed), stream, (2, 3))
    assert found.flatten().tolist() == by_hand(seed, stream, 6)


def test_streams_draw_what_they_always_did() -> None:
    # a change here changes the draws behind every seed that users have written down
    stream = Stream(0)
    assert stream.uniform((2,), CPU).tolist() == [0.20310281705476096, 0.33805245419550545]
    assert stream.normal((2,), CPU).tolist() == [-0.6511073708534241, -0.0881529450416565]


@given(seed=seeds, size=st.integers(0, 50))
def test_a_stream_follows_from_seed_and_count_alone(seed: int, size: int) -> None:
    one, two = Stream(seed), Stream(torch.tensor([seed]))
    for _ in range(2):
        assert torch.equal(one.uniform((size,), CPU), two.uniform((size,), CPU))
        assert torch.equal(one.normal((size, 2), CPU), two.normal((size, 2), CPU))
    assert one.num_draws == two.num_draws == 4
    later = Stream(seed)
    later.num_draws = 4
    assert torch.equal(one.uniform((size,), CPU), later.uniform((size,), CPU))


def test_a_seed_tensor_is_read_when_the_draw_is_made() -> None:
    seed = torch.tensor(1)
    stream = Stream(seed)
    seed.fill_(2)
    assert torch.equal(stream.uniform((4,), CPU), Stream(2).uniform((4,), CPU))


@given(seed=integers)
def test_any_int_is_a_seed(seed: int) -> None:
    drawn = Stream(seed).uniform((3,), CPU)
    if -(2**63) <= seed < 2**63:
        assert torch.equal(drawn, Stream(torch.tensor(seed)).uniform((3,), CPU))
    assert not torch.equal(drawn, Stream(seed + 1).uniform((3,), CPU))


def test_a_longer_draw_begins_with_the_shorter_one() -> None:
    assert torch.equal(Stream(1).normal((40,), CPU)[:7], Stream(1).normal((7,), CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_uniform_numbers_never_round_up_to_one(dtype: torch.dtype) -> None:
    drawn = Stream(0).uniform((200_000,), CPU, dtype)
    assert drawn.dtype == dtype
    assert drawn.min() >= 0
    # the largest number below 1 of a 7-bit mantissa comes up in 200,000 draws but for 1e-340
    assert drawn.max() < 1
    wide = Stream(0).uniform((200_000,), CPU)
    step = torch.finfo(dtype).eps / 2
    assert ((wide - drawn.double() >= 0) & (wide - drawn.double() < step)).all()


def test_repr_shows_what_comes_next() -> None:
    stream = Stream(3)
    stream.uniform((1,), CPU)
    assert repr(stream) == "Stream(seed=3, num_draws=1)"
    assert repr(Stream(torch.tensor(3))) == "Stream(seed=tensor, num_draws=0)"


def test_without_a_seed_a_stream_takes_one_from_the_global_generator() -> None:
    torch.manual_seed(1)
    first, second = Stream.of(None, CPU), Stream.of(None, CPU)
    assert first.seed != second.seed
    torch.manual_seed(1)
    assert Stream.of(None, CPU).seed == first.seed
    assert Stream.of(7, CPU).seed == 7


def test_generators_of_a_stream_are_seeded_by_its_draws() -> None:
    ints, tensors = Stream(3), Stream(torch.tensor(3))
    found = [ints.generator(CPU).initial_seed() for _ in range(3)]
    assert len(set(found)) == 3
    assert [tensors.generator(CPU).initial_seed() for _ in range(3)] == found
    assert Stream(4).generator(CPU).initial_seed() != found[0]


@pytest.mark.parametrize("op", ["random_uniform", "random_normal"])
@pytest.mark.parametrize("seed", [torch.tensor(3), torch.tensor([-4])])
def test_operators_are_registered_as_torch_wants(op: str, seed: torch.Tensor) -> None:
    operator = getattr(torch.ops.hyperframe, op).default
    for shape in ((4, 5), (), (0, 3)):
        torch.library.opcheck(operator, (seed, 1, shape))


def test_draws_from_ranges_are_registered_as_torch_wants() -> None:
    start, length = torch.tensor([[3], [0]]), torch.tensor([[4.0], [900.0]], dtype=torch.float64)
    given = (torch.tensor(-7), 2, start, length, (2, 1, 2, 5))
    torch.library.opcheck(torch.ops.hyperframe.range_draws.default, given)


def chi_square(counts: torch.Tensor) -> float:
    """Pearson's statistic of equally likely cells."""
    expected = counts.sum() / counts.numel()
    return float(((counts - expected).square() / expected).sum())


def highest(freedom: int) -> float:
    """A bound that a chi-square variable exceeds with a chance of 1e-6."""
    return float(scipy.stats.chi2.isf(1e-6, freedom))


# false alarms: each seed of the list has 4 checks of at most 1e-6, and the draws are fixed
@pytest.mark.statistical
@pytest.mark.parametrize("seed", [0, 1, -1, 2**40])
def test_uniform_numbers_fill_the_interval_evenly(seed: int) -> None:
    drawn = Stream(seed).uniform((1 << 18,), CPU)
    high = torch.bincount((drawn * 256).long(), minlength=256).double()
    assert chi_square(high) < highest(255)
    # bits 12 to 19, and the lowest 8 of 53
    middle = (drawn * 2**19).long() % 256
    assert chi_square(torch.bincount(middle, minlength=256).double()) < highest(255)
    lowest = (drawn * 2**53).long() % 256
    assert chi_square(torch.bincount(lowest, minlength=256).double()) < highest(255)
    # pairs that follow one another
    pairs = (drawn[0::2] * 16).long() * 16 + (drawn[1::2] * 16).long()
    assert chi_square(torch.bincount(pairs, minlength=256).double()) < highest(255)


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


@pytest.mark.statistical
def test_neighbouring_seeds_draws_and_numbers_are_uncorrelated() -> None:
    size = 1 << 16
    base = Stream(0)
    first, second = base.uniform((size,), CPU), base.uniform((size,), CPU)
    others = {f"seed {seed}": Stream(seed).uniform((size,), CPU) for seed in (1, 2, -1, 1 << 32)}
    others |= {"next draw": second}
    for lag in (1, 2, 3, 64, 1024):
        others[f"lag {lag}"] = first.roll(lag)
    # the next seed's first draw and this seed's second one
    assert abs(correlation(second, others["seed 1"])) < 6 / math.sqrt(size)
    for name, other in others.items():
        # eleven checks of 6 standard errors: false alarms 2.2e-8
        assert abs(correlation(first, other)) < 6 / math.sqrt(size), name


@pytest.mark.statistical
def test_no_number_comes_twice() -> None:
    drawn = []
    for seed in range(-8, 8):
        stream = Stream(seed)
        drawn += [stream.uniform((1 << 12,), CPU) for _ in range(16)]
    bits = (torch.cat(drawn) * 2**53).long()
    # 2^20 numbers of 53 bits: 6e-5 pairs are expected to be equal
    assert bits.unique().numel() == bits.numel()


@pytest.mark.statistical
def test_normal_numbers_have_the_normal_distribution() -> None:
    size = 1 << 17
    stream = Stream(0)
    drawn = stream.normal((size,), CPU)
    assert drawn.dtype == torch.float32
    found = scipy.stats.kstest(drawn.double().numpy(), "norm")
    assert found.pvalue > 1e-6
    # numbers share no uniform number with their neighbours: lags and squares are uncorrelated
    x = drawn.double()
    for lag in (1, 2):
        assert abs(correlation(x, x.roll(lag))) < 6 / math.sqrt(size)
        assert abs(correlation(x.square(), x.square().roll(lag))) < 6 / math.sqrt(size)
    assert abs(correlation(x, stream.normal((size,), CPU).double())) < 6 / math.sqrt(size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functions_draw_from_a_stream_too(dtype: torch.dtype) -> None:
    assert torch.equal(uniform((5,), CPU, Stream(1), dtype), Stream(1).uniform((5,), CPU, dtype))
    assert torch.equal(normal((5,), CPU, Stream(1)), Stream(1).normal((5,), CPU))
    assert uniform((4,), torch.device("meta"), Stream(torch.tensor(0))).device.type == "meta"


def test_sources_of_draws_are_told_from_other_things() -> None:
    for source in (None, torch.Generator(), Stream(0)):
        check_generator(source)
        check_generator(source, seed_on=CPU)
    for seed in (torch.tensor(3), torch.tensor([3]), torch.tensor([[3]])):
        check_generator(seed, seed_on=CPU)
    with pytest.raises(ArgumentTypeError, match=r"generator=3: has type int.*Stream\(seed\)"):
        check_generator(3)
    with pytest.raises(ArgumentTypeError, match=r"torch.int64.*Stream\(seed\)"):
        check_generator(torch.tensor(3))
    for wrong in (torch.tensor(3, dtype=torch.int32), torch.tensor(0.5), torch.tensor([1, 2])):
        with pytest.raises(ArgumentTypeError, match="int64 tensor with one element"):
            check_generator(wrong, seed_on=CPU)
    with pytest.raises(ArgumentError, match="seed is on cpu, but query is on meta"):
        check_generator(torch.tensor(3), seed_on=torch.device("meta"))


# ------------------------------------------------------------------------------- components


def inputs(num_queries: int = 50) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 4, num_queries, 8), (2, 2, 50, 8), (2, 2, 50, 8)]
    return [torch.randn(shape, generator=g) for shape in shapes]


OPTIONS: dict[str, Any] = {"num_samples": 6, "min_seq_len": 0, "backend": "torch"}


def test_a_seed_tensor_in_a_call_is_the_seed() -> None:
    attention = HyperAttention(detector="sort_lsh(block_size=8)", **OPTIONS)
    for seed in (0, -3, 2**62):
        expected = attention.replace(seed=seed)(*inputs())
        found = attention(*inputs(), generator=torch.tensor(seed))
        assert torch.equal(found, expected)
        in_a_list = torch.tensor([seed])
        by_function = hyper_attention(
            *inputs(), detector=attention.detector, generator=in_a_list, **OPTIONS
        )
        assert torch.equal(by_function, expected)
        assert not torch.equal(found, attention.replace(seed=seed + 1)(*inputs()))


def test_a_stream_in_a_call_moves_on() -> None:
    attention = HyperAttention(detector="sort_lsh(block_size=8)", **OPTIONS)
    stream = Stream(0)
    first, second = (attention(*inputs(), generator=stream) for _ in range(2))
    assert torch.equal(first, attention(*inputs()))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "source, error, words",
    [
        (3, ArgumentTypeError, ["generator=3", "int", "Stream(seed)"]),
        (torch.tensor(0.5), ArgumentTypeError, ["float32", "int64 tensor with one element"]),
        (torch.tensor([1, 2]), ArgumentTypeError, ["(2,)", "one element"]),
        (torch.tensor(1, device="meta"), ArgumentError, ["seed is on meta", "query is on cpu"]),
    ],
)
def test_a_call_refuses_what_is_no_source_of_draws(
    source: Any, error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as raised:
        HyperAttention(**OPTIONS)(*inputs(), generator=source)
    assert all(word in str(raised.value) for word in words)


@dataclass(frozen=True, kw_only=True)
class _RandomColumns(AbstractDetector):
    """A detector that knows torch's generators only."""

    def find(self, query, key, *, scale=None, is_causal=False, generator=None):  # type: ignore[no-untyped-def]
        assert isinstance(generator, torch.Generator)
        drawn = torch.rand(*key.shape[:3], generator=generator)
        return ListMask.columns(
            drawn.argsort(dim=-1)[..., :5], num_query_heads=query.shape[1],
            num_queries=query.shape[2], num_keys=key.shape[2], is_causal=is_causal,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _RandomSampler(AbstractSampler):
    def density(self, query, key, value):  # type: ignore[no-untyped-def]
        return None

    def sample(self, query, key, value, *, num_samples, generator=None):  # type: ignore[no-untyped-def]
        assert isinstance(generator, torch.Generator)
        return super().sample(query, key, value, num_samples=num_samples, generator=generator)


@dataclass(frozen=True, kw_only=True)
class _RandomEstimator(AbstractEstimator):
    def row_sums(self, query, key, mask, *, scale=None, num_samples=256, generator=None):  # type: ignore[no-untyped-def]
        assert isinstance(generator, torch.Generator)
        noise = torch.rand(query.shape[:3], generator=generator)
        return RowSums(log_sum=noise)


@pytest.mark.parametrize(
    "components",
    [
        {"detector": _RandomColumns()},
        {
            "detector": Union(
                detectors=("heavy_columns(num_columns=3, tile_size=8)", _RandomColumns())
            )
        },
        {"detector": "heavy_columns(num_columns=3, tile_size=8)", "sampler": _RandomSampler()},
        {"detector": "heavy_columns(num_columns=3, tile_size=8)", "estimator": _RandomEstimator()},
    ],
    ids=["detector", "in a union", "sampler", "estimator"],
)
@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_components_that_know_no_streams_get_generators(
    components: dict[str, Any], causal: str
) -> None:
    attention = HyperAttention(**components, causal=causal, **{**OPTIONS, "min_seq_len": 10})
    for is_causal in (False, True):
        first = attention(*inputs(), is_causal=is_causal)
        assert torch.equal(attention(*inputs(), is_causal=is_causal), first)
        assert not torch.equal(attention.replace(seed=1)(*inputs(), is_causal=is_causal), first)
        by_tensor = attention(*inputs(), is_causal=is_causal, generator=torch.tensor(0))
        assert torch.equal(by_tensor, first)


def test_a_detector_that_finds_in_its_own_way_inherits_no_promise() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Renamed(HeavyColumns):
        pass

    @dataclass(frozen=True, kw_only=True)
    class Changed(HeavyColumns):
        def find(self, query, key, **options):  # type: ignore[no-untyped-def]
            assert isinstance(options["generator"], torch.Generator)
            return super().find(query, key, **options)

    assert HeavyColumns.takes_stream
    assert Renamed.takes_stream
    assert not Changed.takes_stream
    query, key, _ = inputs()
    Changed(num_columns=3).find(query, key, generator=Stream(0))


def test_all_built_in_components_take_streams() -> None:
    for registry in (detectors, samplers, estimators):
        for name in registry.names():
            assert registry.create(name).takes_stream, name


def test_draws_in_prefixes_are_those_of_the_same_source() -> None:
    prefixes, shape = torch.tensor([3, 4, 5, 900]), (2, 3, 4, 4)
    by_stream, weight = draws_in_prefixes(prefixes, shape, 999, Stream(7))
    drawn = Stream(7).uniform(shape, prefixes.device)
    taken = (drawn * prefixes.unsqueeze(-1)).long()
    assert torch.equal(by_stream[:, :, 2:], taken[:, :, 2:])
    assert by_stream[0, 0, 0].tolist() == [0, 1, 2, 3]  # of a short one every key, once
    assert weight.exp()[:2].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    by_generator, _ = draws_in_prefixes(prefixes, shape, 999, torch.Generator().manual_seed(1))
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(by_generator[:, :, 3], (drawn * 900).long()[:, :, 3])
