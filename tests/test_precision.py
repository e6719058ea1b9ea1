"""Autocast changes nothing: what promises float32 arithmetic computes in it."""

from __future__ import annotations

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.detectors.heavy_columns import column_scores
from hyperframe.detectors.sort_lsh import hamming_sorted_codes
from hyperframe.kernels.exact import exact_attention, exact_output
from hyperframe.precision import without_autocast

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DETECTORS = {
    "sort_lsh": "sort_lsh(block_size=16)",
    "sliding_window": "sliding_window(width=9, num_sinks=3)",
    "heavy_columns": "heavy_columns(num_columns=12, num_queries=5, tile_size=16)",
    "oracle": "oracle(budget=7)",
    "block_list": "block_list(blocks=((0,0),(1,0),(3,2)), block_size=16)",
    "vertical_slash": "vertical_slash(num_columns=8, num_diagonals=8, num_segments=3, tile_size=8)",
    "antidiagonal": "antidiagonal(block_size=4, num_blocks=3, stride=2, tile_size=8)",
    "quest": "quest(block_size=4, num_blocks=3, num_queries=2, tile_size=8)",
    "pca_tree": "pca_tree(leaf_size=4, num_leaves=3, tile_size=8, chunk_size=16)",
    "kmeans": "kmeans(block_size=4, num_blocks=3, num_steps=2, tile_size=8, chunk_size=16)",
    "balanced_lsh": "balanced_lsh(block_size=16, checkpoint=8)",
    "reformer_lsh": "reformer_lsh(block_size=8, num_buckets=8, num_rounds=2)",
    "lsh_topk": "lsh_topk(num_keys=6, num_buckets=4, num_rounds=2, tile_size=8)",
    "union": "sort_lsh(block_size=16) | sliding_window(width=5) | oracle(budget=3)",
}
# strategy: what is called, and whether the mask is causal
STRATEGIES = {
    "full": ({}, False),
    "single_pass": ({"causal": "single_pass"}, True),
    "recursive": ({"causal": "recursive"}, True),
    "exact": ({"min_seq_len": 1000}, True),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_every_combination_and_its_gradients_are_the_same_under_autocast(
    detector: str, strategy: str, backend: str, device: str
) -> None:
    options, is_causal = STRATEGIES[strategy]
    options = {"min_seq_len": 16, **options}
    attention = HyperAttention(detector=detector, num_samples=8, backend=backend, **options)
    g = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, heads, 70, 8, generator=g).to(device).requires_grad_() for heads in (4, 2, 2)
    ]

    def results(*, enabled: bool) -> list[torch.Tensor]:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            out, lse = attention(*inputs, is_causal=is_causal, return_lse=True)
            alone = attention(*inputs, is_causal=is_causal)
            total = out.square().sum() + lse.sum() + alone.sum()
            if device == "cpu":
                return [out, lse, alone, *torch.autograd.grad(total, inputs)]
        # on CUDA, SDPA's own backward obeys an autocast that is on during the backward pass
        return [out, lse, alone, *torch.autograd.grad(total, inputs)]

    # gradients are added by atomics on CUDA, in any order; bfloat16 would be off by 1e-2
    tolerance = 1e-6 if device == "cpu" else 1e-4
    for found, expected in zip(results(enabled=True), results(enabled=False), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_hash_codes_column_scores_and_exact_attention_are_those_without_autocast(
    device: str,
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 500, 16, generator=g).to(device)
    projection = torch.randn(1, 2, 16, 20, generator=g).to(device)
    rows = torch.arange(0, 500, 7, device=device)
    calls = (
        lambda: hamming_sorted_codes(x, projection),
        lambda: column_scores(x, x, rows, scale=0.5),
        lambda: exact_output(x, x, x, scale=0.5, is_causal=True),
        lambda: exact_attention(x, x, x, scale=0.5, is_causal=True).lse,
    )
    for call in calls:
        expected = call()
        with torch.autocast(device, dtype=torch.bfloat16):
            assert torch.equal(call(), expected)


def test_devices_without_autocast_are_left_alone() -> None:
    with without_autocast(torch.empty(1, device="meta")):
        assert torch.empty(2, device="meta").shape == (2,)


def test_autocast_comes_back_behind_the_block() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(torch.zeros(1)):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
