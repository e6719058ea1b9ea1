"""The best distinct keys of padded lists."""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from .ops import has_triton
from .ops import lists as _schema  # noqa: F401  (defines the operator implemented here)

__all__ = ["best_distinct", "torch_best_distinct"]

_CHUNK_BYTES = 64 << 20  # of what is made of the lists, held at once


def best_distinct(
    index: torch.Tensor, weight: torch.Tensor | None = None, *, limit: int, k: int,
    count: torch.Tensor | None = None, start: int = 0, stop: torch.Tensor | None = None,
    is_sorted: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the `k` distinct keys of largest weight of every list, ascending.

    The weights of equal keys are added up; of keys that weigh the same the smaller ones are taken.
    An entry is not used, and adds nothing, where its key is outside of `[start, min(stop, limit))`,
    its slot is not below `count`, or its weight is negative or NaN. Weight 0 counts.

    Args:
        index: int32 or int64 `[..., L]`, lists of keys.
        weight: floating point `[..., L]`; None: all keys weigh the same.
        limit: keys are below it, and it fills what is left of a list; below 2^31.
        k: keys to keep, at least 1; may exceed `L`.
        count: integer, broadcast to `[...]`: used slots. None: all of them.
        start: the first key that may be kept.
        stop: integer, broadcast to `[...]`: keys from it on are not kept. None: `limit`.
        is_sorted: whether the keys of every list ascend, used or not, repeats side by side. Saves
            the sort; the result is undefined where it does not hold.

    Returns:
        int32 `[..., k]`, and how many are keys, int32 `[...]`. Weights are added in float32, in
        float64 if they are; deterministic. No gradient.

    Cost: O(L log^2 L) time for a list. On CUDA with Triton one launch, for L <= 4096, that reads
        the lists once; elsewhere sorts of torch, in chunks of bounded memory.

    Raises:
        ArgumentError: for `k` below 1.

    Example:
        >>> keys = torch.tensor([[7, 3, 7, 9, 3, 5]])
        >>> weights = torch.tensor([[1.0, 2.0, 2.0, 4.0, 0.5, 1.0]])
        >>> kept, held = best_distinct(keys, weights, limit=9, k=2)
        >>> kept.tolist(), held.tolist()
        ([[3, 7]], [2])
        >>> best_distinct(keys, limit=9, k=4)[0].tolist()
        [[3, 5, 7, 9]]
    """
    if k < 1:
        raise ArgumentError(f"best_distinct: k={k} keeps nothing; pass at least 1")
    kept, held = torch.ops.hyperframe.best_distinct(
        index, None if weight is None else weight.detach(), count, stop, start, limit, k, is_sorted
    )
    return kept, held


@torch.library.impl("hyperframe::best_distinct", "default")
def _run(
    index: torch.Tensor, weight: torch.Tensor | None, count: torch.Tensor | None,
    stop: torch.Tensor | None, start: int, limit: int, k: int, is_sorted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    given = (index, weight, count, stop, start, limit, k)
    if index.is_cuda and torch.version.hip is None and has_triton():
        from .triton import select as kernels

        if kernels.supports(index, weight):
            with torch.cuda.device(index.device):
                return kernels.triton_best_distinct(*given, is_sorted=is_sorted)
    return torch_best_distinct(*given)


def torch_best_distinct(
    index: torch.Tensor, weight: torch.Tensor | None, count: torch.Tensor | None,
    stop: torch.Tensor | None, start: int, limit: int, k: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `best_distinct` says, on any device, by sorting some lists at a time."""
    shape, length = index.shape[:-1], index.shape[-1]
    kept = torch.full((*shape, k), limit, dtype=torch.int32, device=index.device)
    held = torch.zeros(shape, dtype=torch.int32, device=index.device)
    if kept.numel() == 0 or length == 0:
        return kept, held
    lists = index.expand(*shape, length).reshape(-1, length)
    weights = None if weight is None else weight.expand(*shape, length).reshape(-1, length)
    counts = None if count is None else count.expand(shape).reshape(-1, 1)
    stops = None if stop is None else stop.expand(shape).reshape(-1, 1)
    flat_kept, flat_held = kept.view(-1, k), held.view(-1)
    step = max(1, _CHUNK_BYTES // (64 * length))
    for first in range(0, len(lists), step):
        part = slice(first, first + step)
        found = _best(
            lists[part], None if weights is None else weights[part],
            None if counts is None else counts[part], None if stops is None else stops[part],
            start, limit, k,
        )  # fmt: skip
        flat_kept[part, : found.shape[-1]] = found.int()
        flat_held[part] = (found < limit).sum(dim=-1, dtype=torch.int32)
    return kept, held


def _best(
    index: torch.Tensor, weight: torch.Tensor | None, count: torch.Tensor | None,
    stop: torch.Tensor | None, start: int, limit: int, k: int,
) -> torch.Tensor:  # fmt: skip
    """Return at most `k` keys of each of `[N, L]` lists, ascending; `limit` fills the rest."""
    used = (index >= start) & (index < limit)
    if count is not None:
        used = used & (torch.arange(index.shape[-1], device=index.device) < count)
    if stop is not None:
        used = used & (index < stop)
    if weight is not None:
        used = used & (weight >= 0)
    key, order = torch.where(used, index, limit).sort(dim=-1, stable=True)
    is_last = torch.ones_like(used)
    is_last[:, :-1] = key[:, :-1] != key[:, 1:]
    if weight is None:
        return torch.where(is_last, key, limit).sort(dim=-1).values[:, :k]
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = torch.where(used, weight.to(dtype), 0).gather(-1, order)
    # sums of runs of equal keys, over ever more slots; the last slot of a run has all of it
    reach = 1
    while reach < total.shape[-1]:
        is_same = key[:, reach:] == key[:, :-reach]
        before = torch.where(is_same, total[:, :-reach], 0)
        total = torch.cat([total[:, :reach], total[:, reach:] + before], dim=-1)
        reach *= 2
    total = torch.where(is_last & (key < limit), total, -1)
    # stable, and keys ascend: of ties the smaller ones come first
    total, best = total.sort(dim=-1, descending=True, stable=True)
    chosen = torch.where(total >= 0, key.gather(-1, best), limit)[:, :k]
    return chosen.sort(dim=-1).values
