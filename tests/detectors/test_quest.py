"""Quest: the scores bound the logits, the best blocks are held, none from the future."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors import blocks as blocks_module
from hyperframe.detectors.quest import Quest, block_extremes, logit_bounds
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.testing.strategies import AttentionInputs, attention_inputs
from tests import finding_laws
from tests.finding_laws import SIZES
from tests.finding_laws import random_heads as tensors

SMALL = Quest(block_size=4, num_blocks=2, num_queries=2, tile_size=8)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "max"])


@given(attention_inputs(), st.integers(1, 20), st.floats(-3, 3))
def test_the_bound_is_at_least_every_logit_of_the_block(
    inputs: AttentionInputs, block_size: int, scale: float
) -> None:
    query, key = inputs.query.double(), inputs.key.double()
    bounds = logit_bounds(query, block_extremes(key, block_size), scale=scale)
    logits = scale * query @ inputs.expanded_key().double().mT
    assert bounds.shape[-1] == -(-key.shape[2] // block_size)
    rounding = 1e-12 * (query.norm(dim=-1, keepdim=True) * key.norm(dim=-1).max() * abs(scale) + 1)
    for block in range(bounds.shape[-1]):
        largest = logits[..., block * block_size : (block + 1) * block_size].amax(dim=-1)
        assert (bounds[..., block] >= largest - rounding.squeeze(-1)).all()
    if block_size == 1:
        torch.testing.assert_close(bounds, logits, rtol=1e-9, atol=float(rounding.max()))


def test_bounds_are_the_best_corner_of_the_box_of_a_block() -> None:
    query, key = (x.double() for x in tensors(num_keys=18))
    bounds = logit_bounds(query, block_extremes(key, 4), scale=-0.7)
    assert bounds.dtype == torch.float64
    for head in range(4):
        for block in range(5):
            keys = key[1, head // 2, 4 * block : 4 * block + 4]
            ends = torch.stack([keys.amin(dim=0), keys.amax(dim=0)])
            corners = torch.cartesian_prod(*ends.unbind(dim=1))
            expected = (-0.7 * query[1, head] @ corners.mT).amax(dim=-1)
            torch.testing.assert_close(bounds[1, head, :, block], expected)


def chosen_blocks(
    detector: Quest, query: torch.Tensor, key: torch.Tensor, *, is_causal: bool
) -> torch.Tensor:
    """The dense mask, from the definition: pools, bounds and sorts for each tile."""
    size, width, num_queries, num_keys = (
        detector.tile_size, detector.block_size, query.shape[2], key.shape[2]
    )  # fmt: skip
    extremes = block_extremes(key.double(), width)
    dense = torch.zeros(*query.shape[:3], num_keys, dtype=torch.bool)
    for tile in range(-(-num_queries // size)):
        rows = torch.arange(tile * size, tile * size + size).clamp(max=num_queries - 1)
        pooled = query[:, :, rows].double().unflatten(2, (detector.num_queries, -1)).mean(dim=3)
        bounds = logit_bounds(pooled, extremes, scale=0.5)
        scores = bounds.amax(dim=2) if detector.reduction == "max" else bounds.mean(dim=2)
        start = tile * size + num_keys - num_queries
        total = max(0, start) // width if is_causal else scores.shape[-1]
        best = scores[..., :total].sort(dim=-1, descending=True).indices[..., : detector.num_blocks]
        held = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, best, True)
        held = held.repeat_interleave(width, dim=-1)[..., :num_keys]
        if is_causal:
            held[..., total * width : max(0, start + size)] = True
        dense[:, :, rows] = held.unsqueeze(2)
    return dense.tril(num_keys - num_queries) if is_causal else dense


@REDUCTIONS
@given(
    num_queries=SIZES, num_keys=SIZES, seed=st.integers(0, 999), is_causal=st.booleans(),
    num_blocks=st.integers(1, 5), sizes=st.sampled_from([(4, 8, 2), (6, 4, 4), (16, 9, 3)]),
)  # fmt: skip
def test_the_mask_holds_the_best_blocks_and_the_keys_of_the_tile(
    reduction: str, num_queries: int, num_keys: int, seed: int, is_causal: bool, num_blocks: int,
    sizes: tuple[int, int, int],
) -> None:  # fmt: skip
    block_size, tile_size, pooled = sizes
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = Quest(
        block_size=block_size, num_blocks=num_blocks, num_queries=pooled, reduction=reduction,
        tile_size=tile_size,
    )  # fmt: skip
    mask = detector.find(query, key, is_causal=is_causal, scale=0.5)
    expected = chosen_blocks(detector, query, key, is_causal=is_causal)
    assert torch.equal(mask.to_dense(), expected)


@REDUCTIONS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_block_of_a_planted_key_is_found_and_held_by_every_row(
    is_causal: bool, strict: bool, reduction: str
) -> None:
    query, key = tensors(num_queries=256, num_keys=256)
    query[..., 0] += 4.0
    key[:, :, 53, 0] += 9.0  # one key of the block
    detector = Quest(block_size=16, num_blocks=1, tile_size=32, reduction=reduction)
    find = detector.find_strict if strict else detector.find
    dense = find(query, key, is_causal=is_causal).to_dense()
    assert dense[:, :, 64:, 48:64].all()
    assert is_causal or torch.equal(dense.sum(-1), torch.full((2, 4, 256), 16))


def test_the_maximum_over_the_rows_themselves_finds_what_one_row_looks_at() -> None:
    query, key = torch.zeros(1, 1, 16, 2), torch.zeros(1, 1, 32, 2)
    query[..., 0], query[:, :, 11] = 1.0, torch.tensor([0.0, 9.0])
    key[:, :, 3, 0], key[:, :, 20, 1] = 5.0, 5.0
    find = Quest(block_size=4, num_blocks=1, num_queries=16, reduction="max", tile_size=16).find
    assert find(query, key).to_dense()[0, 0, 0].nonzero().flatten().tolist() == [20, 21, 22, 23]
    mean = Quest(block_size=4, num_blocks=1, num_queries=16, reduction="mean", tile_size=16)
    assert mean.find(query, key).to_dense()[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3]


@REDUCTIONS
@finding_laws.at_any_cut
def test_no_later_key_moves_a_causal_row(
    reduction: str, num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    find = partial(SMALL.replace(reduction=reduction).find, is_causal=True)
    finding_laws.no_later_token_moves_a_row(find, num_queries, num_keys, cut, seed, keys_only=True)


@REDUCTIONS
@finding_laws.at_any_cut
def test_no_later_key_or_query_moves_a_strictly_causal_row(
    reduction: str, num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    find = partial(SMALL.replace(reduction=reduction).find_strict, is_causal=True)
    finding_laws.no_later_token_moves_a_row(find, num_queries, num_keys, cut, seed, keys_only=False)


@pytest.mark.parametrize("num_earlier", [0, 3, 20])
def test_in_a_strict_rectangle_no_later_query_moves_a_row(num_earlier: int) -> None:
    finding_laws.no_later_query_moves_a_row_of_a_strict_rectangle(SMALL, num_earlier)


@given(attention_inputs(), st.booleans(), st.booleans())
def test_any_input_gives_a_mask_and_shared_key_heads_are_as_repeated_ones(
    inputs: AttentionInputs, is_causal: bool, strict: bool
) -> None:
    finding_laws.shared_key_heads_are_as_repeated_ones(
        SMALL, inputs, is_causal=is_causal, strict=strict
    )


@REDUCTIONS
@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_scored_one_by_one_are_the_same(
    is_causal: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = tensors(num_queries=61, num_keys=75)
    detector = SMALL.replace(reduction=reduction)
    whole = detector.find(query, key, is_causal=is_causal).to_dense()
    monkeypatch.setattr(blocks_module, "_CHUNK_BYTES", 1)
    assert torch.equal(whole, detector.find(query, key, is_causal=is_causal).to_dense())


@REDUCTIONS
def test_no_intermediate_grows_with_the_square_of_the_length(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "_CHUNK_BYTES", 1 << 15)
    detector = Quest(block_size=16, num_blocks=2, tile_size=16, reduction=reduction)
    finding_laws.no_intermediate_grows_with_the_square_of_the_length(
        partial(detector.find, is_causal=True)
    )


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_value_is_read(is_causal: bool) -> None:
    """On the meta device there are none: a size that depends on one would raise."""
    query, key = (x.to("meta") for x in tensors(num_queries=50))
    for find in (SMALL.find, SMALL.find_strict):
        assert find(query, key, is_causal=is_causal).device.type == "meta"


# torch's own: its compiler makes an instance of the function to trace it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_finding_compiles_to_one_graph() -> None:
    find = SMALL.replace(reduction="max").find_strict
    finding_laws.finds_in_one_graph(partial(find, is_causal=True))


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("strict", [False, True])
def test_with_all_blocks_attention_is_exact(causal: str, strict: bool) -> None:
    detector = SMALL.replace(num_blocks=20)
    finding_laws.with_every_key_attention_is_exact(detector, causal, strict=strict)


def test_bad_options_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"num_queries=3 does not divide tile_size=64.*divisor"):
        Quest(num_queries=3)
    with pytest.raises(ArgumentError, match=r"quest: reduction='sum'.*'mean', 'max'"):
        Quest(reduction="sum")
    for name in ("block_size", "num_blocks", "num_queries", "tile_size"):
        with pytest.raises(ArgumentError, match=f"quest: {name}=0"):
            Quest(**{name: 0})
        with pytest.raises(ArgumentTypeError, match=f"quest: {name}=2.5"):
            Quest(**{name: 2.5})
