"""Several sequences in one row of the batch, told apart by positions that start again."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError

__all__ = ["RowGroup", "RowMemory", "packed_rows", "restarts", "row_groups", "within_pieces"]

#: rows of the batch that share the same cuts, and the pieces between those as (start, stop) pairs
RowGroup = tuple[list[int], list[tuple[int, int]]]


@dataclasses.dataclass
class RowMemory:
    """The answer for the last forward pass, so that its layers read device memory only once.

    It is recalled for the very same tensors, unchanged since; tensors made in inference mode do
    not tell whether they were changed and are never remembered.
    """

    source: Tensor | None = None
    mask: Tensor | None = None
    version: int = -1
    groups: list[RowGroup] | None = None

    def recall(self, source: Tensor, mask: Tensor | None) -> tuple[list[RowGroup] | None] | None:
        """The stored groups as a 1-tuple (they may be None), or None when nothing fits."""
        if source.is_inference() or self.source is not source or self.mask is not mask:
            return None
        return (self.groups,) if self.version == source._version else None

    def store(self, source: Tensor, mask: Tensor | None, groups: list[RowGroup] | None) -> None:
        """Keeps an answer."""
        if not source.is_inference():
            self.source, self.mask, self.version = source, mask, source._version
            self.groups = groups


def packed_rows(
    memory: RowMemory,
    mask: Tensor | None,
    n_q: int,
    n_k: int,
    batch_size: int,
    position_ids: Tensor | None,
) -> list[RowGroup] | None:
    """Where the packed sequences of each row begin and end.

    Args:
        memory: remembers the answer for the other layers of the same forward.
        mask: int32 `[batch, n_k]` with the number of each key's sequence, or bool `[batch, n_k]`
            (True = real key), or bool `[batch, 1, n_q, n_k]` (True = attend), or None.
        n_q: number of queries.
        n_k: number of keys.
        batch_size: rows of the batch.
        position_ids: int64 `[batch or 1, n_q]`, read when the mask does not number the sequences;
            other shapes are ignored.

    Returns:
        None when no row is cut, else the groups of `row_groups`.

    Raises:
        UnsupportedError: the positions start again in a forward that continues a cache.
    """
    numbered = mask is not None and mask.dtype == torch.int32
    source = mask if numbered else position_ids
    if source is None or source.dim() != 2 or source.shape[-1] != n_q:
        return None
    known = memory.recall(source, mask)
    if known is not None:
        return known[0]
    if numbered:
        starts = nn.functional.pad(source[:, 1:] != source[:, :-1], (1, 0))
    else:
        starts = restarts(source, _real(mask, n_q, n_k))
    groups = row_groups(starts, batch_size)
    if groups is not None and n_q != n_k:
        raise UnsupportedError(
            f"position_ids start again inside a forward of {n_q} tokens that continues a cache of "
            f"{n_k - n_q}: it is not known which sequence each cached key belongs to. Prefill "
            "packed sequences in one forward."
        )
    memory.store(source, mask, groups)
    return groups


def _real(mask: Tensor | None, n_q: int, n_k: int) -> Tensor | None:
    """Which of the queries are real tokens, bool `[batch, n_q]`; None when all are."""
    if mask is None or mask.dim() == 2:
        return None if mask is None else mask[:, n_k - n_q :]
    # a real token attends to itself, whatever the pattern
    return mask[:, 0].diagonal(n_k - n_q, -2, -1)


def within_pieces(mask: Tensor, groups: list[RowGroup]) -> Tensor:
    """A pattern without the entries between different packed sequences.

    Args:
        mask: bool `[batch, 1, n, n]`.
        groups: as `packed_rows` returns them.

    Returns:
        A new mask of the same shape.
    """
    number = torch.zeros(mask.shape[0], mask.shape[-1], dtype=torch.int32)
    for rows, pieces in groups:
        for piece, (start, stop) in enumerate(pieces):
            number[rows, start:stop] = piece
    number = number.to(mask.device)
    return mask & (number[:, None, :, None] == number[:, None, None, :])


def restarts(position_ids: Tensor, real: Tensor | None) -> Tensor:
    """Marks the tokens at which the positions start again, i.e. a packed sequence begins.

    Args:
        position_ids: int64 `[batch or 1, n]`.
        real: bool `[batch, n]`, True = real token, or None when all are. Positions of padding mean
            nothing: a restart counts only on a real token that has a real one before it.

    Returns:
        bool `[batch or 1, n]`; the first token of a row is never marked.

    Example:
        >>> import torch
        >>> restarts(torch.tensor([[0, 1, 2, 0, 1]]), None).tolist()
        [[False, False, False, True, False]]
        >>> padded = torch.tensor([[False, False, True, True, True]])
        >>> restarts(torch.tensor([[1, 1, 0, 1, 2]]), padded).any().item()
        False
    """
    later = position_ids[:, 1:]
    marked = (later < position_ids[:, :-1]) | (later == 0)
    marked = nn.functional.pad(marked, (1, 0))
    if real is None:
        return marked
    return marked & real & (real.cumsum(-1) > 1)


def row_groups(starts: Tensor, batch_size: int) -> list[RowGroup] | None:
    """Groups the rows of a batch by their cuts.

    Args:
        starts: bool `[batch or 1, n]`, True where a segment begins (beside the first token).
        batch_size: rows of the batch.

    Returns:
        None when no row is cut, else `(rows, [(start, stop), ...])` pairs that cover every row.
        Reads device memory.

    Example:
        >>> import torch
        >>> row_groups(torch.tensor([[False, False, True], [False, False, False]]), 2)
        [([0], [(0, 2), (2, 3)]), ([1], [(0, 3)])]
    """
    length = starts.shape[-1]
    cuts: list[list[int]] = [[] for _ in range(starts.shape[0])]
    for row, column in starts.nonzero().tolist():
        cuts[row].append(column)
    if not any(cuts):
        return None
    if len(cuts) != batch_size:
        cuts = cuts * batch_size
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, columns in enumerate(cuts):
        rows_of.setdefault(tuple(columns), []).append(row)
    groups: list[RowGroup] = []
    for key, rows in rows_of.items():
        edges = [0, *key, length]
        groups.append((rows, list(itertools.pairwise(edges))))
    return groups
