"""Key padding: what is padded is never seen, and the rest is as if it had never been there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create
from hyperframe.errors import ArgumentError, UnsupportedError
from hyperframe.testing import causal_mask, dense_attention, masked_attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
N = 40

DETECTORS = [
    "sort_lsh(block_size=8)",
    "sliding_window(width=9, num_sinks=3)",
    "heavy_columns(num_columns=6, num_queries=5, tile_size=8)",
    "oracle(budget=5)",
    "sliding_window(width=5) | sort_lsh(block_size=8)",
    "vertical_slash(num_columns=6, num_diagonals=4, num_queries=3, num_segments=3, tile_size=4)",
    "antidiagonal(block_size=4, num_blocks=2, stride=2, tile_size=8)",
    "quest(block_size=4, num_blocks=2, num_queries=2, tile_size=8)",
    "pca_tree(leaf_size=4, num_leaves=2, tile_size=8, chunk_size=16)",
    "kmeans(block_size=4, num_blocks=2, num_steps=2, tile_size=8, chunk_size=16)",
    "balanced_lsh(block_size=8, checkpoint=8)",
    "reformer_lsh(block_size=6, num_buckets=8, num_rounds=2)",
    "lsh_topk(num_keys=5, num_buckets=4, num_rounds=2, tile_size=4)",
]


def tensors(
    num_queries: int = N, num_keys: int = N, *, batch: int = 5, dtype: torch.dtype = torch.float32
) -> Tensors:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(batch, 4, num_queries, 4, generator=g, dtype=torch.float64)
    key = torch.randn(batch, 2, num_keys, 4, generator=g, dtype=torch.float64)
    value = torch.randn(batch, 2, num_keys, 3, generator=g, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def padding(num_keys: int = N, *, detector: str = "oracle") -> torch.Tensor:
    """No padding, left, right, holes (or both sides, for positions), and nothing but padding."""
    mask = torch.ones(5, num_keys, dtype=torch.bool)
    mask[1, : num_keys // 4] = False
    mask[2, -num_keys // 3 :] = False
    holes = [] if create(detector).is_positional else [5, 6, 7, 20]
    mask[3, [0, 1, *holes, num_keys - 1]] = False
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
    inputs = tensors(*shape)
    mask = padding(shape[1], detector=options.get("detector", "oracle"))
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
    mask = padding(detector=detector)
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
    mask = padding(detector=detector)
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
@pytest.mark.parametrize("detector", ["sliding_window(width=9, num_sinks=3)", *DETECTORS[2:4]])
def test_real_rows_are_those_of_a_call_without_the_padding(detector: str, causal: str) -> None:
    # without draws that depend on the batch: all queries vote, nothing is sampled
    detector = detector.replace("num_queries=5", "num_queries=40")
    attention = HyperAttention(detector=detector, num_samples=0, min_seq_len=4, causal=causal)
    inputs, mask = tensors(), padding(detector=detector)
    out, lse = attention(*inputs, is_causal=True, key_padding_mask=mask, return_lse=True)
    for item in range(4):
        cut = [x[item : item + 1, :, mask[item]] for x in inputs]
        alone, alone_lse = attention(*cut, is_causal=True, return_lse=True)
        torch.testing.assert_close(out[item : item + 1, :, mask[item]], alone)
        torch.testing.assert_close(lse[item : item + 1, :, mask[item]], alone_lse)


@pytest.mark.parametrize("detector", [DETECTORS[0], DETECTORS[2], DETECTORS[3]])
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
    mask, cut = padding(detector=detector), 22
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


# detectors that go by positions: width or blocks, and the pattern they stand for
POSITIONAL = [
    "sliding_window(width=9, num_sinks=0)",
    "sliding_window(width=6, num_sinks=13)",
    "block_list(blocks=((0,0),(1,0),(2,1),(3,3),(4,4),(5,0),(5,5)), block_size=7)",
    "block_list(blocks=((1,0),(0,2,1),(3,4,2),(5,5)), block_size=7)",
    "sliding_window(width=3, num_sinks=2) | block_list(blocks=((2,1),(4,0),(5,3)), block_size=7)",
    "sliding_window(width=5, num_sinks=1) | oracle(budget=60)",
]
SIDES = {
    "left": (11, 0), "right": (0, 13), "both": (9, 10), "one key": (20, 19), "one left": (1, 0),
    "one right": (0, 1), "two real": (17, 21),
}  # fmt: skip


def side_padding(sides: tuple[int, int], num_keys: int) -> torch.Tensor:
    """The sides of the first item; the second item is whole, the third nothing but padding."""
    mask = torch.ones(3, num_keys, dtype=torch.bool)
    mask[0, : sides[0]] = False
    mask[0, num_keys - sides[1] :] = False
    mask[2] = False
    return mask


def pattern(
    spec: str, num_queries: int, num_keys: int, first_real: int, *, is_causal: bool
) -> torch.Tensor:
    """What a spec holds in a call, position by position: bool `[4, n_q, n_k]`."""
    held = torch.zeros(4, num_queries, num_keys, dtype=torch.bool)
    detector = create(spec)
    for part in getattr(detector, "detectors", (detector,)):
        if part.name == "sliding_window":
            left = part.width - 1 if is_causal else part.width // 2
            for row in range(num_queries):
                own = row + num_keys - num_queries
                held[:, row, max(0, own - left) : max(0, own + part.width - left)] = True
            held[:, :, first_real : first_real + part.num_sinks] = True
        elif part.name == "block_list":
            for block in part.blocks:
                head = slice(block[0], block[0] + 1) if len(block) == 3 else slice(None)
                rows, keys = (slice(x * part.block_size, (x + 1) * part.block_size)
                              for x in block[-2:])  # fmt: skip
                held[head, rows, keys] = True
        else:
            held[:] = True  # an oracle that has room for everything
    return held & causal_mask(num_queries, num_keys) if is_causal else held


@pytest.mark.parametrize("mode", ["non-causal", "single_pass", "recursive"])
@pytest.mark.parametrize("shape", [(N, N), (N - 4, N + 2), (N + 2, N)])
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("detector", POSITIONAL)
def test_all_rows_hold_what_they_held_without_the_padding_but_for_padded_keys(
    detector: str, sides: tuple[int, int], shape: tuple[int, int], mode: str
) -> None:
    query, key, value = tensors(*shape, batch=3, dtype=torch.float64)
    mask, is_causal = side_padding(sides, shape[1]), mode != "non-causal"
    held = torch.stack(
        [pattern(detector, *shape, first, is_causal=is_causal) for first in (sides[0], 0, 0)]
    )
    held = held & mask[:, None, None, :]
    if mode == "recursive":  # where leaves are single keys: each row also holds its own
        position = torch.arange(shape[0])[:, None] + shape[1] - shape[0]
        held = held | ((position == torch.arange(shape[1])) & mask[:, None, None, :])
    expected = masked_attention(query, key, value, held)
    attention = HyperAttention(
        detector=detector, num_samples=0, min_seq_len=0,
        strict_causal=is_causal and "|" in detector,
        causal="single_pass" if mode == "non-causal" else mode,
    )  # fmt: skip
    # what stands in padding does not matter
    key, value = (x.masked_fill(~mask[:, None, :, None], float("nan")) for x in (key, value))
    out, lse = attention(
        query, key, value, is_causal=is_causal, key_padding_mask=mask, return_lse=True
    )
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(lse, expected.lse)


@pytest.mark.parametrize("detector", POSITIONAL[:4])
@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_what_is_appended_and_padded_changes_no_row_before_it(detector: str, causal: str) -> None:
    attention = HyperAttention(detector=detector, num_samples=0, min_seq_len=3, causal=causal)
    inputs = tensors(batch=1)
    alone = attention(*inputs, is_causal=True)
    longer = [torch.cat([x, torch.full_like(x[:, :, :9], float("nan"))], dim=2) for x in inputs]
    mask = torch.arange(N + 9)[None] < N
    out = attention(*longer, is_causal=True, key_padding_mask=mask)
    torch.testing.assert_close(out[:, :, :N], alone)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
def test_window_and_sinks_are_moved_along_by_padding(
    sides: tuple[int, int], is_causal: bool
) -> None:
    attention = HyperAttention(
        detector="sliding_window(width=8, num_sinks=3)", num_samples=0, min_seq_len=0
    )
    inputs = tensors(batch=1, dtype=torch.float64)
    mask = side_padding(sides, N)[:1]
    real = mask[0].nonzero().squeeze(-1)
    out = attention(*inputs, is_causal=is_causal, key_padding_mask=mask)[:, :, real]
    alone = attention(*(x[:, :, real] for x in inputs), is_causal=is_causal)
    torch.testing.assert_close(out, alone)


@pytest.mark.parametrize("mode", ["non-causal", "single_pass", "recursive"])
@pytest.mark.parametrize("detector", [*POSITIONAL, "sort_lsh | sliding_window"])
def test_holes_are_refused_by_name_where_positions_matter(detector: str, mode: str) -> None:
    query, key, value = tensors(batch=1)
    mask = torch.ones(1, N, dtype=torch.bool)
    mask[0, 20] = False
    options: dict[str, Any] = {"is_causal": mode != "non-causal", "key_padding_mask": mask}
    causal = "single_pass" if mode == "non-causal" else mode
    attention = HyperAttention(detector=detector, min_seq_len=0, causal=causal)
    name = create(detector).name
    with pytest.raises(UnsupportedError, match=rf"key_padding_mask.*{name}.*contiguous.*not posit"):
        attention(query, key, value, **options)
    # exact attention asks no detector
    exact = HyperAttention(detector=detector, min_seq_len=1000)(query, key, value, **options)
    assert exact.isfinite().all()


def test_a_block_outside_the_call_is_refused_under_padding_too() -> None:
    attention = HyperAttention(
        detector="block_list(blocks=((0,5),), block_size=8)", num_samples=0, min_seq_len=0
    )
    with pytest.raises(ArgumentError, match="5 key blocks"):
        attention(*tensors(), key_padding_mask=side_padding((0, 10), N)[[0, 0, 0, 0, 0]])


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize(
    "detector",
    [
        "heavy_columns(num_columns=3, num_queries=40, tile_size=4)",
        "sort_lsh(block_size=4)",
        "oracle(budget=3)",
        "heavy_columns(num_columns=3, num_queries=40, tile_size=4) | sliding_window(width=3)",
    ],
)
def test_rows_at_padded_positions_are_strictly_causal_too(detector: str, causal: str) -> None:
    attention = HyperAttention(
        detector=detector, num_samples=0, min_seq_len=2, causal=causal, strict_causal=True
    )
    mask, cut = torch.arange(N)[None] < 25, 33
    query, key, value = tensors(batch=1)
    before = attention(query, key, value, is_causal=True, key_padding_mask=mask)
    query = query.clone()
    query[:, :, cut:] *= -4
    after = attention(query, key, value, is_causal=True, key_padding_mask=mask)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
