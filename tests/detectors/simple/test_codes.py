"""Detectors made of hash codes: like codes meet, in every form, and nothing looks ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors.simple import from_codes
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.randomness import Stream


@from_codes
def signs(query: Any, key: Any, *, num_bits: int = 3) -> Any:
    """The signs of the first coordinates are the bits."""
    powers = 2 ** torch.arange(num_bits)
    return tuple(((x[..., :num_bits] > 0) * powers).sum(-1) for x in (query, key))


@from_codes
def planes(query: Any, key: Any, *, num_bits: int, generator: Any) -> Any:
    """The sides of random hyperplanes are the bits."""
    shape = (*key.shape[:2], key.shape[-1], num_bits)
    drawn = torch.randn(shape, generator=generator, dtype=key.dtype)
    return tuple(((x @ drawn > 0) * 2 ** torch.arange(num_bits)).sum(-1) for x in (query, key))


def tensors(
    seed: int, num_queries: int = 64, num_keys: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, 4, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, 4, generator=g, dtype=torch.float64)
    return query, key


def codes_of(x: torch.Tensor) -> torch.Tensor:
    return ((x[..., :3] > 0) * 2 ** torch.arange(3)).sum(-1)


def blocks_of(code: torch.Tensor, size: int) -> torch.Tensor:
    """The block of every place: equal runs of ranks."""
    rank = code.sort(dim=-1, stable=True).indices.argsort(dim=-1)
    count = -(-code.shape[-1] // size)
    return rank * count // code.shape[-1]


def test_rows_hold_the_keys_of_their_block_of_equal_rank() -> None:
    query, key = tensors(0)
    dense = signs(num_keys=16).find(query, key).to_dense()
    rows, columns = blocks_of(codes_of(query), 16), blocks_of(codes_of(key), 16)
    columns = columns.repeat_interleave(2, dim=1)
    assert torch.equal(dense, rows.unsqueeze(-1) == columns.unsqueeze(-2))


@given(n_q=st.integers(1, 60), n_k=st.integers(1, 60), seed=st.integers(0, 999))
def test_a_causal_row_holds_its_own_key_and_earlier_ones_of_its_bucket_only(
    n_q: int, n_k: int, seed: int
) -> None:
    query, key = tensors(seed, n_q, n_k)
    detector = signs(num_keys=8)
    dense = detector.find(query, key, is_causal=True).to_dense()
    position = torch.arange(n_q).unsqueeze(-1) + n_k - n_q
    earlier, own = torch.arange(n_k) <= position, torch.arange(n_k) == position
    assert not (dense & ~earlier).any()
    assert dense.sum(-1).max() <= 8
    if n_k > 8:
        joined = 3 - min(3, (-(-n_k // 8)).bit_length() - 1)
        bucket = (codes_of(key) >> joined).repeat_interleave(2, dim=1).unsqueeze(-2)
        is_like = (codes_of(query) >> joined).unsqueeze(-1) == bucket
        assert not (dense & ~is_like & ~own).any()
        assert (dense | ~own).all()
        # the last key of the bucket is held by every row that has one
        last = (is_like & earlier).long() * torch.arange(1, n_k + 1)
        held = dense.gather(-1, (last.amax(-1, keepdim=True) - 1).clamp(min=0))
        assert (held.squeeze(-1) | (last.amax(-1) == 0)).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_strict_form_is_a_function_of_the_own_query(is_causal: bool) -> None:
    query, key = tensors(1)
    options = {"is_causal": True} if is_causal else {"earlier_query": query}
    whole = signs(num_keys=8).find_strict(query, key, **options).to_dense()
    other = query.clone()
    other[:, :, 30:] *= -1
    changed = signs(num_keys=8).find_strict(other, key, **options).to_dense()
    assert torch.equal(changed[:, :, :30], whole[:, :, :30])
    assert not torch.equal(changed, whole)
    if is_causal:
        later = key.clone()
        later[:, :, 30:] *= -1
        changed = signs(num_keys=8).find_strict(query, later, is_causal=True).to_dense()
        assert torch.equal(changed[:, :, :30], whole[:, :, :30])


def test_rounds_share_the_budget_and_draw_anew() -> None:
    query, key = tensors(2)
    one = planes(num_keys=16, num_bits=4)
    masks = [
        detector.find(query, key, generator=torch.Generator().manual_seed(3)).to_dense()
        for detector in (one, one, one.replace(num_rounds=2), one.replace(num_keys=8))
    ]
    assert torch.equal(masks[0], masks[1])
    assert masks[2].sum(-1).max() <= 16
    assert (masks[2] | ~masks[3]).all()  # the first of two rounds is the round of half the budget
    assert masks[2].sum() > 1.2 * masks[3].sum()
    assert one.replace(num_keys=0.25).find(query, key).to_dense().sum(-1).max() == 16


def test_a_function_that_asks_for_a_generator_gets_one() -> None:
    assert signs.takes_stream
    assert not planes.takes_stream
    query, key = tensors(0)
    drawn = [planes().find(query, key, generator=Stream(seed)).to_dense() for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    wide = planes(num_keys=8)
    drawn = [wide.find(query, key, generator=Stream(seed)).to_dense() for seed in (0, 1)]
    assert not torch.equal(*drawn)


WRONG = {
    "no pair": (lambda q, k: k[..., 0].long(), "its codes are a Tensor; return a pair"),
    "dtype": (lambda q, k: (q[..., 0], k[..., 0]), "the query codes are torch.float64"),
    "shape": (lambda q, k: ((q > 0).long()[..., 0], (k > 0).long()), "the key codes are torch.int"),
    "range": (lambda q, k: ((q > 0).long()[..., 0] * 8,) * 2, "0..8, outside 0..7; use num_bits=3"),
    "sign": (lambda q, k: ((q > 0).long()[..., 0] - 1,) * 2, r"-1..0, outside 0..7"),
}


@pytest.mark.parametrize("case", WRONG)
def test_codes_of_a_wrong_kind_are_refused(case: str) -> None:
    function, text = WRONG[case]

    @from_codes
    def wrong(query: Any, key: Any, *, num_bits: int = 3) -> Any:
        return function(query, key)

    query, key = tensors(0)
    with pytest.raises(ArgumentError, match=text):
        wrong().find(query[:, ::2], key)


@pytest.mark.parametrize("name", ["num_keys", "num_bits", "num_rounds"])
def test_parameters_are_checked(name: str) -> None:
    for value in (0, -1, "8"):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=f"signs: {name}="):
            signs(**{name: value})
    with pytest.raises(ArgumentError, match="num_keys=3 is no key for each of num_rounds=4 rounds"):
        signs(num_keys=3, num_rounds=4)
    with pytest.raises(ArgumentError, match="does not fit a 64-bit code"):
        signs(num_bits=63)
