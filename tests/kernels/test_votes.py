"""Columns are chosen among groups of keys, by bounds that no key of a group exceeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.kernels import votes as votes_module
from hyperframe.kernels.votes import Lines, groups_of, of_best_groups, torch_line_votes


@given(
    num_keys=st.integers(1, 70), size=st.sampled_from([1, 4, 16]), count=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_groups_with_the_largest_bounds_are_listed(
    num_keys: int, size: int, count: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    shares = torch.rand((1, 2, 3, 4, num_keys), generator=g, dtype=torch.float64)
    stop = torch.randint(1, num_keys + 1, (3, 1), generator=g)
    found = of_best_groups(shares, torch.arange(num_keys) >= stop, size, count)
    for head in range(2):
        for segment in range(3):
            seen = int(stop[segment])
            row = shares[0, head, segment, :, :seen]
            bounds = [
                (float(row[:, first : first + size].max(dim=1).values.sum()), first // size)
                for first in range(0, seen, size)
            ]
            best = {group for _, group in sorted(bounds, reverse=True)[:count]}
            listed = {key // size for key in range(seen) if found[0, head, segment, key]}
            assert listed == best
            # no key has more votes than its group's bound
            votes = row.sum(dim=0)
            assert all(votes[group * size : (group + 1) * size].max() <= b for b, group in bounds)


def columns_by_hand(
    voters: torch.Tensor, key: torch.Tensor, num_columns: int, count: int, stop: int
) -> set[int]:
    """The best columns of one segment, of the keys of the best groups of 16."""
    shares = torch.softmax(voters @ key[:stop].T, dim=-1)
    starts = range(0, stop, 16)
    bounds = [float(shares[:, s : s + 16].max(dim=1).values.sum()) for s in starts]
    groups = sorted(range(len(bounds)), key=lambda i: -bounds[i])[:count]
    keys = [key for i in groups for key in range(16 * i, min(16 * i + 16, stop))]
    votes = shares.sum(dim=0)
    return set(sorted(keys, key=lambda i: -float(votes[i]))[:num_columns])


@pytest.mark.parametrize("fewest, count", [(1, 5), (8, 8), (32, 32)])
def test_columns_are_the_best_keys_of_the_best_groups(
    fewest: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(votes_module, "_FEWEST", fewest)
    g = torch.Generator().manual_seed(3)
    voters = torch.randn((1, 1, 2, 3, 8), generator=g, dtype=torch.float64)
    key = torch.randn((1, 1, 400, 8), generator=g, dtype=torch.float64)
    row = torch.tensor([[200, 250, 299], [300, 310, 399]])
    lines = Lines(5, 16, 1, 25)
    assert groups_of(lines, 400) == (16, count)
    columns, _ = torch_line_votes(
        voters, row, key, lines, scale=1.0, is_causal=True, segment=150, shift=150
    )
    for segment, stop in ((0, 150), (1, 300)):
        expected = columns_by_hand(voters[0, 0, segment], key[0, 0], 5, count, stop)
        assert set(columns[0, 0, segment].tolist()) == expected


def test_enough_groups_change_nothing() -> None:
    g = torch.Generator().manual_seed(4)
    voters = torch.randn((1, 2, 1, 4, 8), generator=g, dtype=torch.float64)
    key = torch.randn((1, 2, 500, 8), generator=g, dtype=torch.float64)
    columns, _ = torch_line_votes(
        voters, torch.arange(4).unsqueeze(0), key, Lines(9, 16, 1, 32), scale=1.0,
        is_causal=False, segment=500, shift=0,
    )  # fmt: skip
    votes = torch.softmax(voters[:, :, 0] @ key.transpose(-1, -2), dim=-1).sum(dim=2)
    assert torch.equal(columns[:, :, 0].long(), votes.topk(9).indices)
