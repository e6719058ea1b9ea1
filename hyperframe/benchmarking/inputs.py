"""Inputs to measure on: planted clusters, where a detector has something to find, and noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..component import check_choice

__all__ = ["ERROR_BOUNDS", "Shape", "make_inputs"]

ERROR_BOUNDS: dict[str, float | None] = {"planted": 0.5, "normal": None}
"""Kinds of inputs, and the relative error above which no speed-up is reported for each.

On planted inputs, sampling without a detector ends above 0.6 and `sort_lsh` near 0.3, so the bound
lies between blindness and sight. Independent normal inputs have no heavy entries and no bound.
"""

_CLUSTERS = 256
_SPREAD = 0.25  # of the members of a cluster, in standard deviations of the centres
_SHARPNESS = 2.0  # factor of the queries: with it, a query's own cluster carries most of its mass
_VALUE_NOISE = 0.5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one self-attention problem.

    Attributes:
        batch: batch items.
        heads: query heads.
        kv_heads: key and value heads.
        length: queries, and keys.
        head_dim: `d`, also that of the values.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int

    @property
    def elements(self) -> int:
        """Elements of query, key, value and output together."""
        return 2 * self.batch * (self.heads + self.kv_heads) * self.length * self.head_dim


def make_inputs(
    kind: str, shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value.

    `"planted"`: every position belongs to one of 256 random clusters; queries and keys lie near
    the centre of their cluster, and so do values, so that a method which finds keys of the right
    cluster finds the output. `"normal"`: independent standard normal numbers.

    Args:
        kind: a key of `ERROR_BOUNDS`.
        shape: the sizes.
        dtype: of the result.
        device: where the numbers are drawn; each device draws its own.
        seed: of the draws.

    Returns:
        `[batch, heads, n, d]`, and twice `[batch, kv_heads, n, d]`.

    Cost: O(elements); float32 temporaries of one head at a time.
    """
    check_choice("bench", "inputs", kind, tuple(ERROR_BOUNDS))
    generator = torch.Generator(device=device).manual_seed(seed)
    length, head_dim = shape.length, shape.head_dim

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    def empty(heads: int) -> torch.Tensor:
        return torch.empty(shape.batch, heads, length, head_dim, dtype=dtype, device=device)

    query, key, value = empty(shape.heads), empty(shape.kv_heads), empty(shape.kv_heads)
    if kind == "normal":
        for tensor in (query, key, value):
            for head in tensor.flatten(0, 1):
                head.copy_(noise(length, head_dim))
        return query, key, value
    members = torch.randint(_CLUSTERS, (2, length), generator=generator, device=device)
    group = shape.heads // shape.kv_heads
    for item in range(shape.batch):
        for head in range(shape.kv_heads):
            centres = noise(_CLUSTERS, head_dim)
            own = centres[members[1]]
            key[item, head] = own + _SPREAD * noise(length, head_dim)
            value[item, head] = own + _VALUE_NOISE * noise(length, head_dim)
            for query_head in range(head * group, (head + 1) * group):
                spread = _SPREAD * noise(length, head_dim)
                query[item, query_head] = _SHARPNESS * (centres[members[0]] + spread)
    return query, key, value
