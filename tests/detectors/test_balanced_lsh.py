"""BalancedLSH: products stay, shifts are not seen, cones are taken away, nothing is foreseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.clustering import second_moment
from hyperframe.detectors.balanced_lsh import BalancedLSH, _balance, _balance_prefixes
from hyperframe.detectors.sort_lsh import SortLSH
from hyperframe.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from hyperframe.masks import HeavyMask
from hyperframe.testing.strategies import AttentionInputs, attention_inputs

SIZES = st.integers(1, 60)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    seed: int = 0, *, num_queries: int = 40, num_keys: int = 40, dim: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two cones that point apart, of different shapes."""
    g = generator(seed)
    query = torch.randn(2, 4, num_queries, dim, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, dim, generator=g, dtype=torch.float64)
    size = torch.logspace(-1, 1, dim, dtype=torch.float64)
    return query * size + 3.0, key / size - 2.0


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(dim=2, keepdim=True)


def test_balancing_keeps_the_products_of_centred_vectors_and_makes_their_moments_agree() -> None:
    query, key = tensors()
    one, two = _balance(query, key, query)

    def products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.repeat_interleave(2, dim=1).mT

    torch.testing.assert_close(products(one, two), products(centred(query), centred(key)))
    moments = second_moment(one.reshape(2, 2, -1, 6)), second_moment(two)
    torch.testing.assert_close(*moments, rtol=1e-2, atol=1e-2 * float(moments[0].abs().max()))
    # those of what was given do not: one is large where the other one is small
    before = second_moment(centred(query).reshape(2, 2, -1, 6)), second_moment(centred(key))
    assert (before[0] - before[1]).abs().max() > 0.5 * before[0].abs().max()


def test_in_a_prefix_form_positions_of_one_stretch_keep_their_products() -> None:
    query, key = tensors(num_queries=50, num_keys=50)
    one, two = _balance_prefixes(query, key, 8)
    for start, stop in ((0, 8), (8, 16), (16, 32), (32, 50)):
        rows = slice(start, stop)
        end = max(1, start)
        q = query[:, :, rows] - query[:, :, :end].mean(dim=2, keepdim=True)
        k = key[:, :, rows] - key[:, :, :end].mean(dim=2, keepdim=True)
        expected = q @ k.repeat_interleave(2, dim=1).mT
        found = one[:, :, rows] @ two[:, :, rows].repeat_interleave(2, dim=1).mT
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def find_of(detector: BalancedLSH, form: str, query: torch.Tensor, key: torch.Tensor) -> HeavyMask:
    options: dict[str, Any] = {"generator": generator(3)}
    if form == "full":
        return detector.find(query, key, **options)
    if form == "strict":
        return detector.find_strict(query, key, earlier_query=query, **options)
    find = detector.find if form == "causal" else detector.find_strict
    return find(query, key, is_causal=True, **options)


@pytest.mark.parametrize("form", ["full", "strict", "causal", "strict causal"])
def test_the_choice_does_not_see_a_shift_of_all_keys_or_all_queries(form: str) -> None:
    query, key = tensors(num_queries=60, num_keys=60)
    shift = 5.0 * torch.randn(2, 1, 1, 6, generator=generator(9), dtype=torch.float64)
    detector = BalancedLSH(block_size=6, checkpoint=4)
    dense = find_of(detector, form, query, key).to_dense()
    assert torch.equal(find_of(detector, form, query, key + shift).to_dense(), dense)
    assert torch.equal(find_of(detector, form, query - shift, key).to_dense(), dense)
    # sort_lsh does see it
    plain = SortLSH(block_size=6)
    is_causal = "causal" in form
    one, two = (plain.find(query, k, is_causal=is_causal, generator=generator(3))
                for k in (key, key + shift))  # fmt: skip
    assert not torch.equal(one.to_dense(), two.to_dense())


@pytest.mark.parametrize("form", ["full", "strict", "causal"])
def test_the_choice_does_not_see_how_long_all_queries_or_all_keys_are(form: str) -> None:
    query, key = tensors(num_queries=60, num_keys=60)
    detector = BalancedLSH(block_size=6, checkpoint=4)
    dense = find_of(detector, form, query, key).to_dense()
    assert torch.equal(find_of(detector, form, 64 * query, key / 64).to_dense(), dense)
    assert torch.equal(find_of(detector, form, query, 8 * key).to_dense(), dense)


def test_neighbours_in_two_cones_are_found_where_sort_lsh_finds_few() -> None:
    g = generator(1)
    base = torch.randn(1, 4, 512, 16, generator=g)
    order = torch.randperm(512, generator=g)
    size = torch.logspace(-0.7, 0.7, 16)
    query = base[:, :, order] * size + 6.0
    key = base / size - 6.0

    def recall(detector: BalancedLSH | SortLSH, *, is_causal: bool) -> float:
        dense = detector.find(query, key, is_causal=is_causal, generator=generator()).to_dense()
        hit = dense[:, :, torch.arange(512), order]
        return float(hit[:, :, torch.arange(512) >= order].double().mean())

    # one of 16 blocks by chance; twins have nearly the same code once cones are taken away
    assert recall(BalancedLSH(block_size=32), is_causal=False) > 0.6
    assert recall(SortLSH(block_size=32), is_causal=False) < 0.3
    # in a single pass only the latest keys of a bucket are held: as many buckets as blocks
    found, plain = (
        recall(detector, is_causal=True)
        for detector in (BalancedLSH(block_size=128), SortLSH(block_size=128))
    )
    assert found > plain + 0.15


@given(
    num_queries=SIZES, num_keys=SIZES, cut=st.integers(0, 59), strict=st.booleans(),
    checkpoint=st.integers(1, 20), seed=st.integers(0, 1000),
)  # fmt: skip
@example(num_queries=60, num_keys=60, cut=33, strict=False, checkpoint=8, seed=0)
@example(num_queries=40, num_keys=60, cut=21, strict=True, checkpoint=4, seed=0)
@example(num_queries=60, num_keys=40, cut=41, strict=True, checkpoint=3, seed=0)
@example(num_queries=30, num_keys=60, cut=1, strict=True, checkpoint=64, seed=0)
def test_no_later_key_or_query_moves_a_causal_row(
    num_queries: int, num_keys: int, cut: int, strict: bool, checkpoint: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = BalancedLSH(block_size=6, num_projections=3, num_rounds=2, checkpoint=checkpoint)
    find = detector.find_strict if strict else detector.find
    cut = min(cut, num_queries)
    before = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    query[:, :, cut:] *= -5
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -5
    after = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


def test_earlier_keys_do_move_a_later_row() -> None:
    query, key = tensors(num_queries=60, num_keys=60)
    detector = BalancedLSH(block_size=6, checkpoint=4)
    before = detector.find(query, key, is_causal=True, generator=generator()).to_dense()
    key[:, :, :16] = key[:, :, :16].flip(-1)
    after = detector.find(query, key, is_causal=True, generator=generator()).to_dense()
    # not only by their own codes: the codes of keys 32.. go by the moments of keys before
    assert not torch.equal(before[:, :, 40:, 32:], after[:, :, 40:, 32:])


def test_in_a_strict_rectangle_a_row_depends_on_its_own_query_and_earlier_ones() -> None:
    query, key = tensors(num_queries=20, num_keys=50)
    earlier = tensors(5, num_queries=50)[0]
    detector = BalancedLSH(block_size=6)

    def dense(q: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return detector.find_rectangle(
            q, key, earlier_query=before, strict=True, generator=generator()
        ).to_dense()

    whole = dense(query, earlier)
    for row in (0, 7, 19):
        changed = -3 * query
        changed[:, :, row] = query[:, :, row]
        assert torch.equal(dense(changed, earlier)[:, :, row], whole[:, :, row])
    assert not torch.equal(dense(query, earlier * torch.arange(6)), whole)


def test_without_earlier_queries_the_strict_form_of_a_rectangle_is_refused() -> None:
    query, key = tensors(num_queries=10, num_keys=30)
    with pytest.raises(UnsupportedError, match=r"strict_causal=True: balanced_lsh.*\(10 queries"):
        BalancedLSH().find_strict(query, key)


@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_and_batch_items_have_statistics_of_their_own(is_causal: bool) -> None:
    query, key = tensors(num_queries=60, num_keys=60)
    detector = BalancedLSH(block_size=6, checkpoint=4)

    def dense(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return detector.find(q, k, is_causal=is_causal, generator=generator()).to_dense()

    before = dense(query, key)
    for b in range(2):
        for h in range(2):
            other_query, other_key = query.clone(), key.clone()
            other_query[b, 2 * h : 2 * h + 2] *= -torch.arange(1, 7)
            other_key[b, h] *= -torch.arange(1, 7)
            after = dense(other_query, other_key)
            same = torch.ones(2, 4, dtype=torch.bool)
            same[b, 2 * h : 2 * h + 2] = False
            assert torch.equal(before[same], after[same])
            assert not torch.equal(before[~same], after[~same])


@given(inputs=attention_inputs(), is_causal=st.booleans(), strict=st.booleans())
def test_any_input_gives_blocks_of_at_most_block_size_keys(
    inputs: AttentionInputs, is_causal: bool, strict: bool
) -> None:
    query, key, value = inputs
    detector = BalancedLSH(block_size=3, checkpoint=2)
    options: dict[str, Any] = {"earlier_query": query} if strict and not is_causal else {}
    find = detector.find_strict if strict else detector.find
    mask = find(query, key, is_causal=is_causal, generator=generator(), **options)
    mask.validate()
    assert mask.to_dense().sum(dim=-1).max() <= 3
    if query.shape[2] > 1 and is_causal:
        attention = HyperAttention(
            detector=detector, num_samples=0, min_seq_len=0, strict_causal=strict,
            backend="reference",
        )  # fmt: skip
        assert torch.isfinite(attention(query, key, value, is_causal=True)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_causal", [False, True])
def test_statistics_of_16_bit_inputs_are_in_float32(dtype: torch.dtype, is_causal: bool) -> None:
    query, key = (x.to(dtype) for x in tensors(num_queries=200, num_keys=200))

    def balanced(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _balance_prefixes(q, k, 16) if is_causal else _balance(q, k, q)

    doubles = balanced(query.double(), key.double())
    for found, expected in zip(balanced(query, key), doubles, strict=True):
        assert found.dtype == dtype
        # rounded once at the end (and in float32 before that, behind a condition of about 1e3)
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error <= max(torch.finfo(dtype).eps, 1e-4)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(130, 130), (100, 150), (150, 100), (3, 5)])
def test_no_value_is_read_while_entries_are_found(
    strict: bool, is_causal: bool, shape: tuple[int, int]
) -> None:
    """Tensors without values: reading one, or a size that depends on one, is an error."""
    query = torch.empty(2, 4, shape[0], 8, device="meta")
    key = torch.empty(2, 2, shape[1], 8, device="meta")
    detector = BalancedLSH(block_size=16, checkpoint=8, num_rounds=2)
    options: dict[str, Any] = {"earlier_query": query} if strict and not is_causal else {}
    find = detector.find_strict if strict else detector.find
    assert find(query, key, is_causal=is_causal, **options).device.type == "meta"


def test_bad_options_are_refused_by_name() -> None:
    for option in ("block_size", "num_projections", "num_rounds", "checkpoint"):
        with pytest.raises(ArgumentError, match=rf"balanced_lsh: {option}=0 is too small"):
            BalancedLSH(**{option: 0})
        with pytest.raises(ArgumentTypeError, match=rf"balanced_lsh: {option}=True has type bool"):
            BalancedLSH(**{option: True})
    with pytest.raises(ArgumentError, match=r"balanced_lsh: num_projections=63 .* at most 62"):
        BalancedLSH(num_projections=63)
