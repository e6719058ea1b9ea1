"""The kernels around the votes of lines give what their torch forms do, and those what is said."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.kernels.slashes import (
    LineCut,
    line_lists,
    run_voters,
    torch_caught_votes,
    torch_line_lists,
    torch_run_voters,
)

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import slashes as kernels  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def used(index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The lists with -1 in the slots that are not used."""
    slot = torch.arange(index.shape[-1], device=index.device)
    return torch.where(slot < count.unsqueeze(-1), index, -1)


# ---- voters


@given(
    num_queries=st.integers(1, 70), size=st.integers(1, 20), num_voters=st.integers(1, 9),
    draws=st.sampled_from(["given", "seed", "middle"]), dim=st.integers(1, 20),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_voters_are_copied_as_by_torch(
    num_queries: int, size: int, num_voters: int, draws: str, dim: int, seed: int
) -> None:
    g = generator(seed)
    # strided, as the projections of a model are
    query = torch.randn(2, num_queries, 3, dim, generator=g).transpose(1, 2).to(DEVICE)
    count = -(-num_queries // size)
    drawn = torch.rand(count, num_voters, generator=g, dtype=torch.float64).to(DEVICE)
    place = torch.tensor(seed, device=DEVICE)
    source = {"given": (drawn, None, 0), "seed": (None, place, 3), "middle": (None, None, 0)}
    given = (query, *source[draws], size, count, num_voters)
    for mine, expected in zip(
        kernels.triton_run_voters(*given), torch_run_voters(*given), strict=True
    ):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)


def test_every_part_of_a_run_has_a_voter_of_its_own() -> None:
    query = torch.arange(40.0).view(1, 1, 40, 1)
    for drawn in (0.0, 0.5, 1 - 2.0**-49):
        draws = torch.full((3, 4), drawn, dtype=torch.float64)
        voters, row = run_voters(query, draws, size=16, count=3, num_voters=4)
        assert torch.equal(voters.flatten().long(), row.flatten())
        parts = (row - torch.arange(3).unsqueeze(-1) * 16) // torch.tensor([[4], [4], [2]])
        assert torch.equal(parts, torch.arange(4).expand(3, 4))


# ---- caught mass


@pytest.mark.parametrize("earlier", ["before", "with", "all"])
@pytest.mark.parametrize("segments, runs, run, tile", [
    (1, 3, 8, 8), (9, 140, 16, 64), (17, 20, 4, 16), (8, 128, 16, 16),
])  # fmt: skip
def test_caught_mass_is_that_of_torch(
    earlier: str, segments: int, runs: int, run: int, tile: int
) -> None:
    votes = torch.rand(2, 3, segments, runs, generator=generator(0)).to(DEVICE)
    votes[..., ::3] = 0  # nothing, exactly, where no segment has any
    votes[:, :, :, -7:] = 0
    for first_offset, min_offset in ((1, 0), (1, 90), (-40, 30)):
        given = (votes, earlier, run, tile, first_offset, min_offset)
        mine, expected = kernels.triton_caught_votes(*given), torch_caught_votes(*given)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(mine < 0, expected < 0)


# ---- lists


def line_problem(
    seed: int, tiles: int, tiles_each: int, num_runs: int, has_near: bool, is_causal: bool
) -> tuple[tuple[torch.Tensor | None, ...], LineCut, int]:
    g = generator(seed)
    size, run = 8, 4
    num_keys, segments = tiles * size + (0 if is_causal else 3), -(-tiles // tiles_each)
    shift = 0 if is_causal else -2
    cut = LineCut(tiles_each, size, run, 1 if is_causal else shift - num_keys + 1, shift)
    columns = torch.randint(num_keys + 1, (2, 2, segments, 7), generator=g).int()
    column_count = torch.randint(8, (tiles,), generator=g).int()
    near = torch.randint(9, (2, 2, segments * tiles_each, 5), generator=g).int()[:, :, :tiles]
    near_count = torch.randint(6, (2, 2, segments * tiles_each), generator=g).int()[..., :tiles]
    begin = torch.randint(num_keys, (segments,), generator=g).int()
    last = (tiles * size + shift - cut.first_offset) // run + 2
    votings = segments if is_causal else 1
    runs = torch.rand(2, 2, votings, last + num_runs, generator=g).argsort(dim=-1)
    runs = runs[..., :num_runs].sort(dim=-1).values.int()  # distinct, and some are none
    kept = (near, near_count, begin) if has_near else (None, None, None)
    given = (columns, column_count, *kept, runs)
    return tuple(None if x is None else x.to(DEVICE) for x in given), cut, num_keys


@given(
    seed=st.integers(0, 999), tiles=st.integers(1, 9), tiles_each=st.integers(1, 4),
    num_runs=st.integers(1, 5), has_near=st.booleans(), is_causal=st.booleans(),
)  # fmt: skip
def test_lists_of_lines_are_those_of_torch(
    seed: int, tiles: int, tiles_each: int, num_runs: int, has_near: bool, is_causal: bool
) -> None:
    given, cut, num_keys = line_problem(seed, tiles, tiles_each, num_runs, has_near, is_causal)
    mine = kernels.triton_line_lists(*given, list(cut), num_keys)  # type: ignore[arg-type]
    expected = torch_line_lists(*given, cut, num_keys)  # type: ignore[arg-type]
    for at in (0, 2):
        assert mine[at].dtype == expected[at].dtype == torch.int32
        assert torch.equal(mine[at + 1], expected[at + 1])
        assert torch.equal(used(*mine[at : at + 2]), used(*expected[at : at + 2]))
        # what is not used may be read, and has to be a key
        assert bool(((mine[at] >= 0) & (mine[at] < num_keys)).all())


def test_lists_of_lines_hold_what_was_chosen_and_diagonals_ascend() -> None:
    tiles, num_keys = 4, 32
    cut = LineCut(2, 8, 4, 1, 0)
    columns = torch.tensor([[[[32, 32, 32], [5, 2, 32]]]]).int()
    near = torch.tensor([[[[0, 0], [3, 1], [0, 0], [4, 2]]]]).int()
    counts, begin = torch.tensor([[[0, 1, 0, 2]]]).int(), torch.tensor([0, 16]).int()
    runs = torch.tensor([[[[0, 9], [0, 2]]]]).int()  # of offsets 1-4, of none; 1-4 and 9-12
    (keys, count), (diagonals, held) = line_lists(
        columns, torch.tensor([0, 0, 2, 1]).int(), (near, counts, begin), runs, cut,
        num_keys=num_keys,
    )  # fmt: skip
    lists = [keys[0, 0, t, : count[0, 0, t]].tolist() for t in range(tiles)]
    assert lists == [[], [3], [5, 2], [20, 18, 5]]
    lists = [diagonals[0, 0, t, : held[0, 0, t]].tolist() for t in range(tiles)]
    assert lists == [
        [], [4, 5, 6, 7], [4, 5, 6, 7, 12, 13, 14, 15], [12, 13, 14, 15, 20, 21, 22, 23],
    ]  # fmt: skip
