"""What is measured: a spec of `HyperAttention`, or a tile plan that is given beforehand."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ..attention import HyperAttention
from ..component import AbstractComponent
from ..detectors import AbstractDetector
from ..kernels import attend_all
from ..plan import TilePlan
from ..samplers import AbstractSampler

__all__ = ["AbstractMethod", "GivenTiles", "SpecMethod", "choosing_in", "tile_plan"]

Call = Callable[..., torch.Tensor]
_Component = TypeVar("_Component", bound=AbstractComponent)


@dataclass(frozen=True, kw_only=True)
class AbstractMethod(ABC):
    """An approximation to be measured.

    Attributes:
        label: what tables and plots call it.
        is_causal: the problem it solves.
    """

    label: str
    is_causal: bool

    @property
    @abstractmethod
    def spec(self) -> str:
        """Code or words that say exactly what is computed."""

    @abstractmethod
    def prepare(self, query: torch.Tensor, key: torch.Tensor, *, backend: str, seed: int) -> Call:
        """Return the function to time, of query, key, value (and `generator=`, where it draws).

        Args:
            query: `[batch, heads, n, d]`, with which it will be called.
            key: `[batch, kv_heads, n, d]`.
            backend: a name of `BACKENDS`.
            seed: of everything random.
        """

    @abstractmethod
    def in_float64(self, query: torch.Tensor, key: torch.Tensor, *, seed: int) -> Call:
        """Return the torch backend's function of float64 inputs, with the choices of `prepare`.

        The heavy entries and samples are those that the dtype of `query` gives, so that it differs
        from what `prepare` returns in nothing but rounding.
        """

    def is_exact_at(self, length: int) -> bool:
        """Whether exact attention answers a problem of that length."""
        return False

    @property
    def gate_length(self) -> int:
        """Length at which the kernels are checked."""
        return 2048


@dataclass(frozen=True, kw_only=True)
class SpecMethod(AbstractMethod):
    """`HyperAttention` from tensors to output.

    Attributes:
        attention: the options; `backend` and `seed` are replaced by those of the run.
    """

    attention: HyperAttention

    @property
    def spec(self) -> str:
        """The `repr` of the attention, which makes it again."""
        return repr(self.attention)

    def prepare(self, query: torch.Tensor, key: torch.Tensor, *, backend: str, seed: int) -> Call:
        """Return the call of the attention."""
        attention = self.attention.replace(backend=backend, seed=seed)
        return functools.partial(attention, is_causal=self.is_causal)

    def in_float64(self, query: torch.Tensor, key: torch.Tensor, *, seed: int) -> Call:
        """Return the call of an attention whose components choose in the dtype of `query`."""
        attention = self.attention.replace(
            backend="torch", seed=seed,
            detector=choosing_in(self.attention.detector, query.dtype),
            sampler=choosing_in(self.attention.sampler, query.dtype),
        )  # fmt: skip
        return functools.partial(attention, is_causal=self.is_causal)

    def is_exact_at(self, length: int) -> bool:
        """Whether `min_seq_len` answers this length exactly."""
        return length <= (self.attention.min_seq_len or 0)

    @property
    def gate_length(self) -> int:
        """Long enough for two levels of the recursion."""
        return max(2048, 4 * (self.attention.min_seq_len or 0))


def choosing_in(component: _Component, dtype: torch.dtype) -> _Component:
    """Return a detector or sampler that sees its inputs rounded to `dtype`.

    Inputs that came from `dtype` are not changed by the rounding; a hash of them is then the same
    bits, where one computed in float64 would move a few rows to other blocks.
    """
    cls = type(component)
    inherited = (AbstractDetector, AbstractSampler, AbstractComponent)
    methods = {}
    for name in dir(cls):
        found = getattr(cls, name)
        # what only hands on to other methods stays as it is, so that it draws as it did
        is_own = all(getattr(base, name, None) is not found for base in inherited)
        if name.startswith(("find", "sample", "draws", "density")) and callable(found) and is_own:
            methods[name] = _rounding(found, dtype)
    kept = {"__module__": cls.__module__, "takes_stream": getattr(cls, "takes_stream", False)}
    # the same name and base class: whoever looks at the component sees what it was
    made: Any = type(cls.__name__, (cls,), {**methods, **kept})
    chosen: _Component = made(**{name: getattr(component, name) for name in cls.parameters()})
    return chosen


def _rounding(function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def rounded(given: Any) -> Any:
        is_wider = isinstance(given, torch.Tensor) and given.dtype == torch.float64
        return given.to(dtype) if is_wider else given

    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        named = {name: rounded(option) for name, option in options.items()}
        return function(self, *map(rounded, arguments), **named)

    return method


@dataclass(frozen=True, kw_only=True)
class GivenTiles(AbstractMethod):
    """`attend_all` by a causal plan that is made before the clock starts; see `tile_plan`."""

    label: str = "given tiles"
    is_causal: bool = True

    @property
    def spec(self) -> str:
        """The plan in words."""
        return (
            f"TilePlan: {_TILE}-query tiles, {_SLOTS} keys each: {_SINKS} sinks, {_BAND} banded "
            f"({_LEFT} back), {_EXACT} random prefix keys, {_SAMPLES} weighted samples"
        )

    def prepare(self, query: torch.Tensor, key: torch.Tensor, *, backend: str, seed: int) -> Call:
        """Make the plan, and return what attends by it."""
        plan = tile_plan(query, key, seed=seed)
        return functools.partial(_attend, plan=plan, backend=backend)

    def in_float64(self, query: torch.Tensor, key: torch.Tensor, *, seed: int) -> Call:
        """Return the same plan on the torch backend."""
        return self.prepare(query, key, backend="torch", seed=seed)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, plan: TilePlan, backend: str
) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5
    return attend_all(query, key, value, [plan], scale=scale, backend=backend).out


_TILE = 64
_SINKS = 16
_LEFT = 128  # keys of the window before a row
_BAND = _LEFT + _TILE  # keys in the window of any row of a tile
_EXACT = 304
_SAMPLES = 256
_SLOTS = _SINKS + _BAND + _EXACT + _SAMPLES


def tile_plan(query: torch.Tensor, key: torch.Tensor, *, seed: int) -> TilePlan:
    """Return a causal plan like those that a selection of keys for each tile ends in.

    A tile of 64 rows lists 768 keys: a window of 128 keys back from each row, as a band; 16 sinks
    and 304 random keys of the prefix, exactly; and 256 samples of what rows of the tile have
    before their window, one from each of 256 equal runs, weighted by the length of its run (0
    where the key is held exactly). Slots that the first tiles cannot fill have weight 0.

    Args:
        query: `[batch, heads, n, d]`; read for sizes and device.
        key: `[batch, kv_heads, n, d]`.
        seed: of the random keys.

    Returns:
        The plan, with one list for each key head. Row sums are unbiased.

    Cost: O(batch kv_heads n / 64 x 768) time and memory.
    """
    device = query.device
    generator = torch.Generator(device=device).manual_seed(seed)
    batch, heads, length = key.shape[:3]
    tiles = -(-length // _TILE)
    start = torch.arange(tiles, device=device).unsqueeze(-1) * _TILE  # [T, 1]
    lists = (batch, heads, tiles)

    def draw(count: int) -> torch.Tensor:
        return torch.rand(*lists, count, generator=generator, device=device, dtype=torch.float64)

    # exact keys: one of each of equal runs of the keys between the sinks and the tile's window
    width = (start - _LEFT - _SINKS).clamp(min=0)  # [T, 1]
    run = torch.arange(_EXACT + 1, device=device) * width // _EXACT  # [T, E + 1]
    sizes = run.diff(dim=-1)
    exact = run[:, :-1] + (draw(_EXACT) * sizes).long()  # [B, H, T, E], counted after the sinks
    exact_weight = torch.where(sizes > 0, 0.0, float("-inf")).expand_as(exact)

    # samples: also of keys that only some rows have in their window, settled by the band
    width_sampled = (start - _TILE - _SINKS).clamp(min=0)
    run = torch.arange(_SAMPLES + 1, device=device) * width_sampled // _SAMPLES
    sizes = run.diff(dim=-1)
    sampled = run[:, :-1] + (draw(_SAMPLES) * sizes).long()
    # the one exact key that a sample could be: that of its own run
    own = ((sampled + 1) * _EXACT - 1).div(width.clamp(min=1), rounding_mode="floor")
    is_before = sampled < width
    twin = exact.gather(-1, torch.where(is_before, own, 0).clamp(0, _EXACT - 1))
    is_held = is_before & (twin == sampled)
    sampled_weight = sizes.double().log().expand_as(sampled).masked_fill(is_held, float("-inf"))

    begin = (start - _LEFT).clamp(min=_SINKS)
    banded = begin + torch.arange(_BAND, device=device)  # [T, W]
    banded_weight = torch.where(banded < (start + _TILE).clamp(max=length), 0.0, float("-inf"))
    sinks = torch.arange(_SINKS, device=device)
    sinks_weight = torch.where(sinks < length, 0.0, float("-inf"))

    pieces = (
        (banded, banded_weight), (sinks, sinks_weight),
        (exact + _SINKS, exact_weight), (sampled + _SINKS, sampled_weight),
    )  # fmt: skip
    index = torch.cat([piece.expand(*lists, piece.shape[-1]) for piece, _ in pieces], dim=-1)
    weight = torch.cat([piece.expand(*lists, piece.shape[-1]) for _, piece in pieces], dim=-1)

    def count(slots: int) -> torch.Tensor:
        return torch.tensor(slots, dtype=torch.int32, device=device).expand(lists)

    return TilePlan(
        key_index=index.clamp(max=length - 1).int(), log_weight=weight.float(),
        key_count=count(_SLOTS), heavy_count=count(_SLOTS - _SAMPLES), band_count=count(_BAND),
        band=(_LEFT, 0), tile_size=_TILE, num_query_heads=query.shape[1],
        num_queries=length, num_keys=length, is_causal=True, disjoint=True,
    )  # fmt: skip
