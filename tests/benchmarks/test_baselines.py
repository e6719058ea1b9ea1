"""Forced kernels compute exact attention; fixed masks are those of the detectors."""

from __future__ import annotations

import pytest
import torch

from hyperframe import detectors
from hyperframe.benchmarking import Shape, make_inputs
from hyperframe.benchmarking.baselines import exact_candidates, flex_candidate, mask_function
from hyperframe.benchmarking.timing import Failure
from hyperframe.errors import UnsupportedError
from hyperframe.testing import dense_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_forced_kernels_compute_exact_attention(is_causal: bool, kv_heads: int) -> None:
    shape = Shape(batch=1, heads=4, kv_heads=kv_heads, length=200, head_dim=16)
    query, key, value = make_inputs("normal", shape, dtype=torch.float32, device=CPU, seed=0)
    expected = dense_attention(query, key, value, is_causal=is_causal).out
    found = exact_candidates(shape, is_causal=is_causal, dtype=torch.float32, device=CPU)
    ran = 0
    for candidate in found.values():
        if not isinstance(candidate, Failure):
            call, context = candidate
            with context():
                out = call(query, key, value)
            torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
            ran += 1
    assert ran


def test_math_kernel_is_left_out_where_its_scores_do_not_fit() -> None:
    shape = Shape(batch=1, heads=4, kv_heads=4, length=32768, head_dim=16)
    found = exact_candidates(shape, is_causal=True, dtype=torch.float32, device=CPU)
    refused = found["sdpa-math"]
    assert isinstance(refused, Failure)
    assert "16.0 GiB" in refused.reason
    assert not isinstance(found["sdpa-flash"], Failure)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        "sliding_window(width=7, num_sinks=3)",
        "block_list(blocks=((0, 0), (2, 1), (4, 4)), block_size=20)",
        "sliding_window(width=4) | block_list(blocks=((3, 0),), block_size=20)",
    ],
)
def test_fixed_mask_is_the_mask_of_the_detector(spec: str, is_causal: bool) -> None:
    query = torch.zeros(1, 1, 100, 4)
    detector = detectors.create(spec)
    expected = detector.find(query, query, is_causal=is_causal).to_dense()[0, 0]
    mask = mask_function(detector, is_causal=is_causal)
    i, j = torch.arange(100).unsqueeze(1), torch.arange(100)
    assert torch.equal(mask(0, 0, i, j).expand(100, 100), expected)


def test_masks_that_follow_the_content_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="sort_lsh depends on queries and keys"):
        mask_function(detectors.create("sliding_window | sort_lsh"), is_causal=True)
    shape = Shape(batch=1, heads=1, kv_heads=1, length=64, head_dim=16)
    found = flex_candidate(detectors.create("sliding_window"), shape, is_causal=True, device=CPU)
    assert isinstance(found, Failure)
    assert "CUDA" in found.reason


@pytest.mark.gpu
def test_flex_attention_computes_the_window() -> None:
    cuda = torch.device("cuda")
    shape = Shape(batch=1, heads=4, kv_heads=2, length=512, head_dim=64)
    query, key, value = make_inputs("normal", shape, dtype=torch.bfloat16, device=cuda, seed=0)
    detector = detectors.create("sliding_window(width=64, num_sinks=4)")
    call = flex_candidate(detector, shape, is_causal=True, device=cuda)
    assert not isinstance(call, Failure), call
    from hyperframe.testing import masked_attention

    mask = detector.find(query, key, is_causal=True).to_dense()
    expected = masked_attention(query, key, value, mask).out
    torch.testing.assert_close(call(query, key, value).double(), expected, atol=2e-2, rtol=2e-2)
