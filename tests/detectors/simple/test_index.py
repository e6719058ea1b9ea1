"""Detectors made of a list of columns: what is named is held, by rows that may see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors.simple import from_index
from hyperframe.errors import ArgumentError, ArgumentTypeError, UnsupportedError

SIZES = st.integers(1, 60)


@from_index
def voted(query: Any, key: Any, *, count: int, scale: float) -> Any:
    """Columns with most mass of all rows."""
    mass = torch.softmax(scale * query @ key.mT, dim=-1).sum(dim=2)
    return mass.topk(count).indices


@from_index
def largest(key: Any, *, count: int, least: float = 0.0) -> Any:
    """The keys of largest norm, those above a bound."""
    norm, index = key.norm(dim=-1).topk(count)
    return torch.where(norm >= least, index, -1)


MADE = {"voted": voted(num_keys=9, tile_size=5), "largest": largest(num_keys=9, tile_size=5)}
FORMS = pytest.mark.parametrize("form", MADE)


def tensors(
    seed: int, num_queries: int = 50, num_keys: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, 4, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, 4, generator=g, dtype=torch.float64)
    return query, key


@FORMS
def test_all_rows_hold_the_columns_that_are_named(form: str) -> None:
    query, key = tensors(0)
    dense = MADE[form].find(query, key, scale=0.5).to_dense()
    score = key.norm(dim=-1)
    if form == "voted":
        rows = query.view(2, 2, 100, 4)
        score = torch.softmax(0.5 * rows @ key.mT, dim=-1).sum(2)
    expected = torch.zeros(2, 2, 50, dtype=torch.bool)
    expected.scatter_(-1, score.topk(9).indices, True)
    assert torch.equal(dense, expected.repeat_interleave(2, 1).unsqueeze(2).expand(dense.shape))


def by_definition(
    query: torch.Tensor, key: torch.Tensor, *, budget: int, size: int, strict: bool
) -> torch.Tensor:
    """The causal mask of `voted`: rectangle by rectangle, tile by tile, from the definition."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    offset, size = num_keys - num_queries, min(size, num_queries)
    dense = torch.zeros(2, 4, num_queries, num_keys, dtype=torch.bool)
    for first in range(0, num_queries, size):
        rows = slice(first, min(first + size, num_queries))
        # the rectangles over the tile, the largest first: (voters, keys)
        rectangles = [((0, num_queries), (0, offset))] if offset > 0 else []
        for bit in reversed(range(10)):
            if first // size >> bit & 1:
                begin = first // size >> (bit + 1) << (bit + 1)
                places = [(begin + (i << bit)) * size for i in range(3)]
                voters = places[:2] if strict else [places[1], min(places[2], num_queries)]
                rectangles.append((tuple(voters), (places[0] + offset, places[1] + offset)))
        for rank, (voters, keys) in enumerate(rectangles):
            share = max(0, (budget - 1 - rank) // len(rectangles) + 1)
            voting = query[:, :, slice(*voters)].reshape(2, 2, -1, 4)
            seen = key[:, :, slice(*keys)]
            best = torch.softmax(0.5 * voting @ seen.mT, dim=-1).sum(2)
            best = best.topk(min(budget, seen.shape[2])).indices[..., :share] + keys[0]
            held = torch.zeros(2, 2, num_keys, dtype=torch.bool).scatter_(-1, best, True)
            dense[:, :, rows] |= held.repeat_interleave(2, 1).unsqueeze(2)
        dense[:, :, rows, max(0, first + offset) : max(0, first + size + offset)] = True
    return dense.tril(offset)


@given(n_q=SIZES, more=st.integers(0, 20), seed=st.integers(0, 999), size=st.integers(1, 9))
@example(n_q=50, more=0, seed=0, size=1)
@example(n_q=1, more=9, seed=0, size=5)
def test_a_causal_tile_holds_its_share_of_every_rectangle_and_its_own_keys(
    n_q: int, more: int, seed: int, size: int
) -> None:
    query, key = tensors(seed, n_q, n_q + more)
    detector = voted(num_keys=4, tile_size=size)
    mask = detector.find(query, key, is_causal=True, scale=0.5)
    assert torch.equal(
        mask.to_dense(), by_definition(query, key, budget=4, size=size, strict=False)
    )
    if not more:
        mask = detector.find_strict(query, key, is_causal=True, scale=0.5)
        expected = by_definition(query, key, budget=4, size=size, strict=True)
        assert torch.equal(mask.to_dense(), expected)


@FORMS
@given(n_q=SIZES, n_k=SIZES, cut=st.integers(0, 60), seed=st.integers(0, 99))
def test_no_later_key_moves_a_choice(form: str, n_q: int, n_k: int, cut: int, seed: int) -> None:
    query, key = tensors(seed, n_q, n_k)
    whole = MADE[form].find(query, key, is_causal=True).validate().to_dense()
    other = key.clone()
    other[:, :, cut:] = 99.0
    changed = MADE[form].find(query, other, is_causal=True).to_dense()
    before = max(0, cut - (n_k - n_q))  # rows that see no changed key
    assert torch.equal(changed[:, :, :before], whole[:, :, :before])
    own = torch.arange(n_q).unsqueeze(-1) + n_k - n_q == torch.arange(n_k)
    assert (whole | ~own).all()
    assert whole.sum(-1).max() <= 9 + 5


@FORMS
def test_no_later_query_moves_a_strict_choice(form: str) -> None:
    query, key = tensors(3)
    detector = MADE[form]
    whole = detector.find_strict(query, key, is_causal=True).to_dense()
    for cut in (5, 17, 40):
        other = query.clone()
        other[:, :, cut:] = 99.0
        changed = detector.find_strict(other, key, is_causal=True).to_dense()
        assert torch.equal(changed[:, :, :cut], whole[:, :, :cut])


def test_the_strict_form_needs_earlier_queries_only_where_queries_choose() -> None:
    query, key = tensors(0, 10, 50)
    assert not largest.uses_queries
    assert largest().find_strict(query, key).nnz().min() == 500
    earlier = voted(num_keys=3).find_strict(query, key, earlier_query=query * 0).to_dense()
    assert earlier[..., 0, :].sum(-1).unique().tolist() == [3]
    for is_causal in (False, True):
        with pytest.raises(UnsupportedError, match="strict_causal=True: voted chooses by the quer"):
            voted(num_keys=3).find_strict(query, key, is_causal=is_causal)


def test_minus_one_is_no_key() -> None:
    query, key = tensors(0)
    dense = largest(num_keys=20, least=2.5).find(query, key).to_dense()
    expected = torch.zeros(2, 2, 50, dtype=torch.bool)
    norm, index = key.norm(dim=-1).topk(20)
    expected.scatter_(-1, index, norm >= 2.5)
    assert expected.sum(-1).max() < 20
    assert torch.equal(dense[:, :, 7], expected.repeat_interleave(2, 1))
    causal = largest(num_keys=50, least=2.5, tile_size=4).find(query, key, is_causal=True)
    far = (torch.arange(50).unsqueeze(-1) // 4 > torch.arange(50) // 4).expand(2, 4, -1, -1)
    small = (key.norm(dim=-1) < 2.5).repeat_interleave(2, 1).unsqueeze(2)
    assert torch.equal(causal.to_dense() & far, far & ~small)


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("strict", [False, True])
def test_attention_with_all_keys_held_is_exact(causal: str, strict: bool) -> None:
    query, key = tensors(0, 70, 70)
    attention = HyperAttention(
        detector=MADE["voted"].replace(num_keys=70 * 8, tile_size=8), num_samples=0, min_seq_len=0,
        causal=causal, strict_causal=strict,
    )  # fmt: skip
    out = attention(query, key, key, is_causal=True)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), key.repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(out, exact)


WRONG = {
    "dtype": (lambda key, count: key[..., :count, 0], "its columns are torch.float64"),
    "type": (lambda key, count: [0], "its columns are list"),
    "shape": (lambda key, count: torch.zeros(count, dtype=torch.int64), r"shape \(9,\); return"),
    "too many": (lambda key, count: lists(key, range(count + 1)), r"\(2, 2, 10\); return"),
    "range": (lambda key, count: lists(key, [0, 50]), r"0..50, outside 0..49"),
    "twice": (lambda key, count: lists(key, [3, 4, 3]), "names a key twice"),
}


def lists(key: torch.Tensor, columns: Any) -> torch.Tensor:
    return torch.tensor(list(columns)).expand(*key.shape[:2], -1)


@pytest.mark.parametrize("case", WRONG)
def test_columns_of_a_wrong_kind_are_refused(case: str) -> None:
    function, text = WRONG[case]

    @from_index
    def wrong(key: Any, *, count: int) -> Any:
        return function(key, count)

    with pytest.raises((ArgumentError, ArgumentTypeError), match=text):
        wrong(num_keys=9).find(*tensors(0))


@pytest.mark.parametrize("name", ["num_keys", "tile_size"])
def test_parameters_are_checked(name: str) -> None:
    for value in (0, -1, "8"):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=f"voted: {name}="):
            voted(**{name: value})
