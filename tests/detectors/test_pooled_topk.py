"""Pooled top-k: blocks of consecutive keys, by the scores written down, never from the future."""

from __future__ import annotations

import pytest
import torch

from hyperframe.detectors.pooled_topk import PooledTopK
from hyperframe.errors import ArgumentError


def tensors(length: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, length, 8, generator=g, dtype=torch.float64) * 2
    key = torch.randn(1, 2, length, 8, generator=g, dtype=torch.float64)
    return query, key


@pytest.mark.parametrize("step", [1, 2, 4])
def test_the_blocks_are_those_with_most_mass_of_the_pooled_queries(step: int) -> None:
    query, key = tensors()
    detector = PooledTopK(
        tile_size=16, num_means=4, chunk_size=16, block_size=4, num_blocks=3, pool_step=step
    )
    dense = detector.find(query, key, scale=0.6).to_dense()
    # [B, H, tiles, runs, d]
    pooled_q = query.unflatten(2, (4, 4, 4))[:, :, :, :, ::step].mean(dim=4)
    pooled_k = key.unflatten(2, (16, 4))[:, :, :, ::step].mean(dim=3).repeat_interleave(2, dim=1)
    logits = 0.6 * torch.einsum("bhtrd,bhkd->bhtrk", pooled_q, pooled_k)
    best = torch.softmax(logits, dim=-1).sum(dim=3).topk(3, dim=-1).indices
    blocks = torch.zeros(1, 4, 4, 16, dtype=torch.bool).scatter_(-1, best, True)
    expected = blocks.repeat_interleave(4, dim=-1).repeat_interleave(16, dim=2)
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_a_planted_block_is_found_by_the_tiles_behind_it(strict: bool) -> None:
    query, key = tensors(256)
    query[..., 0], key[..., 0] = 3.0, 0.0
    key[:, :, 72:76, 0] = 12.0
    detector = PooledTopK(tile_size=16, chunk_size=64, block_size=4, num_blocks=2)
    find = detector.find_strict if strict else detector.find
    dense = find(query, key, is_causal=True).to_dense()
    assert dense[:, :, 80:, 72:76].all()
    assert dense.sum(dim=-1).max() <= 2 * 4 + 16


@pytest.mark.parametrize("step", [1, 4])
def test_no_later_key_moves_an_earlier_row(step: int) -> None:
    query, key = tensors(100)
    detector = PooledTopK(tile_size=8, chunk_size=32, block_size=4, num_blocks=2, pool_step=step)
    before = detector.find(query, key, is_causal=True).to_dense()
    differs = False
    for cut in (5, 33, 64, 77):
        later = key.clone()
        later[:, :, cut:] *= -3
        after = detector.find(query, later, is_causal=True).to_dense()
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
        differs = differs or not torch.equal(before, after)
    assert differs


@pytest.mark.parametrize(
    "name", ["block_size", "num_blocks", "num_means", "tile_size", "pool_step"]
)
def test_wrong_parameters_are_refused_by_name(name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        PooledTopK(**{name: 0})


def test_a_step_that_does_not_fit_into_tiles_is_refused() -> None:
    with pytest.raises(ArgumentError, match="pool_step=3 does not divide tile_size=64"):
        PooledTopK(pool_step=3)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("length", [64, 203])
def test_blocks_that_fit_into_tiles_are_the_same_in_chunks_of_any_size(
    length: int, strict: bool, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = tensors(length)
    detector = PooledTopK(tile_size=8, chunk_size=32, block_size=4, num_blocks=3, pool_step=step)
    find = detector.find_strict if strict else detector.find
    expected = find(query, key[:, :, :-3], is_causal=True).to_dense()
    monkeypatch.setattr(PooledTopK, "_largest_chunk", lambda self: self.chunk_size)
    assert torch.equal(find(query, key[:, :, :-3], is_causal=True).to_dense(), expected)
