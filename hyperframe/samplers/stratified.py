"""Stratified columns: one key of each of equally long runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ..component import check_choice, check_non_negative_int
from ..errors import UnsupportedError
from ..masks import HeavyMask, KeyBlocks
from ..randomness import check_generator, uniform
from ..rectangles import Places
from ..samples import KeySample, SampleDraw
from ..tables import kept
from ..validation import check_inputs
from .base import AbstractSampler
from .places import block_runs, whole_where_short

__all__ = ["WITH_BLOCKS", "Stratified"]

WITH_BLOCKS = ("sort_lsh", "balanced_lsh", "reformer_lsh", "pca_tree", "kmeans", "pooled_topk")
"""The built-in detectors whose masks have blocks of keys, where no row is before a key."""


@dataclass(frozen=True, kw_only=True)
class Stratified(AbstractSampler):
    """One key drawn uniformly from each of `m` runs of consecutive keys.

    Run `s` of `n` keys holds the positions from `floor(s n / m)` up to `floor((s + 1) n / m)`; the
    lengths of two runs differ by one at most. A draw stands for the keys of its run: its weight is
    the run's length. Of at most `m` keys each is taken once with weight 1, and slots that are left
    over weigh nothing (`-inf`). Runs are disjoint, so no key is drawn twice: there is
    no `replacement` to choose.

    A sum over the sample is unbiased for any function `f` of a key. Its variance is the sum over
    the runs of `length^2 var(f in the run)`; that of uniform draws is `n^2 / m var(f)`. So it is
    never larger where `m` divides `n`, and at most `ceil(n / m) / (n / m)` times as large
    otherwise. What neighbours have in common is gained, nothing is where keys are in no order.

    The runs depend on lengths alone, so no key moves the weights of a row.

    With `strata="detector"` the runs follow the blocks into which the detector put the keys: the
    blocks of equal rank of `sort_lsh`, the leaves of `pca_tree` (see `WITH_BLOCKS`). Each of `b`
    blocks is cut into `floor(m / b)` runs or one more, in its own order; of fewer samples than
    blocks, each stands for `floor(b / m)` neighbouring blocks or one more. So every block has the
    same number of draws, or one more, whatever its size, and a weight is still the length of a run.
    A function that is constant in every block has no variance where `m >= b`. Blocks are known
    where all rows see all keys: without a causal mask, and in the rectangles of the causal
    recursion; anything else is refused, as are detectors without blocks. Only attention can ask
    for such a sample: `sample` by itself has no mask (`sample_blocks` takes the blocks).

    Args:
        strata: `"positions"`, runs of consecutive keys; or `"detector"`, the detector's blocks.

    Cost: O(m) time and memory for a head; with blocks that are not equally long, O(n). Random.
    Source: stratified sampling (Cochran, Sampling Techniques, chapter 5), in place of the
    independent columns of HyperAttention, Algorithm 2, line 4.

    Example:
        >>> q = k = v = torch.zeros(1, 1, 9, 4)
        >>> sample = Stratified().sample(q, k, v, num_samples=2)
        >>> (sample.index // 4).clamp(max=1).tolist()
        [[[0, 1]]]
        >>> sample.log_weight.exp().round().tolist()
        [[[4.0, 5.0]]]
    """

    takes_stream: ClassVar[bool] = True

    strata: str = "positions"

    def __post_init__(self) -> None:
        """Check the parameter."""
        check_choice(self, "strata", self.strata, ("positions", "detector"))

    @property
    def needs_mask(self) -> bool:
        """Whether the strata are those of a detector."""
        return self.strata == "detector"

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scale: float | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Return None: every key of a run is equally likely."""
        return None

    def sample(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        generator: torch.Generator | None = None, scale: float | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw one key of each run; see the class and `AbstractSampler.sample`."""
        self._check_positions()
        check_non_negative_int(self, "num_samples", num_samples)
        check_inputs(query, key, value)
        check_generator(generator)
        runs = _runs(((0, key.shape[2]),), num_samples, key.device)
        sample = _draw(runs, (*key.shape[:2], 1, num_samples), generator)
        return KeySample(index=sample.index.squeeze(2), log_weight=sample.log_weight.squeeze(2))

    def sample_prefixes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        prefixes: torch.Tensor, generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> KeySample:  # fmt: skip
        """Draw one key of each run of each prefix; see `AbstractSampler.sample_prefixes`."""
        self._check_positions()
        check_non_negative_int(self, "num_samples", num_samples)
        check_inputs(query, key, value)
        check_generator(generator)
        num_keys = key.shape[2]
        draws = uniform((*key.shape[:2], len(prefixes), num_samples), key.device, generator)
        length = prefixes.clamp(max=num_keys).unsqueeze(-1)
        slot = torch.arange(num_samples + 1, device=key.device)
        edge = slot * length // max(1, num_samples)  # [T, m + 1]
        size = edge.diff(dim=-1)
        index = edge[:, :-1] + (draws * size).long()
        return whole_where_short(index, torch.log(size), prefixes, num_keys)

    def sample_rectangles(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, num_samples: int,
        rectangles: tuple[Places, ...], generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> KeySample | None:  # fmt: skip
        """Draw one key of each run of the keys of each rectangle; None for a detector's blocks."""
        if self.needs_mask:
            return None
        ranges = tuple(places[2:] for places in rectangles)
        runs = _runs(ranges, num_samples, key.device)
        return _draw(runs, (*key.shape[:2], len(rectangles), num_samples), generator)

    def sample_blocks(
        self, blocks: KeyBlocks, *, num_samples: int, generator: torch.Generator | None = None
    ) -> KeySample:
        """Draw one key of each run that blocks are cut into, or made of; see the class.

        Args:
            blocks: of keys, see `HeavyMask.key_blocks`.
            num_samples: number of draws `m`.
            generator: source of the draws.
        """
        check_non_negative_int(self, "num_samples", num_samples)
        order = blocks.order.long()
        start, stop = block_runs(blocks.edge, num_samples)
        draws = uniform((*order.shape[:2], num_samples), order.device, generator)
        # below the length: rounding never takes the product of a draw of 53 bits up to it. An empty
        # run weighs nothing, whatever key stands there
        place = (draws * (stop - start)).long() + start.clamp(max=order.shape[-1] - 1)
        log_weight = torch.log((stop - start).double()).float()
        return KeySample(index=order.gather(-1, place), log_weight=log_weight.expand(place.shape))

    def draws_for(
        self, mask: HeavyMask, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        num_samples: int, generator: torch.Generator | None = None, scale: float | None = None,
    ) -> SampleDraw | None:  # fmt: skip
        """Return the function that draws by positions, or by the blocks of a mask."""
        if not self.needs_mask or num_samples == 0:
            return self.draws(
                query, key, value, num_samples=num_samples, generator=generator, scale=scale
            )
        if mask.is_causal:
            raise UnsupportedError(
                "stratified(strata='detector'): blocks are made of keys that all rows see, and a "
                "single causal pass has none, since a later key would move the draws of earlier "
                "rows; use causal='recursive', whose rectangles have some, or strata='positions'"
            )
        blocks = mask.key_blocks()
        if blocks is None:
            raise UnsupportedError(
                "stratified(strata='detector'): the detector found a mask that has no blocks of "
                f"keys; {', '.join(WITH_BLOCKS[:-1])} and {WITH_BLOCKS[-1]} put keys into blocks "
                "(those that hash not under strict_causal=True); take one, by itself or in a "
                "union, or strata='positions'"
            )

        def draw(prefixes: torch.Tensor | None) -> KeySample:
            # of few keys all are taken, as by `draws`
            if num_samples >= key.shape[2]:
                index = torch.arange(key.shape[2], device=key.device).expand(*key.shape[:2], -1)
                return KeySample(index=index, log_weight=torch.zeros_like(index).float())
            return self.sample_blocks(blocks, num_samples=num_samples, generator=generator)

        return draw

    def _check_positions(self) -> None:
        if self.needs_mask:
            raise UnsupportedError(
                "stratified(strata='detector'): draws from the blocks of a mask, and was asked "
                "for a sample without one; let HyperAttention draw, hand blocks to sample_blocks, "
                "or use strata='positions'"
            )


class _Runs(NamedTuple):
    """The runs of several ranges of keys, `[ranges, m]`."""

    start: torch.Tensor  # int64
    length: torch.Tensor  # float64
    log_weight: torch.Tensor  # float32; [ranges, 1] where all runs of each range are equally long


@kept
def _runs(ranges: tuple[tuple[int, int], ...], num_samples: int, device: torch.device) -> _Runs:
    # made on the host: what a captured graph writes is not there before the graph runs
    bounds = torch.tensor(ranges, dtype=torch.int64).view(-1, 2)
    first, stop = bounds[:, :1], bounds[:, 1:]
    slot = torch.arange(num_samples + 1)
    edge = first + slot * (stop - first) // max(1, num_samples)
    start, length, slot = edge[:, :-1], edge.diff(dim=-1), slot[:-1]
    log_weight = torch.log(length.double())
    lengths = [last - begin for begin, last in ranges]
    if any(x <= num_samples for x in lengths):
        is_whole = stop - first <= num_samples
        start = torch.where(is_whole, torch.minimum(first + slot, stop - 1), start)
        length = torch.where(is_whole, 1, length)
        whole_weight = torch.where(slot < stop - first, 0.0, -torch.inf)
        log_weight = torch.where(is_whole, whole_weight.double(), log_weight)
    elif num_samples and all(x % num_samples == 0 for x in lengths):
        log_weight = log_weight[:, :1]  # kernels read one number of a list then
    return _Runs(start.to(device), length.double().to(device), log_weight.float().to(device))


def _draw(runs: _Runs, shape: tuple[int, ...], generator: torch.Generator | None) -> KeySample:
    # below the length: rounding never takes the product of a draw of 53 bits up to it
    index = (uniform(shape, runs.start.device, generator) * runs.length).long() + runs.start
    return KeySample(index=index, log_weight=runs.log_weight.expand(shape))
