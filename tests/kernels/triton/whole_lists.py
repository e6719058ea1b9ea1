"""Plans of tiles whose lists end with a block: what the kernels of their own are for."""

from __future__ import annotations

import torch

from hyperframe.plan import TilePlan


def plan_of_whole_lists(
    generator: torch.Generator, device: torch.device, *, heads: int, group: int, queries: int,
    keys: int, slots: int, tile: int, band: tuple[int, int] | None, weighted: bool, causal: bool,
) -> TilePlan:  # fmt: skip
    """Tiles that hold a run of keys (banded), other keys, and samples; one slot weighs nothing."""
    tiles = -(-queries // tile)
    index = torch.stack([
        torch.randperm(keys, generator=generator)[:slots] for _ in range(heads * tiles)
    ]).view(1, heads, tiles, slots)  # fmt: skip
    weight = torch.randn(index.shape, generator=generator)
    heavy = slots // 2
    weight[..., :heavy] = 0.0
    weight[..., 3] = float("-inf")

    def count(number: int) -> torch.Tensor:
        return torch.full((1, heads, tiles), number, dtype=torch.int32, device=device)

    return TilePlan(
        key_index=index.int().to(device), key_count=count(slots), heavy_count=count(heavy),
        band=band, band_count=None if band is None else count(slots // 4), tile_size=tile,
        num_query_heads=heads * group, num_queries=queries, num_keys=keys, is_causal=causal,
        log_weight=weight.to(device) if weighted else None, disjoint=True,
    )  # fmt: skip
