"""Budgets: numbers, fractions of the keys, shares of the mass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe import detectors
from hyperframe.budget import resolve_budget
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import ListMask


@given(fraction=st.floats(1e-6, 1), available=st.integers(1, 10**6))
def test_a_fraction_is_rounded_up(fraction: float, available: int) -> None:
    found = resolve_budget(fraction, available)
    assert 1 <= found <= available
    assert found - 1 < fraction * available <= found or found == 1


def test_a_number_stays() -> None:
    assert resolve_budget(300, 10) == 300


FRACTIONS = {
    "oracle": ("budget", 1), "heavy_columns": ("num_columns", 1), "quest": ("num_blocks", 8),
    "antidiagonal": ("num_blocks", 8), "refined": ("num_keys", 1), "pooled_topk": ("num_blocks", 8),
    "pca_tree": ("num_leaves", 8), "kmeans": ("num_blocks", 8),
    "vertical_slash": ("num_columns", 1), "lsh_topk": ("num_keys", 1),
}  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", FRACTIONS)
def test_a_fraction_holds_what_its_number_holds(name: str, is_causal: bool) -> None:
    parameter, unit = FRACTIONS[name]
    options = {"leaf_size" if name == "pca_tree" else "block_size": 8} if unit == 8 else {}
    if name == "refined":
        options = {"candidates": "heavy_columns(num_columns=60)"}
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 2, 160, 8, generator=g), torch.randn(1, 1, 160, 8, generator=g)
    masks = [
        detectors.create(name, **{parameter: budget}, **options).find(
            query, key, is_causal=is_causal, generator=torch.Generator().manual_seed(0)
        )
        for budget in (0.25, 40 // unit)
    ]
    assert torch.equal(masks[0].to_dense(), masks[1].to_dense())


@pytest.mark.parametrize("name", FRACTIONS)
@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan"), True])
def test_what_is_neither_is_refused_by_name(name: str, value: float) -> None:
    parameter, _ = FRACTIONS[name]
    with pytest.raises((ArgumentError, ArgumentTypeError), match=f"{name}: {parameter}="):
        detectors.create(name, **{parameter: value})


def held_by_tiles(mask: ListMask, scores: torch.Tensor) -> torch.Tensor:
    """Share of the mass of each tile of 8 rows that a mask holds."""
    mass = torch.softmax(scores, dim=-1)
    return (mass * mask.to_dense()).sum(dim=-1).unflatten(-1, (-1, 8)).mean(dim=-1)


@given(top_p=st.floats(0.05, 1), seed=st.integers(0, 20), sharpness=st.floats(0.1, 6))
def test_a_share_of_the_mass_is_held_by_as_few_keys_as_it_takes(
    top_p: float, seed: int, sharpness: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    query = sharpness * torch.randn(1, 2, 32, 8, generator=g, dtype=torch.float64)
    key = torch.randn(1, 2, 50, 8, generator=g, dtype=torch.float64)
    # all keys are candidates
    refined = detectors.create(
        "refined", candidates="heavy_columns(num_columns=50)", num_keys=50, top_p=top_p,
        tile_size=8,
    )  # fmt: skip
    mask = next(iter(refined.find(query, key).parts()))
    assert isinstance(mask, ListMask)
    scores = query @ key.transpose(-1, -2) / 8**0.5
    held = held_by_tiles(mask, scores)
    assert bool((held >= top_p - 1e-5).all())
    # without its least key a tile would hold too little
    mass = torch.softmax(scores, dim=-1).unflatten(2, (-1, 8)).sum(dim=3)
    chosen = mask.to_dense().unflatten(2, (-1, 8))[:, :, :, 0]
    least = torch.where(chosen, mass, torch.inf).amin(dim=-1) / 8
    assert bool((held - least < top_p + 1e-5).all())


def test_a_sharp_head_holds_fewer_keys_than_a_flat_one() -> None:
    g = torch.Generator().manual_seed(0)
    key = torch.randn(1, 2, 256, 8, generator=g)
    query = torch.randn(1, 2, 256, 8, generator=g) * torch.tensor([0.2, 5.0]).view(1, 2, 1, 1)
    refined = detectors.create(
        "refined", candidates="heavy_columns(num_columns=200)", num_keys=200, top_p=0.8
    )
    flat, sharp = refined.find(query, key).nnz()[0].tolist()
    assert sharp < 0.7 * flat
