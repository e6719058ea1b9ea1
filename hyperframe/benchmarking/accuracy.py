"""The accuracy gate: no speed-up is reported for a call that does not compute what it says.

Two errors are measured. The *kernel error* is that of the arithmetic: the call against the same
heavy entries and samples in float64; it may be twice that of the torch backend in the same dtype.
The *approximation error* is that of the method: its output against exact attention.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .inputs import Shape, make_inputs
from .methods import AbstractMethod

__all__ = ["ApproximationError", "KernelError", "exact_rows", "kernel_error", "sampled_error"]

_SAMPLED_ROWS = 512
_EXACT_ROWS = 2048  # of the exact gradient, whose scores are written out in float64
_CHUNK_BYTES = 64 << 20  # of scores held at once


@dataclass(frozen=True)
class KernelError:
    """Relative Frobenius errors against float64, choices of entries held fixed.

    Attributes:
        ours: of the output, by the backend under test.
        torch: of the output, by the torch backend in the same dtype.
        limit: what `ours` may be.
        length: `n` of the problem they were measured on.
        grad_ours: of the gradients of query, key and value, the worst of the three; None if no
            backward is timed.
        grad_torch: likewise, by the torch backend.
        grad_exact: likewise, by PyTorch's exact attention; its fused kernels round the weights to
            the dtype of the inputs, as any kernel on tensor cores does.
        grad_limit: what `grad_ours` may be.
    """

    ours: float
    torch: float
    limit: float
    length: int
    grad_ours: float | None = None
    grad_torch: float | None = None
    grad_exact: float | None = None
    grad_limit: float | None = None

    @property
    def reason(self) -> str | None:
        """Why the gate fails, or None."""
        checks = (
            ("kernel error", self.ours, self.torch, self.limit),
            ("gradient error", self.grad_ours, self.grad_torch, self.grad_limit),
        )
        for what, ours, of_torch, limit in checks:
            if ours is not None and limit is not None and not ours <= limit:  # nan fails
                return (
                    f"{what} {ours:.2g} against float64 at n = {self.length} is above "
                    f"{limit:.2g} (torch backend: {of_torch:.2g})"
                )
        return None

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields, for a row."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class ApproximationError:
    """Relative Frobenius errors of the heads' outputs against exact attention.

    Attributes:
        median: over batch items and heads.
        worst: the largest.
        rows: query rows of each head that were compared.
        bound: above it, no speed-up is reported; None is no bound.
        is_finite: whether the whole output was.
    """

    median: float
    worst: float
    rows: int
    bound: float | None
    is_finite: bool

    @property
    def reason(self) -> str | None:
        """Why the gate fails, or None."""
        if not self.is_finite or not math.isfinite(self.median):
            return "the output is not finite"
        if self.bound is not None and self.median > self.bound:
            return f"relative error {self.median:.2f} is above {self.bound:g}"
        return None

    def as_dict(self) -> dict[str, float | int | bool | None]:
        """Return the fields, for a row."""
        return dataclasses.asdict(self)


def kernel_error(
    method: AbstractMethod, shape: Shape, *, inputs: str, dtype: torch.dtype,
    device: torch.device, backend: str, seed: int, backward: bool = False,
) -> KernelError:  # fmt: skip
    """Measure the arithmetic of a backend on a problem of its own, of `shape` or shorter.

    Args:
        method: what to run.
        shape: the problem that is timed.
        inputs: kind of inputs.
        dtype: of the inputs.
        device: where they are.
        backend: under test.
        seed: of inputs and draws.
        backward: whether the gradients are checked too.

    Returns:
        The errors. A limit is twice the error of the torch backend (for gradients: of the worse of
        the torch backend and PyTorch's exact attention) plus 1e-6 (1e-12 in float64),
        and never above eight roundings of the dtype (1e-4 at least): where the torch backend is
        further off than that, something else than rounding differs.
    """
    length = min(shape.length, method.gate_length)
    shape = dataclasses.replace(shape, length=length)
    query, key, value = make_inputs(inputs, shape, dtype=dtype, device=device, seed=seed)
    calls = [
        method.in_float64(query, key, seed=seed),
        method.prepare(query, key, backend=backend, seed=seed),
        method.prepare(query, key, backend="torch", seed=seed),
    ]
    results = []
    for number, call in enumerate(calls):
        tensors = [x if number else x.double() for x in (query, key, value)]
        results.append(_results(call, tensors, backward=backward))
    reference, *found = results
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    most = max(1e-4, 8 * torch.finfo(dtype).eps)
    errors = []  # of ours and of torch: output, worst gradient
    for tensors in found:
        output, *gradients = _distances(tensors, reference)
        errors.append((output, _worst(gradients)))
    (ours, grad_ours), (of_torch, grad_torch) = errors
    error = KernelError(
        ours=ours, torch=of_torch, limit=min(2 * of_torch + floor, most), length=length
    )
    if not backward:
        return error
    grad_exact = _exact_gradient_error(query, key, value, is_causal=method.is_causal)
    grad_limit = min(2 * max(grad_torch, grad_exact) + floor, most)
    return dataclasses.replace(
        error, grad_ours=grad_ours, grad_torch=grad_torch, grad_exact=grad_exact,
        grad_limit=grad_limit,
    )  # fmt: skip


def _exact_gradient_error(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool
) -> float:
    """Worst gradient of SDPA in the inputs' dtype against float64, in one head and 2,048 rows."""
    tensors = [tensor[:1, :1, :_EXACT_ROWS].contiguous() for tensor in (query, key, value)]
    call = functools.partial(F.scaled_dot_product_attention, is_causal=is_causal)
    reference = _results(call, [tensor.double() for tensor in tensors], backward=True)
    return _worst(_distances(_results(call, tensors, backward=True), reference)[1:])


def _distances(found: list[torch.Tensor], reference: list[torch.Tensor]) -> list[float]:
    return [
        float((tensor.double() - wide).norm() / wide.norm())
        for tensor, wide in zip(found, reference, strict=True)
    ]


def _results(
    call: Callable[..., torch.Tensor], tensors: list[torch.Tensor], *, backward: bool
) -> list[torch.Tensor]:
    """Return the output and, with `backward`, the gradients of query, key and value."""
    if not backward:
        with torch.no_grad():
            return [call(*tensors)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():  # whatever the caller does
        out = call(*leaves)
    # the same for every dtype, and different for every entry
    place = torch.arange(out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
    grad = torch.cos(place).to(tensors[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _worst(errors: list[float]) -> float:
    return math.nan if any(math.isnan(x) for x in errors) else max(errors, default=0.0)


def sampled_error(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, *,
    is_causal: bool, seed: int, bound: float | None = None,
) -> ApproximationError:  # fmt: skip
    """Compare an output with exact attention in up to 512 random rows of every head.

    Args:
        query: `[batch, heads, n, d]`.
        key: `[batch, kv_heads, n, d]`.
        value: `[batch, kv_heads, n, d_v]`.
        out: `[batch, heads, n, d_v]`, the output to judge; all of it must be finite.
        is_causal: whether it is causal.
        seed: of the rows; they are the same for all heads.
        bound: see `ApproximationError`.

    Cost: O(512 heads n d) time, 64 MiB of temporaries beside one head of keys and values.
    """
    length = query.shape[2]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = torch.randperm(length, generator=generator)[:_SAMPLED_ROWS].sort().values
    rows = rows.to(query.device)
    exact = exact_rows(query, key, value, rows, is_causal=is_causal)
    difference = (out[:, :, rows].to(exact.dtype) - exact).flatten(2).norm(dim=-1)
    relative = (difference / exact.flatten(2).norm(dim=-1)).double()
    return ApproximationError(
        median=float(relative.median()), worst=float(relative.max()), rows=len(rows), bound=bound,
        is_finite=bool(torch.isfinite(out).all()),
    )  # fmt: skip


def exact_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, *,
    is_causal: bool,
) -> torch.Tensor:  # fmt: skip
    """Return some rows of exact attention, in float32 (float64 for float64 inputs).

    Args:
        query: `[batch, heads, n, d]`.
        key: `[batch, kv_heads, n, d]`.
        value: `[batch, kv_heads, n, d_v]`.
        rows: int64 `[rows]`.
        is_causal: whether row i sees keys up to i only.

    Returns:
        `[batch, heads, rows, d_v]`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, head_dim = query.shape
    group = heads // key.shape[1]
    exact = query.new_empty((batch, heads, len(rows), value.shape[-1]), dtype=dtype)
    step = max(1, _CHUNK_BYTES // (8 * length))
    position = torch.arange(length, device=query.device)
    for item in range(batch):
        for head in range(heads):
            k = key[item, head // group].to(dtype)
            v = value[item, head // group].to(dtype)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                scores = query[item, head, part].to(dtype) @ k.T * head_dim**-0.5
                if is_causal:
                    scores = scores.masked_fill(position > part.unsqueeze(-1), float("-inf"))
                exact[item, head, start : start + step] = scores.softmax(dim=-1) @ v
    return exact
