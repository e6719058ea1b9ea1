"""What every detector of a fixed pattern has to obey, given the pattern by its definition.

A definition is called as `expected(detector, num_queries, num_keys, is_causal=, first_real=)` and
returns the dense mask, bool `[2, 4, n_q, n_k]`; `first_real` is the first key that is no padding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import AbstractDetector, create
from hyperframe.testing import masked_attention

Definition = Callable[..., torch.Tensor]

SIZES = st.integers(1, 40)
SHAPES = pytest.mark.parametrize("shape", [(40, 40), (33, 40), (40, 33)])
SIDES = pytest.mark.parametrize("sides", [(0, 0), (11, 0), (0, 13), (9, 10), (20, 19)])
MODES = pytest.mark.parametrize("mode", ["full", "single_pass", "recursive"])


def shapes(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a query and a key of the sizes, two batch items, groups of two heads."""
    return torch.zeros(2, 4, num_queries, 3), torch.zeros(2, 2, num_keys, 3)


def mask_is_the_definition(
    detector: AbstractDetector, expected: Definition, num_queries: int, num_keys: int, *,
    is_causal: bool,
) -> None:  # fmt: skip
    """`find` and `find_strict` return the pattern."""
    query, key = shapes(num_queries, num_keys)
    want = expected(detector, num_queries, num_keys, is_causal=is_causal, first_real=0)
    for find in (detector.find, detector.find_strict):
        mask = find(query, key, is_causal=is_causal)
        assert mask.is_causal == is_causal
        assert torch.equal(mask.to_dense(), want)
        assert torch.equal(mask.nnz(), want.sum(dim=(-2, -1)))


def rectangle_is_a_part(
    detector: AbstractDetector, expected: Definition, num_queries: int, num_keys: int,
    data: st.DataObject,
) -> None:  # fmt: skip
    """`find_rectangle` returns the part of the causal pattern in a rectangle below the diagonal."""
    query, key = shapes(num_queries, num_keys)
    whole = expected(detector, num_queries, num_keys, is_causal=True, first_real=0)
    offset = num_keys - num_queries
    row = data.draw(st.integers(0, num_queries - 1))
    last = data.draw(st.integers(row + 1, num_queries))
    stop = data.draw(st.integers(0, num_keys))
    if not 0 < stop <= row + offset:
        return  # not below the diagonal
    first = data.draw(st.integers(0, stop - 1))
    part = detector.find_rectangle(
        query[:, :, row:last], key[:, :, first:stop], query_start=row + offset, key_start=first,
        first_row=row,
    )  # fmt: skip
    assert not part.is_causal
    assert torch.equal(part.to_dense(), whole[:, :, row:last, first:stop])


def rest_of_padding_is_a_part(
    detector: AbstractDetector, expected: Definition, num_queries: int, num_keys: int,
    data: st.DataObject, *, is_causal: bool,
) -> None:  # fmt: skip
    """`find_within` returns what of the pattern lies in the rows and keys that padding leaves."""
    query, key = shapes(num_queries, num_keys)
    offset = num_keys - num_queries
    first = data.draw(st.integers(0, num_keys - 1))
    stop = data.draw(st.integers(first + 1, num_keys))
    whole = expected(detector, num_queries, num_keys, is_causal=is_causal, first_real=first)
    # causal: the rows whose keys are real; otherwise any
    row, last = max(0, first - offset), stop - offset
    if not is_causal:
        row = data.draw(st.integers(0, num_queries - 1))
        last = data.draw(st.integers(row + 1, num_queries))
    if row >= last:
        return
    part = detector.find_within(
        query[:, :, row:last], key[:, :, first:stop], is_causal=is_causal, strict=is_causal,
        query_start=row + offset, key_start=first, first_row=row, num_queries=num_queries,
        num_keys=num_keys,
    )  # fmt: skip
    assert part.is_causal == is_causal
    assert torch.equal(part.to_dense(), whole[:, :, row:last, first:stop])


def attention_goes_by_the_pattern(
    spec: str, expected: Definition, mode: str, sides: tuple[int, int], shape: tuple[int, int]
) -> None:
    """Attention without samples is masked attention, the first batch item padded at its sides."""
    g = torch.Generator().manual_seed(0)
    query, key = (torch.randn(x.shape, generator=g, dtype=torch.float64) for x in shapes(*shape))
    real = torch.arange(shape[1])
    real = (sides[0] <= real) & (real < shape[1] - sides[1])
    padding = torch.stack([real, torch.ones_like(real)])
    is_causal = mode != "full"
    patterns = [
        expected(create(spec), *shape, is_causal=is_causal, first_real=first)[:1]
        for first in (sides[0], 0)
    ]
    held = torch.cat(patterns) & padding[:, None, None]
    if mode == "recursive":  # where leaves are single keys: each row also holds its own
        position = torch.arange(shape[0])[:, None] + shape[1] - shape[0]
        held = held | ((position == torch.arange(shape[1])) & padding[:, None, None])
    want = masked_attention(query, key, key, held)
    attention = HyperAttention(
        detector=spec, num_samples=0, min_seq_len=0, causal=mode if is_causal else "single_pass"
    )
    out, lse = attention(
        query, key, key, is_causal=is_causal, key_padding_mask=padding, return_lse=True
    )
    torch.testing.assert_close(out, want.out)
    torch.testing.assert_close(lse, want.lse)
