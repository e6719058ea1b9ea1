"""Detectors made of scores: the best blocks are held, and nothing comes from the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors.simple import from_scores
from hyperframe.errors import ArgumentError, ArgumentTypeError

SIZES = st.integers(1, 60)


@from_scores
def mean_scores(tiles: Any, keys: Any, *, scale: float, sharpness: float = 1.0) -> Any:
    """Blocks whose mean key is near the mean query."""
    return sharpness * scale * tiles.mean(dim=3) @ keys.mean(dim=3).mT


@from_scores
def all_logits(tiles: Any, keys: Any, *, scale: float, block_size: int = 1) -> Any:
    """Keys with most mass of the rows of the tile."""
    assert block_size == keys.shape[3] == 1
    return scale * tiles @ keys.flatten(2, 3).mT.unsqueeze(2)


MADE = {
    "mean": mean_scores(tile_size=8, block_size=4, num_keys=8),
    "logits": all_logits(tile_size=8, num_keys=5),
}
FORMS = pytest.mark.parametrize("form", MADE)


def tensors(seed: int, num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, 4, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, 4, generator=g, dtype=torch.float64)
    return query, key


def by_definition(
    form: str, query: torch.Tensor, key: torch.Tensor, *, is_causal: bool, strict: bool
) -> torch.Tensor:
    """The dense mask, tile by tile and head by head."""
    detector = MADE[form]
    size, width, num_queries, num_keys = (
        detector.tile_size, detector.block_size, query.shape[2], key.shape[2]
    )  # fmt: skip
    key = key.repeat_interleave(2, dim=1)
    dense = torch.zeros(*query.shape[:3], num_keys, dtype=torch.bool)
    for first in range(0, num_queries, size):
        rows = torch.arange(first, min(first + size, num_queries))
        voters = torch.arange(first, first + size).clamp(max=num_queries - 1)
        if strict:
            voters = torch.arange(first - size + 1, first + 1).clamp(min=0)
        start = max(0, first + num_keys - num_queries)
        total = start // width if is_causal else -(-num_keys // width)
        stop = total * width if is_causal else num_keys
        for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
            if total:
                chosen = query[b, h, voters]
                padding = key[b, h, -1:].expand(total * width - stop, -1)
                keys = torch.cat([key[b, h, :stop], padding]).view(total, width, -1)
                if form == "mean":
                    score = 0.5 * chosen.mean(0) @ keys.mean(1).T
                else:
                    score = torch.softmax(0.5 * chosen @ keys[:, 0].T, dim=-1).sum(0)
                count = min(max(1, int(detector.num_keys) // width), total)
                for block in score.topk(count).indices.tolist():
                    dense[b, h, rows, block * width : (block + 1) * width] = True
            if is_causal:
                dense[b, h, rows, total * width : max(0, first + size + num_keys - num_queries)] = (
                    True
                )
    return dense.tril(num_keys - num_queries) if is_causal else dense


@FORMS
@given(
    n_q=SIZES, n_k=SIZES, seed=st.integers(0, 999), is_causal=st.booleans(), strict=st.booleans()
)
def test_the_mask_holds_the_best_blocks_of_every_tile(
    form: str, n_q: int, n_k: int, seed: int, is_causal: bool, strict: bool
) -> None:
    query, key = tensors(seed, n_q, n_k)
    find = MADE[form].find_strict if strict else MADE[form].find
    mask = find(query, key, is_causal=is_causal, scale=0.5)
    expected = by_definition(form, query, key, is_causal=is_causal, strict=strict)
    assert torch.equal(mask.to_dense(), expected)


@FORMS
@pytest.mark.parametrize("strict", [False, True])
def test_no_later_key_and_in_the_strict_form_no_later_query_moves_a_choice(
    form: str, strict: bool
) -> None:
    query, key = tensors(0, 50, 50)
    find = MADE[form].find_strict if strict else MADE[form].find
    whole = find(query, key, is_causal=True).to_dense()
    for cut in (7, 16, 33, 48):
        other_query, other_key = query.clone(), key.clone()
        other_key[:, :, cut:] = 99.0
        if strict:
            other_query[:, :, cut:] = -99.0
        changed = find(other_query, other_key, is_causal=True).to_dense()
        assert torch.equal(changed[:, :, :cut], whole[:, :, :cut])


def test_a_budget_is_shared_by_blocks_and_fractions_count_all_keys() -> None:
    query, key = tensors(0, 64, 64)
    for num_keys, held in ((8, 8), (2, 2), (10, 8), (0.5, 32), (1.0, 64), (500, 64)):
        detector = MADE["mean"].replace(num_keys=num_keys)
        assert detector.find(query, key).to_dense().sum(-1).unique().tolist() == [held]
    assert MADE["mean"].with_budget(24).num_keys == 24


def test_scores_are_made_in_float32_and_outside_of_autocast() -> None:
    found = []

    @from_scores
    def remembered(tiles: Any, keys: Any) -> Any:
        found.append((tiles.dtype, keys.dtype, (tiles.mean(3) @ keys.mean(3).mT).dtype))
        return tiles.mean(dim=3) @ keys.mean(dim=3).mT

    query, key = (x.bfloat16() for x in tensors(0, 20, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        remembered().find(query, key)
    assert found == [(torch.float32,) * 3]


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_attention_with_all_keys_held_is_exact(causal: str) -> None:
    query, key = tensors(0, 70, 70)
    attention = HyperAttention(
        detector=MADE["mean"].replace(num_keys=1.0), num_samples=0, min_seq_len=0, causal=causal
    )
    out = attention(query, key, key, is_causal=True)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), key.repeat_interleave(2, 1), is_causal=True
    )
    torch.testing.assert_close(out, exact)


WRONG = {
    "shape": (lambda tiles, keys: tiles.mean(dim=(3, 4)), r"its scores are torch.float64 \(2, 2, "),
    "dtype": (lambda tiles, keys: (tiles.mean(3) @ keys.mean(3).mT).long(), "return floating"),
    "type": (lambda tiles, keys: None, "its scores are a NoneType"),
}


@pytest.mark.parametrize("case", WRONG)
def test_scores_of_a_wrong_shape_or_type_are_refused(case: str) -> None:
    function, text = WRONG[case]

    @from_scores
    def wrong(tiles: Any, keys: Any) -> Any:
        return function(tiles, keys)

    with pytest.raises(ArgumentError, match=text):
        wrong().find(*tensors(0, 20, 20))


@pytest.mark.parametrize("name", ["num_keys", "block_size", "tile_size"])
def test_parameters_are_checked(name: str) -> None:
    for value in (0, -1, "8"):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=f"mean_scores: {name}="):
            mean_scores(**{name: value})
