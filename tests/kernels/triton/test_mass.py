"""The kernel of tile masses gives what torch does; on a GPU, else interpreted."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.errors import ArgumentError
from hyperframe.kernels.mass import NO_WINDOW, Window, tile_mass, torch_tile_mass

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import configs  # noqa: E402
from hyperframe.kernels.triton import mass as kernels  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# the interpreter computes no products of bfloat16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU


def problem(
    *, size: int = 8, slots: int = 70, num_keys: int = 90, heads: int = 2, key_heads: int = 1,
    dim: int = 16, offset: int = 20, dtype: torch.dtype = torch.float32, delayed: bool = False,
    step: int = 1, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    tiles = 3
    voters = torch.randn((2, heads, tiles, size, dim), generator=g)
    key = torch.randn((2, key_heads, num_keys, dim), generator=g)
    drawn = torch.rand((2, heads, tiles, max(num_keys, slots)), generator=g).argsort(dim=-1)
    index = drawn[..., :slots].clamp(max=num_keys).sort(dim=-1).values
    begin = torch.arange(tiles) * size * step + offset
    rows = torch.tensor([size, size, max(1, size - 3)])
    return {
        "voters": voters.to(DEVICE, dtype), "rows": rows.to(DEVICE),
        "position": (begin - (size - 1) * step * delayed).to(DEVICE), "key": key.to(DEVICE, dtype),
        "index": index.to(DEVICE), "begin": begin.to(DEVICE),
    }  # fmt: skip


def compare(given: dict[str, Any], window: Window, tolerance: float = 1e-4, **options: Any) -> None:
    options = {"scale": 0.6, "is_causal": True, "is_delayed": False} | options
    found = kernels.triton_tile_mass(**given, window=tuple(window), **options)
    exact = {
        name: x.double() if x.is_floating_point() else x for name, x in given.items()
    }  # fmt: skip
    expected = torch_tile_mass(**exact, window=window, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["walked", "held"])
def _either_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways for lists in 16 bits: walked over twice, or the first 128 slots held."""
    held = {} if request.param == "walked" else {"long": 64, "short": 64}
    for rows in (32, 64, 128):
        config = configs.MassConfig(64, 4, 2, **held)
        monkeypatch.setitem(configs.MASS_OVERRIDES, (64, rows), config)


@given(
    left=st.integers(-1, 30), right=st.integers(0, 9), sinks=st.integers(0, 12),
    offset=st.integers(-30, 70), slots=st.integers(1, 90), is_causal=st.booleans(),
    delayed=st.booleans(), size=st.integers(1, 20), step=st.integers(1, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_window_and_any_position(
    left: int, right: int, sinks: int, offset: int, slots: int, is_causal: bool, delayed: bool,
    size: int, step: int, seed: int,
) -> None:  # fmt: skip
    window = NO_WINDOW if left < 0 else Window(left, 0 if is_causal else right, sinks)
    given_ = problem(size=size, slots=slots, offset=offset, delayed=delayed, step=step, seed=seed)
    compare(given_, window, is_causal=is_causal, is_delayed=delayed, step=step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, heads, key_heads", [(16, 1, 1), (40, 4, 2), (128, 2, 2)])
def test_head_sizes_groups_and_dtypes(
    dtype: torch.dtype, dim: int, heads: int, key_heads: int
) -> None:
    given_ = problem(dim=dim, heads=heads, key_heads=key_heads, dtype=dtype, size=16)
    compare(given_, Window(9, 0, 3), 1e-4 if dtype == torch.float32 else 2e-3, scale=0.2)


@pytest.mark.usefixtures("_either_kernel")
@pytest.mark.parametrize(
    "size, step, offset, is_causal, delayed",
    [(3, 1, 20, True, True), (33, 2, -9, True, False), (33, 1, 10, False, True)],
)
def test_lists_held_or_walked_over(
    size: int, step: int, offset: int, is_causal: bool, delayed: bool
) -> None:
    given_ = problem(
        size=size, step=step, offset=offset, slots=150, num_keys=200, delayed=delayed,
        dtype=torch.float16,
    )  # fmt: skip
    window = Window(21, 0 if is_causal else 4, 3)
    compare(given_, window, 4e-3, step=step, is_causal=is_causal, is_delayed=delayed)


@pytest.mark.parametrize("stride", [2, 4, 7])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_softmax_over_some_of_the_slots(stride: int, is_causal: bool) -> None:
    for window in (NO_WINDOW, Window(6, 0, 3)):
        compare(problem(size=20, offset=60), window, is_causal=is_causal, stride=stride)
    # the only slot that counts is hidden from the first rows
    given_ = problem(size=20, offset=5, slots=stride)
    compare(given_, NO_WINDOW, is_causal=is_causal, stride=stride)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # seen, and mended
@pytest.mark.usefixtures("_either_kernel")
@pytest.mark.parametrize("window", [NO_WINDOW, Window(20, 0, 3), Window(0, 0, 0)])
def test_held_logits_far_above_and_below_those_of_the_first_block(window: Window) -> None:
    far_logits(torch.float16, [window], 4e-3)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # seen, and mended
def test_logits_far_above_and_below_those_of_the_first_block() -> None:
    far_logits(torch.float32, [NO_WINDOW, Window(20, 0, 3), Window(0, 0, 0)], 1e-4)


def far_logits(dtype: torch.dtype, windows: list[Window], tolerance: float) -> None:
    # sums shifted by the maximum of the first block overflow, or vanish
    given_ = problem(slots=90, size=16, offset=95, dim=16, dtype=dtype)
    ladder = torch.linspace(-18, -7, 90, device=DEVICE)
    given_["key"] = (given_["key"] * 0.1 + ladder.view(-1, 1)).to(dtype)
    for sign in (1, -1):
        for window in windows:
            given_["voters"] = sign * given_["voters"].abs()
            compare(given_, window, tolerance, scale=1.5)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_that_are_not_positive(scale: float) -> None:
    compare(problem(), Window(5, 0, 2), scale=scale)


@pytest.mark.parametrize("size", [70, 128])
def test_tiles_of_many_rows(size: int) -> None:
    compare(problem(size=size, offset=10), Window(30, 0, 2))


@pytest.mark.usefixtures("_either_kernel")
@pytest.mark.parametrize("dtype, strides", [(torch.float32, (1, 3)), (torch.float16, (1,))])
def test_lists_that_end_early(dtype: torch.dtype, strides: tuple[int, ...]) -> None:
    given_ = problem(slots=200, num_keys=300, offset=250, dtype=dtype)
    used = torch.tensor([[[0, 1, 63], [64, 65, 128]], [[129, 192, 200], [5, 0, 199]]])
    is_used = torch.arange(200) < used.unsqueeze(-1)
    given_["index"] = torch.where(is_used.to(DEVICE), given_["index"], 300)
    for stride in strides:
        compare(given_, Window(9, 0, 2), 1e-4 if dtype == torch.float32 else 4e-3, stride=stride)


def test_rows_that_see_nothing_have_no_mass_and_what_is_no_candidate_has_minus_one() -> None:
    given_ = problem(offset=0)
    given_["index"] = torch.full_like(given_["index"], 90)
    given_["index"][..., 0] = 89  # behind all rows
    found = kernels.triton_tile_mass(
        **given_, window=NO_WINDOW, scale=1.0, is_causal=True, is_delayed=False
    )
    assert (found[..., 0] == 0).all()
    assert (found[..., 1:] == -1).all()


def test_the_operator_keeps_the_rules_of_torch() -> None:
    given_ = problem()
    torch.library.opcheck(
        torch.ops.hyperframe.tile_mass.default,
        (*given_.values(), [5, 0, 2], 0.5, True, False, 2, 3),
    )
    by_name = tile_mass(**given_, window=Window(5, 0, 2), scale=0.5, is_causal=True)
    assert by_name.shape == given_["index"].shape
    with pytest.raises(ArgumentError, match="stride=0"):
        tile_mass(**given_, scale=0.5, is_causal=True, stride=0)
    with pytest.raises(ArgumentError, match="step=0"):
        tile_mass(**given_, scale=0.5, is_causal=True, step=0)


def test_what_the_kernel_does_not_take_is_said() -> None:
    given_ = problem()
    assert kernels.supports(given_["voters"], given_["key"])
    assert not kernels.supports(given_["voters"].double(), given_["key"].double())
    assert not kernels.supports(
        given_["voters"][..., :1].repeat(1, 1, 1, 1, 300),
        given_["key"][..., :1].repeat(1, 1, 1, 300),
    )
