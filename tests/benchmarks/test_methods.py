"""The given tile plan is a plan, and a float64 reference makes the choices of the tested dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.benchmarking import SUITES, GivenTiles, Shape, SpecMethod, make_inputs, tile_plan
from hyperframe.benchmarking.methods import choosing_in
from hyperframe.testing import dense_attention

CPU = torch.device("cpu")


def inputs(length: int, *, heads: int = 2, kv_heads: int = 2, dtype: Any = torch.float32) -> Any:
    shape = Shape(batch=1, heads=heads, kv_heads=kv_heads, length=length, head_dim=16)
    return make_inputs("planted", shape, dtype=dtype, device=CPU, seed=0)


@pytest.mark.parametrize("length", [1, 63, 300, 336])
def test_short_tile_plan_holds_every_visible_key_once(length: int) -> None:
    query, key, _ = inputs(length)
    dense = tile_plan(query, key, seed=0).validate().to_dense()
    assert torch.equal(
        dense, torch.ones(length, length, dtype=torch.float64).tril().expand_as(dense)
    )


def test_tile_plan_lists_no_key_twice() -> None:
    query, key, _ = inputs(1500, kv_heads=1)
    plan = tile_plan(query, key, seed=1).validate()
    assert plan.key_index.shape == (1, 1, 24, 768)
    assert plan.log_weight is not None
    banded = 192
    for index, weight in zip(plan.key_index[0, 0], plan.log_weight[0, 0], strict=True):
        held = index[weight > float("-inf")].tolist()
        # a sample may be a key of the band: rows that hold it exactly do not see the sample
        samples = index[512:][weight[512:] > float("-inf")].tolist()
        both = set(index[:banded][weight[:banded] > float("-inf")].tolist()) & set(samples)
        assert len(held) == len(set(held)) + len(both)
    assert int((plan.to_dense() > 0).sum(-1).max()) <= 129 + 16 + 304 + 256


@pytest.mark.statistical
def test_row_sums_of_the_tile_plan_are_unbiased() -> None:
    # one stratum gives a key uniformly, so a row sum is a mean of bounded terms: over 400 draws
    # its standard error is below 0.4 % of the row at these lengths; 2 % is more than five of them
    query, key, _ = inputs(1200, heads=1, kv_heads=1)
    draws = [tile_plan(query, key, seed=seed).to_dense().sum(-1) for seed in range(40)]
    rows = torch.arange(1, 1201, dtype=torch.float64)
    mean = torch.stack(draws).mean(dim=0)[0, 0]
    assert float((mean / rows - 1).abs().view(-1, 100).mean(dim=1).max()) < 0.02


def test_given_tiles_are_exact_at_short_lengths() -> None:
    query, key, value = inputs(300, heads=4)
    out = GivenTiles().prepare(query, key, backend="torch", seed=0)(query, key, value)
    expected = dense_attention(query, key, value, is_causal=True).out
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


SPECS = {
    "blocks": {"detector": "sort_lsh(block_size=64, num_rounds=2)"},
    "recursion": {"detector": "sort_lsh(block_size=64)", "causal": "recursive", "min_seq_len": 128},
    "strict": {
        "detector": "sort_lsh(block_size=64)", "causal": "recursive", "min_seq_len": 128,
        "strict_causal": True,
    },
    "union": {"detector": "sliding_window(width=16) | heavy_columns(num_columns=32)"},
    "density": {"detector": "sort_lsh(block_size=64)", "sampler": "row_norm"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SPECS)
def test_float64_reference_differs_by_rounding_only(name: str, dtype: torch.dtype) -> None:
    query, key, value = inputs(700, heads=4, kv_heads=2, dtype=dtype)
    attention = HyperAttention(**{"min_seq_len": 0, "num_samples": 48, **SPECS[name]})
    method = SpecMethod(label=name, is_causal=name != "blocks", attention=attention)
    out = method.prepare(query, key, backend="torch", seed=3)(query, key, value)
    wide = (tensor.double() for tensor in (query, key, value))
    reference = method.in_float64(query, key, seed=3)(*wide)
    assert reference.dtype == torch.float64
    error = float((out.double() - reference).norm() / reference.norm())
    assert error < (0.01 if dtype == torch.bfloat16 else 1e-5)


def test_component_that_chooses_in_a_dtype_is_what_it_was() -> None:
    detector = HyperAttention(detector="sort_lsh(block_size=64)").detector
    chosen: Any = choosing_in(detector, torch.bfloat16)
    assert isinstance(chosen, type(detector))
    assert (chosen.name, chosen.block_size) == ("sort_lsh", 64)
    assert chosen.takes_stream == detector.takes_stream


def test_specs_of_the_suites_make_their_attention_again() -> None:
    for suite in SUITES.values():
        assert suite.methods
        assert len({method.label for method in suite.methods}) == len(suite.methods)
        for method in suite.methods:
            if isinstance(method, SpecMethod):
                assert eval(method.spec, {"HyperAttention": HyperAttention}) == method.attention
