"""The kernels of sketches and entries against plain definitions; on a GPU, else interpreted."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperframe.detectors import entry_detector
from hyperframe.detectors.count_sketch import CountSketch as Detector
from hyperframe.kernels import bucket_sums as sums
from hyperframe.kernels import entry_lists, sketch
from hyperframe.kernels.bucket_sums import torch_bucket_sums
from hyperframe.kernels.entry_lists import torch_entry_lists
from hyperframe.kernels.sketch import packed_places, torch_candidates, torch_products
from hyperframe.sketching import count_sketch
from hyperframe.sketching.columns import ColumnProblem
from hyperframe.sketching.count_sketch import CountSketch
from hyperframe.sketching.dyadic import RowSearch

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import bucket_sums as sum_kernels  # noqa: E402
from hyperframe.kernels.triton import entries as entry_kernels  # noqa: E402
from hyperframe.kernels.triton import entry_lists as list_kernels  # noqa: E402
from hyperframe.kernels.triton import sketch as kernels  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# the interpreter computes no products of bfloat16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------- candidates


def integers(low: int, high: int, *shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Whole numbers, whose products are exact in every order of the sums."""
    drawn = torch.randint(low, high + 1, shape, generator=generator(seed))
    return drawn.to(DEVICE, dtype)


def tree(
    top: int, levels: int, *, width: int = 16, repetitions: int = 3, dim: int = 5, columns: int = 2,
    heads: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the candidates: a tree whose scores are whole numbers, many of them ties."""
    nodes = sum(top * 8**level for level in range(levels))
    unit = min(15, 127 // repetitions)
    shape = (heads, levels, repetitions, width, dim)
    blocks = torch.randint(
        width // 8, (heads, nodes, repetitions), generator=generator(seed + 1), device="cpu"
    )
    return {
        "key": integers(-2, 2, heads, columns, dim, seed=seed + 2, dtype=torch.float32),
        "top": integers(-2, 2, heads, repetitions, top, dim, seed=seed + 3, dtype=dtype),
        "hashed": integers(-2, 2, *shape, seed=seed + 4, dtype=dtype),
        "places": packed_places(blocks.to(DEVICE), width // 8),
        "factor": 2.0, "unit": unit, "least": max(1, repetitions * unit // 3), "capacity": 9,
        "num_rows": top * 8**levels - 3,
    }  # fmt: skip


def by_hand(
    key: torch.Tensor, top: torch.Tensor, hashed: torch.Tensor, places: torch.Tensor,
    factor: float, unit: int, least: int, capacity: int, num_rows: int,
) -> list[list[list[int]]]:  # fmt: skip
    """The rows of every column, where of equal scores the first nodes stay."""
    heads, columns, _ = key.shape
    repetitions = top.shape[1]
    key, top, hashed, places = (x.cpu().double() for x in (key, top, hashed, places))
    found = []
    for head in range(heads):
        scores = [top[head], *hashed[head]]
        scores = [((x @ key[head].T * factor) ** 2).clamp(max=unit).floor() for x in scores]
        of_head = []
        for column in range(columns):
            kept, start, nodes = list(range(top.shape[2])), 0, top.shape[2]
            for level, score in enumerate(scores):
                total = {}
                if level:
                    kept = [8 * node + child for node in kept for child in range(8)]
                for node in kept:
                    bucket = [node] * repetitions
                    if level:
                        block = places[head, start + node // 8].long().tolist()
                        bucket = [8 * b + node % 8 for b in block[:repetitions]]
                    total[node] = sum(float(score[r, b, column]) for r, b in enumerate(bucket))
                if level:
                    start, nodes = start + nodes, nodes * 8
                kept = [node for node in kept if total[node] >= least]
                kept = sorted(sorted(kept, key=lambda node: (-total[node], node))[:capacity])
            of_head.append([node for node in kept if node < num_rows])
        found.append(of_head)
    return found


def assert_candidates(given: dict[str, Any]) -> torch.Tensor:
    row = kernels.triton_candidates(**given)
    expected = torch_candidates(**given)
    assert row.dtype == expected.dtype
    assert row.shape == expected.shape
    used = [[[x for x in column if x >= 0] for column in head] for head in row.tolist()]
    assert used == by_hand(**given)
    # what is not used comes last
    assert all(
        (x >= 0) == (slot < len(column))
        for head, kept in zip(row.tolist(), used, strict=True)
        for whole, column in zip(head, kept, strict=True)
        for slot, x in enumerate(whole)
    )
    return row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "top, levels, width, repetitions", [(5, 0, 8, 3), (16, 1, 16, 8), (11, 2, 24, 3), (3, 3, 16, 9)]
)
def test_candidates_are_those_of_the_definition_and_of_ties_the_first(
    top: int, levels: int, width: int, repetitions: int, dtype: torch.dtype
) -> None:
    made = tree(top, levels, width=width, repetitions=repetitions, dtype=dtype)
    row = assert_candidates(made)
    assert (row >= 0).any()


@pytest.mark.parametrize("capacity, least", [(1, 1), (40, 1), (3, 100), (40, 255)])
def test_any_capacity_and_any_score_that_is_enough(capacity: int, least: int) -> None:
    assert_candidates(tree(6, 2, repetitions=5) | {"capacity": capacity, "least": least})


def test_levels_of_few_and_of_many_nodes() -> None:
    # 6, 48 and 100 nodes: blocks of 32, 64 and 128
    made = tree(6, 3, repetitions=5, columns=1) | {"capacity": 100, "least": 1}
    assert (assert_candidates(made) >= 0).sum() > 190


def test_places_that_need_more_than_a_byte() -> None:
    made = tree(4, 1, width=8 * 300, repetitions=2, heads=1)
    assert made["places"].dtype == torch.int16
    assert_candidates(made)
    wide = packed_places(torch.tensor([[[40_000, 1, 2]]]), 40_001)
    assert wide.dtype == torch.int32
    assert wide.tolist() == [[[40_000, 1, 2, 0]]]
    assert packed_places(torch.zeros(1, 2, 9, dtype=torch.int64), 256).shape == (1, 2, 16)


def test_more_columns_and_buckets_than_a_block_and_keys_with_strides() -> None:
    made = tree(40, 0, columns=33, dim=17, heads=2)
    made["key"] = made["key"].transpose(0, 1).contiguous().transpose(0, 1)
    assert_candidates(made)
    assert_candidates(tree(40, 1, width=64, repetitions=8, columns=1, heads=1))


def test_all_energy_in_one_bucket_counts_once() -> None:
    # squares beyond any byte, and as large as floats are
    made = tree(8, 1, repetitions=1)
    made["key"] *= 1e18
    assert_candidates(made)


def test_no_columns_give_no_rows() -> None:
    made = tree(6, 1)
    made["key"] = made["key"][:, :0]
    assert kernels.triton_candidates(**made).shape == (2, 0, 9)


def test_a_real_sketch_leads_to_the_same_rows() -> None:
    g = generator(5)
    query = torch.randn(1, 2, 700, 8, generator=g) * torch.rand(700, 1, generator=g) ** -0.7
    problem = ColumnProblem.of(query.to(DEVICE), torch.randn(1, 1, 6, 8, generator=g).to(DEVICE))
    drawn = CountSketch.draw(
        2, num_rows=700, width=64, repetitions=8, device=problem.query.device, generator=None
    )
    search = RowSearch.of(drawn, problem.query)
    given = {
        "key": problem.key, "top": search.top, "hashed": search.hashed, "places": search.places,
        "factor": math.sqrt(8 * 15.5), "unit": 15, "least": 24, "capacity": 300, "num_rows": 700,
    }  # fmt: skip
    row, expected = kernels.triton_candidates(**given), torch_candidates(**given)
    # a product that rounds to the other side of a whole number may move a node over the bound
    a, b = (set(map(tuple, torch.nonzero(dense(x, 700)).tolist())) for x in (row, expected))
    assert len(b) > 60
    assert len(a ^ b) <= 2


def dense(row: torch.Tensor, num_rows: int) -> torch.Tensor:
    found = torch.zeros((*row.shape[:2], num_rows + 1), dtype=torch.bool, device=row.device)
    return found.scatter_(-1, torch.where(row < 0, num_rows, row), True)[..., :-1]


def test_what_the_descent_does_not_take_is_said() -> None:
    made = tree(6, 1)
    given = (made["key"], made["top"], made["hashed"])
    assert kernels.supports(*given, 15, 2048)
    assert not kernels.supports(*given, 15, 2049)
    assert not kernels.supports(*given, 16, 9)
    more = {"top": made["top"].repeat(1, 3, 1, 1), "hashed": made["hashed"].repeat(1, 1, 3, 1, 1)}
    assert kernels.supports(made["key"], **more, unit=14, capacity=9)
    assert not kernels.supports(made["key"], **more, unit=15, capacity=9)
    assert not kernels.supports(*(x.double() for x in given), 15, 9)


# ------------------------------------------------------------------------ bucket sums


@pytest.mark.parametrize(
    "num_rows, nodes, blocks, members, dim",
    [(5, 1, 1, 1, 3), (70, 9, 2, 5, 16), (150, 19, 3, 7, 70)],
)
@pytest.mark.parametrize("first", [0, 46])
def test_sums_of_signed_rows_are_those_of_torch(
    num_rows: int, nodes: int, blocks: int, members: int, dim: int, first: int
) -> None:
    g = generator(first)
    x = integers(-9, 9, 2, 1, num_rows, dim, seed=1, dtype=torch.float32)
    words = torch.randint(1 << 48, (2, 2, num_rows), generator=g).to(DEVICE)
    order = torch.rand(2, 4, blocks * members, generator=g).argsort(dim=-1).to(DEVICE)
    assert int(order.max()) >= nodes - 1
    options = (order, nodes, blocks, first, 48)
    for rows, signs in ((x, words), (x.expand(-1, 4, -1, -1).contiguous(), None)):
        found = sum_kernels.triton_bucket_sums(rows, signs, *options)
        for a, b in zip(found, torch_bucket_sums(rows, signs, *options), strict=True):
            assert torch.equal(a, b)


def test_sums_that_the_kernel_does_not_take_are_said() -> None:
    x, order = torch.zeros(1, 1, 8, 4), torch.zeros(1, 1, 1, dtype=torch.int64)
    assert sum_kernels.supports(x, order)
    assert not sum_kernels.supports(x.double(), order)


# ---------------------------------------------------------------------- exact products


def candidates_of(
    num_rows: int, columns: int, width: int, *, dim: int = 6, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    g = generator(seed)
    query = torch.randn(2, num_rows, dim, generator=g).to(dtype)
    key = torch.randn(2, columns, dim, generator=g)
    norm = (key @ query.float().transpose(-1, -2)).square().sum(dim=-1, keepdim=True).sqrt()
    row = torch.rand(2, columns, num_rows, generator=g).argsort(dim=-1)[..., :width]
    row = torch.where(torch.rand(row.shape, generator=g) < 0.8, row, -1)
    return query.to(DEVICE), (key / norm).to(DEVICE), row.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "width, dim, limit, sign", [(20, 6, 60, None), (70, 40, 70, 1.0), (33, 64, 50, -1.0)]
)
def test_products_are_kept_in_order_where_they_are_large(
    width: int, dim: int, limit: int, sign: float | None, dtype: torch.dtype
) -> None:
    query, key, row = candidates_of(90, 9, width, dim=dim, dtype=dtype)
    given = (query, key, row, 1.0 / limit, limit, sign)
    assert entry_kernels.supports_products(*given)
    kept, product = entry_kernels.triton_products(*given)
    expected, _ = torch_products(*given)
    assert kept.shape == expected.shape
    assert torch.equal(dense(kept, 90), dense(expected, 90))
    assert (expected >= 0).sum() > 20
    # the order of the candidates, and nothing between them
    place = torch.where(kept.unsqueeze(-1) == row.unsqueeze(-2), 1, 0).argmax(dim=-1)
    is_used = kept >= 0
    assert (place[..., 1:] > place[..., :-1])[is_used[..., 1:]].all()
    assert (is_used[..., :-1] >= is_used[..., 1:]).all()
    exact = (query.double().gather(
        1, kept.clamp(min=0).flatten(1).unsqueeze(-1).expand(-1, -1, dim)
    ).view(*kept.shape, dim) * key.double().unsqueeze(2)).sum(dim=-1)  # fmt: skip
    torch.testing.assert_close(product[is_used].double(), exact[is_used], atol=1e-6, rtol=1e-5)


def test_no_candidate_and_no_energy_give_no_entry() -> None:
    query, key, row = candidates_of(30, 4, 8)
    kept, product = entry_kernels.triton_products(query, key, row * 0 - 1, 0.1, 8, None)
    assert (kept == -1).all()
    assert (product == 0).all()
    kept, _ = entry_kernels.triton_products(query, key * 0, row, 0.0, 8, None)
    assert (kept == -1).all()


def test_what_the_exact_test_does_not_take_is_said() -> None:
    query, key, row = candidates_of(30, 4, 8)
    assert entry_kernels.supports_products(query, key, row, 1 / 8, 8, None)
    # more can pass than there is room for: the largest have to be found
    assert not entry_kernels.supports_products(query, key, row, 1 / 8, 7, None)
    assert entry_kernels.supports_products(query, key, row, 0.0, 8, None)
    assert not entry_kernels.supports_products(query.double(), key.double(), row, 0.1, 8, None)


# ------------------------------------------------------------------------------- lists


def assert_lists(
    row: torch.Tensor, strength: torch.Tensor, num_rows: int, tile_size: int, longest: int,
    is_causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    given = (row.to(DEVICE), strength.to(DEVICE), num_rows, tile_size, longest, is_causal)
    index, bits, count = list_kernels.triton_lists(*given)
    expected = torch_entry_lists(*given)
    assert index.dtype == expected[0].dtype
    assert (index >= 0).all()
    assert (index < row.shape[1]).all()
    assert torch.equal(count, expected[2])
    is_used = torch.arange(longest, device=DEVICE) < count.unsqueeze(-1)
    assert torch.equal(index[is_used], expected[0][is_used])
    assert torch.equal(bits[is_used], expected[1][is_used])
    return count


@settings(max_examples=max(6, settings.default.max_examples // 8))
@given(
    num_rows=st.integers(1, 90), num_keys=st.integers(1, 20), slots=st.integers(1, 5),
    tile_size=st.sampled_from([1, 3, 16, 64]), longest=st.integers(1, 12), is_causal=st.booleans(),
    levels=st.sampled_from([2, 1000]), seed=st.integers(0, 9999),
)  # fmt: skip
def test_lists_are_those_of_the_sorts(
    num_rows: int, num_keys: int, slots: int, tile_size: int, longest: int, is_causal: bool,
    levels: int, seed: int,
) -> None:  # fmt: skip
    g = generator(seed)
    order = torch.rand(2, num_keys, num_rows + slots, generator=g).argsort(dim=-1)[..., :slots]
    row = torch.where(order < num_rows, order, -1)
    # ties, negative strengths, and no number where there is no entry
    strength = torch.randint(-levels, levels, row.shape, generator=g).float()
    strength = strength.masked_fill(row < 0, float("nan"))
    assert_lists(row, strength, num_rows, tile_size, min(longest, num_keys), is_causal)


@pytest.mark.parametrize("longest, levels", [(1, 1), (37, 2), (64, 10_000)])
def test_a_row_that_every_column_holds_keeps_the_strongest(longest: int, levels: int) -> None:
    row = torch.zeros(1, 100, 3, dtype=torch.int32)
    row[..., 1], row[..., 2] = -1, torch.arange(100) % 20 + 1
    strength = torch.randint(-levels, levels, row.shape, generator=generator()).float()
    count = assert_lists(row, strength, 24, 8, longest)
    assert count[0, 0] == longest


@pytest.mark.parametrize(
    "num_keys, tile_size, bits, longest, levels",
    [(400, 64, 8, 30, 1), (400, 64, 8, 1, 10_000), (400, 64, 8, 89, 3), (90, 5, 4, 9, 3),
     (90, 64, 4, 89, 1), (90, 64, 4, 1, 10_000)],
)  # fmt: skip
def test_a_tile_that_many_jobs_share_keeps_the_same(
    num_keys: int, tile_size: int, bits: int, longest: int, levels: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, size in (("_JOB", 64), ("_JOB_BLOCK", 32), ("_TILES_AT_ONCE", 2)):
        monkeypatch.setattr(list_kernels, name, size)
    asked, shifts = [], list_kernels._shifts

    def shifts_of(width: int, num_keys: int) -> list[int]:
        asked.append(width)
        return shifts(width, num_keys)

    monkeypatch.setattr(list_kernels, "_shifts", shifts_of)
    # most columns have an entry in the same tile, and few anywhere else
    g = generator(num_keys + longest)
    row = torch.full((2, num_keys, 3), -1)
    row[..., 0] = torch.where(torch.rand(2, num_keys, generator=g) < 0.95, 1, -1)
    row[..., 1] = torch.randint(2, 30, (2, num_keys), generator=g)
    strength = torch.randint(-levels, levels, row.shape, generator=g).float()
    count = assert_lists(row, strength, 30, tile_size, longest)
    assert asked == [8, bits]
    assert (count == longest).any()


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("num_keys", [2, 16, 17, 256, 257, 1 << 17, (1 << 31) - 1])
def test_digits_leave_out_no_bit_that_can_differ(width: int, num_keys: int) -> None:
    known = 63
    for shift in list_kernels._shifts(width, num_keys):
        assert shift < known
        skipped = ((1 << known) - 1) & -(1 << (shift + width))
        of_keys = (1 << (num_keys - 1).bit_length()) - 1
        assert skipped & (((1 << 32) - 1) << 31 | of_keys) == 0
        known = shift
    assert known == 0


def test_no_entries_give_empty_lists() -> None:
    row = torch.full((2, 20, 4), -1)
    count = assert_lists(row, torch.zeros(2, 20, 4), 30, 16, 5)
    assert (count == 0).all()


def test_what_the_lists_do_not_take_is_said() -> None:
    row, strength = torch.full((2, 20, 4), -1), torch.zeros(2, 20, 4)
    assert list_kernels.supports_lists(row, strength, 4096)
    assert not list_kernels.supports_lists(row, strength, 4097)
    assert not list_kernels.supports_lists(row, strength.double(), 5)


# ---------------------------------------------------------------------------- detector


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, do by kernels what a GPU would."""
    if ON_GPU:
        return

    def is_single(x: torch.Tensor) -> bool:
        return x.dtype == torch.float32

    for module in (sketch, sums, entry_lists, count_sketch, entry_detector):
        monkeypatch.setattr(module, "runs_kernels", is_single)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize(
    "dtype, positive_only", [(torch.float32, False), (torch.float16, True), (torch.bfloat16, False)]
)
def test_the_detector_holds_the_heavy_entries(dtype: torch.dtype, positive_only: bool) -> None:
    g = generator(7)
    query = torch.randn(1, 1, 300, 8, generator=g) * torch.rand(300, 1, generator=g) ** -0.7
    query, key = (3e4 * query / query.abs().max()).to(dtype), torch.randn(1, 1, 8, 8, generator=g)
    query, key = query.to(DEVICE), key.to(DEVICE, dtype)
    key[..., 5, :], query[..., 7, :] = 0, float("inf")
    detector = Detector(
        tau=8,
        search="sketch",
        width=4,
        repetitions=5,
        positive_only=positive_only,
        max_bytes=30_000,
    )
    drawn = torch.Generator(device=DEVICE).manual_seed(1)
    found = detector.find(query, key, generator=drawn).to_dense()
    logits = query.masked_fill(query.isinf(), 0).double() @ key.double().transpose(-1, -2)
    square = logits.square()
    is_heavy = (square >= square.sum(dim=2, keepdim=True) / 8) & (
        (logits > 0) | (not positive_only)
    )
    is_heavy = is_heavy & (square > 0)
    assert (found <= is_heavy).all()
    # what is missed depends on the draw, which is fixed; see test_dyadic for how often
    assert (is_heavy & ~found).sum() <= 1
    assert is_heavy.sum() >= 4
