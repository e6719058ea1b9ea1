"""Exact attention by PyTorch's CUDA kernels against the float64 oracle, every kernel and layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperframe.kernels import fused_kernels
from hyperframe.kernels.exact import exact_attention, exact_leaves, exact_output
from hyperframe.kernels.fused_exact import leaf_backward, leaf_forward
from hyperframe.testing import dense_attention

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
LABELS = ("out", "lse", "dq", "dk", "dv")
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def make(
    n_q: int, n_k: int, d: int, dtype: torch.dtype, *, heads: int = 4, key_heads: int = 4,
    batch: int = 2, d_v: int | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(n_q + d)
    shapes = ((batch, heads, n_q, d), (batch, key_heads, n_k, d), (batch, key_heads, n_k, d_v or d))
    return [torch.randn(s, generator=generator).to(dtype).cuda() for s in shapes]


def plain_attention(q, k, v, scale, is_causal):  # type: ignore[no-untyped-def]
    """Matmul, softmax, matmul in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = scale * (q @ k.mT)
    if is_causal:
        n_q, n_k = logits.shape[-2:]
        seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
        logits = logits.masked_fill(~seen, -math.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def sdpa_attention(q, k, v, scale, is_causal):  # type: ignore[no-untyped-def]
    """What a user would run, by the kernel that PyTorch chooses; its normaliser by hand."""
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = None
    if is_causal and q.shape[2] != k.shape[2]:
        n_q, n_k = q.shape[2], k.shape[2]
        mask = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
    # in float32 its kernels refuse other layouts, in the backward
    out = F.scaled_dot_product_attention(
        *(x.contiguous() for x in (q, keys, values)), attn_mask=mask,
        is_causal=is_causal and mask is None, scale=scale,
    )  # fmt: skip
    return out, plain_attention(q, k, v, scale, is_causal)[1]


def results(
    attend: Attend, tensors: list[torch.Tensor], *, by_lse: bool = True
) -> list[torch.Tensor]:
    """`out`, finite `lse` and the gradients of a fixed function of them."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out, lse = attend(*tensors)
    lse = lse.masked_fill(torch.isinf(lse), 0)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator).cuda() for x in (out, lse)]
    total = (out.double() * weights[0]).sum()
    if by_lse:
        total = total - 0.7 * (lse.double() * weights[1]).sum()
    grads = torch.autograd.grad(total, tensors)
    return [out.detach(), lse.detach(), *grads]


def baselines(
    tensors: list[torch.Tensor], scale: float, is_causal: bool, *, by_lse: bool = True,
    wrap: Callable[[Attend], Attend] = lambda attend: attend,
) -> list[list[torch.Tensor]]:  # fmt: skip
    """`results` of PyTorch in the dtype of the inputs: by its operations, and by its kernels.

    Both, because for float32 its memory-efficient kernel, which is what runs here, errs up to five
    times as much in `dq` as the operations do: it recomputes the shares in the backward from a
    log normaliser that was rounded to float32.
    """
    return [
        results(wrap(lambda *x, f=f: f(*x, scale, is_causal)), tensors, by_lse=by_lse)
        for f in (plain_attention, sdpa_attention)
    ]


def check(
    found: list[torch.Tensor], plain: list[list[torch.Tensor]], exact: list[torch.Tensor],
    dtype: torch.dtype, labels: tuple[str, ...] = LABELS,
) -> None:  # fmt: skip
    """At most twice as far from the oracle as the worse of the `baselines`."""
    for label, ours, true, *theirs in zip(labels, found, exact, *plain, strict=True):
        assert torch.isfinite(ours).all(), label
        error, *others = ((x.double() - true).square().mean().sqrt() for x in (ours, *theirs))
        plain_error = max(others)
        rounding = 2 * torch.finfo(dtype).eps * true.square().mean().sqrt()
        assert error <= 2 * plain_error + rounding, (label, float(error), float(plain_error))


@pytest.mark.parametrize("n_q, n_k", [(333, 333), (512, 512), (100, 333), (333, 100), (1, 333)])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("d", [16, 64, 72, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_normalisers_and_gradients_are_exact(
    dtype: torch.dtype, d: int, is_causal: bool, key_heads: int, n_q: int, n_k: int
) -> None:
    tensors = make(n_q, n_k, d, dtype, key_heads=key_heads)
    scale = d**-0.5
    if is_causal and n_q > n_k:
        # rows before every key: plain torch knows none
        plain_inputs = [tensors[0][:, :, n_q - n_k :], *tensors[1:]]
        out, lse = exact_attention(*tensors, scale=scale, is_causal=True)
        assert not out[:, :, : n_q - n_k].any()
        assert (lse[:, :, : n_q - n_k] == -math.inf).all()
        tensors = plain_inputs
    for by_lse in (False, True):
        found, exact = (
            results(lambda *x, f=f: f(*x, scale=scale, is_causal=is_causal), given, by_lse=by_lse)
            for f, given in (
                (exact_attention, tensors),
                (dense_attention, [x.double() for x in tensors]),
            )
        )
        plain = baselines(tensors, scale, is_causal, by_lse=by_lse)
        assert found[0].dtype == dtype
        assert found[1].dtype == torch.float32
        check(found, plain, exact, dtype)
    out = exact_output(*tensors, scale=scale, is_causal=is_causal)
    check([out], [x[:1] for x in plain], exact[:1], dtype, ("output alone",))


@pytest.mark.parametrize("d, d_v", [(5, 5), (64, 40), (40, 64), (300, 300), (128, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_head_size_is_taken(dtype: torch.dtype, d: int, d_v: int) -> None:
    tensors = make(200, 200, d, dtype, key_heads=2, d_v=d_v)
    options = {"scale": d**-0.5, "is_causal": True}
    found = results(lambda *x: exact_attention(*x, **options), tensors)
    exact = results(lambda *x: dense_attention(*x, **options), [x.double() for x in tensors])
    check(found, baselines(tensors, **options), exact, dtype)


LAYOUTS = {
    "rows side by side": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "padded": lambda x: torch.nn.functional.pad(x, (0, 3))[..., :-3],
    "misaligned": lambda x: torch.nn.functional.pad(x, (1, 7))[..., 1:-7],
    "reversed strides": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_is_taken(dtype: torch.dtype, layout: str) -> None:
    tensors = [LAYOUTS[layout](x) for x in make(256, 256, 64, dtype)]
    options = {"scale": 0.125, "is_causal": True}
    found = results(lambda *x: exact_attention(*x, **options), tensors)
    exact = results(lambda *x: dense_attention(*x, **options), [x.double() for x in tensors])
    check(found, baselines(tensors, **options), exact, dtype)


def kernels_for(dtype: torch.dtype, d: int) -> list[str]:
    names = ["efficient"]
    if dtype in HALF and d <= 256:
        names.append("flash")
    if dtype in HALF and d <= 128 and torch.cuda.get_device_capability()[0] in (9, 10):
        names.append("cudnn")
    return names


@pytest.mark.parametrize("n", [256, 384, 1024])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("d", [64, 120])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_is_exact(
    dtype: torch.dtype, d: int, is_causal: bool, key_heads: int, n: int
) -> None:
    tensors = make(n, n, d, dtype, key_heads=key_heads)
    options = {"scale": d**-0.5, "is_causal": is_causal}
    exact = results(lambda *x: dense_attention(*x, **options), [x.double() for x in tensors])
    plain = baselines(tensors, **options)
    generator = torch.Generator().manual_seed(3)
    shapes = (exact[0].shape, exact[1].shape)
    weights = [torch.randn(shape, generator=generator).cuda() for shape in shapes]
    for name in kernels_for(dtype, d):
        out, lse = fused_kernels.forward(*tensors, **options, kernels=(name,))
        # one more column fits into 128 for both sizes of head
        grads = fused_kernels.backward(
            weights[0].to(dtype), *tensors, out, lse, -0.7 * weights[1], **options, kernels=(name,)
        )
        try:
            check([out, lse, *grads], plain, exact, dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# batch, query heads, key heads, rows, leaf
LEAVES = {
    "even": (2, 4, 4, 1024, 256),
    "ragged": (2, 4, 4, 1000, 256),
    "grouped": (2, 4, 2, 1024, 256),
    "grouped alone": (1, 4, 2, 1024, 256),
    "grouped alone ragged": (1, 4, 2, 900, 128),
    "short": (1, 2, 2, 100, 512),
}


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["heads apart", "rows side by side"])
def test_the_leaf_backward_is_the_part_of_the_leaves_in_a_joint_softmax(
    layout: str, dtype: torch.dtype, d: int, name: str
) -> None:
    batch, heads, key_heads, rows, leaf = LEAVES[name]
    tensors = make(rows, rows, d, dtype, batch=batch, heads=heads, key_heads=key_heads)
    tensors = [LAYOUTS.get(layout, lambda x: x)(x) for x in tensors]
    extra = make(rows, 64, d, dtype, batch=batch, heads=heads, key_heads=heads)[1:]
    scale = d**-0.5
    run = torch.arange(rows, device="cuda") // leaf
    seen = (run[:, None] == run).tril()

    def joint(q, k, v, keys, values, by_kernels):  # type: ignore[no-untyped-def]
        group = heads // key_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        k, v = torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2)
        hidden = F.pad(~seen, (0, keys.shape[2]))
        logits = (scale * q @ k.mT).masked_fill(hidden, -math.inf)
        if by_kernels:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=scale)
        else:
            out = logits.softmax(-1) @ v
        return out, logits.logsumexp(-1)

    grad_out = torch.randn(batch, heads, rows, d).to(dtype).cuda()
    true = []
    cases = (([x.double() for x in tensors], False), (tensors, False), (tensors, True))
    for given, by_kernels in cases:
        given = [x.detach().requires_grad_() for x in given]
        more = [x.to(given[0].dtype) for x in extra]
        out, lse = joint(*given, *more, by_kernels)
        grads = torch.autograd.grad(out, given, grad_out.to(out.dtype))
        # less what the other keys give to the queries
        shares = torch.exp(scale * given[0] @ more[0].mT - lse.unsqueeze(-1))
        values = grad_out.to(out.dtype) @ more[1].mT
        delta = (grad_out.to(out.dtype) * out).sum(-1, keepdim=True)
        grads = (grads[0] - scale * (shares * (values - delta)) @ more[0], *grads[1:])
        true.append([x.detach() for x in (out, lse, *grads)])
    exact, *plain = true
    out, lse = exact[0].to(dtype), exact[1].float()
    found = leaf_backward(grad_out, *tensors, out, lse, leaf=leaf, scale=scale)
    check(list(found), [x[2:] for x in plain], exact[2:], dtype, LABELS[2:])


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leaves_attend_causally_inside_their_runs(dtype: torch.dtype, name: str) -> None:
    batch, heads, key_heads, rows, leaf = LEAVES[name]
    tensors = make(rows, rows, 64, dtype, batch=batch, heads=heads, key_heads=key_heads)

    def by_hand(attend: Attend) -> Attend:
        def leaves(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            runs = zip(*(y.split(leaf, dim=2) for y in x), strict=True)
            states = [attend(*run) for run in runs]
            out, lse = (torch.cat(parts, dim=2) for parts in zip(*states, strict=True))
            return out, lse

        return leaves

    exact = results(
        by_hand(lambda *x: dense_attention(*x, scale=0.125, is_causal=True)),
        [x.double() for x in tensors],
    )
    plain = baselines(tensors, 0.125, True, wrap=by_hand)
    check(
        results(lambda *x: exact_leaves(*x, leaf=leaf, scale=0.125), tensors), plain, exact, dtype
    )
    out, lse = leaf_forward(*tensors, leaf=leaf, scale=0.125)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    check([out, lse], [x[:2] for x in plain], exact[:2], dtype, LABELS[:2])


def test_plans_made_for_other_layouts_of_the_gradient_are_not_used() -> None:
    tensors = make(512, 512, 64, torch.bfloat16, heads=1, key_heads=1)
    inputs = [x.clone().requires_grad_() for x in tensors]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*inputs, scale=0.125)
    # a gradient with rows of another length: legal, and written into cuDNN's plan
    wide = torch.randn(2, 1, 512, 128, device="cuda", dtype=torch.bfloat16)
    out.backward(wide[..., :64])
    options = {"scale": 0.125, "is_causal": False}
    exact = results(lambda *x: dense_attention(*x, **options), [x.double() for x in tensors])
    plain = baselines(tensors, **options)
    found = results(lambda *x: exact_attention(*x, **options), tensors)
    check(found, plain, exact, torch.bfloat16)
    for weight in (out.detach(), wide[..., :64], out.detach().mT.contiguous().mT):
        by_fused, by_hand = (
            torch.autograd.grad(f(*given)[0], given, weight.to(given[0].dtype))
            for f, given in (
                (lambda *x: exact_attention(*x, **options), inputs),
                (lambda *x: dense_attention(*x, **options), [x.double() for x in inputs]),
            )
        )
        for ours, true in zip(by_fused, by_hand, strict=True):
            assert (ours - true).norm() < 0.02 * true.norm()


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_algorithms_give_the_same_bits_again(dtype: torch.dtype) -> None:
    q, k, v = make(2048, 2048, 64, dtype)
    assert "cudnn" not in fused_kernels.choose(q, k, 64)
    results_of = [
        leaf_backward(
            q, q, k, v, *leaf_forward(q, k, v, leaf=1024, scale=0.1), leaf=1024, scale=0.1
        )
        for _ in range(5)
    ]
    for again in results_of[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results_of[0], again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_replays_forward_and_backward(dtype: torch.dtype) -> None:
    static = [x.requires_grad_() for x in make(512, 1024, 64, dtype, key_heads=2)]

    def step() -> list[torch.Tensor]:
        state = exact_attention(*static, scale=0.125, is_causal=True)
        leaves = exact_leaves(*(x[:, :, :512] for x in static), leaf=128, scale=0.125)
        total = sum((x.float() ** 2).sum() for x in (*state, *leaves))
        return [*state, *leaves, *torch.autograd.grad(total, static)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in static:
            x.copy_(torch.randn_like(x))
    graph.replay()
    tolerance = 64 * torch.finfo(dtype).eps
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    tensors = make(512, 1024, 64, dtype, key_heads=2)
    tensors = [x.requires_grad_() for x in tensors]

    def step() -> None:
        state = exact_attention(*tensors, scale=0.125, is_causal=True)
        leaves = exact_leaves(*(x[:, :, :512] for x in tensors), leaf=100, scale=0.125)
        total = sum(x.float().sum() for x in (*state, *leaves))
        total = total + exact_output(*tensors, scale=0.125).float().sum()
        torch.autograd.grad(total, tensors)

    step()  # kernels are loaded in the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_attention_is_the_same_in_one_graph(dtype: torch.dtype) -> None:
    tensors = make(300, 500, 64, dtype, key_heads=2)

    def attend(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = exact_attention(*x, scale=0.125, is_causal=True)
        return out, lse

    compiled = torch.compile(attend, fullgraph=True)
    tolerance = 64 * torch.finfo(dtype).eps
    for found, expected in zip(results(compiled, tensors), results(attend, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_long_output_is_exact_and_changes_no_global_state(is_causal: bool) -> None:
    tensors = make(4096, 4096, 64, torch.bfloat16, heads=8, key_heads=8, batch=1)
    before = (torch._C._get_sdp_priority_order(), torch.backends.cuda.cudnn_sdp_enabled())
    out = exact_output(*tensors, scale=0.125, is_causal=is_causal)
    assert (torch._C._get_sdp_priority_order(), torch.backends.cuda.cudnn_sdp_enabled()) == before
    rows = [0, 17, 2047, 4095]
    for row in rows:
        last = row + 1 if is_causal else 4096
        q, k, v = (x.double() for x in tensors)
        exact = dense_attention(q[:, :, row : row + 1], k[:, :, :last], v[:, :, :last], scale=0.125)
        error = (out[:, :, row].double() - exact.out[:, :, 0]).norm()
        assert error < 0.01 * exact.out.norm()
