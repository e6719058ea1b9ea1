"""Lists of tiles side by side: one launch for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ragged import join_padded
from .ops import has_triton
from .ops import joined as _schema  # noqa: F401  (defines the operator implemented here)

__all__ = ["side_by_side"]


def side_by_side(
    pieces: Sequence[tuple[torch.Tensor, torch.Tensor]], shape: tuple[int, int, int], *, fill: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return lists side by side, as `ragged.join_padded` does.

    Args:
        pieces: lists `[batch, heads, tiles, L]` and counts, one dimension less, at least one of
            them; each for all heads or for key heads, or of a stride or size of 1 and 0 to repeat.
        shape: `(batch, heads, tiles)`.
        fill: what unused slots hold.

    Returns:
        int32 `[batch, heads, tiles, L]`, and None; of a single piece itself and its counts.
        Cost O(L) a list. On CUDA with Triton one launch for four pieces.

    Example:
        >>> lists, counts = torch.tensor([[[[3, 5]]]]), torch.tensor([[[1]]])
        >>> side_by_side([(lists, counts), (lists + 1, counts + 1)], (1, 1, 1), fill=9)[0].tolist()
        [[[[3, 9, 4, 6]]]]
    """
    if len(pieces) == 1:
        return join_padded(list(pieces), shape, fill)
    joined: torch.Tensor = torch.ops.hyperframe.side_by_side(
        [index for index, _ in pieces], [count for _, count in pieces], list(shape), fill
    )
    return joined, None


@torch.library.impl("hyperframe::side_by_side", "default")
def _run(
    index: Sequence[torch.Tensor], count: Sequence[torch.Tensor], shape: Sequence[int], fill: int
) -> torch.Tensor:
    if index[0].is_cuda and torch.version.hip is None and has_triton():
        from .triton import joined as kernels

        with torch.cuda.device(index[0].device):
            return kernels.triton_side_by_side(index, count, shape, fill)
    return torch_side_by_side(index, count, shape, fill)


def torch_side_by_side(
    index: Sequence[torch.Tensor], count: Sequence[torch.Tensor], shape: Sequence[int], fill: int
) -> torch.Tensor:
    """Do what `side_by_side` says for two pieces and more, on any device."""
    batch, heads, tiles = shape
    pieces = list(zip(index, count, strict=True))
    joined, _ = join_padded(pieces, (batch, heads, tiles), fill)
    return joined
