"""One graph: compiled calls give what eager ones give; recomputed calls give the same bits."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from hyperframe import HyperAttention

# torch's own: its compiler makes an instance of the function to trace it
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "sort_lsh": ({"detector": "sort_lsh(block_size=16)"}, False),
    "sort_lsh, ragged": ({"detector": "sort_lsh(block_size=17, num_rounds=2)"}, False),
    "sort_lsh, centred": ({"detector": "sort_lsh(block_size=16, centre_keys=True)"}, False),
    "sort_lsh, single pass": ({"detector": "sort_lsh(block_size=16)"}, True),
    "sort_lsh, recursive": ({"detector": "sort_lsh(block_size=16)", "causal": "recursive"}, True),
    "sort_lsh, strict": (
        {"detector": "sort_lsh(block_size=16)", "causal": "recursive", "strict_causal": True},
        True,
    ),
    "columns": ({"detector": "heavy_columns(num_columns=16)"}, False),
    "columns, single pass": ({"detector": "heavy_columns(num_columns=16, tile_size=16)"}, True),
    "columns, recursive": (
        {"detector": "heavy_columns(num_columns=16)", "causal": "recursive"},
        True,
    ),
    "window and columns": (
        {"detector": "sliding_window(width=16) | heavy_columns(num_columns=16)"},
        True,
    ),
    "stratified, recursive": (
        {"detector": "sort_lsh(block_size=16)", "sampler": "stratified", "causal": "recursive"},
        True,
    ),
    "importance": ({"detector": "sort_lsh(block_size=16)", "sampler": "importance"}, False),
    "importance, single pass": (
        {"detector": "sliding_window(width=16)", "sampler": "importance(tile_size=16)"},
        True,
    ),
    "columns and diagonals, single pass": (
        {"detector": "vertical_slash(num_columns=8, num_diagonals=8, tile_size=16)"},
        True,
    ),
    "the best of several, single pass": (
        {
            "detector": "refined(candidates='sliding_window(width=16) | vertical_slash(num_columns="
            "8, num_diagonals=8, num_queries=2, num_segments=4, tile_size=8) | pooled_topk("
            "block_size=8, num_blocks=2, tile_size=8)', num_keys=12, tile_size=8)"
        },
        True,
    ),
    "tree, single pass": (
        {"detector": "pca_tree(leaf_size=8, num_leaves=2, tile_size=16, chunk_size=32)"},
        True,
    ),
    "hash buckets, single pass": (
        {"detector": "lsh_topk(num_keys=16, num_rounds=2, tile_size=16)"},
        True,
    ),
    "hash buckets, recursive": (
        {"detector": "lsh_topk(num_keys=16, tile_size=16)", "causal": "recursive"},
        True,
    ),
    "row norm, exact sums": (
        {"detector": "heavy_columns(num_columns=16)", "sampler": "row_norm", "estimator": "exact"},
        False,
    ),
}


def inputs(num_rows: int = 130, batch: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, 4, num_rows, 8), (batch, 2, num_rows, 8), (batch, 2, num_rows, 8)]
    return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]


def attention_of(**options: Any) -> HyperAttention:
    return HyperAttention(num_samples=12, min_seq_len=40, backend="torch", **options)


def compiled(function: Any, backend: Any = "aot_eager", *, dynamic: bool | None = True) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def assert_same(
    attention: HyperAttention, is_causal: bool, backend: str, num_rows: int = 130, batch: int = 2
) -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return attention(q, k, v, is_causal=is_causal, return_lse=True)

    results = []
    for function in (call, compiled(call, backend)):
        tensors = inputs(num_rows, batch)
        out, lse = function(*tensors)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), tensors)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_call_is_one_graph_and_gives_what_eager_gives(case: str) -> None:
    options, is_causal = CASES[case]
    assert_same(attention_of(**options), is_causal, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside of torch's compiler
@pytest.mark.parametrize("case", ["sort_lsh", "sort_lsh, recursive", "window and columns"])
def test_inductor_gives_what_eager_gives(case: str) -> None:
    options, is_causal = CASES[case]
    assert_same(attention_of(**options), is_causal, "inductor")


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("case", ["sort_lsh, recursive", "columns, single pass"])
def test_other_lengths_and_batch_sizes_compile_anew(case: str, dynamic: bool | None) -> None:
    options, is_causal = CASES[case]
    attention = attention_of(**options)
    counter = CompileCounter()
    function = compiled(lambda *x: attention(*x, is_causal=is_causal), counter, dynamic=dynamic)
    for shape in ((130, 2), (131, 2), (97, 2), (97, 3), (130, 2)):
        found = function(*inputs(*shape))
        torch.testing.assert_close(found, attention(*inputs(*shape), is_causal=is_causal))
    assert counter.frame_count <= 4


@pytest.mark.parametrize("case", ["sort_lsh", "sort_lsh, recursive", "window and columns"])
def test_another_seed_tensor_needs_no_other_graph(case: str) -> None:
    options, is_causal = CASES[case]
    attention = attention_of(**options)
    counter = CompileCounter()

    def call(seed: torch.Tensor, *x: torch.Tensor) -> torch.Tensor:
        return attention(*x, is_causal=is_causal, generator=seed)

    function = compiled(call, counter)
    for seed in (0, 1, -5):
        expected = attention.replace(seed=seed)(*inputs(), is_causal=is_causal)
        torch.testing.assert_close(function(torch.tensor(seed), *inputs()), expected)
    assert counter.frame_count == 1


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a GPU: tests/gpu")
def test_the_kernels_of_triton_are_part_of_the_graph() -> None:
    pytest.importorskip("triton")
    options, is_causal = CASES["sort_lsh, recursive"]
    attention = attention_of(**options).replace(backend="triton")
    assert_same(attention, is_causal, "aot_eager", num_rows=90, batch=1)


def test_without_a_seed_every_compiled_call_draws_anew() -> None:
    attention = attention_of(detector="sort_lsh(block_size=16)", seed=None)
    function = compiled(lambda *x: attention(*x), "eager")
    torch.manual_seed(3)
    first, second = function(*inputs()), function(*inputs())
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(function(*inputs()), first)
    torch.manual_seed(3)
    torch.testing.assert_close(attention(*inputs()), first)


def test_an_attention_inside_a_module_and_a_given_scale_compile_too() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention_of(detector="sort_lsh(block_size=16)")

        def forward(self, scale: float, *x: torch.Tensor) -> torch.Tensor:
            return self.attention(*x, scale=scale)

    layer = Layer()
    function = compiled(layer)
    for scale in (0.25, -0.5):
        torch.testing.assert_close(function(scale, *inputs()), layer(scale, *inputs()))


def test_short_calls_compile_as_exact_attention() -> None:
    attention = attention_of(detector="sort_lsh(block_size=16)")
    for is_causal in (False, True):
        function = compiled(lambda *x, c=is_causal: attention(*x, is_causal=c))
        expected = attention(*inputs(30), is_causal=is_causal)
        torch.testing.assert_close(function(*inputs(30)), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("case", ["sort_lsh", "sort_lsh, recursive", "window and columns"])
def test_a_recomputed_call_has_the_same_bits(
    case: str, seed: int | None, use_reentrant: bool
) -> None:
    options, is_causal = CASES[case]
    attention = attention_of(**options, seed=seed)
    calls = []

    def call(*x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return attention(*x, is_causal=is_causal)

    results = []
    for is_recomputed in (False, True):
        torch.manual_seed(5)
        tensors = inputs()
        if is_recomputed:
            out = checkpoint(call, *tensors, use_reentrant=use_reentrant)
        else:
            out = call(*tensors)
        torch.rand(7)  # the global generator has moved on when the backward begins
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors)])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert len(calls) == 3  # once without checkpointing, and twice with it
