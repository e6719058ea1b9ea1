"""KMeans: its blocks, its draws and its options; what all leaf detectors obey is tested there."""

from __future__ import annotations

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.clustering import in_metric_of, kmeans_order
from hyperframe.detectors.kmeans import KMeans
from hyperframe.errors import ArgumentError, ArgumentTypeError


def tensors(num_queries: int = 64, num_keys: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, num_queries, 6, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, 6, generator=g, dtype=torch.float64)
    return query, key


def test_what_a_tile_holds_are_blocks_of_clusters_in_the_metric_of_the_queries() -> None:
    query, key = tensors()
    detector = KMeans(block_size=8, num_blocks=3, tile_size=16, chunk_size=64)
    dense = detector.find(query, key).to_dense()
    points = in_metric_of(query, key).unflatten(2, (2, 64))
    order = kmeans_order(points, block_size=8) + torch.tensor([[0], [64]])
    order = order.flatten(2).repeat_interleave(2, dim=1)
    by_block = dense.gather(-1, order.unsqueeze(2).expand_as(dense)).unflatten(-1, (16, 8))
    assert torch.equal(by_block.any(dim=-1), by_block.all(dim=-1))
    assert (by_block.all(dim=-1).sum(dim=-1) == 3).all()
    # both chunks are used
    assert by_block[..., :8, :].any()
    assert by_block[..., 8:, :].any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_draws_come_from_the_generator_and_without_one_nothing_is_random(is_causal: bool) -> None:
    query, key = tensors(128)
    detector = KMeans(block_size=8, num_blocks=2, tile_size=16, chunk_size=64, batch_size=20)

    def dense(seed: int | None) -> torch.Tensor:
        g = None if seed is None else torch.Generator().manual_seed(seed)
        return detector.find(query, key, is_causal=is_causal, generator=g).to_dense()

    assert torch.equal(dense(None), dense(None))
    assert torch.equal(dense(3), dense(3))
    assert not torch.equal(dense(3), dense(4))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_call_is_one_graph_and_gives_what_eager_gives() -> None:
    attention = HyperAttention(
        detector=KMeans(block_size=6, num_blocks=2, tile_size=16, chunk_size=64),
        num_samples=12, min_seq_len=0, backend="torch",
    )  # fmt: skip
    query, key = (x.float() for x in tensors(100, 130))

    def call(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = attention(q, k, k, is_causal=True)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(query, key), call(query, key))


@pytest.mark.parametrize("option", ["block_size", "num_blocks", "batch_size"])
def test_bad_options_are_refused_by_name(option: str) -> None:
    with pytest.raises(ArgumentError, match=rf"kmeans: {option}=0 is too small"):
        KMeans(**{option: 0})
    with pytest.raises(ArgumentTypeError, match=rf"kmeans: {option}=True has type bool"):
        KMeans(**{option: True})


def test_no_step_is_allowed_and_fewer_is_refused() -> None:
    assert KMeans(num_steps=0).num_steps == 0
    with pytest.raises(ArgumentError, match=r"num_steps=-1 is too small"):
        KMeans(num_steps=-1)
