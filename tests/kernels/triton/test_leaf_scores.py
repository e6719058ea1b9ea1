"""The kernels that choose leaves give what torch does; on a GPU, else interpreted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.kernels.leaves import best_leaves, leaf_masses, leaf_means, torch_leaf_means

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import few_leaves  # noqa: E402
from hyperframe.kernels.triton import leaf_scores as kernels  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"


def problem(
    *, tiles: int = 5, voters: int = 3, num_far: int = 40, num_near: int = 6, heads: int = 4,
    key_heads: int = 2, dim: int = 16, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    leaves = num_far + num_near + 7
    near = torch.rand((tiles, 7 + num_near), generator=g).argsort(dim=-1)[:, :num_near] + num_far
    given = {
        "voters": torch.randn((2, heads, tiles, voters, dim), generator=g),
        "votes": torch.rand((tiles, voters), generator=g) < 0.8,
        "mean": torch.randn((2, key_heads, leaves, dim), generator=g),
        "sizes": torch.randint(1, 5, (leaves,), generator=g),
        "far": torch.randint(0, num_far + 1, (tiles,), generator=g),
        "near": near, "is_near": torch.rand(near.shape, generator=g) < 0.6,
    }  # fmt: skip
    return {name: x.to(DEVICE) for name, x in given.items()}


def compare(given: dict[str, Any], *, num_far: int, num_leaves: int, is_even: bool = False) -> None:
    """Chosen leaves have the scores of those that torch chooses, and none is chosen twice."""
    if is_even:
        given["sizes"] = torch.full_like(given["sizes"], 3)
    found = kernels.triton_best_leaves(
        **given, scale=0.7, num_far=num_far, num_leaves=num_leaves, is_even=is_even
    )
    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    masses = leaf_masses(**exact, scale=0.7, num_far=num_far)
    slots = masses.shape[-1]
    assert found.shape[-1] == min(num_leaves, slots)
    whole = torch.full((*masses.shape[:3], given["mean"].shape[2]), float("-inf"), device=DEVICE)
    named = torch.arange(num_far, device=DEVICE).expand(len(given["near"]), -1)
    named = torch.cat([named, given["near"]], dim=-1).expand(*masses.shape[:3], -1)
    whole = whole.double().scatter(-1, named, masses)
    seen = (given["far"] + given["is_near"].sum(dim=-1)).clamp(max=found.shape[-1])
    expected = masses.topk(found.shape[-1], dim=-1).values
    number = torch.arange(found.shape[-1], device=DEVICE)
    is_used = (number < seen.unsqueeze(-1)).expand_as(found)
    mine = whole.gather(-1, found).masked_fill(~is_used, float("-inf"))
    mine = mine.sort(dim=-1, descending=True).values
    apart = torch.where(is_used, found, -1 - number).sort(dim=-1).values
    assert (apart.diff() != 0).all()
    # where no voter counts, all are without mass
    mine, expected = mine[is_used], expected[is_used]
    some = expected > float("-inf")
    torch.testing.assert_close(mine[some], expected[some], rtol=0, atol=1e-3)


@given(
    tiles=st.integers(1, 9), voters=st.integers(1, 6), num_far=st.sampled_from([0, 1, 16, 45]),
    num_near=st.integers(0, 9), num_leaves=st.integers(1, 20), is_even=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_tiles_get_the_leaves_that_torch_finds(
    tiles: int, voters: int, num_far: int, num_near: int, num_leaves: int, is_even: bool, seed: int
) -> None:
    num_near += num_far == 0
    given_ = problem(
        tiles=tiles, voters=voters, num_far=num_far, num_near=num_near, heads=2, key_heads=1,
        seed=seed,
    )  # fmt: skip
    compare(given_, num_far=num_far, num_leaves=num_leaves, is_even=is_even)


@given(
    tiles=st.integers(1, 40), voters=st.integers(1, 9), num_far=st.integers(1, 150),
    num_leaves=st.integers(1, 2), is_even=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_or_two_leaves_are_found_in_one_launch(
    tiles: int, voters: int, num_far: int, num_leaves: int, is_even: bool, seed: int
) -> None:
    given_ = problem(
        tiles=tiles, voters=voters, num_far=num_far, num_near=0, heads=2, key_heads=1, seed=seed
    )
    assert few_leaves.supports(given_["voters"], num_far, 0, num_leaves)
    compare(given_, num_far=num_far, num_leaves=num_leaves, is_even=is_even)


def test_few_leaves_are_chosen_by_groups_where_one_launch_would_be_slow() -> None:
    voters = problem()["voters"]
    assert not few_leaves.supports(voters, 40, 6, 2)  # lists of near leaves
    assert not few_leaves.supports(voters, 40, 0, 3)
    assert not few_leaves.supports(voters, 5000, 0, 2)  # few programs, many leaves
    assert few_leaves.supports(voters[:, :1].expand(2, 400, -1, -1, -1), 5000, 0, 2)


def test_tiles_in_chunks_and_other_head_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_HELD_BYTES", 1)
    compare(problem(dim=40, heads=2, key_heads=1), num_far=40, num_leaves=7)


@pytest.mark.parametrize("num_near, num_leaves", [(6, 9), (0, 2)])
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_what_is_not_a_number_names_no_leaf_twice(num_near: int, num_leaves: int) -> None:
    given_ = problem(num_near=num_near)
    given_["voters"][:, 1] = float("nan")
    given_["mean"][1, :, 3] = float("nan")
    given_["votes"][:] = True
    found = kernels.triton_best_leaves(
        **given_, scale=0.7, num_far=40, num_leaves=num_leaves, is_even=False
    )
    seen = (given_["far"] + given_["is_near"].sum(dim=-1)).clamp(max=num_leaves)
    for tile, count in enumerate(seen.tolist()):
        held = found[:, :, tile, :count].sort(dim=-1).values
        assert (held.diff() > 0).all()


@pytest.mark.parametrize("longest, dim", [(1, 8), (5, 16), (16, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_means_are_those_of_the_rows_that_are_there(
    longest: int, dim: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 50, dim), generator=g).to(DEVICE, dtype)
    index = torch.randint(0, 50, (2, 3, 37, longest), generator=g).to(DEVICE)
    sizes = torch.randint(1, longest + 1, (37,), generator=g).to(DEVICE)
    found = kernels.triton_leaf_means(x, index, sizes)
    expected = torch_leaf_means(x.double(), index, sizes)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_the_kernels_do_not_take_is_said() -> None:
    given_ = problem()
    voters, mean = given_["voters"], given_["mean"]
    assert kernels.supports(voters, mean, 40, 6, 9)
    assert not kernels.supports(voters.double(), mean.double(), 40, 6, 9)
    assert not kernels.supports(voters, mean, 0, 0, 9)
    assert not kernels.supports(voters, mean, 40, 6, 0)
    assert not kernels.supports_means(mean.double())


def test_the_operators_keep_the_rules_of_torch() -> None:
    given_ = problem()
    torch.library.opcheck(
        torch.ops.hyperframe.best_leaves.default, (*given_.values(), 0.5, 40, 9, False)
    )
    chosen = best_leaves(**given_, scale=0.5, num_far=40, num_leaves=9, is_even=False)
    assert chosen.shape == (2, 4, 5, 9)
    index = torch.zeros((2, 2, 4, 3), dtype=torch.int64, device=DEVICE)
    sizes = torch.full((4,), 3, device=DEVICE)
    torch.library.opcheck(torch.ops.hyperframe.leaf_means.default, (given_["mean"], index, sizes))
    assert leaf_means(given_["mean"], index, sizes).shape == (2, 2, 4, 16)
