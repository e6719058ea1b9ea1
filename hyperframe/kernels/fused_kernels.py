"""PyTorch's fused attention kernels under one calling convention, and the choice between them.

Four kernels give exact attention with the log normaliser of every row: cuDNN's and FlashAttention
on CUDA in half precision, the memory-efficient one on CUDA in any precision but float64, and the
flash kernel of the CPU. Here they all take `[batch, heads, n, d]` with any head sizes and any
grouping of heads, and return the natural logarithm `[batch, heads, n]`. What a kernel cannot take
is made so that it can: narrow heads get columns of zeros, which change no product; grouped keys
are repeated where a kernel wants as many heads as queries have; memory that is not aligned to 16
bytes is copied.

Nothing here is differentiable or traced: see `fused_exact`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["backward", "choose", "forward", "in_layout_of", "round_up"]

_LOGGER = logging.getLogger(__name__)
_ATEN = torch.ops.aten

_HALF = (torch.bfloat16, torch.float16)
_WIDEST = {"cudnn": 128, "flash": 256}
"""The widest head of a kernel, in columns; the others have no limit."""
_FEWEST_FOR_CUDNN = 128  # rows and keys: below, flash starts faster and no version fails
_CUDNN_RAGGED = 91501  # the first version that is right where lengths are no multiples of 128
_MAX_GRID = 65535  # of the grid dimensions that batch and heads become

_refused: set[tuple[Any, ...]] = set()


def round_up(count: int, multiple: int = 8) -> int:
    """Return the smallest multiple that is not below `count`."""
    return -(-count // multiple) * multiple


def choose(query: torch.Tensor, key: torch.Tensor, width: int) -> tuple[str, ...]:
    """Return the kernels that may take these inputs, the fastest first.

    The order was measured on an H100 (`benchmarks/exact.py`): at 131,072 rows cuDNN needs 0.6
    (causal) to 0.75 of the time of flash forward and two thirds of it backward; the efficient
    kernel is the slowest.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        width: columns of a head, after padding.
    """
    if query.device.type == "cpu":
        return ("cpu",)
    names = ["efficient"]
    if query.dtype not in _HALF or max(query.shape[:2]) > _MAX_GRID:
        return tuple(names)
    if width <= _WIDEST["flash"]:
        names.insert(0, "flash")
    if width <= _WIDEST["cudnn"] and _trusts_cudnn(query, key):
        names.insert(0, "cudnn")
    return tuple(names)


def _trusts_cudnn(query: torch.Tensor, key: torch.Tensor) -> bool:
    lengths = (query.shape[2], key.shape[2])
    if min(lengths) < _FEWEST_FOR_CUDNN:
        return False
    if torch.are_deterministic_algorithms_enabled():
        return False  # its backward adds in any order
    if torch.version.hip is not None or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    if torch.cuda.get_device_capability(query.device)[0] not in (9, 10):
        return False  # elsewhere flash is as fast
    version = torch.backends.cudnn.version() or 0
    return version >= _CUDNN_RAGGED or not any(length % 128 for length in lengths)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float,
    is_causal: bool, kernels: tuple[str, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return `out` `[batch, query_heads, n_q, d_v]` and `lse` `[batch, query_heads, n_q]`.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        scale: factor of the logits, positive.
        is_causal: hide the keys after a row; needs `n_q == n_k`.
        kernels: names to try in turn; by default those of `choose`.

    `lse` is float32, for float64 input float64. The strides of `out` are the kernel's choice.
    """
    shape, d_v = query.shape, value.shape[-1]
    if not (query.numel() and key.numel() and d_v):
        return _nothing(query, d_v)
    width = _width(query, d_v)
    q, k, v = _merged_heads(*(_ready(x, width) for x in (query, key, value)))
    names = kernels or choose(q, k, width)
    out, lse = _first_that_runs(_FORWARD, names, (q, k, v), is_causal, scale)
    return out.reshape(*shape[:3], width)[..., :d_v], lse.reshape(shape[:3])


def backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor | None = None, *, scale: float,
    is_causal: bool, kernels: tuple[str, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients in query, key and value.

    The kernels make the weights anew from `lse`, `P = exp(scale q k^T - lse)`, and give
    `dS = P (grad_out v^T - rowsum(grad_out * out))`. So `lse` and `out` may come from more keys
    than the given ones: the result is then the part of these keys in the gradient of the whole.

    No kernel takes a gradient of `lse`. With one more value column that is 0 in `value`, 1 in
    `grad_out` and `-grad_lse` in `out`, the row sum becomes `rowsum(grad_out * out) - grad_lse`,
    which is just the missing term; the column changes nothing else.

    Args: as for `forward`; `grad_out` and `out` `[batch, query_heads, n_q, d_v]`, `lse` and
        `grad_lse` `[batch, query_heads, n_q]`.
    """
    if not (query.numel() and key.numel() and value.numel()):
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if grad_lse is not None:
        column = grad_lse.unsqueeze(-1).to(out.dtype)
        out = torch.cat([out, column.neg()], dim=-1)
        grad_out = torch.cat([grad_out, torch.ones_like(column)], dim=-1)
    width = _width(query, out.shape[-1])
    q, k, v = _merged_heads(*(_ready(x, width) for x in (query, key, value)))
    # cuDNN keeps a plan for the layout of q, k and v, with that of these two written into it:
    # so they get one that follows from the layout of q
    grad_out, out = (in_layout_of(q, _padded(x, width).reshape(q.shape)) for x in (grad_out, out))
    lse = lse.reshape(q.shape[:3])
    lse = in_layout_of(torch.empty(lse.shape, device="meta"), lse)
    names = kernels or choose(q, k, width)
    tensors = (q, k, v, grad_out, out, lse)
    grad_q, grad_k, grad_v = _first_that_runs(_BACKWARD, names, tensors, is_causal, scale)
    return (
        grad_q.reshape(*query.shape[:3], width)[..., : query.shape[-1]],
        grad_k.reshape(*key.shape[:3], width)[..., : key.shape[-1]],
        grad_v.reshape(*value.shape[:3], width)[..., : value.shape[-1]],
    )


def in_layout_of(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the strides of `torch.empty_like(like)`, copied only if it has others.

    Both have one shape. The memory starts at a multiple of 16 bytes.
    """
    strides = torch.empty_like(like, device="meta").stride()
    same = zip(tensor.shape, tensor.stride(), strides, strict=True)
    if all(a == b for size, a, b in same if size > 1) and _starts_aligned(tensor):
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _nothing(query: torch.Tensor, d_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = torch.full(query.shape[:3], float("-inf"), dtype=dtype, device=query.device)
    return query.new_zeros((*query.shape[:3], d_v)), lse


def _width(query: torch.Tensor, d_v: int) -> int:
    """Columns of a padded head: all three alike, on CUDA a multiple of 8."""
    widest = max(query.shape[-1], d_v)
    as_it_is = query.device.type == "cpu" and query.shape[-1] == d_v
    return widest if as_it_is else round_up(widest)


def _starts_aligned(tensor: torch.Tensor) -> bool:
    # the allocator's blocks are aligned
    return tensor.storage_offset() * tensor.element_size() % 16 == 0


def _padded(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Return the tensor with columns of zeros behind its own; `F.pad` would copy it in any case."""
    missing = width - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def _ready(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Pad with columns of zeros and make loads of 16 bytes possible."""
    if tensor.shape[-1] != width:
        return _padded(tensor, width)
    # the CPU needs no alignment, but its kernel, too, takes columns to lie side by side
    step = 1 if tensor.device.type == "cpu" else 16 // tensor.element_size()
    rows = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    # a stride of 0 (an expanded tensor) is more than cuDNN takes
    strides_fit = all(stride > 0 and stride % step == 0 for size, stride in rows if size > 1)
    if strides_fit and tensor.stride(-1) == 1 and _starts_aligned(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _merged_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View `[batch, heads, n, d]` as `[batch * heads, 1, n, d]` where that is free.

    Flash works in the memory order batch, row, head and copies `out` and its gradient where they
    lie otherwise; with one head the two orders are the same.
    """
    batch, heads = query.shape[:2]
    if heads != key.shape[1] or batch * heads > _MAX_GRID:
        return query, key, value
    if not (query.is_contiguous() and key.is_contiguous() and value.is_contiguous()):
        return query, key, value
    q, k, v = (x.view(batch * heads, 1, *x.shape[2:]) for x in (query, key, value))
    return q, k, v


def _first_that_runs(
    table: dict[str, Callable[..., tuple[torch.Tensor, ...]]], names: tuple[str, ...],
    tensors: tuple[torch.Tensor, ...], is_causal: bool, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Run the first kernel that takes the tensors; one that refused them is not asked again."""
    query, key = tensors[:2]
    for name in names[:-1]:
        case = (name, len(tensors), query.dtype, query.shape, key.shape, is_causal)
        if case in _refused:
            continue
        try:
            return table[name](*tensors, is_causal, scale)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
                raise  # no refusal: the device is full or broken
            _refused.add(case)
            _LOGGER.info("the %s kernel refused %s: %s", name, case[1:], error)
    return table[names[-1]](*tensors, is_causal, scale)


def _cudnn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    result = _ATEN._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )
    return result[0], result[1]  # lse is [..., n, 1]


def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    result = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
    return result[0], result[1]


def _efficient_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    k, v = _repeated(q, k, v)
    result = _ATEN._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, is_causal, scale=scale
    )
    return result[0], result[1][..., : q.shape[2]]  # lse is padded to 32 rows


def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, ...]:
    k, v = _repeated(q, k, v)
    result = _ATEN._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    return result[0], result[1]


def _cudnn_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, is_causal: bool, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    # some versions look up the plan of a backward by the layout of q, k and v alone, though it
    # holds that of grad_out too: a dropout of -0.0, which is none, keeps ours from mixing with
    # those of other callers
    result: tuple[torch.Tensor, ...] = _ATEN._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None, q.shape[2],
        k.shape[2], -0.0, is_causal, scale=scale,
    )  # fmt: skip
    return result


def _flash_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, is_causal: bool, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    result: tuple[torch.Tensor, ...] = _ATEN._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, is_causal,
        seed, seed[0], scale=scale,
    )  # fmt: skip
    return result


def _efficient_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, is_causal: bool, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    rows = q.shape[2]
    lse = F.pad(lse, (0, round_up(rows, 32) - rows), value=float("inf"))
    # the kernel takes the rows of `out`, whatever its strides, to hold all heads side by side
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    grads = _ATEN._scaled_dot_product_efficient_attention_backward(
        grad_out, q, *_repeated(q, k, v), None, out, lse, seed, seed, 0.0,
        [True, True, True, False], is_causal, scale=scale,
    )  # fmt: skip
    return grads[0], _summed(grads[1], k), _summed(grads[2], v)


def _cpu_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad_out: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, is_causal: bool, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    grads = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, *_repeated(q, k, v), out, lse, 0.0, is_causal, scale=scale
    )
    return grads[0], _summed(grads[1], k), _summed(grads[2], v)


def _repeated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every query head a key head of its own."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _summed(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Add the gradients of one key head's copies."""
    return grad if grad.shape == like.shape else grad.unflatten(1, (like.shape[1], -1)).sum(2)


_FORWARD: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "cudnn": _cudnn_forward,
    "flash": _flash_forward,
    "efficient": _efficient_forward,
    "cpu": _cpu_forward,
}
_BACKWARD: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "cudnn": _cudnn_backward,
    "flash": _flash_backward,
    "efficient": _efficient_backward,
    "cpu": _cpu_backward,
}
