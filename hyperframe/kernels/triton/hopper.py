"""When `hopper_tiles_kernel` runs: for what it can do, with the versions it was tried with.

Gluon, in which it is written, changes from version to version and does not run in the interpreter.
Everything else goes to `tile_forward_kernel`, which computes the same.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from .arguments import PlanView
from .configs import is_interpreted

__all__ = ["hopper_kernel"]

_VERSIONS = ("3.6", "3.7")
_FEWEST_ROWS = 64  # of a product of four warps
_FEWEST_SLOTS = 64  # a block


def hopper_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: PlanView,
    given: dict[str, Any],
) -> Any | None:  # fmt: skip
    """Return the kernel, or None where it cannot do a plan.

    Args:
        query: `[batch, heads, n_q, d]`; as `key` and `value` with a last stride of 1.
        key: `[batch, kv_heads, n_k, d]`.
        value: `[batch, kv_heads, n_k, d_v]`.
        view: the plan, of which `is_simple` holds.
        given: the arguments of the kernels, with strides.
    """
    width = query.shape[-1]
    fits = (
        query.element_size() == 2
        and query.dtype == key.dtype == value.dtype
        and width in (64, 128)
        and value.shape[-1] == width
        and view.places >= _FEWEST_ROWS
        and view.list_slots >= _FEWEST_SLOTS
        and (not view.variant["HAS_WEIGHT"] or view.lists["weight_ptr"].dtype == torch.float32)
    )
    return _kernel(query.device) if fits and _is_aligned((query, key, value), given) else None


def _is_aligned(tensors: tuple[torch.Tensor, ...], given: dict[str, Any]) -> bool:
    """Whether all rows begin where a copy of 16 bytes may, as far as the compiler can know."""
    strides = [given[f"{x}_{of}"] for x in "qkv" for of in ("batch", "head", "row")]
    return all(x.data_ptr() % 16 == 0 for x in tensors) and all(x % 16 == 0 for x in strides)


@functools.cache
def _kernel(device: torch.device) -> Any | None:
    version = ".".join(triton.__version__.split(".")[:2])
    is_amd = torch.version.hip is not None
    if is_interpreted() or is_amd or version not in _VERSIONS:
        return None
    if torch.cuda.get_device_capability(device)[0] != 9:
        return None
    from .hopper_tiles import hopper_tiles_kernel

    return hopper_tiles_kernel
