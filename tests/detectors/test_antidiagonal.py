"""Antidiagonal: the scores are the definition, the best blocks are held, none from the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hyperframe.attention import HyperAttention
from hyperframe.detectors import blocks as blocks_module
from hyperframe.detectors.antidiagonal import Antidiagonal, antidiagonal_scores
from hyperframe.detectors.blocks import delayed, filled_runs
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import HeavyMask
from hyperframe.testing.strategies import AttentionInputs, attention_inputs

SIZES = st.integers(1, 60)
SMALL = Antidiagonal(block_size=4, num_blocks=2, stride=2, tile_size=8)


def tensors(
    seed: int = 0, *, num_queries: int = 40, num_keys: int = 40, dim: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, dim, generator=g)
    key = torch.randn(2, 2, num_keys, dim, generator=g)
    return query, key


def mean_of_antidiagonals(
    query: torch.Tensor, key: torch.Tensor, stride: int, scale: float
) -> torch.Tensor:
    """Entry by entry, for one head: `[tiles, T, d]` and `[blocks, S, d]`."""
    scores = torch.zeros(len(query), len(key), dtype=torch.float64)
    for t, rows in enumerate(query.double()):
        for b, keys in enumerate(key.double()):
            logits = [
                scale * float(rows[r] @ keys[c])
                for r in range(len(rows))
                for c in range(len(keys))
                if (r + c + 1) % stride == 0
            ]
            scores[t, b] = sum(logits) / len(logits)
    return scores


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_scores_are_means_over_strided_antidiagonals(stride: int) -> None:
    query, key = (x.double() for x in tensors(num_queries=24, num_keys=20))
    tiles, blocks = query.unflatten(2, (3, 8)), key.unflatten(2, (5, 4))
    scores = antidiagonal_scores(tiles, blocks, stride=stride, scale=-0.7)
    assert scores.dtype == torch.float64
    for batch in range(2):
        for head in range(4):
            expected = mean_of_antidiagonals(
                tiles[batch, head], blocks[batch, head // 2], stride, -0.7
            )
            torch.testing.assert_close(scores[batch, head], expected)


def chosen_blocks(
    detector: Antidiagonal, query: torch.Tensor, key: torch.Tensor, *, is_causal: bool
) -> torch.Tensor:
    """The dense mask, from the definition: sorts the scores of each tile."""
    size, width = detector.tile_size, detector.block_size
    num_queries, num_keys = query.shape[2], key.shape[2]
    tiles = filled_runs(query.double(), size, -(-num_queries // size))
    blocks = filled_runs(key.double(), width, -(-num_keys // width))
    scores = antidiagonal_scores(tiles, blocks, stride=detector.stride, scale=0.5)
    dense = torch.zeros(*query.shape[:3], num_keys, dtype=torch.bool)
    for batch, head, tile in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        start = tile * size + num_keys - num_queries
        total = max(0, start) // width if is_causal else blocks.shape[2]
        share = scores[batch, head, tile, :total].softmax(-1).tolist()
        order = sorted(range(total), key=lambda block: -share[block])
        reached = 0.0
        rows = slice(tile * size, tile * size + size)
        for block in order[: detector.num_blocks]:
            if reached < detector.top_p:
                dense[batch, head, rows, block * width : block * width + width] = True
            reached += share[block]
        if is_causal:
            dense[batch, head, rows, total * width : max(0, start + size)] = True
    return dense.tril(num_keys - num_queries) if is_causal else dense


@given(
    num_queries=SIZES, num_keys=SIZES, seed=st.integers(0, 999), is_causal=st.booleans(),
    num_blocks=st.integers(1, 5), top_p=st.sampled_from([0.3, 0.8, 1.0]),
    sizes=st.sampled_from([(4, 8, 2), (6, 4, 2), (16, 8, 4), (3, 9, 3), (5, 5, 1)]),
)  # fmt: skip
def test_the_mask_holds_the_best_blocks_and_the_keys_of_the_tile(
    num_queries: int, num_keys: int, seed: int, is_causal: bool, num_blocks: int, top_p: float,
    sizes: tuple[int, int, int],
) -> None:  # fmt: skip
    block_size, tile_size, stride = sizes
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = Antidiagonal(
        block_size=block_size, num_blocks=num_blocks, stride=stride, top_p=top_p,
        tile_size=tile_size,
    )  # fmt: skip
    mask = detector.find(query, key, is_causal=is_causal, scale=0.5)
    expected = chosen_blocks(detector, query, key, is_causal=is_causal)
    assert torch.equal(mask.to_dense(), expected)


def longest_list(mask: HeavyMask) -> int:
    return max(int(part.key_count.max()) for part in mask.parts())  # type: ignore[attr-defined]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_planted_block_is_found_and_held_by_every_row(is_causal: bool, strict: bool) -> None:
    query, key = tensors(num_queries=256, num_keys=256)
    query[..., 0] += 3.0
    key[:, :, 48:64, 0] += 3.0  # spread over the block, not one key
    detector = Antidiagonal(block_size=16, num_blocks=1, stride=8, tile_size=32)
    find = detector.find_strict if strict else detector.find
    dense = find(query, key, is_causal=is_causal).to_dense()
    assert dense[:, :, 64:, 48:64].all()
    assert is_causal or torch.equal(dense.sum(-1), torch.full((2, 4, 256), 16))


def test_a_share_of_the_mass_takes_fewer_blocks_where_one_has_it_all() -> None:
    query, key = tensors(num_queries=64, num_keys=64)
    query[..., 0] = 9.0
    key[:, 0, :, 0] = 0.0
    key[:, 0, 16:32, 0] = 9.0  # the first key head: one block; the second one: all alike
    key[:, 1, :] = 0.0
    detector = Antidiagonal(block_size=16, num_blocks=4, top_p=0.7, tile_size=64)
    count = detector.find(query, key).to_dense().sum(-1)
    assert (count[:, :2] == 16).all()
    assert (count[:, 2:] == 48).all()


@given(num_queries=SIZES, num_keys=SIZES, cut=SIZES, seed=st.integers(0, 999))
@example(num_queries=60, num_keys=60, cut=31, seed=0)
@example(num_queries=40, num_keys=57, cut=21, seed=0)
@example(num_queries=60, num_keys=41, cut=43, seed=0)
def test_no_later_key_moves_a_causal_row(
    num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector, cut = SMALL.replace(top_p=0.8), min(cut, num_queries)
    before = detector.find(query, key, is_causal=True).to_dense()
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -50
    after = detector.find(query, key, is_causal=True).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@given(num_queries=SIZES, num_keys=SIZES, cut=SIZES, seed=st.integers(0, 999))
@example(num_queries=60, num_keys=60, cut=31, seed=0)
@example(num_queries=53, num_keys=44, cut=41, seed=0)
def test_no_later_key_or_query_moves_a_strictly_causal_row(
    num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    cut = min(cut, num_queries)
    before = SMALL.find_strict(query, key, is_causal=True).to_dense()
    query[:, :, cut:] *= -50
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -50
    after = SMALL.find_strict(query, key, is_causal=True).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@pytest.mark.parametrize("num_earlier", [0, 3, 20])
def test_in_a_strict_rectangle_no_later_query_moves_a_row(num_earlier: int) -> None:
    query, key = tensors(num_queries=30, num_keys=25)
    earlier = tensors(1, num_queries=20)[0][:, :, :num_earlier] if num_earlier else None
    rectangle: Any = {"query_start": 25, "strict": True, "earlier_query": earlier}
    before = SMALL.find_rectangle(query, key, **rectangle).to_dense()
    for cut in (1, 8, 9, 20):
        changed = query.clone()
        changed[:, :, cut:] *= -50
        after = SMALL.find_rectangle(changed, key, **rectangle).to_dense()
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    loose = SMALL.find_rectangle(query, key, query_start=25)
    assert torch.equal(loose.to_dense(), SMALL.find(query, key).to_dense())
    if earlier is not None:
        other = SMALL.find_rectangle(query, key, **{**rectangle, "earlier_query": -earlier})
        assert not torch.equal(before, other.to_dense())


def test_delayed_queries_end_with_the_first_row_of_each_tile() -> None:
    query = torch.arange(10.0).view(1, 1, 10, 1)
    assert delayed(query, None, 3).flatten().tolist() == [0, 0, 0, *range(10)]
    assert delayed(query, -query[:, :, 1:3], 3).flatten().tolist() == [-1, -1, -2, *range(10)]
    assert delayed(query, -query, 3).flatten().tolist() == [-7, -8, -9, *range(10)]
    assert delayed(query, -query, 0) is query


@given(attention_inputs(), st.booleans(), st.booleans())
def test_any_input_gives_a_mask_and_shared_key_heads_are_as_repeated_ones(
    inputs: AttentionInputs, is_causal: bool, strict: bool
) -> None:
    query, key, _ = inputs
    find = SMALL.find_strict if strict else SMALL.find
    mask = find(query, key, is_causal=is_causal).validate()
    longest = min(SMALL.num_blocks * SMALL.block_size, key.shape[2])
    assert longest_list(mask) <= max(longest, SMALL.tile_size + SMALL.block_size - 1)
    again = find(query, inputs.expanded_key(), is_causal=is_causal)
    if inputs.structure == "plain":
        assert torch.equal(mask.to_dense(), again.to_dense())


@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_scored_one_by_one_are_the_same(
    is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = tensors(num_queries=61, num_keys=75)
    whole = SMALL.find(query, key, is_causal=is_causal).to_dense()
    monkeypatch.setattr(blocks_module, "_CHUNK_BYTES", 1)
    assert torch.equal(whole, SMALL.find(query, key, is_causal=is_causal).to_dense())


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_no_intermediate_grows_with_the_square_of_the_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks_module, "_CHUNK_BYTES", 1 << 15)
    largest = []
    for n in (1024, 2048):
        query, key = torch.zeros(1, 2, n, 8), torch.zeros(1, 2, n, 8)
        with Largest() as record:
            Antidiagonal(block_size=16, num_blocks=2, tile_size=16).find(query, key, is_causal=True)
        largest.append(record.numel)
        assert record.numel <= 2 * n * 32
    assert largest[1] <= 2.1 * largest[0]


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_value_is_read(is_causal: bool) -> None:
    """On the meta device there are none: a size that depends on one would raise."""
    query, key = (x.to("meta") for x in tensors(num_queries=50))
    detector = SMALL.replace(top_p=0.5)
    for find in (detector.find, detector.find_strict):
        assert find(query, key, is_causal=is_causal).device.type == "meta"


# torch's own: its compiler makes an instance of the function to trace it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_finding_compiles_to_one_graph() -> None:
    detector = SMALL.replace(top_p=0.8)

    def find(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
        mask = detector.find(query, key, is_causal=True)
        return [part.key_index for part in mask.parts()]  # type: ignore[attr-defined]

    torch._dynamo.reset()
    compiled = torch.compile(find, fullgraph=True, backend="aot_eager")
    inputs = tensors(num_keys=53)
    torch.testing.assert_close(compiled(*inputs), find(*inputs))


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("strict", [False, True])
def test_with_all_blocks_attention_is_exact(causal: str, strict: bool) -> None:
    query, key = tensors(num_queries=45, num_keys=45)
    detector = SMALL.replace(num_blocks=20)
    attention = HyperAttention(
        detector=detector, num_samples=0, min_seq_len=8, causal=causal, strict_causal=strict
    )
    out = attention(query, key, key, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, key, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_bad_options_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"stride=3 does not divide block_size=16.*divisor"):
        Antidiagonal(stride=3)
    with pytest.raises(ArgumentError, match=r"stride=16 does not divide tile_size=24"):
        Antidiagonal(stride=16, tile_size=24)
    with pytest.raises(ArgumentError, match=r"top_p=0.0 is outside"):
        Antidiagonal(top_p=0.0)
    for name in ("block_size", "num_blocks", "stride", "tile_size"):
        with pytest.raises(ArgumentError, match=f"antidiagonal: {name}=0"):
            Antidiagonal(**{name: 0})
        with pytest.raises(ArgumentTypeError, match=f"antidiagonal: {name}=2.5"):
            Antidiagonal(**{name: 2.5})
