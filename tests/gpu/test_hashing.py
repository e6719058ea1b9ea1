"""`hash_orders` on a CUDA device: the fused kernels, chosen by themselves, against torch."""

from __future__ import annotations

import pytest
import torch

from hyperframe.kernels.hashing import (
    HashOrders,
    hamming_sorted_codes,
    hash_orders,
    torch_hash_orders,
)

pytestmark = pytest.mark.gpu
kernels = pytest.importorskip("hyperframe.kernels.triton.hashing")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def integers(
    batch: int, heads: int, key_heads: int, num_queries: int, num_keys: int, dim: int, bits: int,
    dtype: torch.dtype, seed: int = 0,
) -> list[torch.Tensor]:  # fmt: skip
    """Small integers: projections are exact in every dtype and order of summation."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = [
        (batch, heads, num_queries, dim), (batch, key_heads, num_keys, dim),
        (batch, key_heads, dim, bits), (batch, key_heads, bits),
    ]  # fmt: skip
    q, k, projection, threshold = (
        torch.randint(-3, 4, shape, generator=generator, device="cuda") for shape in shapes
    )
    return [q.to(dtype), k.to(dtype), projection.float(), threshold.float()]


def assert_equal(found: HashOrders, expected: tuple[torch.Tensor, ...]) -> None:
    for name, ours, theirs in zip(("query", "key", "rank"), found, expected, strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [40, 64, 80, 128, 256])
@pytest.mark.parametrize(
    "num_queries, num_keys, runs",
    [(4096, 4096, (4096,)), (5000, 5000, (5000,)), (5000, 3000, (300, 600, 1200, 2400, 9600)),
     (70, 20001, (32, 20001)), (100_003, 100_003, (1000, 50_000))],
)  # fmt: skip
def test_orders_are_those_of_torch(
    num_queries: int, num_keys: int, runs: tuple[int, ...], dim: int, dtype: torch.dtype
) -> None:
    q, k, projection, threshold = integers(2, 4, 2, num_queries, num_keys, dim, 7, dtype)
    assert kernels.supports(q, k, projection, runs)
    for limit in (None, threshold):
        found = hash_orders(q, k, projection, runs=runs, key_threshold=limit)
        assert_equal(found, torch_hash_orders(q, k, projection, limit, runs))


@pytest.mark.parametrize("bits", range(1, 12))
def test_any_number_of_projections(bits: int) -> None:
    q, k, projection, threshold = integers(1, 6, 2, 3000, 2000, 64, bits, torch.bfloat16)
    found = hash_orders(q, k, projection, runs=(500, 1000, 3000), key_threshold=threshold)
    expected = torch_hash_orders(q, k, projection, threshold, (500, 1000, 3000))
    assert_equal(found, expected)


@pytest.mark.parametrize("log_length", [17, 20])
def test_long_sequences_and_many_run_sizes(log_length: int) -> None:
    length = 1 << log_length
    q, k, projection, _ = integers(1, 4, 4, length, length, 64, 7, torch.bfloat16)
    runs = tuple(1024 << level for level in range(log_length - 9))
    found = hash_orders(q, k, projection, runs=runs)
    assert_equal(found, torch_hash_orders(q, k, projection, None, runs))


@pytest.mark.parametrize("block_rows, num_warps", [(16, 1), (32, 4), (64, 2), (64, 4), (128, 4),
                                                   (128, 8)])  # fmt: skip
@pytest.mark.parametrize("bits", [3, 7, 8])
@pytest.mark.parametrize("sorts", [False, True])
def test_the_tuning_changes_nothing(
    sorts: bool, bits: int, block_rows: int, num_warps: int
) -> None:
    q, k, projection, threshold = integers(2, 4, 2, 3001, 2999, 64, bits, torch.bfloat16)
    tuning = kernels.Tuning(
        chunk=256, block_rows=block_rows, num_warps=num_warps, num_stages=3, sorts=sorts
    )
    found = kernels.triton_hash_orders(q, k, projection, threshold, (700, 1400, 3001), tuning)
    assert_equal(found, torch_hash_orders(q, k, projection, threshold, (700, 1400, 3001)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_away_from_the_hyperplanes_are_those_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, projection = (
        torch.randn(shape, generator=generator, device="cuda").to(dtype)
        for shape in [(2, 4, 5000, 128), (2, 2, 5000, 128), (2, 2, 128, 7)]
    )
    projection = projection.float()
    threshold = torch.randn(2, 2, 7, generator=generator, device="cuda")
    sort = kernels.HashSort(q, k, projection, threshold, (5000,))
    sort.write_codes()
    found = sort.code.split([q[..., 0].numel(), k[..., 0].numel()])
    of_queries = projection.repeat_interleave(2, dim=1)
    zero = torch.zeros_like(threshold).repeat_interleave(2, dim=1)
    for code, x, planes, limit in ((found[0], q, of_queries, zero),
                                   (found[1], k, projection, threshold)):  # fmt: skip
        expected = hamming_sorted_codes(x, planes, limit)
        distance = x.double() @ planes.double() - limit.double().unsqueeze(-2)
        clear = distance.abs().amin(dim=-1) > 1e-3
        assert clear.float().mean() > 0.99
        assert torch.equal(code.view(expected.shape)[clear].long(), expected[clear])


def test_any_strides() -> None:
    q, k, projection, threshold = integers(2, 4, 2, 1500, 1500, 64, 7, torch.bfloat16)
    expected = torch_hash_orders(q, k, projection, threshold, (1500,))
    for spread in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],  # rows start at odd addresses
        lambda x: x.mT.contiguous().mT,
    ):
        found = hash_orders(spread(q), spread(k), projection, runs=(1500,), key_threshold=threshold)
        assert_equal(found, expected)


def test_offsets_beyond_32_bits() -> None:
    q = torch.zeros(1, 17, 1 << 20, 128, dtype=torch.float16, device="cuda")
    _, k, projection, _ = integers(1, 17, 17, 1, 128, 128, 7, torch.float16)
    q[:, 16] = integers(1, 1, 1, 1 << 20, 1, 128, 7, torch.float16)[0][0]
    found = hash_orders(q, k, projection, runs=(1 << 20,))
    last = torch_hash_orders(q[:, 16:], k[:, 16:], projection[:, 16:], None, (1 << 20,))
    assert torch.equal(found.query_order[:, :, 16:], last[0])
    assert torch.equal(found.key_order[:, :, 16:], last[1])


def test_nothing_waits_for_the_device() -> None:
    q, k, projection, threshold = integers(1, 4, 2, 1500, 1500, 64, 7, torch.bfloat16)
    expected = torch_hash_orders(q, k, projection, threshold, (500, 1500))
    hash_orders(q, k, projection, runs=(500, 1500), key_threshold=threshold)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = hash_orders(q, k, projection, runs=(500, 1500), key_threshold=threshold)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(found, expected)


def test_a_captured_graph_sorts_new_rows() -> None:
    q, k, projection, threshold = integers(1, 4, 2, 1500, 1500, 64, 7, torch.bfloat16)
    hash_orders(q, k, projection, runs=(500, 1500), key_threshold=threshold)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = hash_orders(q, k, projection, runs=(500, 1500), key_threshold=threshold)
    new_q, new_k, _, _ = integers(1, 4, 2, 1500, 1500, 64, 7, torch.bfloat16, seed=1)
    q.copy_(new_q)
    k.copy_(new_k)
    graph.replay()
    assert_equal(found, torch_hash_orders(new_q, new_k, projection, threshold, (500, 1500)))


def test_it_compiles_into_one_graph_and_keeps_the_rules_of_torch() -> None:
    q, k, projection, threshold = integers(1, 4, 2, 1500, 1500, 64, 7, torch.bfloat16)
    torch.library.opcheck(
        torch.ops.hyperframe.hash_orders.default, (q, k, projection, threshold, [500, 1500], False)
    )

    @torch.compile(fullgraph=True)
    def sort(q: torch.Tensor, k: torch.Tensor) -> HashOrders:
        return hash_orders(q, k, projection, runs=(500, 1500), key_threshold=threshold)

    assert_equal(sort(q, k), torch_hash_orders(q, k, projection, threshold, (500, 1500)))
