"""Operators between the kernels that find: registered as torch wants, and what they say in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperframe.kernels.slashes import caught_votes

OPERATORS = torch.ops.hyperframe
SEED = torch.tensor(3)
# torch's own: its compiler makes an instance of the function to trace it
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def whole(*shape: int, below: int = 8) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(0)).int()


CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "voters": (OPERATORS.run_voters, (torch.rand(1, 2, 9, 4), None, None, 0, 4, 3, 2)),
    "voters by a seed": (OPERATORS.run_voters, (torch.rand(1, 2, 9, 4), None, SEED, 1, 4, 3, 2)),
    "caught before": (OPERATORS.caught_votes, (torch.rand(1, 2, 3, 9), "before", 4, 8, 1, 0)),
    "caught by all": (OPERATORS.caught_votes, (torch.rand(1, 2, 3, 9), "all", 4, 8, 1, 0)),
    "lists": (
        OPERATORS.line_lists,
        (whole(1, 2, 2, 5), whole(4, below=5), whole(1, 2, 4, 3), whole(1, 2, 4, below=3),
         whole(2), whole(1, 2, 2, 1), [2, 8, 4, 1, 0], 32),
    ),
    "lists without near keys": (
        OPERATORS.line_lists,
        (whole(1, 1, 1, 5), whole(1), None, None, None, whole(1, 1, 1, 1), [1, 8, 4, 1, 0], 8),
    ),
    "side by side": (
        OPERATORS.side_by_side,
        ([whole(1, 2, 3, 4), whole(1, 1, 3, 5).long()], [whole(1, 2, 3), whole(1, 1, 1)],
         [1, 2, 3], 9),
    ),
    "draws": (OPERATORS.prefix_draws, (SEED, 2, torch.tensor([2, 5, 8]), [1, 2, 3, 4], 8)),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_operators_are_registered_as_torch_wants(call: str) -> None:
    operator, arguments = CALLS[call]
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("earlier", ["before", "with", "all"])
def test_caught_mass_is_the_sum_over_rows_of_the_mass_of_their_diagonals(earlier: str) -> None:
    """Row by row in float64: a key lies on another diagonal for each row, and mass
    counts as spread evenly over a run of diagonals."""
    run, tile, first_offset, min_offset, runs = 4, 8, 1, 14, 7
    votes = torch.rand(1, 1, 3, runs, generator=torch.Generator().manual_seed(0)).double()
    votes[..., 5:] = 0
    expected = torch.zeros(1, 1, 3, runs, dtype=torch.float64)
    for segment in range(3):
        voting = {"before": range(segment), "with": range(segment + 1), "all": range(3)}[earlier]
        mass = sum((votes[0, 0, s] for s in voting), torch.zeros(runs).double())
        for number in range(runs):
            for key in range(number * run, (number + 1) * run):
                for row in range(tile):
                    diagonal = (key + row) // run
                    expected[0, 0, segment, number] += (
                        mass[diagonal] / run if diagonal < runs else 0
                    )
            farthest = number * run + first_offset + run + tile - 2
            if farthest < min_offset or expected[0, 0, segment, number] <= 0:
                expected[0, 0, segment, number] = -1
    found = caught_votes(
        votes, earlier=earlier, run=run, tile_size=tile, first_offset=first_offset,  # type: ignore[arg-type]
        min_offset=min_offset,
    )  # fmt: skip
    torch.testing.assert_close(found, expected[:, :, : found.shape[2]])
    assert found.shape[2] == (1 if earlier == "all" else 3)
