"""sortLSH: Definition 1's probabilities, the blocks of Algorithm 1, and its causal forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binom

from hyperframe.detectors.sort_lsh import SortLSH, hamming_sorted_codes, inverse_gray
from hyperframe.errors import ArgumentError
from hyperframe.kernels.hashing import rounded_planes
from hyperframe.masks import BandMask, BlockMask
from hyperframe.rectangles import Level, causal_levels, leaf_size

FALSE_ALARM = 1e-6


def tensors(
    seed: int = 0, *, batch: int = 1, heads: int = 2, key_heads: int = 1, num_queries: int = 40,
    num_keys: int = 40, dim: int = 6,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, num_queries, dim, generator=g, dtype=torch.float64)
    key = torch.randn(batch, key_heads, num_keys, dim, generator=g, dtype=torch.float64)
    return query, key


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(
    detector: SortLSH, query: torch.Tensor, key: torch.Tensor, seed: int, *, centre: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of queries and keys, both for query heads (one round)."""
    ((query_code, key_code),) = detector._codes(query, key, generator(seed), centre=centre)
    return query_code, key_code.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


# ---------------------------------------------------------------------------- Definition 1


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 10])
def test_cyclic_neighbours_of_the_gray_code_differ_in_one_bit(bits: int) -> None:
    patterns = torch.arange(2**bits)
    rank = inverse_gray(patterns)
    assert rank.sort().values.tolist() == patterns.tolist()  # a permutation
    by_rank = rank.argsort()
    differing = by_rank ^ by_rank.roll(1)
    assert all(int(x).bit_count() == 1 for x in differing)


def test_the_gray_rank_inverts_the_reflected_gray_code_up_to_62_bits() -> None:
    ranks = torch.randint(0, 2**62, (1000,), generator=generator())
    assert torch.equal(inverse_gray(ranks ^ (ranks >> 1)), ranks)


_ANGLES = (0.05, 0.2, 0.5, 0.8)  # in units of pi
_BITS = (2, 4, 7)


@pytest.mark.statistical
@pytest.mark.parametrize("num_projections", _BITS)
@pytest.mark.parametrize("angle", _ANGLES)
def test_equal_and_neighbouring_codes_have_the_probabilities_of_definition_1(
    angle: float, num_projections: int
) -> None:
    draws, dim, r = 20_000, 5, num_projections
    g = generator(17)
    x, y = torch.zeros(dim), torch.zeros(dim)
    x[0], y[0], y[1] = 3.0, math.cos(angle * math.pi), math.sin(angle * math.pi)
    projection = torch.randn(draws, dim, r, generator=g)
    code = hamming_sorted_codes(torch.stack([x, y]).expand(draws, 2, dim), projection)
    distance = (code[:, 0] - code[:, 1]) % 2**r
    same = int((distance == 0).sum())
    neighbours = int(((distance == 1) | (distance == 2**r - 1)).sum())
    # each count is binomial, exactly. two-sided, all checks of this test together: 1e-6
    tail = FALSE_ALARM / (2 * 2 * len(_ANGLES) * len(_BITS))
    for count, probability in (
        (same, (1 - angle) ** r),
        (neighbours, 2 * angle * (1 - angle) ** (r - 1)),
    ):
        low = binom.ppf(tail, draws, probability)
        high = binom.isf(tail, draws, probability)
        assert low <= count <= high, f"{count / draws} is not {probability}"


def test_a_vector_and_its_opposite_never_share_a_code_and_lengths_do_not_matter() -> None:
    g = generator()
    x, projection = torch.randn(100, 6, generator=g), torch.randn(6, 5, generator=g)
    code = hamming_sorted_codes(x, projection)
    assert torch.equal(hamming_sorted_codes(1e-3 * x, projection), code)
    # all r signs differ: the pattern is the complement
    assert not (hamming_sorted_codes(-x, projection) == code).any()


def test_heads_batch_items_and_rounds_have_hyperplanes_of_their_own() -> None:
    query, key = tensors()
    query, key = query[:, :1].expand(2, 4, -1, -1), key.expand(2, 2, -1, -1)
    rounds = SortLSH(num_rounds=2)._codes(query, key, generator(), centre=False)
    seen = [code[b, h] for _, code in rounds for b in range(2) for h in range(2)]
    for i, a in enumerate(seen):
        for b in seen[:i]:
            assert not torch.equal(a, b)
    # query heads of a group share the hyperplanes of their key head
    for query_code, _ in rounds:
        assert torch.equal(query_code[:, 0], query_code[:, 1])
        assert not torch.equal(query_code[:, 1], query_code[:, 2])


# --------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("num_queries", [40, 37, 12, 3])
@pytest.mark.parametrize("block_size", [1, 7, 8, 40])
def test_a_row_holds_the_keys_of_its_share_of_ranks(num_queries: int, block_size: int) -> None:
    query, key = tensors(num_queries=num_queries)
    detector = SortLSH(block_size=block_size, num_projections=3)
    dense = detector.find(query, key, generator=generator(5)).to_dense()
    query_code, key_code = codes(detector, query, key, 5)
    blocks = -(-40 // block_size)
    expected = torch.zeros_like(dense)
    for head in range(2):
        rows = query_code[0, head].argsort(stable=True).tolist()
        columns = key_code[0, head].argsort(stable=True).tolist()
        for b in range(blocks):
            own_rows = rows[b * num_queries // blocks : (b + 1) * num_queries // blocks]
            own_columns = columns[b * 40 // blocks : (b + 1) * 40 // blocks]
            for row in own_rows:
                expected[0, head, row, own_columns] = True
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("shape", [(40, 40), (37, 23), (5, 40)])
@pytest.mark.parametrize("centre", [False, True])
def test_blocks_of_grouped_heads_and_batches_follow_the_codes_of_their_key_head(
    shape: tuple[int, int], centre: bool
) -> None:
    query, key = tensors(batch=2, heads=6, key_heads=3, num_queries=shape[0], num_keys=shape[1])
    detector = SortLSH(block_size=7, num_projections=4, centre_keys=centre)
    mask = detector.find(query, key, generator=generator(8))
    assert isinstance(mask, BlockMask)
    assert mask.rectangles == ((0, shape[0], 0, shape[1]),)
    query_code, key_code = codes(detector, query, key, 8, centre=centre)
    assert torch.equal(mask.query_order.long(), query_code.argsort(dim=-1, stable=True))
    order = mask.key_order.repeat_interleave(2, dim=1).long()
    assert torch.equal(order, key_code.argsort(dim=-1, stable=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hyperplanes_for_16_bit_inputs_have_16_bits_and_products_are_in_float32(
    dtype: torch.dtype,
) -> None:
    query, key = (x.to(dtype) for x in tensors())
    detector = SortLSH(block_size=8)
    drawn = detector._hyperplanes(key, generator())
    planes = rounded_planes(drawn, dtype)
    assert planes.dtype == drawn.dtype == torch.float32
    assert torch.equal(planes, drawn.to(dtype).float())
    assert not torch.equal(planes, drawn)
    dense = detector.find(query, key, generator=generator()).to_dense()
    product = query.double() @ planes[0].double().repeat_interleave(2, dim=1)
    code = inverse_gray(((product > 0).long() << torch.arange(7)).sum(dim=-1))
    assert torch.equal(hamming_sorted_codes(query, planes[0].repeat_interleave(2, 1)), code)
    mask = detector.find(query, key, generator=generator())
    assert torch.equal(mask.query_order.long(), code.argsort(dim=-1, stable=True))
    assert torch.equal(mask.to_dense(), dense)


@given(
    num_queries=st.integers(1, 60),
    num_keys=st.integers(1, 60),
    block_size=st.integers(1, 70),
    seed=st.integers(0, 1000),
    rounding=st.sampled_from([0.0, 1.0, 100.0]),
)
@example(num_queries=13, num_keys=30, block_size=30, seed=0, rounding=0.0)
@example(num_queries=13, num_keys=30, block_size=4, seed=0, rounding=100.0)
def test_blocks_cover_every_row_with_at_most_block_size_keys(
    num_queries: int, num_keys: int, block_size: int, seed: int, rounding: float
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    if rounding:  # ties, up to all vectors being 0
        query, key = (query / rounding).round(), (key / rounding).round()
    mask = SortLSH(block_size=block_size).find(query, key, generator=generator(seed))
    held = mask.to_dense().sum(dim=-1)
    blocks = -(-num_keys // block_size)
    assert held.min() >= num_keys // blocks >= 1
    assert held.max() <= -(-num_keys // blocks) <= block_size
    if num_queries >= blocks:
        assert mask.to_dense().any(dim=-2).all()  # every block has a row
    if block_size >= num_keys:
        assert held.min() == num_keys
        causal = SortLSH(block_size=block_size).find(query, key, is_causal=True)
        everything = torch.ones(num_queries, num_keys, dtype=torch.bool)
        assert (causal.to_dense() == everything.tril(num_keys - num_queries)).all()


def test_equal_queries_and_keys_with_distinct_codes_always_meet() -> None:
    key = torch.randn(1, 2, 200, 32, generator=generator(3))
    order = torch.randperm(200, generator=generator(4))
    detector = SortLSH(block_size=10, num_projections=62)
    dense = detector.find(key[:, :, order], key, generator=generator()).to_dense()
    # equal sets have equal ranks, so every query's twin is in its block
    assert dense[:, :, torch.arange(200), order].all()


def test_planted_neighbours_are_found_far_more_often_than_by_chance() -> None:
    g = generator(1)
    key = torch.randn(1, 4, 256, 32, generator=g)
    order = torch.randperm(256, generator=g)
    query = key[:, :, order] + 0.1 * torch.randn(1, 4, 256, 32, generator=g)
    dense = SortLSH(block_size=16).find(query, key, generator=g).to_dense()
    recall = dense[:, :, torch.arange(256), order].double().mean()
    # the angle is about 0.1 rad: 80 % of the pairs share all 7 bits, and nearly all neighbours
    # are in one block. chance is 16/256
    assert recall > 0.5
    rounds = SortLSH(block_size=16, num_rounds=4).find(query, key, generator=g).to_dense()
    assert rounds[:, :, torch.arange(256), order].double().mean() > max(0.9, recall)


def test_rounds_are_the_union_of_independent_blocks() -> None:
    query, key = tensors(num_keys=64, num_queries=64)
    mask = SortLSH(block_size=8, num_rounds=3).find(query, key, generator=generator())
    members = [part.to_dense() for part in mask.parts()]
    assert len(members) == 3
    assert torch.equal(mask.to_dense(), members[0] | members[1] | members[2])
    assert not torch.equal(members[0], members[1])
    # three blocks of 8 that overlap somewhere: more than one block, at most three
    assert members[0].sum() < mask.nnz().sum() <= sum(int(m.sum()) for m in members)


def test_centred_blocks_do_not_see_a_shift_of_all_keys() -> None:
    query, key = tensors()
    shifted = key + 3.0 * torch.randn(1, 1, 1, 6, generator=generator(9), dtype=key.dtype)

    def dense(k: torch.Tensor, *, centre: bool) -> torch.Tensor:
        detector = SortLSH(block_size=8, centre_keys=centre)
        return detector.find(query, k, generator=generator()).to_dense()

    assert torch.equal(dense(key, centre=True), dense(shifted, centre=True))
    assert not torch.equal(dense(key, centre=False), dense(shifted, centre=False))


# --------------------------------------------------------------------------------- causal


@pytest.mark.parametrize("shape", [(40, 40), (25, 40), (40, 25)])
@pytest.mark.parametrize("block_size", [1, 2, 7, 8])
def test_a_causal_row_holds_the_latest_runs_of_its_bucket(
    shape: tuple[int, int], block_size: int
) -> None:
    num_queries, num_keys = shape
    query, key = tensors(num_queries=num_queries, num_keys=num_keys)
    detector = SortLSH(block_size=block_size, num_projections=1)
    dense = detector.find(query, key, is_causal=True, generator=generator(5)).to_dense()
    query_code, key_code = codes(detector, query, key, 5)
    # 40 keys are at least 5 blocks of 8, 25 keys at least 3: the one bit of the code is kept
    run = max(1, (block_size - 1) // 2)
    expected = torch.zeros_like(dense)
    for head in range(2):
        for row in range(num_queries):
            position = row + num_keys - num_queries
            code = query_code[0, head, row]
            bucket = [j for j in range(max(0, position + 1)) if key_code[0, head, j] == code]
            current = (len(bucket) - 1) // run
            first = max(0, current - (1 if block_size > 2 else 0)) * run
            if block_size > 1:
                expected[0, head, row, bucket[first:]] = True
            if position >= 0:
                expected[0, head, row, position] = True
    assert torch.equal(dense, expected)
    assert dense.sum(dim=-1).max() <= block_size


def test_causal_buckets_are_about_as_large_as_a_block() -> None:
    query, key = tensors(num_queries=1024, num_keys=1024)
    mask = SortLSH(block_size=64).find(query, key, is_causal=True, generator=generator())
    held = mask.to_dense()[:, :, 512:].sum(dim=-1).double()
    # runs of 31 keys in 16 buckets: between one and two runs each, once a bucket has begun
    assert held.max() <= 64
    assert 20 <= held.mean() <= 64
    assert bool(mask.to_dense().diagonal(dim1=-2, dim2=-1).all())


@given(
    num_queries=st.integers(1, 40),
    num_keys=st.integers(1, 40),
    cut=st.integers(0, 39),
    seed=st.integers(0, 1000),
    strict=st.booleans(),
)
@example(num_queries=40, num_keys=40, cut=20, seed=0, strict=False)
@example(num_queries=30, num_keys=40, cut=10, seed=1, strict=True)
def test_no_later_key_or_query_moves_a_causal_row(
    num_queries: int, num_keys: int, cut: int, seed: int, strict: bool
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = SortLSH(block_size=6, num_projections=2, num_rounds=2, centre_keys=True)
    find = detector.find_strict if strict else detector.find
    cut = min(cut, num_queries)
    before = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    query[:, :, cut:] *= -2
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -1
    after = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@given(seed=st.integers(0, 1000), block_size=st.integers(1, 50), row=st.integers(0, 19))
def test_in_the_strict_rectangle_a_row_depends_on_its_own_query_alone(
    seed: int, block_size: int, row: int
) -> None:
    query, key = tensors(seed, num_queries=20)
    detector = SortLSH(block_size=block_size, num_projections=3)
    before = detector.find_strict(query, key, generator=generator(seed)).to_dense()
    held = before.sum(dim=-1)
    assert 1 <= held.min() <= held.max() <= block_size
    other = torch.randn(query.shape, generator=generator(seed + 1), dtype=query.dtype)
    other[:, :, row] = query[:, :, row]
    after = detector.find_strict(other, key, generator=generator(seed)).to_dense()
    assert torch.equal(before[:, :, row], after[:, :, row])


def test_in_the_strict_rectangle_a_query_meets_the_only_key_of_its_bucket() -> None:
    key = torch.randn(1, 1, 100, 32, generator=generator(3))
    detector = SortLSH(block_size=5, num_projections=62)
    twins = torch.tensor([3, 50, 99, 50])
    dense = detector.find_strict(key[:, :, twins], key, generator=generator()).to_dense()
    assert dense[0, 0, torch.arange(4), twins].all()


def test_every_form_stores_linear_memory() -> None:
    query, key = tensors(num_queries=512, num_keys=512)
    detector = SortLSH(block_size=32)
    for mask in (
        detector.find(query, key, generator=generator()),
        detector.find(query, key, is_causal=True, generator=generator()),
        detector.find_strict(query, key, generator=generator()),
    ):
        for part in mask.parts():
            if isinstance(part, BandMask):  # stores nothing
                continue
            if isinstance(part, BlockMask):
                assert part.key_rank is not None
                stored = (part.query_order, part.key_order, part.key_rank, part.tiles().table)
                assert max(t.numel() for t in stored) == 2 * 512
                assert all(t.dtype == torch.int32 for t in stored)
                continue
            stored = (part.query_order, part.key_order, part.start, part.stop)
            # buckets leave tiles half empty: 2^7 of them, in tiles of 32 rows
            assert max(t.numel() for t in stored) <= 2 * (512 + 128 * 32)


# --------------------------------------------------------------------------------- levels


def levels_of(length: int, longest: int) -> tuple[int, list[Level]]:
    leaf = leaf_size(length, longest)
    return leaf, causal_levels(length, leaf)


@pytest.mark.parametrize("length", [64, 61, 37, 9])
@pytest.mark.parametrize("longest", [1, 4, 7])
def test_the_masks_of_all_levels_are_blocks_of_the_rectangles_of_algorithm_4(
    length: int, longest: int
) -> None:
    query, key = tensors(batch=2, heads=4, key_heads=2, num_queries=length, num_keys=length)
    detector = SortLSH(block_size=5, num_projections=3)
    leaf, levels = levels_of(length, longest)
    masks = detector.find_levels(query, key, leaf=leaf, levels=levels, generator=generator(3))
    assert masks is not None
    query_code, key_code = codes(detector, query, key, 3)
    covered = torch.zeros(2, 4, length, length, dtype=torch.int64)
    for level, mask in zip(levels, masks, strict=True):
        expected = torch.zeros_like(covered, dtype=torch.bool)
        runs = torch.arange(length).split(level.size)
        for even, odd in zip(runs[::2], runs[1::2], strict=False):
            blocks = -(-len(even) // 5)
            rows = query_code[:, :, odd].argsort(dim=-1, stable=True) + odd[0]
            columns = key_code[:, :, even].argsort(dim=-1, stable=True) + even[0]
            for b in range(blocks):
                own_rows = rows[..., b * len(odd) // blocks : (b + 1) * len(odd) // blocks]
                own = columns[..., b * len(even) // blocks : (b + 1) * len(even) // blocks]
                batch, head = torch.arange(2).view(2, 1, 1, 1), torch.arange(4).view(1, 4, 1, 1)
                expected[batch, head, own_rows.unsqueeze(-1), own.unsqueeze(-2)] = True
        assert torch.equal(mask.to_dense(), expected)
        covered += expected
    assert covered.max() <= 1  # levels are disjoint
    in_leaf = torch.arange(length) // leaf
    below = (in_leaf[:, None] > in_leaf).expand_as(covered)
    assert (covered[~below] == 0).all()  # nothing in a leaf, nothing above the diagonal


def test_blocks_of_any_size_hold_all_that_is_below_the_leaves() -> None:
    query, key = tensors(num_queries=37, num_keys=37)
    leaf, levels = levels_of(37, 5)
    masks = SortLSH(block_size=32).find_levels(query, key, leaf=leaf, levels=levels)
    assert masks is not None
    run = torch.arange(37) // leaf
    total = torch.stack([mask.to_dense() for mask in masks]).sum(dim=0)
    assert torch.equal(total, (run[:, None] > run).long().expand_as(total))


@pytest.mark.parametrize("options", [{"num_rounds": 2}, {"centre_keys": True}])
def test_rounds_and_centred_keys_have_no_levels_and_draw_nothing(options: dict[str, int]) -> None:
    query, key = tensors()
    leaf, levels = levels_of(40, 8)
    source = generator(1)
    before = source.get_state()
    detector = SortLSH(**options)  # type: ignore[arg-type]
    found = detector.find_levels(query, key, leaf=leaf, levels=levels, generator=source)
    assert found is None
    assert torch.equal(source.get_state(), before)


def test_a_subclass_that_finds_otherwise_is_asked_for_every_rectangle() -> None:
    class Otherwise(SortLSH):
        def find(self, query, key, **options):  # type: ignore[no-untyped-def]
            return super().find(key, query, **options)

    query, key = tensors(heads=1)
    leaf, levels = levels_of(40, 8)
    assert Otherwise().find_levels(query, key, leaf=leaf, levels=levels) is None


@pytest.mark.parametrize(
    "fault, message",
    [
        ("count", "no masks of the levels' rectangles"),
        ("sizes", "no masks of the levels' rectangles"),
        ("order", "moved rows between runs of 5"),
    ],
)
def test_levels_of_other_rectangles_or_runs_are_refused(fault: str, message: str) -> None:
    class Wrong(SortLSH):
        def find_levels(self, query, key, *, leaf, levels, **options):  # type: ignore[no-untyped-def]
            if fault == "sizes":
                levels = levels[::-1]
            masks = super().find_levels(query, key, leaf=leaf, levels=levels, **options)
            if fault == "order":
                masks[0] = replace(masks[0], key_order=masks[0].key_order.flip(-1), key_rank=None)
            return masks[1:] if fault == "count" else masks

    query, key = tensors()
    leaf, levels = levels_of(40, 8)
    with pytest.raises(ArgumentError, match=message):
        Wrong(block_size=4).find_levels(query, key, leaf=leaf, levels=levels)
