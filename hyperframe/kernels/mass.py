"""Softmax mass of the keys in a tile's list, summed over the rows of the tile."""

from __future__ import annotations

from math import log
from typing import NamedTuple

import torch

from ..errors import ArgumentError
from ..precision import without_autocast
from .ops import has_triton
from .ops import mass as _schema  # noqa: F401  (defines the operator implemented here)

__all__ = ["NO_WINDOW", "Window", "tile_mass", "torch_tile_mass"]

_CHUNK_BYTES = 64 << 20  # of keys, logits and what is made of them, held at once


class Window(NamedTuple):
    """What bands hold: keys around a row's own position, and the first ones.

    Attributes:
        left: keys before the position; -1 for no window at all.
        right: keys after it.
        num_sinks: leading keys that every row holds.
    """

    left: int
    right: int
    num_sinks: int

    def holds(self, key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Return whether rows hold keys by the bands; broadcasts positions of both."""
        offset = key - position
        return ((offset >= -self.left) & (offset <= self.right)) | (key < self.num_sinks)


NO_WINDOW = Window(-1, -1, 0)


def tile_mass(
    voters: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, key: torch.Tensor,
    index: torch.Tensor, begin: torch.Tensor, window: Window = NO_WINDOW, *, scale: float,
    is_causal: bool, is_delayed: bool = False, stride: int = 1, step: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Return the softmax mass that each tile's voters give to its candidates.

    The softmax of a voter is over the candidates and what the window holds for it; under
    `is_causal`, over those before the tile. A candidate has no mass in a row that holds it by the
    window.

    Args:
        voters: `[batch, query_heads, tiles, size, d]`.
        rows: integer `[tiles]`, how many voters there are; the others do not count.
        position: integer `[tiles]`, key position of the first voter.
        key: `[batch, key_heads, n_k, d]`, of the same dtype.
        index: int32 or int64 `[batch, query_heads, tiles, L]`, candidates, ascending, none twice;
            `n_k` fills the rest.
        begin: integer `[tiles]`, key position of the first row of the tile.
        window: what bands hold.
        scale: factor of the logits.
        is_causal: whether keys from the tile on are left out.
        is_delayed: whether the voters end with the first row of the tile.
        stride: where above 1, the softmax counts only every `stride`-th slot of the list, `stride`
            times over. Masses are then estimates, good for ranking, and no row gives more than 1
            to a key. What the window holds is counted in full.
        step: positions from one voter to the next: above 1 where only some rows of a tile vote.

    Returns:
        `[batch, query_heads, tiles, L]`, in float32 at least; -1 for none. No gradient.
        Cost O(tiles size (L + L / stride + window) d) time. On CUDA with Triton one launch, for
        tiles of up to 128 rows and d <= 256; elsewhere in chunks of bounded memory.

    Raises:
        ArgumentError: for `stride` or `step` below 1.
    """
    if stride < 1:
        raise ArgumentError(f"tile_mass: stride={stride} counts nothing; pass at least 1")
    if step < 1:
        raise ArgumentError(
            f"tile_mass: step={step} does not lead from a voter to the next; pass at least 1"
        )
    mass: torch.Tensor = torch.ops.hyperframe.tile_mass(
        voters.detach(), rows, position, key.detach(), index, begin, list(window), scale,
        is_causal, is_delayed, stride, step,
    )  # fmt: skip
    return mass


@torch.library.impl("hyperframe::tile_mass", "default")
def _run(
    voters: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, key: torch.Tensor,
    index: torch.Tensor, begin: torch.Tensor, window: list[int], scale: float, is_causal: bool,
    is_delayed: bool, stride: int, step: int = 1,
) -> torch.Tensor:  # fmt: skip
    if key.is_cuda and torch.version.hip is None and has_triton():
        from .triton import mass as kernels

        if kernels.supports(voters, key):
            with torch.cuda.device(key.device):
                return kernels.triton_tile_mass(
                    voters, rows, position, key, index, begin, (window[0], window[1], window[2]),
                    scale=scale, is_causal=is_causal, is_delayed=is_delayed, stride=stride,
                    step=step,
                )  # fmt: skip
    return torch_tile_mass(
        voters, rows, position, key, index, begin, Window(*window), scale=scale,
        is_causal=is_causal, is_delayed=is_delayed, stride=stride, step=step,
    )  # fmt: skip


def torch_tile_mass(
    voters: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, key: torch.Tensor,
    index: torch.Tensor, begin: torch.Tensor, window: Window, *, scale: float, is_causal: bool,
    is_delayed: bool, stride: int = 1, step: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Do what `tile_mass` says, for some tiles at a time, on any device."""
    batch, heads, tiles, slots = index.shape
    dtype = torch.promote_types(key.dtype, torch.float32)
    mass = torch.empty(index.shape, dtype=dtype, device=index.device)
    size = voters.shape[3]
    width = slots + max(0, window.left + window.right + 2 * size * step + window.num_sinks)
    per_tile = 4 * batch * heads * width * (key.shape[-1] + 4 * size)
    some = max(1, _CHUNK_BYTES // max(1, per_tile))
    for start in range(0, tiles, some):
        part = slice(start, start + some)
        mass[:, :, part] = _mass(
            voters[:, :, part], rows[part], position[part], key, index[:, :, part], begin[part],
            window, scale=scale, is_causal=is_causal, is_delayed=is_delayed, stride=stride,
            step=step,
        )  # fmt: skip
    return mass


def _mass(
    voters: torch.Tensor, rows: torch.Tensor, position: torch.Tensor, key: torch.Tensor,
    index: torch.Tensor, begin: torch.Tensor, window: Window, *, scale: float, is_causal: bool,
    is_delayed: bool, stride: int, step: int,
) -> torch.Tensor:  # fmt: skip
    num_keys = key.shape[2]
    dtype = torch.promote_types(key.dtype, torch.float32)
    lowest = torch.finfo(dtype).min  # finite: where nothing is seen, no NaN is born
    size = voters.shape[3]
    at = position.unsqueeze(-1) + torch.arange(size, device=key.device) * step  # [T, S]
    counts = torch.arange(size, device=key.device) < rows.unsqueeze(-1)
    logits = _logits(voters, key, index.clamp(max=max(0, num_keys - 1)), scale)
    there = index.unsqueeze(3)  # [B, H, T, 1, L]
    hidden = (there >= num_keys) | window.holds(there, at.unsqueeze(-1))
    if is_causal:
        hidden = hidden | (there > at.unsqueeze(-1))
    logits = logits.masked_fill(hidden, lowest)
    normaliser = logits[..., ::stride].logsumexp(dim=-1, keepdim=True) + log(stride)
    if window.left >= 0:
        # from what the first voter holds on, which may come a tile before the first row
        reach = (size - 1) * step
        lag = reach if is_delayed else 0
        span = window.left + lag + (0 if is_causal else reach + 1 + window.right)
        near = position.unsqueeze(-1) - window.left + torch.arange(span, device=key.device)
        sinks = torch.arange(min(window.num_sinks, num_keys), device=key.device)
        near = torch.cat([sinks.expand(len(begin), -1), near], dim=1)  # [T, W]
        is_sink = torch.arange(near.shape[1], device=key.device) < len(sinks)
        real = (near >= torch.where(is_sink, 0, len(sinks))) & (near < num_keys)
        if is_causal:
            real = real & (near < begin.unsqueeze(-1))
        held = real.unsqueeze(1) & window.holds(near.unsqueeze(1), at.unsqueeze(-1))
        if is_causal:
            held = held & (near.unsqueeze(1) <= at.unsqueeze(-1))
        near = near.clamp(0, max(0, num_keys - 1)).expand(*index.shape[:2], -1, -1)
        others = _logits(voters, key, near, scale).masked_fill(~held, lowest)
        normaliser = torch.logaddexp(normaliser, others.logsumexp(dim=-1, keepdim=True))
    share = logits - normaliser
    if stride > 1:
        # a sum that lacks a key may be smaller than its term, or nothing
        share = share.clamp(max=0).masked_fill(normaliser < lowest / 2, lowest)
    mass = share.exp().masked_fill(hidden | ~counts.unsqueeze(-1), 0)
    return mass.sum(dim=3).masked_fill(index >= num_keys, -1.0)


def _logits(
    voters: torch.Tensor, key: torch.Tensor, index: torch.Tensor, scale: float
) -> torch.Tensor:
    """Logits `[B, H, T, S, L]` of voters `[B, H, T, S, d]` and the keys of lists `[B, H, T, L]`."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    batch, heads, tiles, length = index.shape
    dim = key.shape[-1]
    flat = index.long().reshape(batch, key.shape[1], heads // key.shape[1] * tiles * length, 1)
    listed = key.gather(2, flat.expand(-1, -1, -1, dim)).to(dtype)
    listed = listed.view(batch, heads, tiles, length, dim)
    with without_autocast(key):
        logits: torch.Tensor = (voters.to(dtype) * scale) @ listed.transpose(-1, -2)
    return logits
