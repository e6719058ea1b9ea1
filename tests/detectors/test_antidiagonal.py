"""Antidiagonal: the scores are the definition, the best blocks are held, none from the future."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors import blocks as blocks_module
from hyperframe.detectors.antidiagonal import Antidiagonal, antidiagonal_scores
from hyperframe.detectors.blocks import delayed, filled_runs
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import HeavyMask
from hyperframe.testing.strategies import AttentionInputs, attention_inputs
from tests import finding_laws
from tests.finding_laws import SIZES
from tests.finding_laws import random_heads as tensors

SMALL = Antidiagonal(block_size=4, num_blocks=2, stride=2, tile_size=8)


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


@finding_laws.at_any_cut
def test_no_later_key_moves_a_causal_row(
    num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    find = partial(SMALL.replace(top_p=0.8).find, is_causal=True)
    finding_laws.no_later_token_moves_a_row(find, num_queries, num_keys, cut, seed, keys_only=True)


@finding_laws.at_any_cut
def test_no_later_key_or_query_moves_a_strictly_causal_row(
    num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    find = partial(SMALL.find_strict, is_causal=True)
    finding_laws.no_later_token_moves_a_row(find, num_queries, num_keys, cut, seed, keys_only=False)


@pytest.mark.parametrize("num_earlier", [0, 3, 20])
def test_in_a_strict_rectangle_no_later_query_moves_a_row(num_earlier: int) -> None:
    finding_laws.no_later_query_moves_a_row_of_a_strict_rectangle(SMALL, num_earlier)


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
    mask = finding_laws.shared_key_heads_are_as_repeated_ones(
        SMALL, inputs, is_causal=is_causal, strict=strict
    )
    longest = min(SMALL.num_blocks * SMALL.block_size, inputs.key.shape[2])
    assert longest_list(mask) <= max(longest, SMALL.tile_size + SMALL.block_size - 1)


@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_scored_one_by_one_are_the_same(
    is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = tensors(num_queries=61, num_keys=75)
    whole = SMALL.find(query, key, is_causal=is_causal).to_dense()
    monkeypatch.setattr(blocks_module, "_CHUNK_BYTES", 1)
    assert torch.equal(whole, SMALL.find(query, key, is_causal=is_causal).to_dense())


def test_no_intermediate_grows_with_the_square_of_the_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks_module, "_CHUNK_BYTES", 1 << 15)
    detector = Antidiagonal(block_size=16, num_blocks=2, tile_size=16)
    finding_laws.no_intermediate_grows_with_the_square_of_the_length(
        partial(detector.find, is_causal=True)
    )


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
    finding_laws.finds_in_one_graph(partial(SMALL.replace(top_p=0.8).find, is_causal=True))


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("strict", [False, True])
def test_with_all_blocks_attention_is_exact(causal: str, strict: bool) -> None:
    detector = SMALL.replace(num_blocks=20)
    finding_laws.with_every_key_attention_is_exact(detector, causal, strict=strict)


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
