"""Block sizes of the kernels, and their guarded launch.

A configuration is looked up by what matters for it (kernel, dtype, head sizes, rows of a tile). Not
every compiler accepts every one: where a launch fails for want of registers or shared memory, the
next smaller configuration is tried and remembered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton

__all__ = ["Config", "choose", "is_interpreted", "launch", "mass_config", "padded", "power_of_two"]


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Config:
    """Block sizes and what the compiler is told."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def blocks(self) -> dict[str, int]:
        """Return the arguments of an attention kernel."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "THREADS": 32 * self.num_warps
        }  # fmt: skip

    def smaller(self) -> Iterator[Config]:
        """Yield this configuration and ever smaller ones."""
        config = self
        yield config
        config = replace(config, max_registers=None)
        while config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
            yield config
        while config.block_n > 16 or config.block_m > 16:
            if config.block_n >= config.block_m:
                config = replace(config, block_n=max(16, config.block_n // 2))
            else:
                config = replace(config, block_m=max(16, config.block_m // 2))
            yield config


# (kernel, widest head size) -> configuration for 16-bit inputs, measured on an H100. What decides
# is how many programs share a multiprocessor: registers are capped where that fits one more in
_MEASURED = {
    ("forward", 64): Config(64, 64, 4, 3, 128),
    ("forward", 128): Config(128, 64, 8, 2, 128),
    ("forward", 256): Config(64, 32, 4, 2),
    ("tile forward", 64): Config(64, 128, 4, 2, 168),
    ("tile forward", 128): Config(64, 32, 4, 2, 128),
    ("tile forward", 256): Config(64, 32, 4, 2),
    ("wide tile forward", 64): Config(64, 128, 4, 2, 168),
    ("wide tile forward", 128): Config(64, 32, 4, 2, 128),
    ("wide tile forward", 256): Config(64, 32, 4, 2),
    ("hopper tiles", 64): Config(64, 64, 4, 1, 128),
    ("hopper tiles", 128): Config(64, 64, 4, 1, 168),
    # small, because most of its programs have nothing to do
    ("rest forward", 64): Config(64, 32, 4, 1),
    ("rest forward", 128): Config(64, 32, 4, 1),
    ("rest forward", 256): Config(64, 32, 4, 2),
    ("merging forward", 64): Config(64, 64, 4, 3, 128),
    ("merging forward", 128): Config(64, 32, 4, 3, 168),
    ("merging forward", 256): Config(64, 32, 4, 2),
    ("small forward", 64): Config(64, 128, 4, 3),
    ("small forward", 128): Config(64, 64, 4, 3),
    ("small forward", 256): Config(64, 32, 4, 2),
    ("rows", 64): Config(128, 64, 8, 3, 128),
    ("rows", 128): Config(128, 32, 8, 3, 128),
    ("rows", 256): Config(64, 32, 4, 2),
    ("tile backward", 64): Config(64, 64, 4, 2, 168),
    ("tile backward", 128): Config(64, 64, 4, 2),
    # small, because most of its programs have nothing to do
    ("rest backward", 64): Config(64, 32, 4, 1),
    ("rest backward", 128): Config(64, 32, 4, 1),
    ("scatter", 64): Config(64, 64, 4, 2),
    ("scatter", 128): Config(64, 32, 4, 2),
    ("scatter", 256): Config(64, 32, 8, 1),
    ("range", 64): Config(64, 64, 4, 2, 168),
    ("range", 128): Config(64, 64, 4, 2),
    ("range", 256): Config(32, 64, 8, 1),
    ("sampled", 64): Config(64, 64, 4, 2, 128),
    ("sampled", 128): Config(64, 64, 4, 2),
    ("sampled", 256): Config(32, 64, 8, 1),
    ("listed", 64): Config(64, 64, 4, 3, 168),
    ("listed", 128): Config(64, 64, 4, 2),
    ("listed", 256): Config(32, 64, 8, 1),
}
_SINGLE = {64: Config(32, 32, 4, 2), 128: Config(32, 32, 4, 1), 256: Config(16, 16, 4, 1)}


class MassConfig(NamedTuple):
    """Block sizes of the kernel of masses, and what the compiler is told; see `Config`."""

    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    long: int = 0  # slots of a list whose rows are held: see `short_mass`
    short: int = 0


# (widest head size, most rows of a tile) -> configuration for 16-bit inputs
_MASS = {
    (64, 32): MassConfig(64, 4, 2, 168, 256, 64),
    (64, 64): MassConfig(64, 4, 3, 168),
    (64, 128): MassConfig(64, 8, 3),
    (128, 32): MassConfig(64, 4, 3),
    (128, 64): MassConfig(64, 4, 3),
    (128, 128): MassConfig(64, 8, 3),
}

MASS_OVERRIDES: dict[tuple[int, int], MassConfig] = {}
"""Configurations of `tile_mass` to use instead, by head size and rows: for measuring others."""


_LONGEST_HELD = 512


def mass_config(key: torch.Tensor, rows: int, slots: int, stride: int) -> MassConfig:
    """Return the configuration of `tile_mass`.

    Args:
        key: gives dtype and head size.
        rows: voters of a tile.
        slots: of a tile's list; of long lists none are held.
        stride: as in `tile_mass`; where it is not 1, none are held either.
    """
    width = max(64, padded(key.shape[-1]))
    if key.element_size() == 4 or width > 128:
        return MassConfig(32, 8 if rows > 64 else 4, 2)
    place = width, max(32, padded(rows))
    config = MASS_OVERRIDES.get(place, _MASS[place])
    if config.long and (stride > 1 or slots > _LONGEST_HELD):
        return _MASS[width, 64]
    return config


OVERRIDES: dict[tuple[str, int], Config] = {}
"""Configurations to use instead, by (kernel, head size): for measuring others."""

_KNOWN_GOOD: dict[tuple[Any, ...], Config] = {}


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is not below a positive count."""
    # Triton's own costs ten times as much when the host calls it
    return 1 << (count - 1).bit_length()


def padded(size: int) -> int:
    """Return the head size as the kernels hold it: a power of two, 16 at least."""
    return max(16, power_of_two(size))


def choose(
    kernel: str, query: torch.Tensor, value: torch.Tensor, rows: int, slots: int, *,
    is_plain: bool = False,
) -> Config:  # fmt: skip
    """Return the configuration for a kernel.

    Args:
        kernel: its name in the table.
        query: gives dtype and head size.
        value: gives the other head size.
        rows: rows of a tile.
        slots: slots of a tile's list.
        is_plain: no row needs a test of what it sees; other variants need more registers.
    """
    width = max(64, padded(query.shape[-1]), padded(value.shape[-1]))
    if kernel in ("forward", "merging forward") and rows <= 64:
        kernel = "small forward"
    elif kernel == "tile forward" and rows > 64:
        kernel = "wide tile forward"
    config = _SINGLE[width] if query.element_size() == 4 else _MEASURED[kernel, width]
    if not is_plain:
        config = replace(config, max_registers=None)
    config = OVERRIDES.get((kernel, width), config)
    rows, slots = padded(min(rows, 128)), padded(min(slots, 128))
    config = replace(config, block_m=min(config.block_m, rows), block_n=min(config.block_n, slots))
    if config.block_m * config.block_n <= 2048:
        config = replace(config, num_warps=min(config.num_warps, 4))
    return config


def launch(
    kernel: Any, key: tuple[Any, ...], config: Config,
    programs: Callable[[Config], tuple[int, ...]],
    arguments: Callable[[Config], dict[str, Any]],
) -> Config:  # fmt: skip
    """Launch with the configuration, or with the first smaller one that the compiler accepts.

    Args:
        kernel: the jit function.
        key: what the choice depends on, beside the configuration.
        config: the one to begin with.
        programs: the grid for a configuration.
        arguments: the kernel's arguments for a configuration.

    Returns:
        The configuration that ran.
    """
    place = (*key, config)
    known = _KNOWN_GOOD.get(place)
    last: Exception | None = None
    for candidate in (config if known is None else known).smaller():
        given = arguments(candidate)
        if not is_interpreted():
            given |= {"num_warps": candidate.num_warps, "num_stages": candidate.num_stages}
            if candidate.max_registers is not None:
                given["maxnreg"] = candidate.max_registers
        try:
            kernel[programs(candidate)](**given)
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError) as error:
            last = error
            continue
        except RuntimeError as error:
            if "PassManager" not in str(error):  # the compiler gave up on this configuration
                raise
            last = error
            continue
        _KNOWN_GOOD[place] = candidate
        return candidate
    assert last is not None
    raise last
