"""Exact attention against the float64 oracle: outputs, normalisers and both gradients."""

from __future__ import annotations

import math

import pytest
import torch

from hyperframe.errors import UnsupportedError
from hyperframe.kernels.exact import exact_attention, exact_output, full_plan
from hyperframe.testing import dense_attention

SCALE = 0.3

# batch, query heads, key heads, n_q, n_k, d, d_v, causal
PROBLEMS = {
    "square": (2, 2, 2, 33, 33, 16, 16, False),
    "square causal": (2, 2, 2, 33, 33, 16, 16, True),
    "grouped": (1, 4, 2, 20, 20, 8, 8, False),
    "grouped causal": (1, 6, 2, 20, 20, 8, 8, True),
    "fewer queries": (1, 2, 1, 7, 40, 8, 8, False),
    "fewer queries causal": (2, 4, 2, 7, 40, 8, 8, True),
    "more queries": (1, 2, 2, 40, 7, 8, 8, False),
    "more queries causal": (2, 4, 2, 40, 7, 8, 8, True),
    "wider values": (1, 4, 2, 21, 21, 6, 11, False),
    "wider values causal": (1, 2, 2, 21, 21, 6, 11, True),
    "narrower values": (1, 2, 2, 9, 21, 11, 3, True),
    "one query causal": (1, 2, 1, 1, 12, 4, 4, True),
    "one key": (1, 1, 1, 5, 1, 4, 4, True),
    "odd head": (1, 1, 1, 37, 37, 1, 1, True),
    "long": (1, 1, 1, 700, 700, 24, 24, True),
}
# how each is differentiated: through the output, the normaliser, or both
COTANGENTS = {"out": (1.0, 0.0), "lse": (0.0, 1.0), "both": (1.0, -0.7)}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

Results = list[torch.Tensor]


def make(name: str) -> list[torch.Tensor]:
    batch, heads, key_heads, n_q, n_k, d, d_v, _ = PROBLEMS[name]
    generator = torch.Generator().manual_seed(7)
    shapes = ((batch, heads, n_q, d), (batch, key_heads, n_k, d), (batch, key_heads, n_k, d_v))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def results(attend, tensors: list[torch.Tensor], cotangent: str) -> Results:  # type: ignore[no-untyped-def]
    """`out`, finite `lse` and the gradients of a fixed function of both."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = attend(*tensors)
    lse = lse.masked_fill(torch.isinf(lse), 0)
    generator = torch.Generator().manual_seed(11)
    total = torch.zeros((), dtype=torch.float64)
    for tensor, factor in zip((out, lse), COTANGENTS[cotangent], strict=True):
        weight = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if factor:
            total = total + factor * (tensor * weight.to(tensor.dtype)).sum().double()
    gradients = torch.autograd.grad(total, tensors, materialize_grads=True)
    return [out.detach(), lse.detach(), *gradients]


def plain_attention(query, key, value, *, is_causal):  # type: ignore[no-untyped-def]
    """Plain torch in the dtype of the inputs: matmul, softmax, matmul."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = SCALE * (query @ key.mT)
    n_q, n_k = logits.shape[-2:]
    hidden = torch.zeros(n_q, n_k, dtype=torch.bool)
    if is_causal:
        hidden = ~torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q)
    is_empty = hidden.all(dim=-1)
    # rows without keys: attend to everything, then clear
    logits = logits.masked_fill(hidden & ~is_empty.unsqueeze(-1), -torch.inf)
    out = (logits.softmax(-1) @ value).masked_fill(is_empty.unsqueeze(-1), 0)
    return out, logits.logsumexp(-1).masked_fill(is_empty, -torch.inf)


@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_normalisers_and_gradients_are_exact(
    name: str, dtype: torch.dtype, cotangent: str
) -> None:
    is_causal = PROBLEMS[name][-1]
    tensors = [tensor.to(dtype) for tensor in make(name)]
    found = results(
        lambda *x: exact_attention(*x, scale=SCALE, is_causal=is_causal), tensors, cotangent
    )
    expected = results(
        lambda *x: dense_attention(*x, scale=SCALE, is_causal=is_causal),
        [tensor.double() for tensor in tensors], cotangent,
    )  # fmt: skip
    plain = results(lambda *x: plain_attention(*x, is_causal=is_causal), tensors, cotangent)
    assert found[0].dtype == dtype
    assert found[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    labels = ("out", "lse", "dq", "dk", "dv")
    for label, ours, theirs, true in zip(labels, found, plain, expected, strict=True):
        error, plain_error = ((x.double() - true).square().mean().sqrt() for x in (ours, theirs))
        rounding = 2 * torch.finfo(dtype).eps * true.square().mean().sqrt()
        assert error <= 2 * plain_error + rounding, (label, error, plain_error)
        if dtype == torch.float64:
            torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_output_alone_is_that_of_the_state(name: str, dtype: torch.dtype) -> None:
    is_causal = PROBLEMS[name][-1]
    tensors = [tensor.to(dtype) for tensor in make(name)]
    out = exact_output(*tensors, scale=SCALE, is_causal=is_causal)
    state = exact_attention(*tensors, scale=SCALE, is_causal=is_causal)
    assert out.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, state.out, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [0.0, -0.4, 2.5])
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_scale_is_the_scale_of_the_logits(scale: float, is_causal: bool) -> None:
    tensors = make("square")
    state = exact_attention(*tensors, scale=scale, is_causal=is_causal)
    expected = dense_attention(*tensors, scale=scale, is_causal=is_causal)
    torch.testing.assert_close(state.out, expected.out)
    torch.testing.assert_close(state.lse, expected.lse)
    out = exact_output(*tensors, scale=scale, is_causal=is_causal)
    torch.testing.assert_close(out, expected.out)


def test_rows_before_every_key_are_empty() -> None:
    tensors = make("more queries causal")
    out, lse = exact_attention(*tensors, scale=SCALE, is_causal=True)
    assert torch.equal(out[:, :, :33], torch.zeros(2, 4, 33, 8, dtype=torch.float64))
    assert (lse[:, :, :33] == -math.inf).all()
    assert torch.isfinite(lse[:, :, 33:]).all()
    alone = exact_output(*tensors, scale=SCALE, is_causal=True)
    assert torch.equal(alone[:, :, :33], out[:, :, :33])


def test_huge_scores_neither_overflow_nor_vanish() -> None:
    q, k, v = (100 * tensor for tensor in make("square causal"))
    state = exact_attention(q.float(), k.float(), v.float(), scale=1.0, is_causal=True)
    expected = dense_attention(q.float(), k.float(), v.float(), scale=1.0, is_causal=True)
    torch.testing.assert_close(state.out.double(), expected.out, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(state.lse.double(), expected.lse, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("name", ["grouped causal", "wider values", "fewer queries causal"])
def test_gradcheck(name: str) -> None:
    tensors = [tensor[:, :, :6].requires_grad_() for tensor in make(name)]
    is_causal = PROBLEMS[name][-1]
    assert torch.autograd.gradcheck(
        lambda *x: tuple(exact_attention(*x, scale=SCALE, is_causal=is_causal)), tensors
    )


def test_strides_do_not_matter() -> None:
    tensors = make("grouped causal")
    strided = [
        torch.nn.functional.pad(tensor.transpose(1, 2), (0, 5))[..., :-5].transpose(1, 2)
        for tensor in tensors
    ]
    for cotangent in COTANGENTS:
        found, expected = (
            results(lambda *x: exact_attention(*x, scale=SCALE, is_causal=True), given, cotangent)
            for given in (strided, tensors)
        )
        torch.testing.assert_close(found, expected)


def test_the_plan_of_everything_is_one_list_for_all_rows() -> None:
    q, k, _ = make("fewer queries causal")
    plan = full_plan(q, k, is_causal=True).validate()
    assert plan.key_index.untyped_storage().nbytes() == 4 * 40
    assert torch.equal(plan.to_dense()[0, 0], torch.ones(7, 40).double().tril(33))


def test_a_double_backward_of_the_flash_kernel_is_refused_with_what_to_do() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in make("grouped causal"))
    out, lse = exact_attention(q, k, v, scale=SCALE, is_causal=True)
    first = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v), create_graph=True)
    out, lse = exact_attention(q, k, v, scale=SCALE, is_causal=True)
    plain = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    # the first gradients are the same with a graph and without
    assert all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    with pytest.raises(UnsupportedError, match=r"double backward: .*CPU flash kernel.*MATH"):
        first[0].square().sum().backward()
