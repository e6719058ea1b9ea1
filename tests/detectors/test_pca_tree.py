"""PCATree: its leaves, its metric and its options; what all leaf detectors obey is tested there."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.clustering import in_metric_of, pca_order
from hyperframe.detectors.pca_tree import PCATree
from hyperframe.errors import ArgumentError, ArgumentTypeError


def tensors(num_queries: int = 64, num_keys: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, num_queries, 6, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, 6, generator=g, dtype=torch.float64)
    return query, key


def test_what_a_tile_holds_are_the_leaves_of_one_tree_in_the_metric_of_the_queries() -> None:
    query, key = tensors()
    detector = PCATree(leaf_size=8, num_leaves=3, tile_size=16)
    dense = detector.find(query, key).to_dense()
    order = pca_order(in_metric_of(query, key), leaf_size=8).repeat_interleave(2, dim=1)
    by_leaf = dense.gather(-1, order.unsqueeze(2).expand_as(dense)).unflatten(-1, (16, 8))
    assert torch.equal(by_leaf.any(dim=-1), by_leaf.all(dim=-1))
    assert (by_leaf.all(dim=-1).sum(dim=-1) == 3).all()
    # another metric makes other leaves
    other = pca_order(key, leaf_size=8).repeat_interleave(2, dim=1)
    by_leaf = dense.gather(-1, other.unsqueeze(2).expand_as(dense)).unflatten(-1, (16, 8))
    assert not torch.equal(by_leaf.any(dim=-1), by_leaf.all(dim=-1))


@pytest.mark.parametrize("num_keys", [128, 100, 77])
def test_the_tile_holds_the_leaves_whose_mean_keys_it_likes_most(num_keys: int) -> None:
    query, key = tensors(num_keys=num_keys)
    detector = PCATree(leaf_size=8, num_leaves=2, tile_size=16, num_means=1)
    dense = detector.find(query, key, scale=1.0).to_dense()
    order = pca_order(in_metric_of(query, key), leaf_size=8)
    count = -(-num_keys // 8)
    bounds = [i * num_keys // count for i in range(count + 1)]
    for head in range(4):
        leaves = [order[0, head // 2, a:b] for a, b in pairwise(bounds)]
        for tile in range(4):
            pooled = query[0, head, 16 * tile : 16 * tile + 16].mean(dim=0)
            score = torch.stack([
                key[0, head // 2, leaf].mean(dim=0) @ pooled + torch.tensor(len(leaf)).log()
                for leaf in leaves
            ])  # fmt: skip
            expected = torch.zeros(num_keys, dtype=torch.bool)
            for leaf in score.topk(2).indices.tolist():
                expected[leaves[leaf]] = True
            assert torch.equal(dense[0, head, 16 * tile], expected)


def test_nothing_is_random() -> None:
    query, key = tensors(128)
    for is_causal in (False, True):
        masks = [
            PCATree(leaf_size=4, chunk_size=128).find(
                query, key, is_causal=is_causal, generator=torch.Generator().manual_seed(seed)
            )
            for seed in (0, 1)
        ]
        assert torch.equal(masks[0].to_dense(), masks[1].to_dense())


def test_queries_that_see_one_direction_make_leaves_along_it() -> None:
    """Distances in the other coordinate, however large, do not separate keys."""
    g = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 256, 2, generator=g) * torch.tensor([1.0, 100.0])
    query = torch.randn(1, 1, 64, 2, generator=g).abs() * torch.tensor([5.0, 0.0])
    detector = PCATree(leaf_size=16, num_leaves=2)
    dense = detector.find(query, key).to_dense()[0, 0, 0]
    best = key[0, 0, :, 0].topk(32).indices
    # the queries only like the first coordinate: its 32 largest values
    assert dense[best].double().mean() > 0.9


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_call_is_one_graph_and_gives_what_eager_gives() -> None:
    attention = HyperAttention(
        detector=PCATree(leaf_size=5, num_leaves=3, tile_size=16, chunk_size=64),
        num_samples=12, min_seq_len=0, backend="torch",
    )  # fmt: skip
    query, key = (x.float() for x in tensors(100, 130))

    def call(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attention(q, k, k, is_causal=True)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(query, key), call(query, key))


@pytest.mark.parametrize("option", ["leaf_size", "num_leaves"])
def test_bad_options_are_refused_by_name(option: str) -> None:
    with pytest.raises(ArgumentError, match=rf"pca_tree: {option}=0 is too small"):
        PCATree(**{option: 0})
    with pytest.raises(ArgumentTypeError, match=rf"pca_tree: {option}=True has type bool"):
        PCATree(**{option: True})
