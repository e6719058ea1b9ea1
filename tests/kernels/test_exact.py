"""Exact attention against the float64 oracle: outputs, normalisers and both gradients."""

from __future__ import annotations

import math

import pytest
import torch

from hyperframe.errors import UnsupportedError
from hyperframe.kernels import fused_kernels
from hyperframe.kernels.exact import exact_attention, exact_leaves, exact_output, full_plan
from hyperframe.kernels.fused_exact import fused_attention, leaf_backward, leaf_forward
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
    # terms of a gradient may cancel, even to nothing: they are as large as those of the others
    largest = max(gradient.square().mean().sqrt() for gradient in expected[2:])
    for label, ours, theirs, true in zip(labels, found, plain, expected, strict=True):
        error, plain_error = ((x.double() - true).square().mean().sqrt() for x in (ours, theirs))
        size = largest if label.startswith("d") else true.square().mean().sqrt()
        rounding = 2 * torch.finfo(dtype).eps * size
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


LAYOUTS = {
    "heads apart": lambda x: x,
    "rows apart": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "padded": lambda x: torch.nn.functional.pad(x.transpose(1, 2), (0, 5))[..., :-5].transpose(
        1, 2
    ),
    "columns apart": lambda x: x.mT.contiguous().mT,
    "one entry for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["grouped causal", "square causal"])
def test_strides_do_not_matter(name: str, layout: str, cotangent: str) -> None:
    strided = [LAYOUTS[layout](x) for x in make(name)]
    found, expected = (
        results(lambda *x: exact_attention(*x, scale=SCALE, is_causal=True), given, cotangent)
        for given in (strided, [x.contiguous() for x in strided])
    )
    torch.testing.assert_close(found, expected)


def test_the_plan_of_everything_is_one_list_for_all_rows() -> None:
    q, k, _ = make("fewer queries causal")
    plan = full_plan(q, k, is_causal=True).validate()
    assert plan.key_index.untyped_storage().nbytes() == 4 * 40
    assert torch.equal(plan.to_dense()[0, 0], torch.ones(7, 40).double().tril(33))


def test_a_double_backward_of_the_fused_kernels_is_refused_with_what_to_do() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in make("grouped causal"))
    out, lse = exact_attention(q, k, v, scale=SCALE, is_causal=True)
    first = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v), create_graph=True)
    out, lse = exact_attention(q, k, v, scale=SCALE, is_causal=True)
    plain = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    # the first gradients are the same with a graph and without
    assert all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    with pytest.raises(UnsupportedError, match=r"double backward: .*fused kernels.*MATH"):
        first[0].square().sum().backward()


# batch, query heads, key heads, rows, leaf, d, d_v
LEAVES = {
    "even": (2, 3, 3, 32, 8, 8, 8),
    "ragged": (2, 3, 3, 37, 8, 8, 8),
    "grouped": (2, 4, 2, 32, 8, 8, 8),
    "grouped ragged": (2, 4, 2, 29, 8, 8, 5),
    "grouped alone": (1, 4, 2, 32, 16, 8, 8),
    "one run": (2, 2, 2, 8, 8, 8, 8),
    "short": (1, 2, 2, 5, 8, 4, 8),
    "single rows": (1, 2, 1, 6, 1, 4, 4),
}


def make_leaves(name: str) -> list[torch.Tensor]:
    batch, heads, key_heads, rows, _, d, d_v = LEAVES[name]
    generator = torch.Generator().manual_seed(5)
    shapes = ((batch, heads, rows, d), (batch, key_heads, rows, d), (batch, key_heads, rows, d_v))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def masked_attention(q, k, v, mask, extra, scale):  # type: ignore[no-untyped-def]
    """Softmax over the visible keys and, with `extra`, over its keys for all rows."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (scale * q @ k.mT).masked_fill(~mask, -math.inf)
    if extra is not None:
        logits = torch.cat([logits, scale * q @ extra[0].mT], dim=-1)
        v = torch.cat([v, extra[1]], dim=2)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def leaf_mask(rows: int, leaf: int) -> torch.Tensor:
    run = torch.arange(rows) // leaf
    return (run[:, None] == run).tril()


@pytest.mark.parametrize("scale", [0.4, -0.3, 0.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LEAVES)
def test_leaves_attend_causally_inside_their_runs(name: str, layout: str, scale: float) -> None:
    rows, leaf = LEAVES[name][3:5]
    given = [LAYOUTS[layout](x) for x in make_leaves(name)]
    mask = leaf_mask(rows, leaf)
    expected = results(lambda *x: masked_attention(*x, mask, None, scale), given, "both")
    found = results(lambda *x: exact_leaves(*x, leaf=leaf, scale=scale), given, "both")
    torch.testing.assert_close(found, expected)
    out, lse = leaf_forward(*given, leaf=leaf, scale=scale)
    torch.testing.assert_close([out, lse], expected[:2])
    assert out.is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize("scale", [0.4, -0.3, 0.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LEAVES)
def test_the_leaf_backward_is_the_part_of_the_leaves_in_a_joint_softmax(
    name: str, layout: str, scale: float
) -> None:
    heads, _, rows, leaf, d, d_v = LEAVES[name][1:]
    q, k, v = (LAYOUTS[layout](x).requires_grad_() for x in make_leaves(name))
    generator = torch.Generator().manual_seed(6)
    extra = [
        torch.randn(q.shape[0], heads, 9, width, generator=generator, dtype=torch.float64)
        for width in (d, d_v)
    ]
    out, lse = masked_attention(q, k, v, leaf_mask(rows, leaf), extra, scale)
    grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    joint = torch.autograd.grad(out, (q, k, v), grad_out)
    # what the other keys add to the gradient of the queries, by the definition
    shares = torch.exp(scale * q @ extra[0].mT - lse.unsqueeze(-1))
    delta = (grad_out * out).sum(-1, keepdim=True)
    others = scale * (shares * (grad_out @ extra[1].mT - delta)) @ extra[0]
    # of these every entry counts: no layout that repeats one
    other = LAYOUTS["rows apart" if layout == "one entry for all" else layout]
    grad_out, out, last = (other(x.detach()) for x in (grad_out, out, lse.unsqueeze(-1)))
    given = (x.detach() for x in (q, k, v))
    found = leaf_backward(grad_out, *given, out, last.squeeze(-1), leaf=leaf, scale=scale)
    torch.testing.assert_close(found[0] + others.detach(), joint[0])
    torch.testing.assert_close(found[1:], joint[1:])


def test_leaves_of_contiguous_tensors_are_not_copied() -> None:
    q, k, v = (x.float() for x in make_leaves("even"))
    seen = []
    known = dict(fused_kernels._FORWARD)

    def spy(query, key, value, is_causal, scale):  # type: ignore[no-untyped-def]
        seen.append((query.data_ptr(), key.data_ptr(), value.data_ptr()))
        return known["cpu"](query, key, value, is_causal, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused_kernels._FORWARD, "cpu", spy)
        leaf_forward(q, k, v, leaf=8, scale=1.0)
    assert seen == [(q.data_ptr(), k.data_ptr(), v.data_ptr())]


@pytest.mark.parametrize("name", ["grouped causal", "wider values", "square"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_do_what_their_fakes_promise(name: str, layout: str) -> None:
    is_causal = PROBLEMS[name][-1]
    q, k, v = (LAYOUTS[layout](x.float()) for x in make(name))
    given = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), 0.5, is_causal)
    torch.library.opcheck(torch.ops.hyperframe.fused_attention.default, given)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = fused_attention(q, k, v, scale=0.5, is_causal=is_causal)
    for grad_lse in (None, torch.ones_like(lse)):
        torch.library.opcheck(
            torch.ops.hyperframe.fused_attention_backward.default,
            (torch.ones_like(out), q, k, v, out, lse, grad_lse, 0.5, is_causal),
        )


@pytest.mark.parametrize("cotangent", COTANGENTS)
def test_compiled_attention_is_the_same_in_one_graph(cotangent: str) -> None:
    tensors = [x.float() for x in make("fewer queries causal")]

    def attend(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(exact_attention(*x, scale=SCALE, is_causal=True))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found, expected = (results(f, tensors, cotangent) for f in (compiled, attend))
    torch.testing.assert_close(found, expected)


def test_without_a_gradient_of_lse_no_column_is_added() -> None:
    seen = []
    known = dict(fused_kernels._BACKWARD)

    def spy(query, *others):  # type: ignore[no-untyped-def]
        seen.append(query.shape[-1])
        return known["cpu"](query, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused_kernels._BACKWARD, "cpu", spy)
        for cotangent in ("out", "both"):
            results(lambda *x: exact_attention(*x, scale=1.0), make("square"), cotangent)
    assert seen == [16, 24]


def test_a_kernel_that_refuses_gives_way_and_is_not_asked_again() -> None:
    q, k, v = (x.float() for x in make("square"))
    calls = []

    def refuse(*_):  # type: ignore[no-untyped-def]
        calls.append(1)
        raise RuntimeError("no plan for these shapes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused_kernels._FORWARD, "flash", refuse)
        patch.setattr(fused_kernels, "_refused", set())
        expected = fused_kernels.forward(q, k, v, scale=1.0, is_causal=True)
        for _ in range(2):
            found = fused_kernels.forward(
                q, k, v, scale=1.0, is_causal=True, kernels=("flash", "cpu")
            )
            torch.testing.assert_close(found, expected)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: x")])
def test_a_full_or_broken_device_is_no_refusal(error: RuntimeError) -> None:
    q, k, v = (x.float() for x in make("square"))

    def fail(*_):  # type: ignore[no-untyped-def]
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused_kernels._FORWARD, "flash", fail)
        with pytest.raises(type(error), match=str(error)):
            fused_kernels.forward(q, k, v, scale=1.0, is_causal=True, kernels=("flash", "cpu"))


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_calls_of_the_cuda_kernels_fit_their_schemas(kernel: str, key_heads: int) -> None:
    q = torch.empty(2, 4, 100, 24, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, key_heads, 100, 24, dtype=torch.bfloat16, device="meta")
    v = torch.empty(2, key_heads, 100, 20, dtype=torch.bfloat16, device="meta")
    options = {"scale": 0.5, "is_causal": True, "kernels": (kernel,)}
    out, lse = fused_kernels.forward(q, k, v, **options)
    assert out.shape == (2, 4, 100, 20)
    assert lse.shape == (2, 4, 100)
    for grad_lse in (None, lse):
        grads = fused_kernels.backward(out, q, k, v, out, lse, grad_lse, **options)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
