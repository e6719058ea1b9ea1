"""What detectors that choose for tiles of rows have to obey, whatever they choose by.

A `find` is called with a query and a key and returns a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hyperframe.attention import HyperAttention
from hyperframe.detectors import AbstractDetector
from hyperframe.masks import HeavyMask
from hyperframe.testing.strategies import AttentionInputs

Find = Callable[[torch.Tensor, torch.Tensor], HeavyMask]

SIZES = st.integers(1, 60)


def random_heads(
    seed: int = 0, *, num_queries: int = 40, num_keys: int = 40, dim: int = 4,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return a query and a key of normal numbers, two batch items, groups of two heads."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, dim, generator=g, dtype=dtype)
    return query, torch.randn(2, 2, num_keys, dim, generator=g, dtype=dtype)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def at_any_cut(test: Callable[..., None]) -> Callable[..., None]:
    """Give a test `num_queries`, `num_keys`, `cut` and `seed`: square, more keys, and fewer."""
    for num_queries, num_keys, cut in ((53, 44, 41), (60, 41, 43), (40, 57, 21), (60, 60, 31)):
        test = example(num_queries=num_queries, num_keys=num_keys, cut=cut, seed=0)(test)
    return given(num_queries=SIZES, num_keys=SIZES, cut=SIZES, seed=st.integers(0, 999))(test)


def no_later_token_moves_a_row(
    find: Find, num_queries: int, num_keys: int, cut: int, seed: int, *, keys_only: bool
) -> None:
    """Other keys (and other queries, if not `keys_only`) from row `cut` on leave earlier rows."""
    query, key = random_heads(seed, num_queries=num_queries, num_keys=num_keys)
    cut = min(cut, num_queries)
    before = find(query, key).to_dense()
    if not keys_only:
        query[:, :, cut:] *= -50
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -50
    after = find(query, key).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


def no_later_query_moves_a_row_of_a_strict_rectangle(
    detector: AbstractDetector, num_earlier: int
) -> None:
    """What later rows ask moves nothing, what earlier ones asked does."""
    query, key = random_heads(num_queries=30, num_keys=25)
    earlier = random_heads(1, num_queries=20)[0][:, :, :num_earlier] if num_earlier else None
    rectangle: Any = {"query_start": 25, "strict": True, "earlier_query": earlier}
    before = detector.find_rectangle(query, key, **rectangle).to_dense()
    for cut in (1, 8, 9, 20):
        changed = query.clone()
        changed[:, :, cut:] *= -50
        after = detector.find_rectangle(changed, key, **rectangle).to_dense()
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    loose = detector.find_rectangle(query, key, query_start=25)
    assert torch.equal(loose.to_dense(), detector.find(query, key).to_dense())
    if earlier is not None:
        other = detector.find_rectangle(query, key, **{**rectangle, "earlier_query": -earlier})
        assert not torch.equal(before, other.to_dense())


def shared_key_heads_are_as_repeated_ones(
    detector: AbstractDetector, inputs: AttentionInputs, *, is_causal: bool, strict: bool
) -> HeavyMask:
    """Any input gives a mask, which is returned."""
    query, key, _ = inputs
    find = detector.find_strict if strict else detector.find
    mask = find(query, key, is_causal=is_causal).validate()
    again = find(query, inputs.expanded_key(), is_causal=is_causal)
    if inputs.structure == "plain":
        assert torch.equal(mask.to_dense(), again.to_dense())
    return mask


def no_intermediate_grows_with_the_square_of_the_length(
    find: Find, *, width: int = 32, growth: float = 2.1
) -> None:
    """The largest tensor has at most `width` numbers a row: twice as many for twice the rows."""
    largest = []
    for n in (1024, 2048):
        query, key = torch.zeros(1, 2, n, 8), torch.zeros(1, 2, n, 8)
        with Largest() as record:
            find(query, key)
        largest.append(record.numel)
        assert record.numel <= 2 * n * width
    assert largest[1] <= growth * largest[0]


def finds_in_one_graph(find: Find) -> None:
    """Compiled as a whole, finding gives the same lists."""

    def lists(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
        return [part.key_index for part in find(query, key).parts()]  # type: ignore[attr-defined]

    torch._dynamo.reset()
    compiled = torch.compile(lists, fullgraph=True, backend="aot_eager")
    inputs = random_heads(num_keys=53)
    torch.testing.assert_close(compiled(*inputs), lists(*inputs))


def with_every_key_attention_is_exact(
    detector: AbstractDetector, causal: str, *, strict: bool
) -> None:
    """A budget that holds everything needs no sample."""
    query, key = random_heads(num_queries=45, num_keys=45)
    attention = HyperAttention(
        detector=detector, num_samples=0, min_seq_len=8, causal=causal, strict_causal=strict
    )
    out = attention(query, key, key, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, key, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
