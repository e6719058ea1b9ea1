"""Stratified columns: one of each run, exactly as likely as it weighs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

import hyperframe.samplers.stratified as module
from hyperframe import HyperAttention
from hyperframe.errors import ArgumentError, SpecError
from hyperframe.rectangles import causal_levels, level_rectangles
from hyperframe.samplers import Stratified, Uniform, create
from hyperframe.samples import KeySample

FALSE_ALARM = 1e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zeros(num_keys: int, copies: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.zeros(1, 1, num_keys, 2).expand(copies, -1, -1, -1)
    return x, x, x


def run_bounds(length: int, m: int) -> list[tuple[int, int]]:
    edges = [length * s // m for s in range(m + 1)]
    return list(itertools.pairwise(edges))


def all_outcomes(monkeypatch: pytest.MonkeyPatch, draw: Any, lengths: list[int]) -> list[KeySample]:
    """What `draw()` returns for every outcome: draw `s` falls in each place of its run."""
    found = []
    for places in itertools.product(*(range(x) for x in lengths)):
        u = torch.tensor([(place + 0.5) / x for place, x in zip(places, lengths, strict=True)])
        monkeypatch.setattr(
            module, "uniform", lambda shape, device, g, u=u: u.double().expand(shape)
        )
        found.append(draw())
    return found


@pytest.mark.parametrize("num_keys, m", [(6, 3), (7, 3), (9, 2), (10, 4), (5, 5), (8, 1)])
def test_over_all_outcomes_every_weighted_sum_is_the_sum_over_all_keys(
    num_keys: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: each run's place is uniform, so the mean over all outcomes is the expectation."""
    lengths = [stop - start for start, stop in run_bounds(num_keys, m)]
    f = torch.randn(num_keys, dtype=torch.float64, generator=generator())
    forms = {
        "sample": lambda: Stratified().sample(*zeros(num_keys), num_samples=m),
        "prefix": lambda: Stratified().sample_prefixes(
            *zeros(num_keys + 4), num_samples=m, prefixes=torch.tensor([num_keys])
        ),
        "rectangle": lambda: Stratified().sample_rectangles(
            *zeros(num_keys + 9), num_samples=m,
            rectangles=((num_keys + 5, num_keys + 9, 5, num_keys + 5),),
        ),
    }  # fmt: skip
    for name, draw in forms.items():
        sums = []
        for sample in all_outcomes(monkeypatch, draw, lengths):
            index = sample.index.flatten() - (5 if name == "rectangle" else 0)
            assert [
                start <= j < stop
                for j, (start, stop) in zip(index.tolist(), run_bounds(num_keys, m), strict=True)
            ] == [True] * m
            sums.append((sample.log_weight.flatten().double().exp() * f[index]).sum())
        assert len(sums) == math.prod(lengths)
        torch.testing.assert_close(torch.stack(sums).mean(), f.sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_keys, m", [(1, 1), (5, 5), (5, 8), (1, 4), (3, 0)])
def test_no_more_keys_than_samples_are_taken_once(num_keys: int, m: int) -> None:
    sample = Stratified().sample(*zeros(num_keys), num_samples=m)
    rectangle = Stratified().sample_rectangles(
        *zeros(20), num_samples=m, rectangles=((12, 20, 3, 3 + num_keys),)
    )
    assert rectangle is not None
    tiles = Stratified().sample_prefixes(
        *zeros(num_keys + 2), num_samples=m, prefixes=torch.tensor([num_keys])
    )
    taken = min(num_keys, m)
    for index, log_weight in (
        (sample.index[0, 0], sample.log_weight[0, 0]),
        (rectangle.index[0, 0, 0] - 3, rectangle.log_weight[0, 0, 0]),
        (tiles.index[0, 0, 0], tiles.log_weight[0, 0, 0]),
    ):
        assert index[:taken].tolist() == list(range(taken))
        assert log_weight.tolist() == [0.0] * taken + [-math.inf] * (m - taken)
        assert ((index >= 0) & (index < num_keys + 2)).all()


@pytest.mark.statistical
@pytest.mark.parametrize("form", ["sample", "prefix", "rectangle"])
def test_keys_of_a_run_are_equally_likely_and_weigh_its_length(form: str) -> None:
    copies, m, num_keys = 20_000, 4, 22
    inputs = zeros(num_keys, copies)
    if form == "sample":
        sample, first, length = Stratified().sample(
            *inputs, num_samples=m, generator=generator(1)
        ), 0, num_keys  # fmt: skip
        index, log_weight = sample.index[:, 0], sample.log_weight[:, 0]
    elif form == "prefix":
        first, length = 0, 19
        sample = Stratified().sample_prefixes(
            *inputs, num_samples=m, prefixes=torch.tensor([7, 19, 22]), generator=generator(2)
        )
        index, log_weight = sample.index[:, 0, 1], sample.log_weight[:, 0, 1]
    else:
        first, length = 5, 9
        drawn = Stratified().sample_rectangles(
            *inputs, num_samples=m, rectangles=((4, 5, 0, 4), (14, 22, 5, 14)),
            generator=generator(3),
        )  # fmt: skip
        assert drawn is not None
        index, log_weight = drawn.index[:, 0, 1], drawn.log_weight[:, 0, 1]
    # counts are binomial, exactly; 3 forms of at most 22 keys, two-sided, together 1e-6
    tail = FALSE_ALARM / (3 * 22 * 2)
    for s, (start, stop) in enumerate(run_bounds(length, m)):
        torch.testing.assert_close(
            log_weight[:, s], torch.full((copies,), math.log(stop - start))
        )  # fmt: skip
        counts = index[:, s].bincount(minlength=first + length)
        assert counts[first + start : first + stop].sum() == copies
        for count in counts[first + start : first + stop].tolist():
            p = 1 / (stop - start)
            assert binom.ppf(tail, copies, p) <= count <= binom.isf(tail, copies, p)


@given(
    num_keys=st.integers(1, 60), m=st.integers(1, 20), leaf=st.integers(1, 16),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_every_rectangle_gets_what_a_call_on_its_keys_alone_gets(
    num_keys: int, m: int, leaf: int, seed: int
) -> None:
    rectangles = tuple(
        places
        for level in causal_levels(num_keys, leaf)
        for places in level_rectangles(level, num_keys)
    )
    if not rectangles:
        return
    inputs = zeros(num_keys, 2)
    sample = Stratified().sample_rectangles(
        *inputs, num_samples=m, rectangles=rectangles, generator=generator(seed)
    )
    assert sample is not None
    assert sample.index.shape == sample.log_weight.shape == (2, 1, len(rectangles), m)
    draws = torch.rand(2, 1, len(rectangles), m, generator=generator(seed), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        for number, (_, _, start, stop) in enumerate(rectangles):
            own = draws[:, :, number : number + 1]
            patch.setattr(module, "uniform", lambda *args, own=own: own)
            alone = Stratified().sample(*zeros(stop - start, 2), num_samples=m)
            assert torch.equal(alone.index + start, sample.index[:, :, number])
            assert torch.equal(alone.log_weight, sample.log_weight[:, :, number])


def test_runs_of_equal_length_share_one_weight_in_memory() -> None:
    sample = Stratified().sample(*zeros(64), num_samples=16)
    assert sample.log_weight.stride(-1) == 0
    drawn = Stratified().sample_rectangles(
        *zeros(64), num_samples=4, rectangles=((8, 16, 0, 8), (32, 64, 0, 32))
    )
    assert drawn is not None
    assert drawn.log_weight.untyped_storage().nbytes() == 4 * 2
    assert Stratified().sample(*zeros(66), num_samples=16).log_weight.stride(-1) == 1


# ------------------------------------------------------------------------------- variance


def exact_variances(f: torch.Tensor, m: int) -> tuple[float, float]:
    """Variances of the weighted sums of a stratified and of a uniform sample."""
    n = len(f)
    runs = [f[start:stop] for start, stop in run_bounds(n, m)]
    stratified = sum(len(run) ** 2 * run.var(correction=0).item() for run in runs)
    return stratified, n**2 / m * f.var(correction=0).item()


@pytest.mark.statistical
@pytest.mark.parametrize("num_keys, m", [(96, 16), (100, 16)])
def test_the_variance_on_a_smooth_function_is_the_computed_one_and_below_uniforms(
    num_keys: int, m: int
) -> None:
    copies = 20_000
    f = torch.linspace(0, 1, num_keys, dtype=torch.float64).square()
    found = []
    for sampler in (Stratified(), Uniform()):
        sample = sampler.sample(
            *zeros(num_keys, copies), num_samples=m, generator=generator(4)
        )  # fmt: skip
        sums = (sample.log_weight.double().exp() * f[sample.index]).sum(-1).flatten()
        found.append(sums)
    variances = exact_variances(f, m)
    assert variances[0] < 0.02 * variances[1]
    # Hoeffding: the squared deviation from the known mean lies in [0, b^2]; a mean of N is off by
    # more than b^2 sqrt(L / (2 N)) with probability at most 2 exp(-L). 2 cases, 2 samplers, 1e-6
    log_term = math.log(2 * 2 * 2 / FALSE_ALARM)
    total = f.sum()
    # how far a sum can lie from its mean: by run, or for all draws together
    most = sum(
        (stop - start) * (f[stop - 1] - f[start]).item()
        for start, stop in run_bounds(num_keys, m)
    )  # fmt: skip
    for sums, variance, bound in zip(
        found, variances, (most, max(num_keys - total.item(), total.item())), strict=True
    ):
        radius = bound**2 * math.sqrt(log_term / (2 * copies))
        assert (sums - total).abs().max() <= bound * (1 + 1e-6)
        assert abs((sums - total).square().mean().item() - variance) <= radius


@given(n=st.integers(1, 80), m=st.integers(1, 40), seed=st.integers(0, 1000))
def test_no_function_has_a_larger_variance_than_the_docstring_says(
    n: int, m: int, seed: int
) -> None:
    if n <= m:
        return
    f = torch.randn(n, generator=generator(seed), dtype=torch.float64).exp()
    stratified, uniformly = exact_variances(f, m)
    factor = math.ceil(n / m) / (n / m)  # 1 where m divides n
    assert stratified <= factor * uniformly * (1 + 1e-9)


# ------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_no_later_key_or_value_moves_a_bit_of_an_earlier_row(causal: str) -> None:
    g = generator()
    query = torch.randn(2, 4, 90, 6, generator=g)
    key, value = torch.randn(2, 2, 2, 90, 6, generator=g)
    for detector in ("sliding_window(width=4)", "sort_lsh(block_size=8)"):
        attention = HyperAttention(
            detector=detector, sampler="stratified", num_samples=6, causal=causal,
            min_seq_len=0 if causal == "single_pass" else 9,
        )  # fmt: skip
        before = attention(query, key, value, is_causal=True, return_lse=True)
        for cut in (20, 37, 70):
            other_key, other_value = key.clone(), value.clone()
            other_key[:, :, cut:] *= -3
            other_value[:, :, cut:] += 5
            after = attention(query, other_key, other_value, is_causal=True, return_lse=True)
            for mine, its in zip(before, after, strict=True):
                assert torch.equal(mine[:, :, :cut], its[:, :, :cut])
            assert not torch.equal(before[0][:, :, cut:], after[0][:, :, cut:])


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(causal: str) -> None:
    g = generator()
    inputs = torch.randn(3, 2, 2, 100, 6, generator=g).unbind()
    attention = HyperAttention(
        detector="sort_lsh(block_size=8)", sampler="stratified", num_samples=6, causal=causal,
        min_seq_len=10,
    )  # fmt: skip
    for is_causal in (False, True):
        first = attention(*inputs, is_causal=is_causal)
        assert torch.equal(first, attention(*inputs, is_causal=is_causal))
        assert not torch.equal(first, attention.replace(seed=1)(*inputs, is_causal=is_causal))


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_those_of_the_weighted_sums_with_constant_weights(is_causal: bool) -> None:
    inputs = torch.randn(3, 1, 2, 24, 6, generator=generator(), dtype=torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    attention = HyperAttention(
        detector="sliding_window(width=4)", sampler="stratified", num_samples=6, min_seq_len=0,
        backend="torch",
    )  # fmt: skip
    grads = []
    for backend in ("torch", "reference"):
        out = attention.replace(backend=backend)(*inputs, is_causal=is_causal)
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for mine, its in zip(*grads, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, its)


def test_it_is_registered_and_has_one_parameter() -> None:
    assert create("stratified") == Stratified(strata="positions")
    with pytest.raises(SpecError, match=r"stratified: .*num_runs"):
        create("stratified(num_runs=4)")
    with pytest.raises(ArgumentError, match=r"strata='detectors' is not a choice .*'detector'"):
        create("stratified(strata='detectors')")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mode", ["full", "single_pass", "recursive"])
def test_it_compiles_to_one_graph(mode: str) -> None:
    attention = HyperAttention(
        detector="sort_lsh(block_size=8)", sampler="stratified", num_samples=6,
        min_seq_len=0 if mode != "recursive" else 20, backend="torch",
        causal="recursive" if mode == "recursive" else "single_pass",
    )  # fmt: skip
    inputs = torch.randn(3, 1, 2, 90, 6, generator=generator()).unbind()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: attention(*x, is_causal=mode != "full"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), attention(*inputs, is_causal=mode != "full"))
