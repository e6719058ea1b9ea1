"""Traces: the keys that an attention call computed, counted."""

from __future__ import annotations

import math

import pytest
import torch

from hyperframe.attention import hyper_attention
from hyperframe.detectors import create
from hyperframe.rectangles import leaf_size
from hyperframe.trace import active_trace, tracing

N = 40


def tensors(num_queries: int = N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = torch.randn(2, 4, num_queries, 4)
    return query, torch.randn(2, 2, N, 4), torch.randn(2, 2, N, 4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "detector",
    [
        "oracle(budget=4)",
        "sliding_window(width=7, num_sinks=2)",
        "heavy_columns(num_columns=6, num_queries=40, tile_size=8)",
        "block_list(blocks=((0,0),(1,0),(1,1)), block_size=16)",
        "sliding_window(width=7) | oracle(budget=4)",
        (
            "vertical_slash(num_columns=6, num_diagonals=4, num_queries=40, num_segments=1, "
            "tile_size=8)"
        ),
        "antidiagonal(block_size=4, num_blocks=2, stride=2, tile_size=8)",
        "pca_tree(leaf_size=4, num_leaves=2, tile_size=8, chunk_size=16)",
    ],
)
def test_without_samples_the_keys_are_the_entries_of_the_mask(
    detector: str, is_causal: bool
) -> None:
    query, key, value = tensors()
    with tracing() as trace:
        hyper_attention(
            query, key, value, detector=detector, num_samples=0, min_seq_len=0, is_causal=is_causal
        )
    mask = create(detector).find(query, key, is_causal=is_causal)
    assert trace.keys == int(mask.nnz().sum())
    assert trace.queries == 2 * 4 * N
    assert trace.keys_per_query == trace.keys / trace.queries
    assert (trace.exact_calls, trace.approximate_calls) == (0, 1)


def test_samples_count_where_they_count_for_a_row() -> None:
    query, key, value = tensors()
    # an empty pattern: every draw counts for every row
    with tracing() as trace:
        hyper_attention(query, key, value, detector="block_list", num_samples=9, min_seq_len=0)
    assert trace.keys_per_query == 9
    # everything is held: no draw counts
    with tracing() as trace:
        hyper_attention(
            query, key, value, detector=f"oracle(budget={N})", num_samples=9, min_seq_len=0
        )
    assert trace.keys_per_query == N


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("num_queries", [N, 1, 23, 60])
def test_exact_calls_count_every_visible_key(num_queries: int, return_lse: bool) -> None:
    for is_causal in (False, True):
        with tracing() as trace:
            hyper_attention(*tensors(num_queries), is_causal=is_causal, return_lse=return_lse)
        visible = torch.ones(num_queries, N)
        if is_causal:
            visible = visible.tril(N - num_queries)
        assert trace.keys == 2 * 4 * int(visible.sum())
        assert trace.queries == 2 * 4 * num_queries
        assert (trace.exact_calls, trace.approximate_calls) == (1, 0)


def test_the_recursion_counts_leaves_and_rectangles() -> None:
    with tracing() as trace:
        hyper_attention(
            *tensors(), detector="oracle(budget=2)", num_samples=0, min_seq_len=5, is_causal=True,
            causal="recursive",
        )  # fmt: skip
    leaf = leaf_size(N, 5)
    assert leaf == 5
    leaves = N // leaf * leaf * (leaf + 1) // 2
    # rows of 8 leaves lie in 0, 1, 1, 2, 1, 2, 2, 3 rectangles, two keys in each
    rectangles = 12 * leaf * 2
    assert trace.keys == 2 * 4 * (leaves + rectangles)
    assert (trace.exact_calls, trace.approximate_calls) == (0, 1)


@pytest.mark.parametrize("num_queries", [N, 23, 60])
def test_levels_that_are_attended_at_once_count_leaves_and_blocks(num_queries: int) -> None:
    visible = int(torch.ones(num_queries, N).tril(N - num_queries).sum())
    options = {"min_seq_len": 5, "is_causal": True, "causal": "recursive"}
    for detector, num_samples in ((f"sort_lsh(block_size={N})", 9), ("sort_lsh(block_size=1)", N)):
        # every rectangle is held, or sampled whole
        with tracing() as trace:
            hyper_attention(
                *tensors(num_queries), detector=detector, num_samples=num_samples, **options
            )
        assert trace.keys == 2 * 4 * visible
        assert trace.queries == 2 * 4 * num_queries
        assert (trace.exact_calls, trace.approximate_calls) == (0, 1)
    with tracing() as trace:
        hyper_attention(*tensors(N), detector="sort_lsh(block_size=5)", num_samples=0, **options)
    # rows of 8 leaves lie in 0, 1, 1, 2, 1, 2, 2, 3 rectangles, of which each holds 5 keys
    assert trace.keys == 2 * 4 * (8 * 15 + 12 * 5 * 5)


def test_padding_counts_no_padded_key() -> None:
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, :10] = False
    with tracing() as trace:
        hyper_attention(*tensors(), key_padding_mask=mask)
    assert trace.keys == 4 * N * (N + N - 10)
    assert trace.queries == 2 * 4 * N


def test_calls_add_up_and_traces_nest() -> None:
    with tracing() as outer:
        hyper_attention(*tensors())
        with tracing() as inner:
            hyper_attention(*tensors())
            hyper_attention(*tensors(), min_seq_len=0, detector="oracle(budget=1)")
        assert active_trace() is outer
    assert active_trace() is None
    assert (inner.exact_calls, inner.approximate_calls) == (1, 1)
    assert outer.exact_calls == 1
    assert outer.keys == 2 * 4 * N * N


def test_a_trace_ends_with_its_block_also_by_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), tracing():
        raise RuntimeError("stop")
    assert active_trace() is None


def test_before_any_call_there_is_no_mean() -> None:
    with tracing() as trace:
        pass
    assert math.isnan(trace.keys_per_query)


def test_tracing_changes_no_bit() -> None:
    inputs = tensors()
    plain = hyper_attention(*inputs, min_seq_len=0, num_samples=4, is_causal=True)
    with tracing():
        traced = hyper_attention(*inputs, min_seq_len=0, num_samples=4, is_causal=True)
    assert torch.equal(plain, traced)
