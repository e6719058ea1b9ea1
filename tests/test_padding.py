"""Key padding: what is padded is never seen, and the rest is as if it had never been there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.testing import dense_attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
N = 40

DETECTORS = [
    "sort_lsh(block_size=8)",
    "sliding_window(width=9, num_sinks=3)",
    "heavy_columns(num_columns=6, num_queries=5, tile_size=8)",
    "oracle(budget=5)",
    "sliding_window(width=5) | sort_lsh(block_size=8)",
]


def tensors(
    num_queries: int = N, num_keys: int = N, *, batch: int = 5, dtype: torch.dtype = torch.float32
) -> Tensors:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 4, num_queries, 4, generator=g, dtype=torch.float64)
    key = torch.randn(batch, 2, num_keys, 4, generator=g, dtype=torch.float64)
    value = torch.randn(batch, 2, num_keys, 3, generator=g, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def padding(num_keys: int = N) -> torch.Tensor:
    """No padding, left, right, holes, and nothing but padding."""
    mask = torch.ones(5, num_keys, dtype=torch.bool)
    mask[1, : num_keys // 4] = False
    mask[2, -num_keys // 3 :] = False
    mask[3, [0, 1, 5, 6, 7, 20, num_keys - 1]] = False
    mask[4] = False
    return mask


_EXACT: dict[str, dict[str, Any]] = {
    "exact path": {"min_seq_len": 1000},
    "oracle": {"detector": "oracle(budget=40)", "num_samples": 0, "min_seq_len": 0},
    "all sampled": {"detector": "sliding_window(width=3)", "num_samples": 40, "min_seq_len": 0},
    "recursive": {
        "detector": "oracle(budget=40)", "num_samples": 0, "min_seq_len": 5, "causal": "recursive",
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", [(N, N), (25, N), (N, 25), (1, N)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", _EXACT.values(), ids=_EXACT)
def test_exact_cases_are_exact_over_the_real_keys(
    options: dict[str, Any], is_causal: bool, shape: tuple[int, int]
) -> None:
    inputs, mask = tensors(*shape), padding(shape[1])
    attention = HyperAttention(**options)
    out, lse = attention(*inputs, is_causal=is_causal, key_padding_mask=mask, return_lse=True)
    expected = dense_attention(*inputs, is_causal=is_causal, key_padding_mask=mask)
    torch.testing.assert_close(out.double(), expected.out, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-5, atol=2e-6)
    alone = attention(*inputs, is_causal=is_causal, key_padding_mask=mask)
    torch.testing.assert_close(alone, out, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("detector", DETECTORS)
def test_an_item_without_real_keys_is_0_and_minus_infinity(
    detector: str, is_causal: bool, causal: str
) -> None:
    attention = HyperAttention(detector=detector, num_samples=4, min_seq_len=4, causal=causal)
    mask = padding()
    out, lse = attention(*tensors(), is_causal=is_causal, key_padding_mask=mask, return_lse=True)
    assert (out[4] == 0).all()
    assert (lse[4] == float("-inf")).all()
    assert out.isfinite().all()
    # and a call in which there is no real key at all
    nothing = torch.zeros_like(mask)
    out, lse = attention(*tensors(), is_causal=is_causal, key_padding_mask=nothing, return_lse=True)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("filling", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("detector", DETECTORS)
def test_what_stands_in_padded_keys_and_values_does_not_matter_in_a_bit(
    detector: str, is_causal: bool, causal: str, filling: float
) -> None:
    mask = padding()
    for min_seq_len in (4, 1000):
        attention = HyperAttention(
            detector=detector, sampler="row_norm", num_samples=4, min_seq_len=min_seq_len,
            causal=causal,
        )  # fmt: skip
        query, key, value = tensors()
        before = attention(
            query, key, value, is_causal=is_causal, key_padding_mask=mask, return_lse=True
        )
        at_padding = ~mask[:, None, :, None]
        key, value = (x.masked_fill(at_padding, filling) for x in (key, value))
        if is_causal:  # nor do queries at padded positions, to all others
            query = query.masked_fill(at_padding, filling)
        after = attention(
            query, key, value, is_causal=is_causal, key_padding_mask=mask, return_lse=True
        )
        for mine, its in zip(before, after, strict=True):
            if is_causal:
                mine, its = (x.transpose(1, 2)[mask] for x in (mine, its))
            assert torch.equal(mine, its)


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("detector", [DETECTORS[1], DETECTORS[2], DETECTORS[3]])
def test_real_rows_are_those_of_a_call_without_the_padding(detector: str, causal: str) -> None:
    # without draws that depend on the batch: all queries vote, nothing is sampled
    detector = detector.replace("num_queries=5", "num_queries=40")
    attention = HyperAttention(detector=detector, num_samples=0, min_seq_len=4, causal=causal)
    inputs, mask = tensors(), padding()
    out, lse = attention(*inputs, is_causal=True, key_padding_mask=mask, return_lse=True)
    for item in range(4):
        cut = [x[item : item + 1, :, mask[item]] for x in inputs]
        alone, alone_lse = attention(*cut, is_causal=True, return_lse=True)
        torch.testing.assert_close(out[item : item + 1, :, mask[item]], alone)
        torch.testing.assert_close(lse[item : item + 1, :, mask[item]], alone_lse)


@pytest.mark.parametrize("detector", DETECTORS)
def test_without_causality_rows_are_those_over_the_cut_keys(detector: str) -> None:
    attention = HyperAttention(detector=detector, num_samples=4, min_seq_len=4)
    query, key, value = (x[:1] for x in tensors())
    for mask in padding()[:4]:
        out = attention(query, key, value, key_padding_mask=mask[None])
        alone = attention(query, key[:, :, mask], value[:, :, mask])
        assert torch.equal(out, alone)  # one item, one pattern: the same draws too


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("detector", DETECTORS)
def test_a_mask_without_padding_changes_no_bit(detector: str, is_causal: bool) -> None:
    attention = HyperAttention(detector=detector, num_samples=4, min_seq_len=4)
    inputs = tensors()
    mask = torch.ones(5, N, dtype=torch.bool)
    plain = attention(*inputs, is_causal=is_causal)
    assert torch.equal(attention(*inputs, is_causal=is_causal, key_padding_mask=mask), plain)


def test_min_seq_len_counts_real_keys() -> None:
    query, key, value = (x[:1] for x in tensors())
    attention = HyperAttention(detector="oracle(budget=1)", num_samples=0, min_seq_len=25)
    mask = torch.arange(N)[None] < 25
    out = attention(query, key, value, key_padding_mask=mask)
    expected = dense_attention(query, key, value, key_padding_mask=mask).out
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padded_keys_and_values_have_no_gradient_and_the_rest_the_right_one(
    is_causal: bool, causal: str
) -> None:
    mask = padding()
    attention = HyperAttention(
        detector="oracle(budget=40)", num_samples=0, min_seq_len=5, causal=causal
    )
    inputs = [x.requires_grad_() for x in tensors(dtype=torch.float64)]
    weight = torch.randn(5, 4, N, 3, dtype=torch.float64)
    out, lse = attention(*inputs, is_causal=is_causal, key_padding_mask=mask, return_lse=True)
    expected = dense_attention(*inputs, is_causal=is_causal, key_padding_mask=mask)
    grads, wanted = (
        torch.autograd.grad((o * weight).sum() + l.masked_fill(l.isinf(), 0).sum(), inputs)
        for o, l in ((out, lse), expected)
    )
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)
    for grad in grads[1:]:
        assert (grad.transpose(1, 2)[~mask] == 0).all()


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("detector", DETECTORS)
def test_under_padding_nothing_later_moves_a_bit_of_an_earlier_real_row(
    detector: str, causal: str
) -> None:
    mask, cut = padding(), 22
    attention = HyperAttention(
        detector=detector, sampler="row_norm", num_samples=4, min_seq_len=3, causal=causal,
        strict_causal=True,
    )  # fmt: skip
    inputs = tensors()
    before = attention(*inputs, is_causal=True, key_padding_mask=mask)
    query, key, value = (x.clone() for x in inputs)
    for x in (query, key, value):
        x[:, :, cut:] *= -4
    after = attention(query, key, value, is_causal=True, key_padding_mask=mask)
    real = mask[:, :cut]
    one, two = (x[:, :, :cut].transpose(1, 2)[real] for x in (before, after))
    assert torch.equal(one, two)
