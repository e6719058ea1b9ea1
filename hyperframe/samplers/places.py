"""What samples need to know of lengths: tables of rectangles, and prefixes taken whole."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..rectangles import Places
from ..samples import KeySample
from ..tables import int_table, kept

__all__ = [
    "RectangleTable",
    "block_runs",
    "rectangle_table",
    "uniform_weight",
    "whole_where_short",
]


def whole_where_short(
    index: torch.Tensor, log_weight: torch.Tensor, prefixes: torch.Tensor, num_keys: int
) -> KeySample:
    """Return samples `[batch, key_heads, tiles, m]`, prefixes of at most `m` keys taken whole.

    `log_weight` may lack leading dimensions and have one sample, where those do not matter to it.
    """
    num_samples = index.shape[-1]
    slot = torch.arange(num_samples, device=index.device)
    is_whole = prefixes.unsqueeze(-1) <= num_samples
    whole_weight = torch.where(slot < prefixes.unsqueeze(-1), 0.0, float("-inf"))
    log_weight = torch.where(is_whole, whole_weight, log_weight.float())
    index = torch.where(is_whole, slot.clamp(max=num_keys - 1), index)
    return KeySample(index=index, log_weight=log_weight.expand(index.shape))


class RectangleTable(NamedTuple):
    """What draws from rectangles need, `[rectangles, 1]` or `[rectangles, m]`."""

    length: torch.Tensor  # float64
    start: torch.Tensor  # int64
    log_weight: torch.Tensor  # float32
    is_whole: torch.Tensor | None = None  # bool; None if all rectangles are drawn from
    whole: torch.Tensor | None = None  # int64, the keys of those that are not


@kept
def uniform_weight(num_keys: int, num_samples: int, device: torch.device) -> torch.Tensor:
    """Return the log weight of every uniform draw, float32: one number, to be expanded."""
    # copied from the host, like every kept table: what a captured graph writes is not there before
    # the graph runs, and a copy in a capture is refused
    return torch.tensor(math.log(num_keys / max(1, num_samples)), dtype=torch.float32).to(device)


@kept
def rectangle_table(
    rectangles: tuple[Places, ...], num_samples: int, device: torch.device
) -> RectangleTable:
    """Return what uniform draws from rectangles need; see `AbstractSampler.sample_rectangles`."""
    bounds = int_table([places[2:] for places in rectangles], 2, device).long()
    start, stop = bounds[:, :1], bounds[:, 1:]
    length = (stop - start).double()
    log_weight = torch.log(length / max(1, num_samples))
    if all(last - first > num_samples for _, _, first, last in rectangles):
        return RectangleTable(length, start, log_weight.float())
    slot = torch.arange(num_samples, device=device)
    is_whole = length <= num_samples
    log_weight = torch.where(is_whole, torch.where(slot < length, 0.0, -torch.inf), log_weight)
    whole = torch.minimum(start + slot, stop - 1)
    return RectangleTable(length, start, log_weight.float(), is_whole, whole)


def block_runs(edge: torch.Tensor, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `m` runs of places that blocks are cut into, or made of: int64 `[m]`, start and stop.

    With at least as many runs as blocks, every block is cut into `floor(m / blocks)` runs or one
    more, whose lengths differ by one at most, and may be 0. With fewer, a run is
    `floor(blocks / m)` neighbouring blocks or one more.

    Args:
        edge: int64 `[blocks + 1]`, where blocks begin, and where the last one ends.
        num_samples: `m`.

    Example:
        >>> start, stop = block_runs(torch.tensor([0, 4, 7]), 4)
        >>> (stop - start).tolist(), (block_runs(torch.tensor([0, 4, 7]), 1)[1]).tolist()
        ([2, 2, 1, 2], [7])
    """
    blocks = len(edge) - 1
    slot = torch.arange(num_samples, device=edge.device)
    if num_samples < blocks:
        first = slot * blocks // max(1, num_samples)
        last = (slot + 1) * blocks // max(1, num_samples)
        return edge[first], edge[last]
    block = ((slot + 1) * blocks - 1) // num_samples  # the last one with a run at or before a slot
    first = block * num_samples // blocks  # the first run of that block
    runs = (block + 1) * num_samples // blocks - first
    begin, length = edge[block], edge[block + 1] - edge[block]
    number = slot - first
    return begin + number * length // runs, begin + (number + 1) * length // runs
