"""The best columns of long rows, in order."""

from __future__ import annotations

import torch

from .ops import has_triton
from .ops import select as _schema  # noqa: F401  (defines the operator implemented here)

__all__ = ["select_top", "torch_select_top"]


def select_top(
    scores: torch.Tensor, stop: torch.Tensor, *, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the columns of each row with the largest scores, in ascending order.

    Scores below 0 and NaN are not taken. Of equal scores the first ones are.

    Args:
        scores: float `[..., n]`.
        stop: integer, of a shape that expands to the leading one: only columns before it are there.
            Nothing is said of the scores behind it, which are not read.
        count: how many columns of a row, at most.

    Returns:
        int32 `[..., count]`, the columns, then `n` where there are fewer; their scores, then -1;
        and int32 `[...]`, how many there are. No gradient.
        Cost O(n) time a row. On CUDA with Triton one launch for float32 rows of up to 4,096 columns
        and three for longer ones, where n and count allow (`supports` of the kernel); elsewhere
        by topk.

    Example:
        >>> index, score, taken = select_top(
        ...     torch.tensor([[0.5, -1.0, 0.7, 0.5, 9.0]]), torch.tensor([4]), count=2
        ... )
        >>> index.tolist(), taken.tolist()
        ([[0, 2]], [2])
    """
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.hyperframe.select_top(
        scores.detach(), stop.expand(scores.shape[:-1]), count
    )
    return found


@torch.library.impl("hyperframe::select_top", "default")
def _run(
    scores: torch.Tensor, stop: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if scores.is_cuda and torch.version.hip is None and has_triton():
        from .triton import select_long as kernels

        if kernels.supports(scores, count):
            with torch.cuda.device(scores.device):
                return kernels.triton_select_top(scores, stop, count)
    return torch_select_top(scores, stop, count)


def torch_select_top(
    scores: torch.Tensor, stop: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what `select_top` says, on any device."""
    length = scores.shape[-1]
    place = torch.arange(length, device=scores.device)
    is_there = (place < stop.unsqueeze(-1)) & (scores >= 0)
    held = torch.where(is_there, scores, -1.0)
    longest = min(count, length)
    if longest == 0:
        none = held.new_full((*held.shape[:-1], count), -1.0)
        return torch.full_like(none, length, dtype=torch.int32), none, none.sum(-1).int() * 0
    bound = held.topk(longest, dim=-1).values[..., -1:]
    is_above, is_equal = held > bound, (held == bound) & is_there
    room = longest - is_above.sum(dim=-1, keepdim=True)
    is_taken = is_above | (is_equal & (is_equal.cumsum(dim=-1) <= room))
    columns = torch.where(is_taken, place, length)
    index = columns.topk(longest, dim=-1, largest=False, sorted=True).values
    score = torch.nn.functional.pad(held, (0, 1), value=-1.0).gather(-1, index)
    index = torch.nn.functional.pad(index, (0, count - longest), value=length)
    score = torch.nn.functional.pad(score, (0, count - longest), value=-1.0)
    return index.int(), score, is_taken.sum(dim=-1, dtype=torch.int32)
