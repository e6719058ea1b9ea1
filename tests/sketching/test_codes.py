"""The code of the cells: distance, even cells, errors and gaps put right, honest refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.errors import ArgumentError
from hyperframe.sketching.codes import FEWEST, CellCode

MESSAGES = [4, 5, 6]


def cells_of(code: CellCode, index: torch.Tensor) -> torch.Tensor:
    """The words of messages, by the linearity of the code from those of single bits."""
    found = torch.zeros(*index.shape, 8, dtype=torch.int64)
    for bit in range(3 * code.message):
        found ^= ((index >> bit) & 1).unsqueeze(-1) * bit_word(bit)
    return found


def bit_word(bit: int) -> torch.Tensor:
    """Powers of the points times one bit, with the product of GF(8) written out as polynomials."""
    symbol, digit = divmod(bit, 3)
    word = []
    for point in range(8):
        value = 1 << digit
        for _ in range(symbol):
            product = 0
            for place in range(3):
                product ^= (value << place) * (point >> place & 1)
            for place in (4, 3):  # x^3 = x + 1
                if product >> place & 1:
                    product ^= 0b1011 << (place - 3)
            value = product
        word.append(value)
    return torch.tensor(word)


def sets_of(word: torch.Tensor, is_missing: torch.Tensor | None = None) -> torch.Tensor:
    """The sets that hold one cell in each layer, or none where it is missing."""
    one = torch.ones_like(word) << word
    if is_missing is not None:
        one = torch.where(is_missing, 0, one)
    return (one << (8 * torch.arange(8))).sum(dim=-1)


def spoiled(
    word: torch.Tensor, wrong: int, missing: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Words with other symbols in `wrong` places; and `missing` others that are missing."""
    g = torch.Generator().manual_seed(seed)
    place = torch.rand(word.shape, generator=g).argsort(dim=-1).argsort(dim=-1)
    noise = torch.randint(1, 8, word.shape, generator=g)
    return torch.where(place < wrong, word ^ noise, word), (place >= wrong) & (
        place < wrong + missing
    )


@pytest.mark.parametrize("message", MESSAGES)
def test_words_are_polynomials_at_all_points(message: int) -> None:
    code = CellCode(message=message)
    index = torch.arange(600)
    assert torch.equal(torch.from_numpy(code.cells(600)), cells_of(code, index))
    word = code.words(600, torch.device("cpu")).long()
    spread = (word.unsqueeze(-1) >> (3 * torch.arange(8))) & 7
    assert torch.equal(spread, cells_of(code, index))


@pytest.mark.parametrize("message", MESSAGES)
def test_no_two_words_agree_in_as_many_places_as_a_message_has_symbols(message: int) -> None:
    """The code is linear: what two words agree in are the zeros of a third."""
    code = CellCode(message=message)
    index = torch.arange(1, code.num_words)
    assert (cells_of(code, index) == 0).sum(dim=-1).max() == message - 1


def test_eight_messages_in_a_row_lie_in_eight_cells_of_every_layer() -> None:
    for message in MESSAGES:
        cells = torch.from_numpy(CellCode(message=message).cells(4096)).view(-1, 8, 8)
        expected = torch.arange(8).view(1, 8, 1).expand_as(cells)
        assert torch.equal(cells.sort(dim=1).values, expected)


@pytest.mark.parametrize("message", MESSAGES)
def test_all_mixtures_of_wrong_and_missing_symbols_up_to_the_radius_are_put_right(
    message: int,
) -> None:
    code = CellCode(message=message)
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, code.num_words, (300,), generator=g)
    word = cells_of(code, index)
    for wrong in range(code.radius // 2 + 1):
        for missing in range(code.radius - 2 * wrong + 1):
            assert torch.equal(code.decode(sets_of(*spoiled(word, wrong, missing, wrong))), index)


@given(
    message=st.sampled_from(MESSAGES), wrong=st.integers(0, 8), missing=st.integers(0, 8),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_what_is_decoded_is_within_the_radius_and_all_within_it_is_decoded(
    message: int, wrong: int, missing: int, seed: int
) -> None:
    code = CellCode(message=message)
    missing = min(missing, 8 - wrong)
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, code.num_words, (40,), generator=g)
    word, is_missing = spoiled(cells_of(code, index), wrong, missing, seed)
    found = code.decode(sets_of(word, is_missing))
    is_near = found >= 0
    differs = (cells_of(code, found.clamp(min=0)) != word) & ~is_missing
    within = 2 * differs.sum(dim=-1) + is_missing.sum(dim=-1) <= code.radius
    assert within[is_near].all()
    if 2 * wrong + missing <= code.radius:
        assert torch.equal(found, index)


def test_two_cells_of_a_layer_are_as_good_as_none() -> None:
    code = CellCode(message=4)
    index = torch.arange(0, 4096, 97)
    word = cells_of(code, index)
    sets = sets_of(word)
    both = sets | (1 << ((word[:, 2] + 3) % 8 + 16)) | (1 << ((word[:, 7] + 1) % 8 + 56))
    is_missing = torch.zeros(8, dtype=torch.bool)
    is_missing[[2, 7]] = True
    assert torch.equal(code.decode(both), index)
    assert torch.equal(code.decode(sets_of(word, is_missing)), index)


def test_the_code_is_the_smallest_with_so_many_words() -> None:
    sizes = {1: 4, 4096: 4, 4097: 5, 32768: 5, 32769: 6, 262144: 6}
    assert {count: CellCode.of(count).message for count in sizes} == sizes


@pytest.mark.parametrize("message", [FEWEST - 1, 7])
def test_sizes_that_make_no_code_are_refused(message: int) -> None:
    with pytest.raises(ArgumentError, match=rf"message={message} cannot be used; pass 4 to 6"):
        CellCode(message=message)
