"""Hash codes of queries and keys, and the orders that sort them: one call for all run sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import ArgumentError
from ..precision import without_autocast
from ..ragged import spread_heads
from .ops import has_triton
from .ops import hashing as _schema  # noqa: F401  (defines the operator implemented here)

__all__ = ["HashOrders", "hamming_sorted_codes", "hash_orders", "inverse_gray", "rounded_planes"]


class HashOrders(NamedTuple):
    """Rows sorted by hash code inside runs, for each of `L` run sizes.

    Args:
        query_order: int32 `[L, B, Hq, n_q]`; the row at each place.
        key_order: int32 `[L, B, Hkv, n_k]`; the key at each place.
        key_rank: int32 `[L, B, Hkv, n_k]`; the place of each key.
    """

    query_order: torch.Tensor
    key_order: torch.Tensor
    key_rank: torch.Tensor


def inverse_gray(pattern: torch.Tensor) -> torch.Tensor:
    """Return the rank of a bit pattern in the reflected Gray code.

    Patterns of neighbouring ranks, also of the last and the first, differ in exactly one bit.

    Args:
        pattern: non-negative int64, any shape.

    Example:
        >>> inverse_gray(torch.tensor([0b00, 0b01, 0b11, 0b10])).tolist()
        [0, 1, 2, 3]
    """
    rank = pattern
    for shift in (1, 2, 4, 8, 16, 32):
        rank = rank ^ (rank >> shift)
    return rank


def hamming_sorted_codes(
    x: torch.Tensor, projection: torch.Tensor, threshold: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the Hamming sorted LSH codes of Definition 1.

    For two vectors at the angle theta, `Pr[H(x) = H(y)] = (1 - theta/pi)^r` and
    `Pr[H(x) = H(y) +- 1 mod 2^r] = 2 theta/pi (1 - theta/pi)^(r-1)`.

    Args:
        x: `[..., n, d]`.
        projection: `[..., d, r]`, standard normal; broadcast against `x`.
        threshold: `[..., r]`; a bit is set where the projection exceeds it. None is 0.

    Returns:
        int64 `[..., n]` in `[0, 2^r)`.
    """
    with without_autocast(x):
        product = torch.matmul(x.to(projection.dtype), projection)
    signs = product > (0 if threshold is None else threshold.unsqueeze(-2))
    bits = torch.arange(projection.shape[-1], device=x.device)
    return inverse_gray((signs.long() << bits).sum(dim=-1))


def hash_orders(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor, *, runs: Sequence[int],
    key_threshold: torch.Tensor | None = None, alternate: bool = False,
) -> HashOrders:  # fmt: skip
    """Sort queries and keys by their Hamming sorted LSH codes, inside runs of several sizes.

    For a run size S, rows are cut into the runs `[i S, min((i + 1) S, n))`, and each run is sorted
    by code; rows of one code stay in the order of their positions. One pass over query and key
    serves all run sizes.

    Args:
        query: `[B, Hq, n_q, d]`, any floating-point dtype, any strides.
        key: `[B, Hkv, n_k, d]`.
        projection: float32 `[B or 1, Hkv, d, r]`, r hyperplanes for each key head, 1 to 62; query
            head h uses those of key head `h // (Hq // Hkv)`. Where query and key are of 16 bits,
            it is rounded to their dtype: products are then exact in float32, and the signs are the
            same on every device but for the rounding of sums.
        runs: run sizes, each at least 1.
        key_threshold: float32 `[B, Hkv, r]`; bit j of a key is `k . p_j > threshold_j`. None is 0,
            as for queries.
        alternate: sort the odd runs of queries and the even runs of keys only, those that meet in
            the rectangles of the causal recursion; rows of the others stay in their places.

    Returns:
        `HashOrders`. No gradient. Codes of rows that lie within rounding of a hyperplane may
        differ between devices.

    Cost: O(n d r + L n) time and O(L n) memory on CUDA with Triton, r <= 8 and d <= 256, where run
        sizes are multiples of the smallest; elsewhere O(n d r + L n log n).
    Source: HyperAttention, Definition 1, and the sort of Algorithm 1.

    Raises:
        ArgumentError: for a run size below 1, or more than 62 projections.

    Example:
        >>> x = torch.tensor([[3.0], [-1.0], [2.0], [-5.0]]).view(1, 1, 4, 1)
        >>> hash_orders(x, x, torch.ones(1, 1, 1, 1), runs=(4, 2)).key_order.flatten(1).tolist()
        [[1, 3, 0, 2], [1, 0, 3, 2]]
    """
    num_projections = projection.shape[-1]
    if not 1 <= num_projections <= 62:
        raise ArgumentError(
            f"hash_orders: {num_projections} projections do not give a 64-bit code; pass 1 to 62"
        )
    if any(run < 1 for run in runs):
        raise ArgumentError(f"hash_orders: runs={tuple(runs)} holds a size below 1")
    return HashOrders(
        *torch.ops.hyperframe.hash_orders(
            query.detach(), key.detach(), projection.detach(), key_threshold, list(runs), alternate
        )
    )


@torch.library.impl("hyperframe::hash_orders", "default")
def _run(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor,
    key_threshold: torch.Tensor | None, runs: Sequence[int], alternate: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    given = (query, key, projection, key_threshold, runs)
    if query.is_cuda and has_triton() and _has_matrix_instructions(query.device):
        from .triton import hashing as kernels

        if kernels.supports(query, key, projection, runs):
            with torch.cuda.device(query.device):
                return kernels.triton_hash_orders(*given, alternate=alternate)
    return torch_hash_orders(*given, alternate=alternate)


def _has_matrix_instructions(device: torch.device) -> bool:
    """Whether the GPU multiplies matrices the way the kernels ask for (Ampere and later)."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def torch_hash_orders(
    query: torch.Tensor, key: torch.Tensor, projection: torch.Tensor,
    key_threshold: torch.Tensor | None, runs: Sequence[int], *, alternate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `hash_orders` says, on any device, by sorting."""
    num_projections = projection.shape[-1]
    codes = []
    for x, threshold in ((query, None), (key, key_threshold)):
        planes = rounded_planes(projection, x.dtype)
        code = hamming_sorted_codes(x, spread_heads(planes, x.shape[1]), threshold)
        codes.append(code)
    query_order, key_order = (
        torch.empty((len(runs), *code.shape), dtype=torch.int32, device=code.device)
        for code in codes
    )
    key_rank = torch.empty_like(key_order)
    for order, code, parity in ((query_order, codes[0], 1), (key_order, codes[1], 0)):
        for level, run in enumerate(runs):
            order[level] = _order(code, run, num_projections, parity if alternate else None)
    place = torch.arange(key.shape[2], dtype=torch.int32, device=key.device)
    key_rank.scatter_(-1, key_order.long(), place.expand(key_order.shape))
    return query_order, key_order, key_rank


def rounded_planes(projection: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float32 hyperplanes as they are for inputs of a dtype; see `hash_orders`."""
    if dtype in (torch.bfloat16, torch.float16):
        return projection.to(dtype).float()
    return projection.double() if dtype == torch.float64 else projection


def _order(code: torch.Tensor, run: int, bits: int, parity: int | None) -> torch.Tensor:
    """Sort `[..., n]` codes of some bits stably inside runs; return the rows as int64.

    With a parity, only inside runs whose number has it.
    """
    num_rows = code.shape[-1]
    run_of_row = torch.arange(num_rows, device=code.device) // run
    if parity is not None:
        code = torch.where(run_of_row % 2 == parity, code, 0)
    all_bits = bits + (max(num_rows - 1, 0) // run).bit_length()
    if all_bits > 63:
        order = code.sort(dim=-1, stable=True).indices
        return order.gather(-1, run_of_row[order].sort(dim=-1, stable=True).indices)
    # the fewer bits a sort sees, the faster it is
    dtype = torch.int16 if all_bits < 16 else torch.int32 if all_bits < 32 else torch.int64
    return (code.to(dtype) + (run_of_row << bits).to(dtype)).sort(dim=-1, stable=True).indices
