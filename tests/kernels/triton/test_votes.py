"""The kernels that count votes give what torch does; on a GPU, else interpreted."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.kernels import votes as votes_module
from hyperframe.kernels.votes import (
    Lines,
    column_votes,
    groups_of,
    line_votes,
    torch_column_votes,
    torch_line_votes,
)

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import lines as line_kernels  # noqa: E402
from hyperframe.kernels.triton import vote_calls as kernels  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# the interpreter computes no products of bfloat16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU


def problem(
    *, groups: int = 2, segments: int = 5, voters: int = 3, num_keys: int = 90, heads: int = 2,
    key_heads: int = 1, dim: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn((2, heads, groups, segments, voters, dim), generator=g)
    key = torch.randn((2, key_heads, num_keys, dim), generator=g)
    begin = torch.randint(0, num_keys, (groups,), generator=g)
    stop = torch.randint(0, num_keys + 1, (groups, segments), generator=g)
    return {
        "voters": rows.to(DEVICE, dtype), "key": key.to(DEVICE, dtype), "begin": begin.to(DEVICE),
        "stop": stop.to(DEVICE),
    }  # fmt: skip


def in_double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


def compare(given: dict[str, Any], tolerance: float = 1e-4, **options: Any) -> None:
    options = {"scale": 0.6, "width": given["key"].shape[2]} | options
    found = kernels.triton_column_votes(**given, **options)
    expected = torch_column_votes(**in_double(given), **options)
    assert found.dtype == torch.float32
    seen = torch.arange(options["width"], device=DEVICE) + given["begin"].view(-1, 1, 1)
    seen = (seen < given["stop"].unsqueeze(-1)).expand(found.shape)
    torch.testing.assert_close(found.double()[seen], expected[seen], rtol=tolerance, atol=tolerance)


@given(
    groups=st.integers(1, 3), segments=st.integers(1, 20), voters=st.integers(1, 12),
    num_keys=st.integers(1, 150), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_segments_and_any_bounds(
    groups: int, segments: int, voters: int, num_keys: int, seed: int
) -> None:
    given_ = problem(groups=groups, segments=segments, voters=voters, num_keys=num_keys, seed=seed)
    compare(given_)


@pytest.mark.parametrize("voters", [1, 2, 5, 16, 30, 64])
def test_voters_of_a_segment_are_added_up(voters: int) -> None:
    compare(problem(voters=voters, segments=9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, heads, key_heads", [(16, 1, 1), (40, 4, 2), (128, 2, 2)])
def test_head_sizes_groups_and_dtypes(
    dtype: torch.dtype, dim: int, heads: int, key_heads: int
) -> None:
    given_ = problem(dim=dim, heads=heads, key_heads=key_heads, dtype=dtype)
    compare(given_, 1e-4 if dtype == torch.float32 else 2e-3, scale=0.2)


def test_many_keys_are_cut_into_chunks() -> None:
    given_ = problem(groups=1, num_keys=2500, dim=16)
    given_["begin"][:] = 0
    given_["stop"][0] = torch.tensor([0, 1000, 1024, 1025, 2500])
    compare(given_)


def test_what_the_kernel_does_not_take_is_said() -> None:
    given_ = problem()
    voters, key = given_["voters"], given_["key"]
    assert kernels.supports(voters, key)
    assert not kernels.supports(voters.double(), key.double())
    assert not kernels.supports(voters.repeat_interleave(30, dim=-2), key)
    assert not kernels.supports(voters, key[:, :, :0])


def test_the_operators_keep_the_rules_of_torch() -> None:
    given_ = problem(groups=1)
    given_["begin"][:], given_["stop"][:] = 0, 90
    torch.library.opcheck(torch.ops.hyperframe.column_votes.default, (*given_.values(), 0.5, 90))
    assert column_votes(**given_, scale=0.5, width=90).shape == (2, 2, 1, 5, 90)


def lines_problem(
    *, segments: int = 4, voters: int = 3, rows: int = 16, num_keys: int = 90, heads: int = 4,
    key_heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    query = torch.randn((2, heads, segments, voters, dim), generator=g)
    key = torch.randn((2, key_heads, num_keys, dim), generator=g)
    row = torch.randint(-5, rows, (segments, voters), generator=g)
    row += torch.arange(segments).unsqueeze(-1) * rows
    return query.to(DEVICE, dtype), row.to(DEVICE), key.to(DEVICE, dtype)


def compare_lines(
    given: tuple[torch.Tensor, ...], lines: Lines, tolerance: float = 1e-4, **options: Any
) -> None:
    options = {"scale": 0.6, "is_causal": True, "segment": 16, "shift": 26} | options
    voters, row, key = given
    groups = groups_of(lines, key.shape[2])
    assert line_kernels.supports(voters, key, lines, groups)
    columns, votes = line_kernels.triton_line_votes(*given, lines, groups=groups, **options)
    expected, mass = torch_line_votes(voters.double(), row, key.double(), lines, **options)
    assert columns.dtype == torch.int32
    # columns of equal votes, but for rounding, may change places
    segments, num_keys = voters.shape[2], key.shape[2]
    stop = torch.full((1, segments), num_keys)
    if options["is_causal"]:
        stop = torch.arange(segments) * options["segment"] + options["shift"]
        stop = stop.clamp(0, num_keys).unsqueeze(0)
    best = torch_column_votes(
        voters.double().unsqueeze(2), key.double(), row.new_zeros(1), stop.to(DEVICE),
        scale=options["scale"], width=num_keys,
    )  # fmt: skip
    best = torch.nn.functional.pad(best.squeeze(2), (0, 1), value=-1.0)
    torch.testing.assert_close(
        best.gather(-1, columns.long()), best.gather(-1, expected.long()), rtol=tolerance, atol=0
    )
    if torch.equal(columns.sort().values, expected.sort().values):
        torch.testing.assert_close(votes.double(), mass, rtol=tolerance, atol=tolerance)


@given(
    segments=st.integers(1, 6), voters=st.integers(1, 9), num_keys=st.integers(1, 150),
    shift=st.integers(-60, 90), num_columns=st.integers(1, 30), run=st.sampled_from([8, 16]),
    is_causal=st.booleans(), fewest=st.sampled_from([1, 32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_segments_have_the_columns_and_diagonals_that_torch_finds(
    segments: int, voters: int, num_keys: int, shift: int, num_columns: int, run: int,
    is_causal: bool, fewest: int, seed: int,
) -> None:  # fmt: skip
    given_ = lines_problem(
        segments=segments, voters=voters, num_keys=num_keys, heads=2, key_heads=1, seed=seed
    )
    first = 1 if is_causal else shift - num_keys + 1
    lines = Lines(num_columns, run, first, -(-(shift + 16 * segments - first) // run) + 2)
    lines = lines._replace(num_runs=max(1, lines.num_runs))
    with mock.patch.object(votes_module, "_FEWEST", fewest):
        compare_lines(given_, lines, shift=shift, is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lines_of_other_dtypes(dtype: torch.dtype) -> None:
    given_ = lines_problem(dim=40, dtype=dtype, num_keys=70)
    # sums of runs are kept in bfloat16: 2^-8 where the interpreter cuts, beside the products
    compare_lines(given_, Lines(5, 16, 1, 7), 1e-4 if dtype == torch.float32 else 8e-3, scale=0.2)


def test_lines_in_chunks_of_keys_and_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = lines_problem(num_keys=2300, rows=500)
    monkeypatch.setattr(line_kernels, "_HELD_BYTES", 1)
    compare_lines(given_, Lines(20, 16, 1, 150), segment=500, shift=300)


def test_of_many_groups_the_best_are_found_among_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = lines_problem(num_keys=1100, rows=275)
    monkeypatch.setattr(line_kernels, "_MANY", 2)
    monkeypatch.setattr(votes_module, "_FEWEST", 1)
    compare_lines(given_, Lines(3, 16, 1, 69), segment=275, shift=0)
    compare_lines(given_, Lines(3, 8, 1, 138), segment=275, shift=0, is_causal=False)


def test_a_column_leaves_no_trace_in_the_diagonals() -> None:
    voters, row, key = lines_problem(heads=1, key_heads=1, num_keys=64, segments=3)
    voters[..., 0] = 6.0
    key[:, :, 11, 0] = 60.0  # all mass, up to 2^-100
    columns, votes = line_kernels.triton_line_votes(
        voters,
        row,
        key,
        [1, 16, 1, 5],
        scale=1.0,
        is_causal=True,
        segment=16,
        shift=16,
        groups=(16, 1),
    )
    assert (columns == 11).all()
    assert votes.max() < 1e-20


def test_the_operator_of_lines_keeps_the_rules_of_torch() -> None:
    voters, row, key = lines_problem()
    torch.library.opcheck(
        torch.ops.hyperframe.line_votes.default,
        (voters, row, key, 0.5, True, [16, 26], [100, 16, 1, 6]),
    )
    columns, votes = line_votes(
        voters, row, key, Lines(100, 16, 1, 6), scale=0.5, is_causal=True, segment=16, shift=26
    )
    assert columns.shape == (2, 4, 4, 100)
    assert votes.shape == (2, 4, 4, 6)
    assert not line_kernels.supports(voters, key, Lines(5, 4, 1, 6), (16, 32))
