"""Random draws: only through an explicit source, seeded and reproducible.

An attention call draws from a `Stream`: every number is a function of a seed, of the number of
draws before and of its place in the draw, and there is no state on the device. So a call can be
compiled, captured in a CUDA graph and recomputed by gradient checkpointing, and it gives the same
numbers on every device.

A `torch.Generator` is welcome wherever a stream is. It draws on its own device and the numbers
move to the tensors' device, so a CPU generator too gives the same numbers everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .errors import ArgumentError, ArgumentTypeError
from .kernels.ops.random import (
    prefix_draws,
    random_normal,
    random_uniform,
    range_draws,
    spread_range_draws,
    weigh_prefix_draws,
)

__all__ = [
    "Stream",
    "check_generator",
    "draws_in_prefixes",
    "draws_in_ranges",
    "fold_in",
    "make_generator",
    "normal",
    "uniform",
    "with_generator",
]

_Result = TypeVar("_Result")

_MASK = (1 << 63) - 1


def fold_in(seed: int, *data: int) -> int:
    """Return a seed that depends on `seed` and all of `data` (splitmix64 steps).

    Example:
        >>> fold_in(0, 1) != fold_in(0, 2)
        True
    """
    state = 0
    for value in (seed, *data, 0x9E3779B9):  # the seed is mixed first: (0, 1) is not (1, 0)
        state = (state + 0x9E3779B97F4A7C15 + (value & 0xFFFFFFFFFFFFFFFF)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK


class Stream:
    """Independent draws that follow from a seed; each draw takes the next number of a count.

    Args:
        seed: an int, or an int64 tensor with one element: read on its device when a draw runs, so
            that a captured graph or compiled code draws anew when the tensor is filled anew. An
            int and a tensor of equal value give equal draws.

    Cost: one kernel launch a draw on a GPU with Triton, and one for an int seed. Nothing waits for
    the device. No gradient.

    Example:
        >>> stream, again = Stream(3), Stream(torch.tensor(3))
        >>> first, second = (stream.uniform((4,), torch.device("cpu")) for _ in range(2))
        >>> torch.equal(first, second), torch.equal(first, again.uniform((4,), first.device))
        (False, True)
    """

    def __init__(self, seed: int | torch.Tensor) -> None:
        if isinstance(seed, int) and not -(1 << 63) <= seed < 1 << 63:
            seed = fold_in(seed)
        self.seed = seed
        self.num_draws = 0
        self._stored: torch.Tensor | None = None

    def __repr__(self) -> str:
        """Return what it draws next; reads no tensor."""
        seed = "tensor" if isinstance(self.seed, torch.Tensor) else self.seed
        return f"Stream(seed={seed}, num_draws={self.num_draws})"

    @classmethod
    def of(cls, seed: int | None, device: torch.device) -> Stream:
        """Return a stream for tensors on `device`.

        Args:
            seed: the seed; None draws one from torch's global CPU generator, so that
                `torch.manual_seed` governs it and a checkpointed forward is recomputed alike.
            device: where it will draw.
        """
        if seed is not None:
            return cls(seed)
        drawn = torch.randint(_MASK, (), device="cpu")
        if torch.compiler.is_compiling():  # a value would be read while nothing runs
            return cls(drawn.to(device))
        return cls(int(drawn.item()))

    def uniform(
        self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """Return draws from [0, 1), evenly spaced in the precision of `dtype`."""
        drawn = random_uniform(self._seed_on(device), self._next(), shape).to(device)
        if dtype == torch.float64:
            return drawn
        steps = 2 / torch.finfo(dtype).eps  # rounding to nearest could return 1
        return ((drawn * steps).floor() / steps).to(dtype)

    def in_prefixes(
        self, prefixes: torch.Tensor, shape: tuple[int, int, int, int], num_keys: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uniform draws from prefixes of the keys, as `uniform` and a product give.

        Args:
            prefixes: int64 `[tiles]`, lengths.
            shape: `(batch, heads, tiles, m)`.
            num_keys: keys of the call.

        Returns:
            Keys, int64 of that shape, and log weights, float32 `[tiles, m]`: see
            `kernels.ops.random.weigh_prefix_draws`.
        """
        source = self.next_draw(prefixes.device)
        return prefix_draws(*source, prefixes, shape, num_keys)

    def next_draw(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """Return what the next draw follows from, for operators that draw by themselves.

        Args:
            device: where they run.

        Returns:
            The seed, on the device, and the number of the draw, as `kernels.ops.random` takes them.
        """
        return self._seed_on(device).to(device), self._next()

    def in_ranges(
        self, start: torch.Tensor, length: torch.Tensor, shape: tuple[int, int, int, int]
    ) -> torch.Tensor:
        """Return uniform draws from ranges of the keys, as `uniform` and a product give.

        Args:
            start: int64 `[ranges, 1]`, the first key of each.
            length: float64 `[ranges, 1]`, how many keys each has.
            shape: `(batch, heads, ranges, m)`.

        Returns:
            Keys, int64 of that shape: see `kernels.ops.random.spread_range_draws`.
        """
        seed = self._seed_on(start.device)
        if seed.device != start.device:
            return spread_range_draws(self.uniform(shape, start.device), start, length)
        return range_draws(seed, self._next(), start, length, shape)

    def normal(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Return float32 draws from the standard normal distribution."""
        return random_normal(self._seed_on(device), self._next(), shape).to(device)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a new generator on `device`, its seed the next draw.

        A seed on a GPU is read, which waits for the device and cannot be captured or compiled.
        """
        return torch.Generator(device=device).manual_seed(fold_in(int(self.seed), self._next()))

    def _next(self) -> int:
        self.num_draws += 1
        return self.num_draws - 1

    def _seed_on(self, device: torch.device) -> torch.Tensor:
        if isinstance(self.seed, torch.Tensor):
            return self.seed
        if self._stored is None or self._stored.device != device:
            self._stored = torch.full((), self.seed, dtype=torch.int64, device=device)
        return self._stored


def make_generator(seed: int | None, device: torch.device | str) -> torch.Generator:
    """Return a new generator on `device`.

    Args:
        seed: the seed; None draws one from torch's global CPU generator, so that
            `torch.manual_seed` governs it and a checkpointed forward is recomputed alike.
        device: where it draws.
    """
    if seed is None:
        seed = int(torch.randint(_MASK, (), device="cpu").item())
    return torch.Generator(device=device).manual_seed(fold_in(seed))


def uniform(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | Stream | None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:  # fmt: skip
    """Return draws from [0, 1)."""
    if isinstance(generator, Stream):
        return generator.uniform(shape, device, dtype)
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=dtype, device=source).to(device)


def draws_in_prefixes(
    prefixes: torch.Tensor, shape: tuple[int, int, int, int], num_keys: int,
    generator: torch.Generator | Stream | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return keys drawn uniformly from prefixes, and log weights; see `Stream.in_prefixes`."""
    if isinstance(generator, Stream):
        return generator.in_prefixes(prefixes, shape, num_keys)
    return weigh_prefix_draws(uniform(shape, prefixes.device, generator), prefixes, num_keys)


def draws_in_ranges(
    start: torch.Tensor, length: torch.Tensor, shape: tuple[int, int, int, int],
    generator: torch.Generator | Stream | None,
) -> torch.Tensor | None:  # fmt: skip
    """Return keys drawn uniformly from ranges by a stream, see `Stream.in_ranges`, or None."""
    return generator.in_ranges(start, length, shape) if isinstance(generator, Stream) else None


def normal(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | Stream | None
) -> torch.Tensor:
    """Return float32 draws from the standard normal distribution."""
    if isinstance(generator, Stream):
        return generator.normal(shape, device)
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


def check_generator(generator: object, *, seed_on: torch.device | None = None) -> None:
    """Check that a source of draws is a `torch.Generator`, a `Stream`, or None.

    Args:
        generator: what was given.
        seed_on: also accept a seed tensor on this device; None accepts none.
    """
    if generator is None or isinstance(generator, (torch.Generator, Stream)):
        return
    if not isinstance(generator, torch.Tensor):
        hint = "; a seed goes into Stream(seed)" if isinstance(generator, int) else ""
        raise ArgumentTypeError(
            f"generator={generator!r}: has type {type(generator).__name__}; pass a "
            f"torch.Generator, for example torch.Generator().manual_seed(0), or None{hint}"
        )
    found = f"a tensor of dtype {generator.dtype} and shape {tuple(generator.shape)}"
    if seed_on is None:
        raise ArgumentTypeError(
            f"generator: got {found}; a seed tensor is for the call of HyperAttention, here pass "
            "hyperframe.randomness.Stream(seed), a torch.Generator, or None"
        )
    if generator.dtype != torch.int64 or generator.numel() != 1:
        raise ArgumentTypeError(
            f"generator: got {found}; a seed is an int64 tensor with one element, for example "
            "torch.tensor(0, device=query.device)"
        )
    if generator.device != seed_on:
        raise ArgumentError(
            f"generator: the seed is on {generator.device}, but query is on {seed_on}; move it "
            "with .to: it is read there, when the draws are made"
        )


def with_generator(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Give a component's method a `torch.Generator` where the component takes no `Stream`.

    The method is called as `method(self, query, ..., generator=)`; `self.takes_stream` says which.
    """

    @functools.wraps(method)
    def called(self: Any, query: torch.Tensor, *args: Any, **options: Any) -> _Result:
        source = options.get("generator")
        if isinstance(source, Stream) and not self.takes_stream:
            options["generator"] = source.generator(query.device)
        return method(self, query, *args, **options)

    return called
