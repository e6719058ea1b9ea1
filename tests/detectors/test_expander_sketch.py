"""ExpanderSketch, the detector: the entries of the definition and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create, expander_sketch
from hyperframe.detectors.expander_sketch import ExpanderSketch
from hyperframe.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from hyperframe.masks import EntryMask
from hyperframe.randomness import Stream
from hyperframe.sketching import expander_decoding

SPEC = "expander_sketch(tau=4, search='sketch')"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def find(spec: str, query: torch.Tensor, key: torch.Tensor, seed: int = 0, **options: Any) -> Any:
    return create(spec).find(query, key, generator=generator(seed), **options)


def separated(
    *, num_queries: int = 200, num_keys: int = 60, batch: int = 1, heads: int = 2,
    key_heads: int = 1, seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Two long queries in the direction of every key, all others short: nothing near the bound."""
    g, dim, long = generator(seed), 16, 12
    query = 0.1 * torch.randn(batch, heads, num_queries, dim, generator=g)
    place = torch.rand(batch, heads, num_queries, generator=g).argsort(dim=-1)[..., :long]
    longs = 8 * torch.eye(dim)[:long].expand(batch, heads, -1, -1)
    query.scatter_(2, place.unsqueeze(-1).expand(-1, -1, -1, dim), longs)
    first = torch.randint(0, long, (batch, key_heads, num_keys), generator=g)
    second = (first + torch.randint(1, long, first.shape, generator=g)) % long
    sign = 1 - 2 * torch.randint(0, 2, (batch, key_heads, num_keys, 1), generator=g)
    key = torch.eye(dim)[first] + sign * torch.eye(dim)[second]
    return query, key + 0.01 * torch.randn(key.shape, generator=g)


def share_of_energy(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The share that every entry has of the energy of its column, in float64."""
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    square = (query.double() @ keys.transpose(-1, -2)).square()
    total = square.sum(dim=-2, keepdim=True)
    return torch.where(total > 0, square / total, 0.0)


@pytest.mark.parametrize("sizes", [(200, 50), (60, 90), (90, 30)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_well_separated_entries_are_found_whatever_the_seed(
    sizes: tuple[int, int], is_causal: bool
) -> None:
    query, key = separated(num_queries=sizes[0], num_keys=sizes[1], batch=2, heads=4, key_heads=2)
    heavy = share_of_energy(query, key)
    assert not ((heavy > 0.6 / 4) & (heavy < 1.4 / 4)).any()
    expected = heavy > 1 / 4
    assert (expected.sum(dim=-2) == 2).all()
    if is_causal:
        position = torch.arange(sizes[0])[:, None] + sizes[1] - sizes[0]
        expected = expected & (torch.arange(sizes[1]) <= position)
    for seed in range(3):
        mask = find(SPEC, query, key, seed, is_causal=is_causal)
        assert isinstance(mask, EntryMask)
        assert torch.equal(mask.to_dense(), expected)
        assert torch.equal(mask.nnz(), expected.sum(dim=(-2, -1)))
    for other in ("count_sketch(tau=4, search='sketch', repetitions=64)",
                  "expander_sketch(tau=4, search='exact')"):  # fmt: skip
        mask = find(other, query, key, is_causal=is_causal)
        assert torch.equal(mask.to_dense(), expected), other


@pytest.mark.parametrize("tau", [1, 3.5, 20])
def test_no_entry_is_held_below_the_bound_and_few_above_it_are_missed(tau: float) -> None:
    """Normal columns with a tail: all shares occur. Fixed seeds; 1 % missed was never seen."""
    g = generator(int(tau))
    query = torch.randn(1, 2, 200, 4, generator=g) * torch.rand(1, 2, 200, 1, generator=g) ** -0.5
    key = torch.randn(1, 1, 40, 4, generator=g)
    share = share_of_energy(query, key)
    dense = find(f"expander_sketch(tau={tau}, search='sketch')", query, key).to_dense()
    # the exact test has a tolerance of 1e-5 for rounding
    assert (share[dense] >= (1 - 1e-4) / tau).all()
    heavy = share >= (1 + 1e-4) / tau
    assert (heavy & ~dense).sum() <= 0.01 * heavy.sum()
    assert dense.any() or not heavy.any()


def test_attention_with_one_large_logit_a_row_is_solved() -> None:
    """An instance of Alman and Song: uniform samples see nothing of what every row attends to."""
    g = generator(3)
    num_keys, dim = 256, 64
    key = torch.randn(1, 1, num_keys, dim, generator=g)
    key = key / key.norm(dim=-1, keepdim=True)
    partner = torch.randperm(num_keys, generator=g)
    query, value = 18 * key[:, :, partner], torch.randn(1, 1, num_keys, dim, generator=g)
    exact = torch.softmax((query @ key.transpose(-1, -2)).double(), dim=-1) @ value.double()

    def error(**options: Any) -> float:
        attention = HyperAttention(num_samples=64, min_seq_len=0, seed=0, **options)
        out = attention(query, key, value, scale=1.0)
        return float((out.double() - exact).norm() / exact.norm())

    assert error(detector="expander_sketch(tau=8, search='sketch')") < 0.05
    # a window of one key leaves the rows to the samples
    assert error(detector="sliding_window(width=1)", sampler="uniform") > 0.5


def test_positive_entries_alone_follow_the_sign_of_the_scale() -> None:
    query, key = separated()
    both = find(SPEC, query, key).to_dense()
    spec = "expander_sketch(tau=4, search='sketch', positive_only=True)"
    up = find(spec, query, key).to_dense()
    down = find(spec, query, key, scale=-1.0).to_dense()
    assert torch.equal(up | down, both)
    assert not (up & down).any()
    assert ((query @ key.transpose(-1, -2))[up] > 0).all()
    assert down.any()


def test_centred_keys_do_not_feel_a_shift_of_all_keys() -> None:
    query, key = separated()
    spec = "expander_sketch(tau=4, search='sketch', center=True)"
    expected = find(spec, query, key).to_dense()
    assert expected.any()
    assert torch.equal(find(spec, query, key + 3.0).to_dense(), expected)
    centred = key - key.mean(dim=2, keepdim=True)
    exact = share_of_energy(query, centred)
    assert (exact[expected] >= (1 - 1e-3) / 4).all()


@pytest.mark.parametrize("center", [False, True])
def test_no_key_moves_the_entries_of_earlier_rows(center: bool) -> None:
    query, key = separated(num_queries=90, num_keys=90)
    spec = f"expander_sketch(tau=4, search='sketch', center={center})"
    before = find(spec, query, key, is_causal=True).to_dense()
    other = key.clone()
    other[:, :, 50:] = separated(num_queries=90, num_keys=90, seed=9)[1][:, :, 50:]
    after = find(spec, query, other, is_causal=True).to_dense()
    assert torch.equal(before[:, :, :50], after[:, :, :50])
    assert not torch.equal(before, after)


def test_below_one_nothing_is_heavy_and_one_is_a_column_of_one_entry() -> None:
    query, key = separated()
    assert not find("expander_sketch(tau=0.5, search='sketch')", query, key).to_dense().any()
    query = torch.zeros(1, 1, 50, 4)
    query[0, 0, 13] = 2.0
    key = torch.ones(1, 1, 7, 4)
    dense = find("expander_sketch(tau=1, search='sketch')", query, key).to_dense()
    assert dense[0, 0, 13].all()
    assert dense.sum() == 7


def test_a_bound_beyond_all_rows_holds_what_the_definition_holds() -> None:
    query, key = separated(num_queries=30, num_keys=20)
    heavy = share_of_energy(query, key) >= 1 / 1e4
    exact = find("expander_sketch(tau=10000)", query, key).to_dense()
    assert ((exact ^ heavy).sum()) <= 2
    sketched = find("expander_sketch(tau=10000, search='sketch')", query, key).to_dense()
    assert not (sketched & ~exact).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (2, 3)])
def test_the_shortest_sequences_work(shape: tuple[int, int]) -> None:
    query, key = torch.ones(1, 1, shape[0], 3), torch.ones(1, 1, shape[1], 3)
    dense = find(f"expander_sketch(tau={shape[0]}, search='sketch')", query, key).to_dense()
    assert dense.shape == (1, 1, *shape)
    # all entries are equal: each is just heavy, and a few rows lie alone in their cells or not
    assert dense.all() or shape[0] > 1


def test_zero_keys_zero_queries_and_what_is_not_finite_hold_nothing() -> None:
    query, key = separated()
    expected = find(SPEC, query, key).to_dense()
    zeros = torch.zeros_like(query), torch.zeros_like(key)
    assert not find(SPEC, zeros[0], key).to_dense().any()
    assert not find(SPEC, query, zeros[1]).to_dense().any()
    bad = key.clone()
    bad[:, :, 5], bad[:, :, 6], bad[:, :, 7] = 0.0, torch.nan, torch.inf
    found = find(SPEC, query, bad).to_dense()
    assert not found[..., 5:8].any()
    expected[..., 5:8] = False
    assert torch.equal(found, expected)
    spoilt = query.clone()
    spoilt[:, :, 0] = torch.nan
    found = find(SPEC, spoilt, key).to_dense()
    assert not found[:, :, 0].any()
    spoilt[:, :, 0] = 0.0
    assert torch.equal(found, find(SPEC, spoilt, key).to_dense())


@pytest.mark.parametrize("factor", [1e-30, 1e15, 1e30])
def test_the_size_of_queries_and_keys_does_not_matter(factor: float) -> None:
    query, key = separated()
    expected = find(SPEC, query, key).to_dense()
    assert torch.equal(find(SPEC, query * factor, key * factor).to_dense(), expected)


def test_equal_rows_are_all_found() -> None:
    """Four equal long queries in 300: names differ though rows do not. Fixed seeds."""
    query, key = 0.05 * torch.randn(1, 1, 300, 8, generator=generator()), torch.ones(1, 1, 9, 8)
    query[0, 0, [3, 77, 150, 299]] = 1.0
    dense = find("expander_sketch(tau=6, search='sketch')", query, key).to_dense()
    assert dense[0, 0, [3, 77, 150, 299]].all()
    assert dense.sum() == 4 * 9


def test_short_lists_keep_the_keys_with_the_largest_logits() -> None:
    query, key = separated(num_queries=64)
    whole = find(SPEC, query, key).to_dense()
    spec = "expander_sketch(tau=4, search='sketch', max_keys_per_tile=5, tile_size=16)"
    mask = find(spec, query, key)
    assert mask.tile_size == 16
    dense = mask.to_dense()
    assert not (dense & ~whole).any()
    held = dense.unflatten(2, (4, 16)).any(dim=3).sum(dim=-1)
    assert (held <= 5).all()
    assert held.max() == 5
    logit = query @ key.transpose(-1, -2)
    best = logit.masked_fill(~whole, -torch.inf).unflatten(2, (4, 16)).amax(dim=3)
    kept = dense.unflatten(2, (4, 16)).any(dim=3)
    worst = best.masked_fill(~kept, torch.inf).amin(dim=-1)
    lost = best.masked_fill(kept, -torch.inf).amax(dim=-1)
    assert (worst >= lost).all()


def test_few_columns_at_a_time_change_nothing() -> None:
    query, key = separated()
    spec = "expander_sketch(tau=4, search='sketch', max_bytes={})"
    few, all_of_them = (find(spec.format(n), query, key).to_dense() for n in (1 << 24, 1 << 40))
    assert torch.equal(few, all_of_them)


def test_short_sequences_are_searched_exactly_unless_asked_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key = separated(num_queries=60, num_keys=20)
    asked: list[int] = []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(1)
        return expander_decoding.expander_rows(*arguments, **options)

    monkeypatch.setattr(expander_sketch, "expander_rows", counted)
    exact = find("expander_sketch(tau=4)", query, key).to_dense()
    assert not asked
    assert torch.equal(find(SPEC, query, key).to_dense(), exact)
    assert len(asked) == 1
    detector = ExpanderSketch(tau=2)
    assert detector._is_exact(2 * detector._sketch_rows(20_000, 2) - 1, 2)
    assert not detector._is_exact(2 * detector._sketch_rows(20_000, 2), 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_finds_the_same_entries(dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in separated())
    expected = share_of_energy(query, key) > 1 / 4
    assert torch.equal(find(SPEC, query, key).to_dense(), expected)


def test_a_stream_draws_the_same_again_and_another_seed_other_maps() -> None:
    g = generator()
    query, key = torch.randn(1, 1, 300, 8, generator=g), torch.randn(1, 1, 60, 8, generator=g)
    query[:, :, ::5] *= 3  # many rows near the bound, so that some are missed
    spec = "expander_sketch(tau=20, search='sketch', repetitions=1, width=2)"
    detector = create(spec)
    first, again, other = (
        detector.find(query, key, generator=Stream(seed)).to_dense() for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_value_is_read_while_entries_are_found(is_causal: bool) -> None:
    """Tensors without values: reading one, or a size that depends on one, is an error."""
    query, key = (torch.empty(2, heads, 70, 8, device="meta") for heads in (4, 2))
    assert create(SPEC).find(query, key, is_causal=is_causal).device.type == "meta"


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_attention_takes_it_under_a_causal_mask(causal: str) -> None:
    query, key = separated(num_queries=80, num_keys=80)
    value = torch.randn(1, 1, 80, 3, generator=generator(5))
    attention = HyperAttention(detector=SPEC, min_seq_len=16, causal=causal, num_samples=16, seed=0)
    out = attention(query, key, value, is_causal=True)
    assert torch.isfinite(out).all()
    with pytest.raises(UnsupportedError, match=r"expander_sketch .* no strictly causal form"):
        HyperAttention(detector=SPEC, min_seq_len=16, strict_causal=True)(
            query, key, value, is_causal=True
        )


def test_bad_options_are_refused_by_name() -> None:
    for option in ("repetitions", "max_keys_per_tile", "tile_size", "max_bytes"):
        with pytest.raises(ArgumentError, match=rf"expander_sketch: {option}=0 is too small"):
            ExpanderSketch(**{option: 0})
    for option in ("tau", "width", "keep"):
        with pytest.raises(ArgumentError, match=rf"expander_sketch: {option}=-1 cannot be used"):
            ExpanderSketch(**{option: -1})
    for option in ("positive_only", "center", "spectral"):
        with pytest.raises(ArgumentTypeError, match=rf"expander_sketch: {option}=1 has type int"):
            ExpanderSketch(**{option: 1})
    with pytest.raises(ArgumentError, match=r"search='fast' .* pass one of 'auto', 'sketch'"):
        ExpanderSketch(search="fast")
    with pytest.raises(ArgumentError, match=r"tile_size=65 is too large: .* at most 64"):
        ExpanderSketch(tile_size=65)
