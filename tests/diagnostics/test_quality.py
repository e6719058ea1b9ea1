"""Density, mass, precision and recall of masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors import create
from hyperframe.diagnostics import MaskQuality, mask_quality
from hyperframe.errors import ArgumentError
from hyperframe.masks import HeavyMask, ListMask
from hyperframe.testing.strategies import AttentionInputs, attention_inputs, masks
from tests.diagnostics import dense

# logits that are equal only where keys or queries are: no ties that rounding could break
STRUCTURES = ["plain", "duplicates", "zero_rows", "constant"]


def expected(
    logits: torch.Tensor, mask: torch.Tensor, heavy: torch.Tensor, budget: int | None = None
) -> MaskQuality:
    seen = logits > -torch.inf
    share = logits.softmax(dim=-1).nan_to_num(0.0)
    num_rows = seen.any(dim=-1).sum(dim=-1)

    both, num_heavy, num_held = (x.sum(dim=-1).double() for x in (mask & heavy, heavy, mask))
    wanted = num_heavy if budget is None else num_heavy.clamp(max=budget)

    def ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        part, whole = part.sum(dim=-1), whole.sum(dim=-1)
        return torch.where(whole > 0, part / whole.clamp(min=1), 1.0)

    return MaskQuality(
        density=num_held.sum(dim=-1) / seen.sum(dim=(-2, -1)),
        mass=(share * mask).sum(dim=(-2, -1)) / num_rows,
        precision=ratio(both, num_held),
        recall=ratio(torch.minimum(both, wanted), wanted),
    )


def check(found: MaskQuality, right: MaskQuality) -> None:
    for name in ("density", "mass", "precision", "recall"):
        torch.testing.assert_close(
            getattr(found, name), getattr(right, name), rtol=1e-9, atol=1e-9, msg=name
        )


@given(attention_inputs(structures=STRUCTURES), masks(), st.integers(1, 20))
def test_heavy_are_the_largest_entries_of_a_row_and_any_that_tie(
    inputs: AttentionInputs, mask: HeavyMask, budget: int
) -> None:
    query, key, _ = inputs
    # of keys without their mean, as there: what ties, ties in both
    logits = dense.logits(
        query, key - key.mean(dim=2, keepdim=True), is_causal=mask.is_causal,
        offset=mask.position_offset,
    )  # fmt: skip
    above = (logits.unsqueeze(-2) > logits.unsqueeze(-1) + 1e-9).sum(dim=-1)
    heavy = (above < budget) & (logits > -torch.inf)
    right = expected(logits, mask.to_dense(), heavy, budget)
    check(mask_quality(query, key, mask, budget=budget), right)


@given(attention_inputs(structures=STRUCTURES), masks(), st.sampled_from([0.0, 0.017, 0.13, 0.7]))
def test_or_those_above_a_threshold(
    inputs: AttentionInputs, mask: HeavyMask, threshold: float
) -> None:
    query, key, _ = inputs
    logits = dense.logits(query, key, is_causal=mask.is_causal, offset=mask.position_offset)
    heavy = logits.softmax(dim=-1).nan_to_num(0.0) > threshold
    found = mask_quality(query, key, mask, threshold=threshold)
    check(found, expected(logits, mask.to_dense(), heavy))


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_oracle_is_perfect_and_its_complement_useless(is_causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 40, 8, generator=g).double() for _ in range(2))
    mask = create("oracle(budget=10)").find(query, key, is_causal=is_causal)
    best = mask_quality(query, key, mask, budget=10)
    assert best.precision.tolist() == best.recall.tolist() == [[1.0, 1.0]]
    complement = ListMask.from_dense(~mask.to_dense(), is_causal=is_causal)
    worst = mask_quality(query, key, complement, budget=10)
    assert worst.precision.tolist() == worst.recall.tolist() == [[0.0, 0.0]]
    one = torch.ones(1, 2).double()
    torch.testing.assert_close(best.density + worst.density, one)
    torch.testing.assert_close(best.mass + worst.mass, one)
    # half the budget is held entirely; half of what is held is asked for
    half = mask_quality(query, key, mask, budget=0.125)
    assert half.recall.tolist() == [[1.0, 1.0]]
    assert (half.precision < 0.7).all()


def test_ties_are_decided_in_favour_of_the_mask() -> None:
    x = torch.zeros(1, 1, 8, 2)
    for first in (0, 4):
        columns = torch.arange(first, first + 2).view(1, 1, 2)
        mask = ListMask.columns(columns, num_query_heads=1, num_queries=8, num_keys=8)
        for budget, recall in ((1, 1.0), (2, 1.0), (4, 0.5)):
            found = mask_quality(x, x, mask, budget=budget)
            assert (found.precision.item(), found.recall.item()) == (1.0, recall)


def test_a_difference_of_rounding_is_a_tie() -> None:
    query = torch.ones(1, 1, 1, 1).double()
    for more, recall in ((4e-16, 1.0), (1e-12, 0.0)):
        key = torch.tensor([1.0, 1.0 + more, 0.0, 0.0], dtype=torch.float64).view(1, 1, 4, 1)
        mask = ListMask.columns(
            torch.zeros(1, 1, 1).long(), num_query_heads=1, num_queries=1, num_keys=4
        )
        assert mask_quality(query, key, mask, budget=1).recall.item() == recall


def test_empty_and_full_masks() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 6, 3, generator=g) for _ in range(2))
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    full = mask_quality(query, key, ListMask.from_dense(everything), budget=2)
    assert full.density.item() == full.recall.item() == 1.0
    assert full.mass.item() == pytest.approx(1.0)
    assert full.precision.item() == pytest.approx(2 / 6)
    nothing = mask_quality(query, key, ListMask.from_dense(~everything), budget=2)
    assert nothing.density.item() == nothing.recall.item() == nothing.mass.item() == 0.0
    assert nothing.precision.item() == 1.0
    # no entry is above 1: none is missed
    none = mask_quality(query, key, ListMask.from_dense(~everything), threshold=1.0)
    assert none.recall.item() == 1.0


def test_budgets_and_thresholds_are_checked() -> None:
    x = torch.zeros(1, 1, 4, 2)
    mask = create("oracle(budget=2)").find(x, x)
    for options in ({"budget": 0}, {"threshold": 1.5}, {"threshold": -0.1}):
        with pytest.raises(ArgumentError, match=f"mask_quality: {next(iter(options))}="):
            mask_quality(x, x, mask, **options)
