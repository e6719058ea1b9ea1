"""CountSketch: the definition of a heavy entry, planted ones, and every odd input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create
from hyperframe.detectors.count_sketch import CountSketch
from hyperframe.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from hyperframe.masks import EntryMask
from hyperframe.randomness import Stream
from hyperframe.sketching.dyadic import miss_bound
from hyperframe.testing import dense_attention
from tests.detectors.heavy_entries import generator, heavy, tensors

# small enough that the sketch of a few hundred rows has several levels
SKETCH = {"search": "sketch", "width": 4, "repetitions": 16}


def alman_song(
    n: int, *, size: float, dim: int = 64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One large logit in every row, at the place of a random permutation; small ones elsewhere."""
    g = generator(seed)
    key = torch.nn.functional.normalize(torch.randn(1, 2, n, dim, generator=g), dim=-1)
    partner = torch.rand(1, 2, n, generator=g).argsort(dim=-1)
    query = size * key.gather(2, partner.unsqueeze(-1).expand_as(key))
    value = torch.randn(1, 2, n, 16, generator=g)
    return query, key, value, partner


@given(
    num_queries=st.integers(1, 60), num_keys=st.integers(1, 60),
    tau=st.sampled_from([0.5, 1.0, 3.0, 7.5, 1e6]), is_causal=st.booleans(),
    positive_only=st.booleans(), scale=st.sampled_from([None, 2.0, -1.0]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_the_exact_search_holds_the_entries_of_the_definition(
    num_queries: int, num_keys: int, tau: float, is_causal: bool, positive_only: bool,
    scale: float | None, seed: int,
) -> None:  # fmt: skip
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = CountSketch(tau=tau, search="exact", positive_only=positive_only)
    found = detector.find(query, key, scale=scale, is_causal=is_causal).to_dense()
    sign = 0.0 if not positive_only else -1.0 if scale == -1.0 else 1.0
    expected = heavy(query, key, tau, is_causal=is_causal, sign=sign)
    if tau == 1e6:  # all entries that are not rounding errors of their columns
        expected = heavy(query, key, 1e9, is_causal=is_causal, sign=sign)
        near = heavy(query, key, 1e5, is_causal=is_causal, sign=sign)
        assert (found >= near).all()
        assert (found <= expected).all()
    else:
        assert torch.equal(found, expected)


@given(
    num_queries=st.integers(60, 300), num_keys=st.integers(1, 40),
    tau=st.sampled_from([0.5, 2.0, 6.0]), is_causal=st.booleans(), positive_only=st.booleans(),
    max_bytes=st.sampled_from([100_000, 1 << 28]), seed=st.integers(0, 999),
)  # fmt: skip
def test_the_sketch_holds_no_entry_that_is_not_heavy(
    num_queries: int, num_keys: int, tau: float, is_causal: bool, positive_only: bool,
    max_bytes: int, seed: int,
) -> None:  # fmt: skip
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    query[:, :, ::13] *= 8
    detector = CountSketch(tau=tau, positive_only=positive_only, max_bytes=max_bytes, **SKETCH)
    found = detector.find(query, key, is_causal=is_causal, generator=generator(seed)).to_dense()
    expected = heavy(query, key, tau, is_causal=is_causal, sign=float(positive_only))
    assert (found <= expected).all()


@pytest.mark.statistical
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_keys", [500, 640, 400])
def test_the_sketch_finds_nearly_all_heavy_entries(num_keys: int, is_causal: bool) -> None:
    # by the bound a heavy entry is missed with probability miss_bound(16, 3) = 3.2 % at most,
    # twice that or more of all of them in half of the draws at most (Markov); measured: none
    query, key = tensors(3, num_queries=500, num_keys=num_keys)
    query[:, :, ::50] *= 4
    expected = heavy(query, key, 20, is_causal=is_causal)
    found = CountSketch(tau=20, **SKETCH).find(
        query, key, is_causal=is_causal, generator=generator(1)
    ).to_dense()  # fmt: skip
    assert expected.sum() >= 1800
    assert (found <= expected).all()
    assert (expected & ~found).sum() <= 0.064 * expected.sum()


@pytest.mark.statistical
def test_what_is_well_separated_is_found_by_every_draw() -> None:
    # every column has one entry with 3/4 of the energy and nothing else near the bound of 1/4.
    # the bound allows 32 of 1,000 misses of each of 5 draws of 128 entries; that none of 640 is
    # missed holds for these draws, and shows that the mask does not depend on them
    query, key, _, partner = alman_song(256, size=1.0, dim=256)
    expected = torch.zeros(1, 2, 256, 256, dtype=torch.bool)
    expected.scatter_(-1, partner.unsqueeze(-1), True)
    detector = CountSketch(tau=4, **SKETCH)
    assert torch.equal(heavy(query, key, 4), expected)
    for seed in range(5):
        assert torch.equal(detector.find(query, key, generator=Stream(seed)).to_dense(), expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_large_entry_in_every_row_is_solved_where_samples_alone_fail(is_causal: bool) -> None:
    query, key, value, _ = alman_song(1024, size=24.0)
    exact = dense_attention(query, key, value, scale=1.0, is_causal=is_causal).out

    def error(detector: str) -> float:
        attention = HyperAttention(
            detector=detector, sampler="uniform", num_samples=64, min_seq_len=0, seed=0
        )
        out = attention(query, key, value, scale=1.0, is_causal=is_causal)
        return float((out - exact).norm() / exact.norm())

    spec = "count_sketch(tau=64, search='sketch', width=2)"
    if not is_causal:
        assert error(spec) < 0.05
        # a window of one key is a detector that finds next to nothing
        assert error("sliding_window(width=1)") > 0.5
    else:
        # half of the rows see no large entry: their error is that of the samples
        assert error(spec) < 0.7 * error("sliding_window(width=1)")


@pytest.mark.parametrize("search", ["exact", "sketch"])
def test_a_bound_below_one_is_met_by_nothing(search: str) -> None:
    query, key = tensors(num_queries=300)
    detector = CountSketch(tau=0.99, search=search)
    mask = detector.find(query, key)
    assert mask.nnz().sum() == 0
    for num_samples in (0, 40):
        attention = HyperAttention(detector=detector, num_samples=num_samples, min_seq_len=0)
        out = attention(query, key, key)
        expected = dense_attention(query, key, key).out if num_samples else torch.zeros_like(out)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("search", ["auto", "sketch"])
def test_a_bound_above_the_rows_is_met_by_all_entries(search: str) -> None:
    query, key = tensors()
    dense = CountSketch(tau=1e300, search=search).find(query, key).to_dense()
    assert dense.all()


@pytest.mark.parametrize("search", ["exact", "sketch"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_row_is_heavy_in_every_column_it_is_not_orthogonal_to(
    is_causal: bool, search: str
) -> None:
    query = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
    key = torch.tensor([[2.0, 1.0], [0.0, 3.0], [-1e-3, 0.0]])[None, None]
    found = CountSketch(tau=1, search=search).find(query, key, is_causal=is_causal).to_dense()
    assert found.tolist() == [[[[True, False, True]]] * 2]


@pytest.mark.parametrize("search", ["exact", "sketch"])
@pytest.mark.parametrize("tau, is_held", [(100.0, True), (99.0, False)])
def test_equal_rows_are_all_heavy_or_none(tau: float, is_held: bool, search: str) -> None:
    # each has 1/100 of the energy, exactly the bound: not lost to rounding
    row = torch.tensor([0.1, 0.7, -0.3])
    query, key = row.expand(1, 1, 100, 3), torch.randn(1, 1, 50, 3, generator=generator())
    detector = CountSketch(tau=tau, search=search, width=0.2, repetitions=32)
    dense = detector.find(query, key, generator=generator(2)).to_dense()
    assert dense.all() if is_held else not dense.any()


@pytest.mark.parametrize("search", ["exact", "sketch"])
def test_duplicated_keys_are_held_alike(search: str) -> None:
    query, key = tensors(num_queries=300)
    query[:, :, ::50] *= 9
    key[:, :, 20:] = key[:, :, :20]
    dense = CountSketch(tau=30, search=search).find(query, key, generator=generator()).to_dense()
    assert dense.any()
    # columns are decoded with the same sketch
    assert torch.equal(dense[..., :20], dense[..., 20:])


@pytest.mark.parametrize("search", ["exact", "sketch"])
@pytest.mark.parametrize("center", [False, True])
def test_zeros_and_values_that_are_not_finite_hold_no_entries_and_hide_none(
    center: bool, search: str
) -> None:
    query, key = tensors(num_queries=200)
    query[:, :, ::40] *= 9
    query[0, 1, 3], query[0, 1, 40] = 0, float("nan")
    key[1, 0, 5], key[1, 0, 6, 2] = 0, float("inf")
    found = CountSketch(tau=10, search=search, center=center).find(
        query, key, generator=generator()
    ).to_dense()  # fmt: skip
    clean_query = torch.where(query.isfinite().all(-1, keepdim=True), query, 0)
    clean_key = torch.where(key.isfinite().all(-1, keepdim=True), key, 0)
    if center:
        mean = clean_key.mean(dim=2, keepdim=True)
        clean_key = clean_key - mean
        clean_key[1, 0, 6] = 0
    expected = heavy(clean_query, clean_key, 10)
    assert expected.any()
    if search == "exact":
        assert torch.equal(found, expected)
    assert (found <= expected).all()
    assert not found[0, 1, [3, 40]].any()
    assert found[0, 1, 80].any()
    zero = CountSketch(tau=10, search=search).find(torch.zeros_like(query), key)
    assert zero.nnz().sum() == 0


@pytest.mark.parametrize("search", ["exact", "sketch"])
def test_centred_keys_are_found_wherever_their_mean_lies(search: str) -> None:
    query, key = tensors(num_queries=200)
    query[:, :, ::40] *= 5
    find = CountSketch(tau=8, search=search, center=True).find
    shift = torch.randn(6, generator=generator(9), dtype=torch.float64)
    before = find(query, key, generator=generator(1)).to_dense()
    after = find(query, key + 30 * shift, generator=generator(1)).to_dense()
    assert before.any()
    assert torch.equal(before, after)
    plain = CountSketch(tau=8, search=search).find(query, key + 30 * shift).to_dense()
    assert not torch.equal(before, plain)


@given(
    cut=st.integers(0, 59), num_queries=st.sampled_from([40, 60]), center=st.booleans(),
    search=st.sampled_from(["exact", "sketch"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_under_a_causal_mask_no_later_key_moves_a_row(
    cut: int, num_queries: int, center: bool, search: str, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=50)
    detector = CountSketch(tau=8, center=center, search=search, width=1)

    def dense() -> torch.Tensor:
        found = detector.find(query, key, is_causal=True, generator=generator(seed))
        return found.to_dense()[:, :, :cut]

    before = dense()
    key[:, :, max(0, cut + 50 - num_queries) :] *= -5
    assert torch.equal(dense(), before)


def test_there_is_no_strict_form() -> None:
    query, key = tensors()
    with pytest.raises(UnsupportedError, match="strict_causal=True: the detector count_sketch"):
        CountSketch().find_strict(query, key, is_causal=True)


def test_a_tile_keeps_its_largest_logits_and_the_mask_says_so() -> None:
    query, key = tensors(num_queries=20, num_keys=30)
    options: dict[str, Any] = {"tau": 9, "tile_size": 8, "search": "exact"}
    whole = CountSketch(**options).find(query, key, scale=-1.0).to_dense()
    mask = CountSketch(max_keys_per_tile=3, **options).find(query, key, scale=-1.0)
    assert isinstance(mask, EntryMask)
    assert mask.key_count.max() == 3
    logits = -(query @ key.repeat_interleave(2, dim=1).transpose(-1, -2))
    kept = torch.zeros_like(whole)
    for start in range(0, 20, 8):
        rows = slice(start, start + 8)
        best = logits[:, :, rows].masked_fill(~whole[:, :, rows], -torch.inf).amax(dim=2)
        top = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(3, -1).indices, True)
        kept[:, :, rows] = whole[:, :, rows] & top.unsqueeze(2)
    assert torch.equal(mask.to_dense(), kept)


def test_what_is_computed_holds_the_mask_and_gives_exact_attention_of_its_tiles() -> None:
    query, key = tensors(num_queries=20, num_keys=30)
    mask = CountSketch(tau=5, tile_size=4).find(query, key)
    assert isinstance(mask, EntryMask)
    lists = mask.to_lists().to_dense()
    logits = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) / 6**0.5
    weight = logits.exp() * lists
    value = key.repeat_interleave(2, dim=1)
    expected = weight @ value / weight.sum(dim=-1, keepdim=True).clamp(min=1e-300)
    attention = HyperAttention(
        detector="count_sketch(tau=5, tile_size=4)", num_samples=0, min_seq_len=0
    )
    torch.testing.assert_close(attention(query, key, key), expected)


def test_the_bound_by_itself_follows_the_rows() -> None:
    detector = CountSketch()
    assert [detector._tau(n) for n in (1, 2)] == [1, 2]
    assert detector._tau(4096) == pytest.approx(4096 / 69.18, rel=1e-3)
    assert detector._tau(131_072) == 64
    taus = [detector._tau(n) for n in range(1, 10_000)]
    assert all(1 <= tau <= 64 for tau in taus)


@pytest.mark.parametrize(
    "num_queries, repetitions, is_exact",
    [(131_072, 8, False), (65_536, 8, False), (16_384, 8, True), (131_072, None, True)],
)
def test_the_sketch_is_used_where_it_is_much_smaller_than_the_queries(
    num_queries: int, repetitions: int | None, is_exact: bool
) -> None:
    detector = CountSketch(repetitions=repetitions)
    assert detector._is_exact(num_queries, 64.0) == is_exact
    assert not detector.replace(search="sketch")._is_exact(num_queries, 64.0)
    assert CountSketch(search="exact")._is_exact(num_queries, 1.0)


def test_repetitions_by_proof_are_those_of_its_bound() -> None:
    width, repetitions = CountSketch(repetitions=None)._sizes(131_072, 64.0)
    assert (width, repetitions) == (512, 114)
    assert miss_bound(repetitions, 4) <= 131_072**-2


@pytest.mark.parametrize("search", ["exact", "sketch"])
def test_the_mask_of_a_call_in_chunks_is_that_of_the_call(search: str) -> None:
    query, key = tensors(num_queries=200)
    query[:, :, ::40] *= 9
    masks = [
        CountSketch(tau=10, search=search, max_bytes=size).find(query, key, generator=generator())
        for size in (1, 1 << 18, 1 << 28)
    ]
    assert masks[0].nnz().sum() > 0
    for mask in masks[1:]:
        assert torch.equal(mask.to_dense(), masks[0].to_dense())


def test_the_result_grows_with_the_keys_and_not_with_the_square() -> None:
    def stored(n: int) -> int:
        query, key, _, _ = alman_song(n, size=1.0)
        mask = CountSketch(tau=16, search="sketch", width=2).find(query, key)
        assert isinstance(mask, EntryMask)
        return sum(x.numel() for x in (mask.key_index, mask.key_count, mask.row_bits))

    assert stored(2048) < 2.5 * stored(1024)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_agrees_with_the_definition_of_the_rounded_inputs(dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in tensors(num_queries=300))
    dense = CountSketch(tau=6).find(query, key).to_dense()
    low, high = heavy(query, key, 6 * (1 + 1e-4)), heavy(query, key, 6 * (1 - 1e-4))
    assert (high <= dense).all()
    assert (dense <= low).all()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"tau": 0}, ArgumentError, "tau=0"),
        ({"tau": float("nan")}, ArgumentError, "tau=nan"),
        ({"tau": "many"}, ArgumentTypeError, "tau='many'"),
        ({"tau": None}, ArgumentTypeError, "tau=None"),
        ({"repetitions": 0}, ArgumentError, "repetitions=0"),
        ({"repetitions": 256}, ArgumentError, "repetitions=256.*at most 255"),
        ({"tile_size": 65}, ArgumentError, "tile_size=65.*at most 64"),
        ({"max_keys_per_tile": 0}, ArgumentError, "max_keys_per_tile=0"),
        ({"max_bytes": 1.5}, ArgumentTypeError, "max_bytes=1.5"),
        ({"width": -1}, ArgumentError, "width=-1"),
        ({"keep": "2"}, ArgumentTypeError, "keep='2'"),
        ({"search": "sketched"}, ArgumentError, "search='sketched'.*'sketch'"),
        ({"center": 1}, ArgumentTypeError, "center=1"),
        ({"positive_only": None}, ArgumentTypeError, "positive_only=None"),
    ],
)
def test_parameters_are_checked(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        create("count_sketch", **options)


def test_candidates_of_a_second_stage_may_be_entries() -> None:
    query, key = tensors(num_queries=64, num_keys=64)
    refined = create("refined(candidates='count_sketch(tau=9)', num_keys=4, tile_size=16)")
    dense = refined.find(query, key).to_dense()
    assert (dense.sum(dim=-1) <= 4).all()
    lists = CountSketch(tau=9).find(query, key)
    assert isinstance(lists, EntryMask)
    assert (dense <= lists.to_lists().to_dense()).all()
