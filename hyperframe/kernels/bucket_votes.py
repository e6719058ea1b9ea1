"""What share of the softmax keys have that single rows found: weights for a vote of their tile."""

from __future__ import annotations

import torch

from ..precision import without_autocast
from ..ragged import spread_heads
from .ops import bucket_votes as _schema  # noqa: F401  (defines the operator implemented here)
from .ops import has_triton

__all__ = ["bucket_votes", "torch_bucket_votes"]

_CHUNK_BYTES = 64 << 20  # of keys and logits held at once
_NUM_SPREAD, _NUM_FIRST = 64, 4  # keys that stand for all before a tile, and first keys


def bucket_votes(
    voters: torch.Tensor, key: torch.Tensor, index: torch.Tensor, score: torch.Tensor,
    before: torch.Tensor, *, size: int, votes: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the keys that rows vote for, and about what share of the row's softmax each has.

    The normaliser of a row is made of the keys that it found and of a fixed look at what comes
    before its tile: 64 keys evenly spread, which stand for all of them, and the first 4.

    Args:
        voters: `[batch, query_heads, n, d]`.
        key: `[batch, key_heads, n_k, d]`, of the same dtype.
        index: int32 `[batch, query_heads, n, found]`, -1 for none.
        score: the logits of those, of the same shape.
        before: integer `[ceil(n / size)]`, keys that come before each tile; none below 1.
        size: rows of a tile.
        votes: keys to take of those that a row found, the ones with the largest shares; at most
            `found`, which leaves all of them where they are.
        scale: factor of the logits.

    Returns:
        Keys int32 `[batch, query_heads, n, votes]`, and their shares, of the dtype of `score`: 0
        for no key, and for one that the row has in an earlier slot. No gradient. Cost
        O(n (d + found^2)) time, memory as that of `score` and one bounded chunk. On CUDA with
        Triton one launch, for tiles of up to 128 rows, d <= 256 and up to 64 keys found by a row.
    """
    voted, weight = torch.ops.hyperframe.bucket_votes(
        voters.detach(), key.detach(), index, score, before, size, votes, scale
    )
    return voted, weight


@torch.library.impl("hyperframe::bucket_votes", "default")
def _run(
    voters: torch.Tensor, key: torch.Tensor, index: torch.Tensor, score: torch.Tensor,
    before: torch.Tensor, size: int, votes: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if key.is_cuda and torch.version.hip is None and has_triton():
        from .triton import bucket_votes as kernels

        if kernels.supports(voters, key, index, size):
            with torch.cuda.device(key.device):
                return kernels.triton_bucket_votes(
                    voters, key, index, score, before, size, votes, scale
                )
    return torch_bucket_votes(voters, key, index, score, before, size, votes, scale)


def torch_bucket_votes(
    voters: torch.Tensor, key: torch.Tensor, index: torch.Tensor, score: torch.Tensor,
    before: torch.Tensor, size: int, votes: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Do what `bucket_votes` says, for some tiles at a time."""
    weight = torch.zeros_like(score)
    batch, heads, num_rows, dim = voters.shape
    looked = _NUM_SPREAD + _NUM_FIRST
    per_tile = 4 * batch * heads * (looked * (dim + 2 * size) + size * (dim + 4 * index.shape[3]))
    step = max(1, _CHUNK_BYTES // max(1, per_tile))
    for start in range(0, len(before), step):
        rows = slice(start * size, min((start + step) * size, num_rows))
        weight[:, :, rows] = _weights(
            voters[:, :, rows], key, index[:, :, rows], score[:, :, rows],
            before[start : start + step], size, scale,
        )  # fmt: skip
    if votes == index.shape[-1]:
        return index.clone(), weight
    # stable: of ties the first
    best = weight.sort(dim=-1, descending=True, stable=True)
    return index.gather(-1, best.indices[..., :votes]), best.values[..., :votes].contiguous()


def _weights(
    voters: torch.Tensor, key: torch.Tensor, index: torch.Tensor, score: torch.Tensor,
    before: torch.Tensor, size: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    lacking = len(before) * size - voters.shape[2]
    rows = torch.nn.functional.pad(voters, (0, 0, 0, lacking)).unflatten(2, (len(before), size))
    looked, log_weight = _look(before, key.device)
    at = looked.clamp(max=key.shape[2] - 1)
    keys = spread_heads(key[:, :, at].to(score.dtype), voters.shape[1])  # [B, H, T, 68, d]
    with without_autocast(key):
        logits = (rows.to(score.dtype) * scale) @ keys.transpose(-1, -2)
    logits = logits + log_weight.to(score.dtype).unsqueeze(1)
    others = logits.flatten(2, 3)[:, :, : voters.shape[2]].logsumexp(dim=-1, keepdim=True)
    is_one = index >= 0
    for slot in range(1, index.shape[-1]):
        is_one[..., slot] &= ~(index[..., :slot] == index[..., slot, None]).any(dim=-1)
    found = score.masked_fill(~is_one, float("-inf"))
    normaliser = torch.logaddexp(others, found.logsumexp(dim=-1, keepdim=True))
    return torch.where(is_one, (found - normaliser).exp(), 0)


def _look(before: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys that stand for all before tiles, and their log weights: `[tiles, 68]`."""
    count = before.clamp(min=0).unsqueeze(-1)
    slot = torch.arange(_NUM_SPREAD, device=device)
    is_all = count <= _NUM_SPREAD
    spread = torch.where(is_all, slot, (2 * slot + 1) * count // (2 * _NUM_SPREAD))
    share = torch.where(is_all, 0.0, (count.double() / _NUM_SPREAD).log())
    first = torch.arange(_NUM_FIRST, device=device).expand(len(before), -1)
    looked = torch.cat([spread, first], dim=1)
    log_weight = torch.cat([share.expand(-1, _NUM_SPREAD), torch.zeros_like(first)], dim=1)
    return looked, log_weight.masked_fill(looked >= count, float("-inf"))
