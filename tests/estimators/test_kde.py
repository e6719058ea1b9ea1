"""Kde: the density of the sampler, its causal form, and the row sums made of its columns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hyperframe import HyperAttention
from hyperframe.detectors import create as create_detector
from hyperframe.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from hyperframe.estimators import create, to_spec
from hyperframe.estimators.kde import Kde
from hyperframe.estimators.uniform import Uniform
from hyperframe.samplers.kde import Kde as KdeSampler
from hyperframe.testing import dense_attention, masked_attention

FALSE_ALARM = 1e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    num_queries: int = 30, num_keys: int = 30, *, batch: int = 2, sharpness: float = 1.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = generator()
    query = torch.randn(batch, 4, num_queries, 3, generator=g, dtype=torch.float64)
    key = torch.randn(batch, 2, num_keys, 3, generator=g, dtype=torch.float64) * sharpness
    return query, key, torch.randn(batch, 2, num_keys, 5, generator=g, dtype=torch.float64)


def softmax_rows(
    query: torch.Tensor, key: torch.Tensor, scale: float, *, is_causal: bool = False
) -> torch.Tensor:
    """`D^-1 A`, `[batch, key_heads, group, n_q, n_k]`."""
    logits = scale * query.unflatten(1, (key.shape[1], -1)) @ key.unsqueeze(2).mT
    if is_causal:
        hidden = ~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(
            key.shape[2] - query.shape[2]
        )
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1).nan_to_num(0)


# ------------------------------------------------------------------- the sampler's density


def test_the_density_is_that_of_the_squared_column_norms() -> None:
    query, key, value = tensors(20, 30)
    shares = softmax_rows(query, key, 0.7).square().sum(dim=(2, 3))
    shares = shares / shares.sum(-1, keepdim=True)
    # as many rows as there are: nothing is left to chance
    density = KdeSampler(num_queries=20, floor=0.2).density(query, key, value, scale=0.7)
    torch.testing.assert_close(density, 0.8 * shares + 0.2 / 30)
    # fewer: those in the middle of equal runs
    few = softmax_rows(query[:, :, [2, 7, 12, 17]], key, 0.7).square().sum(dim=(2, 3))
    few = few / few.sum(-1, keepdim=True)
    density = KdeSampler(num_queries=4, floor=0.2).density(query, key, value, scale=0.7)
    torch.testing.assert_close(density, 0.8 * few + 0.2 / 30)


@pytest.mark.parametrize("num_queries, num_keys", [(40, 40), (24, 40), (40, 24)])
def test_prefixes_are_drawn_by_the_rows_before_the_tile(num_queries: int, num_keys: int) -> None:
    query, key, value = tensors(num_queries, num_keys)
    sampler, m, tile, offset = KdeSampler(num_queries=9), 4, 8, num_keys - num_queries
    ends = torch.arange(tile, num_queries + tile, tile).clamp(max=num_queries) + offset
    prefixes = ends.clamp(min=0)
    sample = sampler.sample_prefixes(
        query, key, value, num_samples=m, prefixes=prefixes, generator=generator(), scale=0.7
    )
    first = max(0, -offset)
    rows = [first + (2 * i + 1) * (num_queries - first) // 18 for i in range(9)]
    squares = softmax_rows(query, key, 0.7, is_causal=True).square().sum(dim=2)  # [B, H, n, n_k]
    seen = max(0, offset)
    by_rows = 0
    for t, length in enumerate(prefixes.tolist()):
        if length > m:
            earlier = [i for i in rows if i + 1 + offset <= seen]
            p = torch.full((2, 2, length), 1 / length, dtype=torch.float64)
            if earlier and seen:
                by_rows += 1
                share = squares[:, :, earlier, :seen].sum(dim=2)
                share = share / share.sum(-1, keepdim=True)
                p[..., :seen] = seen / length * (0.5 * share + 0.5 / seen)
            torch.testing.assert_close(p.sum(-1), torch.ones(2, 2).double())
            index = sample.index[:, :, t]
            expected = -torch.log(m * p.gather(-1, index))
            torch.testing.assert_close(sample.log_weight[:, :, t].double(), expected,
                                       rtol=0, atol=1e-5)  # fmt: skip
        seen = length
    assert by_rows >= 2


def test_prefixes_by_chunks_of_heads_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(40, 40)
    options: dict[str, Any] = {"num_samples": 4, "prefixes": torch.tensor([10, 20, 30, 40])}
    whole = KdeSampler().sample_prefixes(*inputs, **options, generator=generator())
    monkeypatch.setattr("hyperframe.samplers.kde._CHUNK_BYTES", 1)
    parts = KdeSampler().sample_prefixes(*inputs, **options, generator=generator())
    assert torch.equal(whole.index, parts.index)
    torch.testing.assert_close(whole.log_weight, parts.log_weight)


# ------------------------------------------------------------------- row sums


def copies(x: torch.Tensor, count: int) -> torch.Tensor:
    """Every batch item has draws of its own."""
    return x.expand(count, -1, -1, -1)


@pytest.mark.statistical
def test_row_sums_are_unbiased() -> None:
    """Bernstein: the mean of N draws from [0, b] with variance s^2, both known, is off by more than
    sqrt(2 s^2 L / N) + b L / (3 N) with probability at most 2 exp(-L); 4 heads x 20 rows, 1e-6.
    """
    count, m, n = 2000, 6, 24
    query, key, value = (copies(x, count) for x in tensors(20, n, batch=1, sharpness=1.0))
    mask = create_detector("oracle(budget=5)").find(query, key, scale=0.8)
    sums = (
        Kde()
        .row_sums(query, key, mask, scale=0.8, num_samples=m, generator=generator(1))
        .log_sum.exp()
    )
    a = (0.8 * query[0] @ key[0].repeat_interleave(2, dim=0).mT).exp()
    p = KdeSampler().density(query[:1], key[:1], value[:1], scale=0.8)
    assert p is not None
    p = p[0].repeat_interleave(2, dim=0).unsqueeze(1)
    rest = a.masked_fill(mask.to_dense()[0], 0)
    variance = (rest.square() / p).sum(-1) - rest.sum(-1).square()
    log_term = math.log(2 * 80 / FALSE_ALARM)
    radius = (2 * variance * log_term / (count * m)).sqrt()
    radius += (rest / p).amax(-1) * log_term / (3 * count * m)
    assert (radius < 0.1 * a.sum(-1)).all()  # the bound says something
    assert ((sums.mean(0) - a.sum(-1)).abs() <= radius).all()
    assert sums.std(0).min() > 1e-3


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_samples_it_is_the_mask_and_with_all_of_them_exact(is_causal: bool) -> None:
    query, key, value = tensors(20, 24)
    mask = create_detector("oracle(budget=4)").find(query, key, is_causal=is_causal)
    held = Kde().row_sums(query, key, mask, num_samples=0).log_sum
    torch.testing.assert_close(held, masked_attention(query, key, value, mask.to_dense()).lse)
    every = Kde().row_sums(query, key, mask, num_samples=24).log_sum
    torch.testing.assert_close(every, dense_attention(query, key, value, is_causal=is_causal).lse)


def test_on_sinks_its_square_error_is_a_tenth_of_that_of_uniform_columns() -> None:
    # four columns hold most of every row. measured on seeds 0..3: ratios 0.018 to 0.028
    query, key, value = tensors(128, 512, batch=1, sharpness=0.5)
    query[..., 0] = 3.0
    key[:, :, [17, 140, 300, 490], 0] = 4.0
    mask = create_detector("sliding_window(width=8)").find(query, key)
    exact = dense_attention(query, key, value).lse
    errors = [
        ((e.row_sums(query, key, mask, num_samples=64, generator=generator(3)).log_sum - exact)
         .exp() - 1).square().mean()
        for e in (Kde(), Uniform())
    ]  # fmt: skip
    assert errors[0] < 0.1 * errors[1]


# ------------------------------------------------------------------- in the attention

MODES = [(False, "single_pass"), (True, "single_pass"), (True, "recursive")]


@pytest.mark.parametrize("is_causal, causal", MODES)
def test_an_attention_samples_the_columns_of_its_row_sums(is_causal: bool, causal: str) -> None:
    inputs = tensors(50, 50)
    attention = HyperAttention(
        detector="sliding_window(width=4)", estimator="kde(num_queries=8)", causal=causal,
        num_samples=6, min_seq_len=9,
    )  # fmt: skip
    assert attention.sampler == KdeSampler(num_queries=8)
    # the plain weighted sum over its own columns: numerator and normaliser by the same draws
    plain = attention.replace(estimator="uniform", sampler="kde(num_queries=8)")
    for one, two in zip(
        attention(*inputs, is_causal=is_causal, return_lse=True),
        plain(*inputs, is_causal=is_causal, return_lse=True), strict=True,
    ):  # fmt: skip
        assert torch.equal(one, two)


def test_the_sampler_goes_with_the_estimator_unless_it_was_chosen() -> None:
    attention = HyperAttention(detector="sort_lsh")
    assert attention.replace(estimator="kde").sampler == KdeSampler()
    assert attention.replace(estimator="kde").replace(estimator="exact") == attention.replace(
        estimator="exact"
    )
    chosen = HyperAttention(detector="sort_lsh", sampler="uniform", estimator="kde")
    assert chosen.sampler.name == "uniform"


@pytest.mark.parametrize("is_causal", [False, True])
def test_beside_another_sampler_the_row_sums_replace_the_normaliser(is_causal: bool) -> None:
    query, key, value = tensors(40, 40)
    attention = HyperAttention(
        detector="sliding_window(width=4)", sampler="uniform", estimator="kde", num_samples=6,
        min_seq_len=0,
    )  # fmt: skip
    out, lse = attention(
        query, key, value, is_causal=is_causal, return_lse=True, generator=generator(2)
    )
    g = generator(2)
    mask = create_detector("sliding_window(width=4)").find(query, key, is_causal=is_causal)
    rows = Kde().row_sums(query, key, mask, num_samples=6, generator=g)
    torch.testing.assert_close(lse, rows.log_sum)
    plain, plain_lse = attention.replace(estimator="uniform")(
        query, key, value, is_causal=is_causal, return_lse=True, generator=g
    )
    torch.testing.assert_close(out * (lse - plain_lse).exp().unsqueeze(-1), plain)


@pytest.mark.parametrize("sampler", ["auto", "uniform"])
@pytest.mark.parametrize("is_causal, causal", MODES)
def test_backends_agree_forward_and_backward(is_causal: bool, causal: str, sampler: str) -> None:
    results = []
    inputs = [x.requires_grad_() for x in tensors(33, 47)]
    for backend in ("reference", "torch"):
        attention = HyperAttention(
            detector="sliding_window(width=4)", sampler=sampler, estimator="kde", causal=causal,
            num_samples=6, min_seq_len=9, backend=backend,
        )  # fmt: skip
        out, lse = attention(*inputs, is_causal=is_causal, return_lse=True)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), inputs)
        results.append([out, lse, *grads])
    for one, two in zip(*results, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("num_keys", [60, 75, 50])
def test_nothing_later_moves_a_bit_of_an_earlier_row(causal: str, num_keys: int) -> None:
    attention = HyperAttention(
        detector="sliding_window(width=4)", estimator="kde", causal=causal, num_samples=6,
        min_seq_len=9,
    )  # fmt: skip
    offset = num_keys - 60
    inputs = tensors(60, num_keys)
    before = attention(*inputs, is_causal=True)
    for cut in (20, 37, 58):
        query, key, value = (x.clone() for x in inputs)
        key[:, :, cut + offset :] *= -3
        value[:, :, cut + offset :] += 5
        after = attention(query, key, value, is_causal=True)
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
        assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


def test_strict_causality_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="kde looks at queries"):
        HyperAttention(detector="sliding_window", estimator="kde", strict_causal=True)


@pytest.mark.parametrize("component", [Kde, KdeSampler])
@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"num_queries": 0}, ArgumentError, "kde: num_queries=0"),
        ({"num_queries": 2.0}, ArgumentTypeError, "kde: num_queries=2.0"),
        ({"floor": 0.0}, ArgumentError, "kde: floor=0.0"),
        ({"floor": "half"}, ArgumentTypeError, "kde: floor='half'"),
    ],
)
def test_bad_parameters_are_refused_by_name(
    component: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        component(**options)


def test_it_is_registered_and_its_spec_makes_it_again() -> None:
    estimator = create("kde(num_queries=8, floor=0.25)")
    assert estimator == Kde(num_queries=8, floor=0.25)
    assert create(to_spec(estimator)) == estimator
    assert estimator.columns == KdeSampler(num_queries=8, floor=0.25)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_to_one_graph() -> None:
    attention = HyperAttention(
        detector="sliding_window(width=4)", estimator="kde(num_queries=8)", num_samples=6,
        min_seq_len=0, backend="torch",
    )  # fmt: skip
    inputs = [x.float() for x in tensors(40, 40, batch=1)]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: attention(*x, is_causal=True), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), attention(*inputs, is_causal=True))
