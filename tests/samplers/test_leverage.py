"""Leverage scores: against dense float64, online ones key by key, ranges, causality."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hyperframe.samplers.leverage as module
from hyperframe import HyperAttention, samplers
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.samplers.leverage import Leverage, leverage_scores, online_leverage_scores

KINDS = ["plain", "zero_rows", "duplicates", "few_directions", "large", "sinks"]


def rows(
    kind: str, length: int, width: int, seed: int = 0, batch: int = 2, heads: int = 2
) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, length, width, generator=g, dtype=torch.float64)
    if kind == "zero_rows":
        x[:, :, : max(1, length // 3)] = 0
    elif kind == "duplicates":
        x = x[:, :, :1].expand_as(x).clone()
    elif kind == "few_directions":
        x = x[..., :1] * x[:, :, :1]
    elif kind == "large":
        x = 1e4 * x
    elif kind == "sinks":
        x[:, :, 0] *= 30
    return x


def lam(x: torch.Tensor, ridge: float) -> torch.Tensor:
    """`ridge ||X||_F^2 / (n d)`: `[B, H]`."""
    found = ridge * x.square().sum((-1, -2)) / (x.shape[-1] * x.shape[-2])
    return torch.where(found > 0, found, 1.0)


def dense_scores(x: torch.Tensor, lambdas: list[torch.Tensor], widths: list[int]) -> torch.Tensor:
    """The definition: `x_j^T (X^T X + Lambda)^-1 x_j`."""
    diagonal = torch.cat(
        [one.unsqueeze(-1).expand(-1, -1, w) for one, w in zip(lambdas, widths, strict=True)], -1
    )
    inverse = torch.linalg.inv(x.mT @ x + torch.diag_embed(diagonal))
    return torch.einsum("bhnd,bhde,bhne->bhn", x, inverse, x)


@given(
    kind=st.sampled_from(KINDS), length=st.integers(1, 40), width=st.integers(1, 7),
    second=st.integers(0, 4), ridge=st.sampled_from([1e-3, 1.0, 20.0]), seed=st.integers(0, 99),
    chunk=st.sampled_from([1, 700, 1 << 20]),
)  # fmt: skip
def test_scores_are_those_of_the_definition(
    kind: str, length: int, width: int, second: int, ridge: float, seed: int, chunk: int
) -> None:
    parts = [rows(kind, length, width, seed)]
    if second:
        parts.append(100 * rows("plain", length, second, seed + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk)
        found = leverage_scores(*parts, ridge=ridge)
    expected = dense_scores(
        torch.cat(parts, -1), [lam(x, ridge) for x in parts], [x.shape[-1] for x in parts]
    )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert ((found >= 0) & (found < 1)).all()
    # the effective dimension, at most the rank
    assert (found.sum(-1) <= min(length, width + second) + 1e-9).all()


@given(
    kind=st.sampled_from(KINDS), length=st.integers(1, 30), width=st.integers(1, 5),
    block=st.sampled_from([1, 3, 8, 64]), ridge=st.sampled_from([1e-2, 1.0]),
    seed=st.integers(0, 99), chunk=st.sampled_from([1, 1 << 20]),
)  # fmt: skip
def test_online_scores_are_those_of_the_rows_up_to_each(
    kind: str, length: int, width: int, block: int, ridge: float, seed: int, chunk: int
) -> None:
    x = rows(kind, length, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk)
        patch.setattr(module, "BLOCK", block)
        found = online_leverage_scores(x, ridge=ridge)
    for j in range(length):
        before = j // block * block
        ridge_j = lam(x[:, :, : max(1, before)], ridge)
        expected = dense_scores(x[:, :, : j + 1], [ridge_j], [width])[..., -1]
        torch.testing.assert_close(found[..., j], expected, rtol=1e-6, atol=1e-7)
        # leverage only falls when rows are added
        assert (found[..., j] + 1e-7 >= dense_scores(x, [ridge_j], [width])[..., j]).all()


def test_a_first_row_of_zeros_and_giants_behind_it_have_scores() -> None:
    x = rows("plain", 300, 4)
    x[:, :, 0] = 0
    x[:, :, 1:] *= 1e9
    found = online_leverage_scores(x, ridge=1.0)
    assert found.isfinite().all()
    assert ((found >= 0) & (found <= 1)).all()
    assert (found[..., 0] == 0).all()
    assert (found[..., 1:5] > 0.99).all()  # new directions
    assert (found[..., 200:] < 0.5).all()


def test_online_scores_times_their_number_are_those_of_all_rows_where_rows_are_alike() -> None:
    x = rows("plain", 4000, 4, batch=1, heads=1)
    online = Leverage().prefix_density(x, x, x)
    assert online is not None
    ratio = (online / 4000 / leverage_scores(x, ridge=1.0))[0, 0, 500:]
    assert 0.8 < float(ratio.min()) <= float(ratio.max()) < 1.25
    # where plain online scores are far from them
    plain = online_leverage_scores(x, ridge=1.0) / leverage_scores(x, ridge=1.0)
    assert float(plain[0, 0, 500:600].min()) > 5


@pytest.mark.parametrize("of", ["key", "value", "key_value"])
def test_the_matrix_is_the_one_asked_for(of: str) -> None:
    key, value = rows("plain", 50, 4), rows("sinks", 50, 3, seed=5)
    parts = {"key": [key], "value": [value], "key_value": [key, value]}[of]
    sampler = Leverage(of=of, ridge=0.5)
    found = sampler.density(key, key, value)
    assert found is not None
    torch.testing.assert_close(found, leverage_scores(*parts, ridge=0.5))
    found = sampler.prefix_density(key, key, value)
    assert found is not None
    torch.testing.assert_close(
        found, online_leverage_scores(*parts, ridge=0.5) * torch.arange(1, 51)
    )


@given(seed=st.integers(0, 99), factor=st.sampled_from([1e-3, 7.0, 1e4]))
def test_scores_change_neither_with_scale_nor_with_a_rotation(seed: int, factor: float) -> None:
    x = rows("sinks", 40, 5, seed)
    turn = torch.linalg.qr(rows("plain", 5, 5, seed + 1)).Q
    for scores in (leverage_scores, online_leverage_scores):
        torch.testing.assert_close(
            scores(factor * x @ turn, ridge=1.0), scores(x, ridge=1.0), rtol=1e-7, atol=1e-9
        )


def test_no_later_key_moves_the_density_of_a_prefix() -> None:
    x = rows("plain", 300, 6)
    before = Leverage(of="key_value").prefix_density(x, x, 2 * x)
    assert before is not None
    for cut in (1, 40, 128, 200):
        other = x.clone()
        other[:, :, cut:] *= -5
        other[:, :, cut::7] += 3
        after = Leverage(of="key_value").prefix_density(other, other, other + x)
        assert after is not None
        assert torch.equal(before[..., :cut], after[..., :cut])
        assert not torch.equal(before[..., cut:], after[..., cut:])


@pytest.mark.statistical
def test_the_gram_matrix_of_the_sample_is_close_in_every_direction() -> None:
    """`||L^-1 (K^T S^T S K - K^T K) L^-T||_op <= eps` with L L^T = K^T K + lambda I.

    Matrix Bernstein: a term is at most R = d_eff / (m (1 - floor)) long (its score times its
    weight), and the variance at most R: an error above eps has a chance below
    2 d exp(-eps^2 / (2 R (1 + eps / 3))).
    """
    n, d, m = 2000, 4, 4000
    key = rows("plain", n, d, batch=1, heads=1)
    key[..., 3] *= 1e-3
    key[:, :, 17, 3] = 5.0  # one key holds a direction alone: 1 of 2,000
    sampler = Leverage()
    sample = sampler.sample(
        key, key, key, num_samples=m, generator=torch.Generator().manual_seed(1)
    )
    weighted = key[0, 0, sample.index[0, 0]] * sample.log_weight[0, 0].exp().sqrt().unsqueeze(-1)
    gram, sampled = key[0, 0].mT @ key[0, 0], weighted.mT @ weighted
    whiten = torch.linalg.inv(
        torch.linalg.cholesky(gram + lam(key, 1.0)[0, 0] * torch.eye(d).double())
    )
    error = torch.linalg.matrix_norm(whiten @ (sampled - gram) @ whiten.mT, 2)
    score = leverage_scores(key, ridge=1.0)[0, 0]
    largest = float(score.sum()) / (m * 0.99)
    eps = 0.2
    assert 2 * d * torch.exp(torch.tensor(-(eps**2) / (2 * largest * (1 + eps / 3)))) < 1e-6
    assert error <= eps
    # the lonely key is drawn about m / d times; uniformly it would be missed with 1 / e^2
    assert int((sample.index == 17).sum()) > m / 8


def test_it_is_registered_and_its_spec_makes_an_equal_one() -> None:
    sampler = samplers.create("leverage(of='key_value', ridge=2.0, replacement=False)")
    assert sampler == Leverage(of="key_value", ridge=2.0, replacement=False)
    assert samplers.create(samplers.to_spec(sampler)) == sampler != Leverage()
    assert samplers.Leverage is Leverage


def test_bad_parameters_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"leverage: of='keys'.*'key_value'"):
        Leverage(of="keys")
    with pytest.raises(ArgumentError, match=r"leverage: ridge=0"):
        Leverage(ridge=0.0)
    with pytest.raises(ArgumentTypeError, match=r"leverage: replacement=1 has type int"):
        Leverage(replacement=1)


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_hold_indices_and_weights(causal: str, is_causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = [x.requires_grad_() for x in torch.randn(3, 1, 2, 70, 4, generator=g).double()]
    attention = HyperAttention(
        detector="sliding_window(width=4)", sampler="leverage", num_samples=6, causal=causal,
        min_seq_len=0 if causal == "single_pass" else 16, strict_causal=causal == "recursive",
    )  # fmt: skip
    grads = []
    for backend in ("torch", "reference"):
        out = attention.replace(backend=backend)(*inputs, is_causal=is_causal)
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its)
