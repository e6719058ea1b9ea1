"""HyperAttention: exact where all is held, isolated, causal, reproducible, differentiable."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hyperframe.attention import HyperAttention, hyper_attention
from hyperframe.detectors import create
from hyperframe.errors import ArgumentError, BackendUnavailableError
from hyperframe.pipeline import BREAK_EVEN
from hyperframe.testing import dense_attention, masked_attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# small versions of every detector
DETECTORS = {
    "sort_lsh": "sort_lsh(block_size=16)",
    "sort_lsh rounds": "sort_lsh(block_size=8, num_rounds=2, centre_keys=True)",
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
    "union": "sliding_window(width=9) | heavy_columns(num_columns=9, num_queries=5, tile_size=12)",
    "union with order": "sort_lsh(block_size=16) | sliding_window(width=5) | oracle(budget=3)",
}
# the same detectors with room for everything
WHOLE = {
    "sort_lsh": "sort_lsh(block_size=60)",
    "sliding_window": "sliding_window(width=130)",
    "heavy_columns": "heavy_columns(num_columns=600, num_queries=5, tile_size=16)",
    "oracle": "oracle(budget=60)",
    "block_list": "block_list(blocks=((0,0),), block_size=60)",
    "vertical_slash": "vertical_slash(num_columns=240, num_segments=3, tile_size=8)",
    "antidiagonal": "antidiagonal(block_size=4, num_blocks=15, stride=2, tile_size=8)",
    "quest": "quest(block_size=4, num_blocks=15, num_queries=2, tile_size=8)",
    "pca_tree": "pca_tree(leaf_size=4, num_leaves=16, tile_size=8, chunk_size=16)",
    "kmeans": "kmeans(block_size=4, num_blocks=16, num_steps=2, tile_size=8, chunk_size=16)",
    "balanced_lsh": "balanced_lsh(block_size=60)",
    "reformer_lsh": "reformer_lsh(block_size=60)",
    "union": "sliding_window(width=130) | sort_lsh(block_size=8)",
}


def tensors(
    seed: int = 0, *, batch: int = 2, heads: int = 4, key_heads: int = 2, num_queries: int = 70,
    num_keys: int = 70, dim: int = 8, value_dim: int = 8, dtype: torch.dtype = torch.float32,
) -> Tensors:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, num_queries, dim, generator=g, dtype=torch.float64)
    key = torch.randn(batch, key_heads, num_keys, dim, generator=g, dtype=torch.float64)
    value = torch.randn(batch, key_heads, num_keys, value_dim, generator=g, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_exact(
    attention: HyperAttention, inputs: Tensors, *, is_causal: bool = False, **options: Any
) -> None:
    out, lse = attention(*inputs, is_causal=is_causal, return_lse=True, **options)
    expected = dense_attention(*inputs, is_causal=is_causal, **options)
    torch.testing.assert_close(out.double(), expected.out, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-5, atol=2e-6)
    assert out.dtype == inputs[0].dtype
    alone = attention(*inputs, is_causal=is_causal, **options)
    torch.testing.assert_close(alone, out, rtol=1e-5, atol=2e-6)


# ------------------------------------------------------------------------------ exactness

_SHAPES = {
    "square": {},
    "fewer queries": {"num_queries": 33},
    "more queries": {"num_keys": 41},
    "d_v": {"value_dim": 3},
    "one head": {"heads": 1, "key_heads": 1, "batch": 1},
    "no group": {"heads": 3, "key_heads": 3},
}


_EXACT_CASES = [
    (name, mode, shape)
    for name in WHOLE
    for mode in ("full", "single_pass", "recursive", "strict")
    for shape in _SHAPES
    # no query comes before the rows: refused, see the detectors' tests
    if (mode, shape) != ("strict", "fewer queries") or name not in ("heavy_columns", "balanced_lsh")
]


@pytest.mark.parametrize("name, mode, shape", _EXACT_CASES)
def test_with_room_for_everything_every_detector_is_exact(name: str, mode: str, shape: str) -> None:
    sizes = {"num_queries": 60, "num_keys": 60} | _SHAPES[shape]
    attention = HyperAttention(
        detector=WHOLE[name], num_samples=0, min_seq_len=0,
        causal="recursive" if mode == "strict" else mode if mode != "full" else "single_pass",
        strict_causal=mode == "strict",
    )  # fmt: skip
    assert_exact(attention, tensors(**sizes), is_causal=mode != "full")


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sampler", ["uniform", "row_norm"])
@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_as_many_samples_as_keys_take_every_key_once(
    detector: str, sampler: str, is_causal: bool, causal: str
) -> None:
    if not is_causal and causal == "recursive":
        return  # the same as single_pass
    attention = HyperAttention(
        detector=detector, sampler=sampler, num_samples=70, min_seq_len=0, causal=causal
    )
    assert_exact(attention, tensors(), is_causal=is_causal)
    assert_exact(attention, tensors(num_queries=65), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_without_samples_it_is_attention_by_the_mask(detector: str, is_causal: bool) -> None:
    query, key, value = tensors()
    mask = create(detector).find(query, key, is_causal=is_causal, generator=generator(6))
    expected = masked_attention(query, key, value, mask.to_dense())
    out, lse = hyper_attention(
        query, key, value, detector=detector, num_samples=0, min_seq_len=0, is_causal=is_causal,
        return_lse=True, generator=generator(6),
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected.out, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("scale", [0.0, 0.3, -2.0])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("min_seq_len", [0, 1000])
def test_any_finite_scale_is_the_factor_of_the_logits(
    scale: float, is_causal: bool, min_seq_len: int
) -> None:
    for causal in ("single_pass", "recursive"):
        attention = HyperAttention(
            detector="oracle(budget=70)", num_samples=0, min_seq_len=min_seq_len, causal=causal
        )
        for shape in ({}, {"num_queries": 40}, {"value_dim": 3}):
            assert_exact(attention, tensors(**shape), is_causal=is_causal, scale=scale)


def test_scale_none_is_one_over_the_root_of_the_head_dimension() -> None:
    inputs = tensors(dim=5)
    for min_seq_len in (0, 1000):
        attention = HyperAttention(detector="oracle(budget=9)", min_seq_len=min_seq_len)
        explicit = attention(*inputs, scale=1 / math.sqrt(5))
        assert torch.equal(attention(*inputs), explicit)


def test_up_to_min_seq_len_keys_attention_is_exact_and_above_it_is_not() -> None:
    attention = HyperAttention(detector="oracle(budget=1)", num_samples=0, min_seq_len=30)
    for num_queries in (20, 30, 50):
        for is_causal in (False, True):
            inputs = tensors(num_queries=num_queries, num_keys=30)
            assert_exact(attention, inputs, is_causal=is_causal)
    above = tensors(num_queries=20, num_keys=31)
    difference = attention(*above).double() - dense_attention(*above).out
    assert difference.abs().max() > 0.1
    # the default is far above this length
    assert HyperAttention().min_seq_len is None
    assert all(limit > 70 for limit in BREAK_EVEN.values())
    assert_exact(HyperAttention(detector="oracle(budget=1)", num_samples=0), tensors())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_a_single_query_is_exact(detector: str, is_causal: bool) -> None:
    if "block_list" in detector:
        detector = "block_list(blocks=((0,2),), block_size=16)"
    for causal in ("single_pass", "recursive"):
        attention = HyperAttention(detector=detector, num_samples=3, min_seq_len=0, causal=causal)
        assert_exact(attention, tensors(num_queries=1), is_causal=is_causal)


def test_rows_before_every_key_are_0_and_minus_infinity() -> None:
    inputs = tensors(num_queries=50, num_keys=20)
    for causal in ("single_pass", "recursive"):
        for estimator in ("uniform", "exact"):
            for min_seq_len in (0, 1000):
                out, lse = hyper_attention(
                    *inputs, detector="oracle(budget=4)", num_samples=5, min_seq_len=min_seq_len,
                    causal=causal, estimator=estimator, is_causal=True, return_lse=True,
                )  # fmt: skip
                assert (out[:, :, :30] == 0).all()
                assert (lse[:, :, :30] == float("-inf")).all()
                assert lse[:, :, 30:].isfinite().all()
                assert (out[:, :, 30:] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_keeps_the_dtype_and_the_normaliser_is_float32_at_least(
    dtype: torch.dtype,
) -> None:
    inputs = tensors(dtype=dtype)
    for is_causal in (False, True):
        for min_seq_len in (0, 1000):
            for causal in ("single_pass", "recursive"):
                out, lse = hyper_attention(
                    *inputs, detector="sliding_window(width=9)", num_samples=5, causal=causal,
                    is_causal=is_causal, min_seq_len=min_seq_len, return_lse=True,
                )  # fmt: skip
                assert out.dtype == dtype
                assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_low_precision_is_at_most_twice_as_far_off_as_torch_is(
    dtype: torch.dtype, causal: str
) -> None:
    query, key, value = tensors(dtype=dtype)
    detector = create("sliding_window(width=20, num_sinks=4)")
    mask = detector.find(query, key, is_causal=True).to_dense()
    leaf = 9  # 70 in eight leaves; everything in a leaf is exact
    if causal == "recursive":
        position = torch.arange(70)
        mask = mask | (position[:, None] // leaf == position // leaf).tril()
    oracle = masked_attention(query, key, value, mask).out
    torch_out = F.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask
    )
    out = hyper_attention(
        query, key, value, detector=detector, num_samples=0, causal=causal, is_causal=True,
        min_seq_len=leaf if causal == "recursive" else 0,
    )  # fmt: skip
    ours, theirs = ((x.double() - oracle).norm() for x in (out, torch_out))
    assert ours <= 2 * theirs


def test_strided_inputs_are_read_as_they_are() -> None:
    query, key, value = tensors()
    wide = torch.cat([query, query + 1], dim=-1)
    strided = (
        wide[..., :8],
        key.transpose(1, 2).contiguous().transpose(1, 2),
        value.transpose(-1, -2).contiguous().transpose(-1, -2),
    )
    assert not any(x.is_contiguous() for x in strided)
    for detector in DETECTORS.values():
        for is_causal in (False, True):
            attention = HyperAttention(detector=detector, num_samples=9, min_seq_len=0)
            one = attention(query, key, value, is_causal=is_causal)
            two = attention(*strided, is_causal=is_causal)
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- symmetry


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_no_head_or_batch_item_reads_another(detector: str, is_causal: bool) -> None:
    for causal in ("single_pass", "recursive"):
        attention = HyperAttention(
            detector=detector, sampler="row_norm", num_samples=9, min_seq_len=10, causal=causal
        )
        query, key, value = tensors()
        before = attention(query, key, value, is_causal=is_causal)
        query, key, value = query.clone(), key.clone(), value.clone()
        # key head 1 of item 0, with its query heads 2 and 3; and query head 0 of item 1
        key[0, 1] *= -2
        value[0, 1] += 3
        query[0, 2:] *= -1
        query[1, 0] += 1
        after = attention(query, key, value, is_causal=is_causal)
        # one tree of keys serves the query heads of a group: head 1 goes by queries of head 0, too
        others = [2, 3] if "pca_tree" in detector or "kmeans" in detector else [1, 2, 3]
        for item, heads in ((0, [0, 1]), (1, others)):
            torch.testing.assert_close(after[item, heads], before[item, heads], rtol=0, atol=1e-6)
        for item, heads in ((0, [2, 3]), (1, [0])):
            assert (after[item, heads] - before[item, heads]).abs().amax((-1, -2)).min() > 1e-2


def test_heads_with_the_same_content_draw_different_samples() -> None:
    query, key, value = (x[:1, :1].expand(2, 2, -1, -1) for x in tensors())
    for is_causal in (False, True):
        out = hyper_attention(
            query, key, value, detector="sliding_window(width=2)", num_samples=5, min_seq_len=0,
            is_causal=is_causal,
        )  # fmt: skip
        heads = out.flatten(0, 1)
        for i in range(4):
            for j in range(i):
                assert not torch.equal(heads[i], heads[j])


@pytest.mark.parametrize("detector", ["oracle(budget=7)", "heavy_columns(num_columns=9)"])
def test_the_order_of_keys_with_their_values_does_not_matter(detector: str) -> None:
    query, key, value = tensors()
    order = torch.randperm(70, generator=generator())
    attention = HyperAttention(detector=detector, num_samples=0, min_seq_len=0)
    one = attention(query, key, value, return_lse=True)
    two = attention(query, key[:, :, order], value[:, :, order], return_lse=True)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_the_order_of_queries_does_not_matter_to_an_oracle() -> None:
    query, key, value = tensors()
    order = torch.randperm(70, generator=generator())
    attention = HyperAttention(detector="oracle(budget=7)", num_samples=9, min_seq_len=0)
    out = attention(query, key, value)
    shuffled = attention(query[:, :, order], key, value)
    torch.testing.assert_close(shuffled, out[:, :, order], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_a_shift_of_all_keys_does_not_change_exact_attention(name: str) -> None:
    query, key, value = tensors(num_queries=60, num_keys=60, dtype=torch.float64)
    shift = torch.randn(8, generator=generator(), dtype=torch.float64)
    attention = HyperAttention(detector=WHOLE[name], num_samples=0, min_seq_len=0)
    one, lse = attention(query, key, value, return_lse=True)
    two, moved = attention(query, key + shift, value, return_lse=True)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(moved, lse + query @ shift / math.sqrt(8))


# ------------------------------------------------------------------------------ causality


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("sampler", ["uniform", "row_norm"])
@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_nothing_later_moves_a_bit_of_an_earlier_row(
    detector: str, causal: str, sampler: str, strict: bool
) -> None:
    for estimator in ("uniform", "exact"):
        attention = HyperAttention(
            detector=detector, sampler=sampler, estimator=estimator, num_samples=6, causal=causal,
            strict_causal=strict, min_seq_len=0 if causal == "single_pass" else 9,
        )  # fmt: skip
        for num_queries, num_keys in ((70, 70), (61, 80), (80, 61)):
            if (
                strict
                and num_queries < num_keys
                and (
                    "heavy_columns" in detector
                    or ("balanced_lsh" in detector and causal == "recursive")
                )
            ):
                continue  # refused: no query comes before the rows
            offset = num_keys - num_queries
            inputs = tensors(num_queries=num_queries, num_keys=num_keys)
            before = attention(*inputs, is_causal=True, return_lse=True)
            for cut in (20, 37, 58):
                query, key, value = (x.clone() for x in inputs)
                key[:, :, cut + offset :] *= -3
                value[:, :, cut + offset :] *= torch.arange(num_keys - cut - offset)[:, None] + 3.0
                if strict:
                    query[:, :, cut:] *= -2
                after = attention(query, key, value, is_causal=True, return_lse=True)
                for mine, its in zip(before, after, strict=True):
                    assert torch.equal(mine[:, :, :cut], its[:, :, :cut])
                if cut == 20:  # later rows do see the change
                    assert not torch.equal(before[0][:, :, cut:], after[0][:, :, cut:])


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_without_strictness_later_queries_may_help_to_choose(causal: str) -> None:
    # what strict_causal=True is for; if this fails the two senses have become one
    attention = HyperAttention(
        detector=DETECTORS["heavy_columns"], num_samples=0, causal=causal, min_seq_len=4
    )
    query, key, value = tensors()
    before = attention(query, key, value, is_causal=True)
    later = query.clone()
    later[:, :, 60:] = 20 * later[:, :, 60:].flip(-1)
    after = attention(later, key, value, is_causal=True)
    assert not torch.equal(before[:, :, :60], after[:, :, :60])


# ------------------------------------------------------------------------------- the seed


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("sampler", ["uniform", "row_norm"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    causal: str, sampler: str
) -> None:
    inputs = tensors()
    for is_causal in (False, True):

        def run(seed: int, is_causal: bool = is_causal) -> torch.Tensor:
            attention = HyperAttention(
                detector=DETECTORS["sort_lsh"], sampler=sampler, num_samples=6, min_seq_len=8,
                causal=causal, seed=seed,
            )  # fmt: skip
            first = attention(*inputs, is_causal=is_causal)
            torch.manual_seed(seed + 100)  # of no consequence
            assert torch.equal(attention(*inputs, is_causal=is_causal), first)
            return first

        assert not torch.equal(run(0), run(1))
        assert torch.equal(run(-7), run(-7))


def test_a_generator_replaces_the_seed_and_moves_on() -> None:
    inputs = tensors()
    attention = HyperAttention(detector=DETECTORS["sort_lsh"], num_samples=6, min_seq_len=0)
    g = generator(5)
    first, second = (attention(*inputs, generator=g) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(attention(*inputs, generator=generator(5)), first)
    other = HyperAttention(detector=DETECTORS["sort_lsh"], num_samples=6, min_seq_len=0, seed=9)
    assert torch.equal(other(*inputs, generator=generator(5)), first)


def test_seed_none_follows_torchs_global_generator() -> None:
    inputs = tensors()
    attention = HyperAttention(
        detector=DETECTORS["sort_lsh"], num_samples=6, min_seq_len=0, seed=None
    )
    torch.manual_seed(3)
    first, second = (attention(*inputs) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(attention(*inputs), first)
    assert torch.equal(attention(*inputs), second)


def test_a_fixed_seed_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    hyper_attention(*tensors(), detector=DETECTORS["sort_lsh"], min_seq_len=0, is_causal=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_has_the_same_gradients(seed: int | None, use_reentrant: bool) -> None:
    attention = HyperAttention(
        detector=DETECTORS["sort_lsh"], num_samples=6, min_seq_len=0, seed=seed
    )

    def gradients(*, recompute: bool) -> list[torch.Tensor]:
        inputs = [x.requires_grad_() for x in tensors()]
        torch.manual_seed(8)
        if recompute:
            out = checkpoint(lambda *x: attention(*x), *inputs, use_reentrant=use_reentrant)
        else:
            out = attention(*inputs)
        torch.rand(3)  # the global generator has moved on when the backward begins
        out.square().sum().backward()
        return [x.grad for x in inputs if x.grad is not None]

    plain, again = gradients(recompute=False), gradients(recompute=True)
    assert len(plain) == len(again) == 3
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------ gradients


def _loss(attention: HyperAttention, inputs: Any, *, is_causal: bool, use_lse: bool) -> Any:
    out, lse = attention(*inputs, is_causal=is_causal, return_lse=True)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * weight).sum()
    if use_lse:
        loss = loss + (lse.masked_fill(lse.isinf(), 0) * weight[..., 0]).sum()
    return loss


@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize("mode", ["full", "single_pass", "recursive"])
@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_the_torch_backend_has_the_output_and_the_gradient_of_the_reference(
    detector: str, mode: str, use_lse: bool
) -> None:
    for shape in ({}, {"num_queries": 61, "value_dim": 3}):
        results = []
        for backend in ("reference", "torch"):
            inputs = [x.requires_grad_() for x in tensors(dtype=torch.float64, batch=1, **shape)]
            attention = HyperAttention(
                detector=detector, num_samples=6, min_seq_len=8, backend=backend,
                causal="single_pass" if mode == "full" else mode,
            )  # fmt: skip
            loss = _loss(attention, inputs, is_causal=mode != "full", use_lse=use_lse)
            results.append([loss, *torch.autograd.grad(loss, inputs)])
        for reference, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("estimator", ["uniform", "exact"])
@pytest.mark.parametrize("mode", ["full", "single_pass", "recursive"])
def test_the_gradient_is_that_of_the_forward_with_its_choices_held(
    mode: str, estimator: str
) -> None:
    # positions and a fixed seed: nothing chosen depends on the inputs, so finite differences apply
    attention = HyperAttention(
        detector="sliding_window(width=3, num_sinks=1)", estimator=estimator, num_samples=4,
        min_seq_len=3, causal="single_pass" if mode == "full" else mode,
    )  # fmt: skip
    for shape in ((9, 9), (7, 9), (9, 7)):
        inputs = tensors(
            dtype=torch.float64, batch=1, heads=2, key_heads=1, num_queries=shape[0],
            num_keys=shape[1], dim=3, value_dim=2,
        )  # fmt: skip

        def f(*x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = attention(*x, is_causal=mode != "full", return_lse=True)
            return out, lse.masked_fill(lse.isinf(), 0)

        assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in inputs], fast_mode=True)
        assert torch.autograd.gradcheck(
            lambda *x: attention(*x, is_causal=mode != "full"),
            [x.requires_grad_() for x in inputs],
            fast_mode=True,
        )


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_exact_path_has_the_exact_gradient_through_output_and_normaliser(
    is_causal: bool,
) -> None:
    for shape in ({}, {"num_queries": 40}, {"num_keys": 40}, {"value_dim": 3}):
        inputs = [x.requires_grad_() for x in tensors(dtype=torch.float64, batch=1, **shape)]
        attention = HyperAttention(min_seq_len=1000)
        loss = _loss(attention, inputs, is_causal=is_causal, use_lse=True)

        def oracle(*x: torch.Tensor, is_causal: bool = False, return_lse: bool = True) -> Any:
            return dense_attention(*x, is_causal=is_causal)

        expected = _loss(oracle, inputs, is_causal=is_causal, use_lse=True)  # type: ignore[arg-type]
        for mine, its in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(mine, its)


# ------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("detector", DETECTORS.values(), ids=DETECTORS)
def test_auto_is_the_torch_backend_here(detector: str) -> None:
    inputs = tensors()
    outs = [
        hyper_attention(*inputs, detector=detector, min_seq_len=0, num_samples=5, backend=backend)
        for backend in ("auto", "torch")
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("backend", ["triton", "numba"])
@pytest.mark.parametrize("min_seq_len", [0, 1000])
def test_a_backend_that_cannot_run_is_refused_also_where_it_would_not_be_needed(
    backend: str, min_seq_len: int
) -> None:
    from hyperframe.kernels import available_backends

    if backend in available_backends():
        pytest.skip("this version has it")
    with pytest.raises(BackendUnavailableError, match=f"{backend}.*torch"):
        hyper_attention(*tensors(), backend=backend, min_seq_len=min_seq_len)


def test_an_unknown_backend_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ArgumentError, match=r"backend='trition'.*'triton'.*Did you mean"):
        HyperAttention(backend="trition")


# ---------------------------------------------------------------------------- the surface


def test_the_function_is_the_object_called_once() -> None:
    inputs = tensors()
    options: dict[str, Any] = {"detector": "oracle(budget=5)", "num_samples": 7, "min_seq_len": 0}
    call: dict[str, Any] = {"is_causal": True, "scale": 0.4, "return_lse": True}
    one = hyper_attention(*inputs, **options, **call, generator=generator(2))
    two = HyperAttention(**options)(*inputs, **call, generator=generator(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_components_may_be_names_specs_or_instances() -> None:
    by_spec = HyperAttention(detector="oracle(budget=5)", sampler="row_norm", estimator="exact")
    instance = HyperAttention(
        detector=create("oracle", budget=5), sampler=by_spec.sampler, estimator=by_spec.estimator
    )
    assert by_spec == instance
    assert hash(by_spec) == hash(instance)


def test_inputs_are_left_as_they_were() -> None:
    inputs = tensors()
    copies = [x.clone() for x in inputs]
    for detector in DETECTORS.values():
        for causal in ("single_pass", "recursive"):
            hyper_attention(
                *inputs, detector=detector, causal=causal, min_seq_len=0, num_samples=4,
                is_causal=True,
            )  # fmt: skip
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_shortest_sequences_work(n: int) -> None:
    for detector in ("sort_lsh", "sliding_window", "heavy_columns", "oracle"):
        for causal in ("single_pass", "recursive"):
            attention = HyperAttention(detector=detector, min_seq_len=0, causal=causal)
            # default sizes are all larger than n, so that everything is held or sampled whole
            for is_causal in (False, True):
                assert_exact(attention, tensors(num_queries=n, num_keys=n), is_causal=is_causal)
                assert_exact(attention, tensors(num_queries=2, num_keys=n), is_causal=is_causal)
