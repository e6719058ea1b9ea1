"""Draws without replacement: no key twice, and every key with a known probability.

Uniformly, they are the first places of a random permutation. By a density, key `j` is drawn with
the probability `pi_j = min(1, c p_j)` and weighs `1 / pi_j` (Horvitz and Thompson), by systematic
sampling: the points `u, u + 1, u + 2, ...` on a line where key `j` takes up the length `pi_j`.
"""

from __future__ import annotations

import torch

from ..randomness import Stream, uniform
from ..samples import KeySample
from .independent import SMALLEST_SHARE
from .places import uniform_weight

__all__ = [
    "distinct_in_prefixes",
    "distinct_places",
    "distinct_sample",
    "inclusion_probabilities",
]


def distinct_places(draws: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Return the first places of a random permutation of `0 .. length - 1`.

    Step `s` of Fisher and Yates exchanges the place `s` with one of `s .. length - 1`. Here all
    steps are taken at once: what step `s` finds at its place was put there by the last step before
    it that chose the same place, and is what that step had found at its own.

    Args:
        draws: float64 `[..., m]` from [0, 1).
        length: broadcast to `[..., 1]`, at least `m` (of shorter ones places repeat).

    Returns:
        int64 `[..., m]`; every ordered choice of `m` places is equally likely.
        Cost O(m log m) for each list.
    """
    count = draws.shape[-1]
    if count == 0:
        return draws.long()
    slot = torch.arange(count, device=draws.device)
    left = (length.long() - slot).clamp(min=1)
    chosen = slot + torch.minimum((draws * left).long(), left - 1)
    ordered, order = chosen.sort(dim=-1, stable=True)
    is_again = torch.zeros_like(ordered, dtype=torch.bool)
    is_again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    # the last step before each that chose the same place, or -1
    last = torch.empty_like(order)
    last.scatter_(-1, order, torch.where(is_again, order.roll(1, dims=-1), -1))
    # and the last step before step s that chose the place s: its content went there
    is_hit = (chosen < count) & (chosen > slot)
    holder = torch.full((*chosen.shape[:-1], count + 1), -1, device=draws.device)
    holder = holder.scatter_reduce(
        -1, torch.where(is_hit, chosen, count), slot.expand_as(chosen), "amax"
    )[..., :count]
    content = torch.where(holder < 0, slot, holder)
    for _ in range((count - 1).bit_length()):  # to the end of every chain: doubling
        content = content.gather(-1, content)
    return torch.where(last < 0, chosen, content.gather(-1, last.clamp(min=0)))


def inclusion_probabilities(density: torch.Tensor, count: int) -> torch.Tensor:
    """Return `min(1, c p_j)`, with the `c` for which they add up to `count`.

    Args:
        density: positive, float64 `[..., n]`, `n > count`.
        count: how many keys will be drawn, at least 1.
    """
    largest = density.sort(dim=-1, descending=True).values
    rest = largest.flip(-1).cumsum(dim=-1).flip(-1)  # what the key of a rank and all smaller have
    left = count - torch.arange(count, device=density.device)
    # with the k largest certain, c = (count - k) / rest_k: is c p still above 1 for the next?
    is_certain = largest[..., :count] * left > rest[..., :count]
    certain = is_certain.sum(dim=-1, keepdim=True)  # the last of `count` never is
    return (density * ((count - certain) / rest.gather(-1, certain))).clamp(max=1.0)


def distinct_sample(
    density: torch.Tensor | None, shape: tuple[int, int, int], count: int, device: torch.device,
    generator: torch.Generator | Stream | None,
) -> KeySample:  # fmt: skip
    """Draw `count` of all keys without replacement.

    By a density, the keys come in a random order first: neither a period of the keys nor their
    order matters to what is drawn together.

    Args:
        density: positive, float64 `[batch, key_heads, n_k]`, or None: uniformly.
        shape: `(batch, key_heads, n_k)`.
        count: how many; all keys once with weight 1 if there are no more.
        device: where.
        generator: source of the draws.

    Returns:
        `[batch, key_heads, count]`. Cost O(count log count), or O(n_k log n_k) by a density.
    """
    num_keys, lists = shape[2], (*shape[:2], count)
    if num_keys <= count:
        slot = torch.arange(count, device=device)
        weight = torch.where(slot < num_keys, 0.0, -torch.inf)
        index = slot.clamp(max=max(0, num_keys - 1)).expand(lists)
        return KeySample(index=index, log_weight=weight.expand(lists))
    if density is None or count == 0:
        draws = uniform(lists, device, generator)
        index = distinct_places(draws, torch.full((1,), num_keys, device=device))
        return KeySample(
            index=index, log_weight=uniform_weight(num_keys, count, device).expand(lists)
        )
    order = uniform(shape, device, generator).argsort(dim=-1)
    start = uniform((*shape[:2], 1), device, generator)
    probability = inclusion_probabilities(density, count)
    cumulative = probability.gather(-1, order).cumsum(dim=-1)
    # the last sum is `count`, but for rounding
    points = (torch.arange(count, device=device) + start) * (cumulative[..., -1:] / count)
    place = torch.searchsorted(cumulative, points, right=True).clamp(max=num_keys - 1)
    index = order.gather(-1, place)
    return _without_repeats(index, -probability.gather(-1, index).log())


def distinct_in_prefixes(
    density: torch.Tensor, length: torch.Tensor, seen: torch.Tensor, start: torch.Tensor,
    count: int,
) -> KeySample:  # fmt: skip
    """Draw from prefixes without replacement, `pi_j = min(1, m p_j)` in the order of the keys.

    `p_j` mixes the density with the uniform one as `AbstractSampler.sample_prefixes` does, but the
    uniform share is `m / length` where that is more: the nearer the prefix comes to `m` keys, the
    nearer `pi` to 1, without a look at which keys are certain. A key with `m p_j > 1` is certain,
    and the slots of further points that fall on it weigh nothing.

    Args:
        density: float64 `[batch, key_heads, n_k]`; entries from `seen` on are not looked at.
        length: int64 `[tiles, 1]`, keys of each prefix; above `count` (shorter: anything).
        seen: int64 `[tiles, 1]`, how many of them the density speaks for.
        start: float64 `[batch, key_heads, tiles, 1]` from [0, 1).
        count: points `m` in each prefix.

    Returns:
        `[batch, key_heads, tiles, count]`. Cost O(m log n_k) for each prefix, and O(n_k).
    """
    lists = (*start.shape[:3], count)
    cumulative = density.cumsum(dim=-1)
    last = (seen - 1).clamp(min=0)
    total = cumulative[..., last.squeeze(-1)].unsqueeze(-1)  # [B, H, T, 1]
    each = count / length.double()  # what a key takes up if all take up the same
    share = (total > 0) * (1 - each.clamp(min=SMALLEST_SHARE, max=1.0))
    by_density = each * seen * share / total.clamp(min=1e-300)
    evenly = each * (1 - share)
    points = torch.arange(count, device=density.device) + start

    def at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return values.gather(-1, index.flatten(2)).view(lists)

    # the first seen key whose end lies beyond the point, by bisection: the line is the tile's own
    low = torch.zeros(lists, dtype=torch.int64, device=density.device)
    high = last.expand(lists)
    for _ in range(density.shape[-1].bit_length()):
        middle = (low + high) // 2
        is_beyond = by_density * at(cumulative, middle) + evenly * (middle + 1) > points
        high = torch.where(is_beyond, middle, high)
        low = torch.where(is_beyond, low, torch.minimum(middle + 1, high))
    # keys behind the seen ones take up the same length each
    behind = torch.minimum(torch.maximum((points / each).long(), seen), length - 1)
    is_seen = points < each * seen
    index = torch.where(is_seen, low, behind)
    probability = torch.where(is_seen, by_density * at(density, low) + evenly, each)
    return _without_repeats(index, -probability.clamp(max=1.0).log())


def _without_repeats(index: torch.Tensor, log_weight: torch.Tensor) -> KeySample:
    """Return a sample whose slots weigh nothing where the slot before has the same key."""
    is_again = torch.zeros_like(index, dtype=torch.bool)
    is_again[..., 1:] = index[..., 1:] == index[..., :-1]
    return KeySample(index=index, log_weight=log_weight.masked_fill(is_again, -torch.inf).float())
