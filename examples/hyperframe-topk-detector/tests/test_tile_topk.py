"""tile_topk keeps the promises of a detector, and finds what it should."""

import pytest
import torch
from hyperframe_topk_detector import tile_topk

from hyperframe import HyperAttention, detectors
from hyperframe.diagnostics import relative_error
from hyperframe.testing import check_detector


@pytest.mark.parametrize(
    "detector",
    [
        tile_topk(tile_size=8, num_keys=10),
        tile_topk(tile_size=6, num_keys=0.25, block_size=4, num_means=1),
    ],
    ids=repr,
)
def test_it_conforms(detector) -> None:
    check_detector(detector)


def test_it_is_found_by_its_name() -> None:
    detector = detectors.create("tile_topk(num_keys=32)")
    assert detector == tile_topk(num_keys=32)
    assert detectors.to_spec(detector) == "tile_topk(num_keys=32)"


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_key_that_a_tile_likes_is_held_by_all_of_its_rows(is_causal) -> None:
    query, key = torch.zeros(1, 1, 256, 4), torch.zeros(1, 1, 256, 4)
    query[..., 0], key[:, :, 53, 0] = 1.0, 9.0
    dense = tile_topk(num_keys=1).find(query, key, is_causal=is_causal).to_dense()
    assert dense[:, :, 64:, 53].all()


def test_attention_with_a_few_heavy_keys_is_near_exact() -> None:
    query, key, value = torch.randn(3, 1, 2, 1024, 32, generator=torch.Generator().manual_seed(0))
    key[:, :, ::64] *= 6
    errors = [
        relative_error(
            query,
            key,
            value,
            HyperAttention(detector=detector, min_seq_len=0, seed=0)(query, key, value),
        ).max()
        for detector in ("tile_topk(tile_size=1, num_means=1, num_keys=64)", "strided(num_keys=64)")
    ]
    assert errors[0] < 0.2 * errors[1]
