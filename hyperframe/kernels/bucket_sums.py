"""Sums of signed rows: by blocks of nodes, child by child, and by nodes."""

from __future__ import annotations

import torch

from .ops import sketch as _schema
from .sketch import runs_kernels

__all__ = ["bucket_sums", "torch_bucket_sums"]


def bucket_sums(
    x: torch.Tensor, sign_words: torch.Tensor | None, order: torch.Tensor, *, nodes: int,
    blocks: int, first: int = 0, word_bits: int = 48,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the sums of the children of all nodes of a block, and those of each node's children.

    Rows `8 i` to `8 i + 7` are the children of node `i`; those that there are not are zero.

    Args:
        x: floating point `[heads, R, rows, m]`, or `[heads, 1, rows, m]` for all repetitions.
        sign_words: int64 `[heads, words, rows]`; bit `s % word_bits` of word `s // word_bits`
            is set where the row has a minus in repetition `s`. None: no signs.
        order: int64 `[heads, R, blocks * members]`, the nodes of each block; every node once, and
            numbers from `nodes` on for none.
        nodes: how many there are.
        blocks: how many there are.
        first: number of the first repetition.
        word_bits: signs in a word.

    Returns:
        `[heads, R, 8 * blocks, m]`, for every block its first children, and so on; and
        `[heads, R, nodes, m]`. No gradient.
        Cost O(R rows m) time. On CUDA with Triton one launch for float32, which reads every row
        once a repetition. No atomic sums: the same bits every time.
    """
    sums, parents = torch.ops.hyperframe.bucket_sums(
        x, sign_words, order, nodes, blocks, first, word_bits
    )
    return sums, parents


@torch.library.impl("hyperframe::bucket_sums", "default")
def _run(
    x: torch.Tensor, sign_words: torch.Tensor | None, order: torch.Tensor, nodes: int,
    blocks: int, first: int, word_bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    given = (x, sign_words, order, nodes, blocks, first, word_bits)
    if runs_kernels(x):
        from .triton import bucket_sums as kernels

        if kernels.supports(x, order):
            with torch.cuda.device(x.device):
                return kernels.triton_bucket_sums(*given)
    return torch_bucket_sums(*given)


def torch_bucket_sums(
    x: torch.Tensor, sign_words: torch.Tensor | None, order: torch.Tensor, nodes: int,
    blocks: int, first: int, word_bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `bucket_sums` says, on any device."""
    heads, repetitions, _ = order.shape
    if sign_words is not None:
        number = torch.arange(first, first + repetitions, device=x.device)
        word = sign_words[:, number // word_bits]
        signs = 1 - 2 * ((word >> (number % word_bits).unsqueeze(-1)) & 1)
        x = x * signs.to(x.dtype).unsqueeze(-1)
    x = x.expand(-1, repetitions, -1, -1)
    # one node more, without rows, stands for none
    missing = _schema.BRANCHING * (nodes + 1) - x.shape[2]
    siblings = torch.nn.functional.pad(x, (0, 0, 0, missing))
    siblings = siblings.unflatten(2, (nodes + 1, _schema.BRANCHING))
    head = torch.arange(heads, device=x.device).view(-1, 1, 1)
    repetition = torch.arange(repetitions, device=x.device).view(-1, 1)
    placed = siblings[head, repetition, order.clamp(max=nodes)]
    sums = placed.unflatten(2, (blocks, -1)).sum(dim=3).flatten(2, 3)
    return sums, siblings[:, :, :nodes].sum(dim=3)
