"""Reed-Solomon codes: distance, round trips with errors and missing symbols, honest refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.errors import ArgumentError
from hyperframe.sketching.codes import ReedSolomon

CODES = [(8, 4, 4), (10, 5, 4), (15, 7, 4), (7, 3, 3), (20, 6, 8), (3, 1, 2), (8, 1, 4), (4, 4, 4)]


def spoiled(
    code: ReedSolomon, word: torch.Tensor, wrong: int, missing: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Words with other symbols in `wrong` places and any symbols in `missing` others."""
    g = torch.Generator().manual_seed(seed)
    place = torch.rand(word.shape, generator=g).argsort(dim=-1).argsort(dim=-1)
    noise = torch.randint(1, 1 << code.bits, word.shape, generator=g)
    is_missing = (place >= wrong) & (place < wrong + missing)
    word = torch.where(place < wrong, word ^ noise, word)
    return torch.where(is_missing, noise, word), is_missing


@pytest.mark.parametrize("length, message, bits", [(7, 2, 3), (3, 1, 2), (6, 3, 3)])
def test_any_two_words_differ_in_as_many_places_as_can_be(
    length: int, message: int, bits: int
) -> None:
    code = ReedSolomon(length=length, message=message, bits=bits)
    words = code.encode(torch.arange(code.num_words))
    distance = (words.unsqueeze(0) != words.unsqueeze(1)).sum(dim=-1)
    distance += torch.eye(len(words), dtype=torch.int64) * length
    assert distance.min() == length - message + 1


@pytest.mark.parametrize("length, message, bits", CODES)
def test_all_mixtures_of_wrong_and_missing_symbols_up_to_the_radius_are_put_right(
    length: int, message: int, bits: int
) -> None:
    code = ReedSolomon(length=length, message=message, bits=bits)
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, code.num_words, (300,), generator=g)
    word = code.encode(index)
    for wrong in range(code.radius // 2 + 1):
        for missing in range(code.radius - 2 * wrong + 1):
            found, is_near = code.decode(*spoiled(code, word, wrong, missing, wrong))
            assert is_near.all()
            assert torch.equal(found, index)


def test_every_pattern_of_two_wrong_symbols_is_put_right() -> None:
    code = ReedSolomon(length=8, message=4, bits=4)
    word = code.encode(torch.tensor(0xBEEF))
    spoilt = []
    for a, b in itertools.combinations(range(8), 2):
        for x, y in itertools.product((1, 6, 15), repeat=2):
            other = word.clone()
            other[a] ^= x
            other[b] ^= y
            spoilt.append(other)
    found, is_near = code.decode(torch.stack(spoilt))
    assert is_near.all()
    assert (found == 0xBEEF).all()


@given(
    sizes=st.sampled_from(CODES), wrong=st.integers(0, 20), missing=st.integers(0, 20),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_what_is_decoded_is_within_the_radius_and_all_within_it_is_decoded(
    sizes: tuple[int, int, int], wrong: int, missing: int, seed: int
) -> None:
    code = ReedSolomon(length=sizes[0], message=sizes[1], bits=sizes[2])
    wrong, missing = min(wrong, code.length), min(missing, max(0, code.length - wrong))
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, code.num_words, (40,), generator=g)
    word, is_missing = spoiled(code, code.encode(index), wrong, missing, seed)
    found, is_near = code.decode(word, is_missing)
    differs = (code.encode(found) != word) & ~is_missing
    within = 2 * differs.sum(dim=-1) + is_missing.sum(dim=-1) <= code.radius
    assert within[is_near].all()
    assert (found[~is_near] == 0).all()
    if 2 * wrong + missing <= code.radius:
        assert torch.equal(found, index)
        assert is_near.all()


def test_the_first_symbols_are_the_digits_of_the_index() -> None:
    code = ReedSolomon(length=10, message=5, bits=4)
    assert code.encode(torch.tensor(0x12345))[:5].tolist() == [5, 4, 3, 2, 1]


def test_sizes_that_make_no_code_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"message=4 and length=16 do not fit bits=4; .* <= 15"):
        ReedSolomon(length=16, message=4, bits=4)
    with pytest.raises(ArgumentError, match="message=9 and length=8"):
        ReedSolomon(length=8, message=9)
    with pytest.raises(ArgumentError, match="bits=9 names no field here; pass 2 to 8"):
        ReedSolomon(length=8, message=4, bits=9)
