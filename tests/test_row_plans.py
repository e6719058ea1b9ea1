"""Lists of single rows beside tiles: each key once, in every backend, whatever the residual is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe import samplers
from hyperframe.attention import HyperAttention
from hyperframe.builder import build_plans
from hyperframe.kernels import attend, attend_all, available_backends
from hyperframe.masks import BandMask, HeavyMask, ListMask
from hyperframe.plan import TilePlan
from hyperframe.rowsums import RowSumRule
from hyperframe.testing import masked_attention

CPU = torch.device("cpu")
HEADS, KEY_HEADS, DIM, SCALE = 4, 2, 5, 0.7
RESIDUALS = (None, "uniform", "centroid(unit=8)", "centroid(metric='key', unit=4)")


def lists(
    num_queries: int, num_keys: int, *, heads: int, tile_size: int, is_causal: bool, seed: int
) -> ListMask:
    """Random distinct keys, up to 5 of a tile."""
    g = torch.Generator().manual_seed(seed)
    shape = (1, heads, -(-num_queries // tile_size))
    longest = min(5, num_keys)
    index = torch.rand(*shape, num_keys, generator=g).argsort(dim=-1)[..., :longest]
    return ListMask(
        batch_size=1, num_query_heads=HEADS, num_queries=num_queries, num_keys=num_keys,
        is_causal=is_causal, key_index=index, tile_size=tile_size,
        key_count=torch.randint(0, longest + 1, shape, generator=g),
    )  # fmt: skip


def band(num_queries: int, num_keys: int, *, is_causal: bool) -> BandMask:
    return BandMask(
        batch_size=1, num_query_heads=HEADS, num_queries=num_queries, num_keys=num_keys,
        is_causal=is_causal, left=3, right=1, num_sinks=2, on_device=CPU,
    )  # fmt: skip


def tensors(
    num_queries: int, num_keys: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, num_queries), (KEY_HEADS, num_keys), (KEY_HEADS, num_keys))
    return [
        torch.randn(1, *shape, DIM, generator=g, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def plans_of(
    mask: HeavyMask,
    inputs: list[torch.Tensor],
    residual: str | None,
    rule: RowSumRule | None = None,
) -> list[TilePlan]:
    draw = None
    if residual is not None:
        draw = samplers.create(residual).draws(
            *inputs, num_samples=6, generator=torch.Generator().manual_seed(2), scale=SCALE
        )
    made = build_plans(mask, key_heads=KEY_HEADS, draw=draw, rule=rule)
    assert all(isinstance(plan, TilePlan) for plan in made)
    return [plan.validate() for plan in made if isinstance(plan, TilePlan)]


def weights(plans: list[TilePlan], **part: Any) -> torch.Tensor:
    """The matrix that plans mean together; pseudo-keys stand behind the keys."""
    width = max(plan.num_summaries for plan in plans)
    pad = torch.nn.functional.pad
    each = [pad(plan.to_dense(**part), (0, width - plan.num_summaries)) for plan in plans]
    return torch.stack(each).sum(dim=0)


@given(
    sizes=st.sampled_from([(37, 37), (20, 45), (23, 9), (2, 30)]), is_causal=st.booleans(),
    heads=st.tuples(*[st.sampled_from([KEY_HEADS, HEADS])] * 2), with_band=st.booleans(),
    residual=st.sampled_from(RESIDUALS), seed=st.integers(0, 1000),
)  # fmt: skip
def test_no_entry_counts_twice_and_all_backends_agree(
    sizes: tuple[int, int], is_causal: bool, heads: tuple[int, int], with_band: bool,
    residual: str | None, seed: int,
) -> None:  # fmt: skip
    mask: HeavyMask = lists(*sizes, heads=heads[0], tile_size=1, is_causal=is_causal, seed=seed)
    mask |= lists(*sizes, heads=heads[1], tile_size=8, is_causal=is_causal, seed=seed + 1)
    if with_band:
        mask |= band(*sizes, is_causal=is_causal)
    inputs = tensors(*sizes, seed)
    plans = plans_of(mask, inputs, residual)
    num_keys = sizes[1]
    exact = weights(plans, part="heavy")[..., :num_keys]
    assert (exact[mask.to_dense()] == 1).all()
    assert ((exact == 0) | (exact == 1)).all()
    if residual is None:
        assert torch.equal(exact.bool(), mask.to_dense())
    elif residual == "uniform":
        assert (weights(plans, part="sampled")[exact > 0] == 0).all()
    else:
        # every key that a row may see counts once: by itself, or in the size of its group
        total = weights(plans)
        visible = torch.ones(sizes).tril(sizes[1] - sizes[0]) if is_causal else torch.ones(sizes)
        expected = visible.sum(dim=-1).double().expand(1, HEADS, -1)
        torch.testing.assert_close(total.sum(dim=-1), expected, rtol=0, atol=1e-5)
        assert (total > -1e-5).all()
    states = [
        attend_all(*inputs, plans, scale=SCALE, backend=name) for name in ("reference", "torch")
    ]
    torch.testing.assert_close(states[0], states[1])
    if residual is None:
        truth = masked_attention(*inputs, mask.to_dense(), scale=SCALE)
        torch.testing.assert_close(states[0].out, truth.out)


def by_weights(inputs: list[torch.Tensor], plans: list[TilePlan]) -> torch.Tensor:
    """The output by the dense meaning of all plans together, in float64."""
    query, key, value = (x.double() for x in inputs)
    with_means = [plan for plan in plans if plan.num_summaries]
    if with_means:
        means = with_means[0]
        assert means.summary_key is not None
        assert means.summary_value is not None
        key = torch.cat([key, means.summary_key.double()], dim=2)
        value = torch.cat([value, means.summary_value.double()], dim=2)
    group = HEADS // KEY_HEADS
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    share = weights(plans) * (SCALE * query @ key.transpose(-1, -2)).exp()
    return share @ value / share.sum(dim=-1, keepdim=True)


CASES = [("torch", residual) for residual in RESIDUALS] + [
    (name, RESIDUALS[3]) for name in available_backends(CPU) if name != "torch"
]


@pytest.mark.parametrize("backend, residual", CASES)
def test_outputs_and_gradients_are_those_of_the_weights(residual: str | None, backend: str) -> None:
    # the interpreter of the kernels is slow
    (num_queries, num_keys), tile = ((6, 11), 4) if backend == "triton" else ((21, 33), 8)
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = [x.requires_grad_() for x in tensors(num_queries, num_keys, dtype=dtype)]
    mask: HeavyMask = band(num_queries, num_keys, is_causal=True)
    for size in (1, tile):
        mask |= lists(num_queries, num_keys, heads=HEADS, tile_size=size, is_causal=True, seed=size)
    plans = plans_of(mask, inputs, residual)
    assert len(plans) == (2 if residual in (None, "uniform") else 3)
    found = attend_all(*inputs, plans, scale=SCALE, backend=backend).out
    expected = by_weights(inputs, plans)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if backend == "triton" else {}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    along = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(found, inputs, along, retain_graph=True)
    truth = torch.autograd.grad(expected, inputs, along.double())
    for gradient, other in zip(gradients, truth, strict=True):
        torch.testing.assert_close(gradient, other, **tolerance)


def test_rows_of_their_own_cost_a_tile_no_list_for_each_row() -> None:
    mask = lists(64, 64, heads=HEADS, tile_size=1, is_causal=True, seed=0)
    tiles = lists(64, 64, heads=HEADS, tile_size=16, is_causal=True, seed=1)
    inputs = tensors(64, 64)
    plans = plans_of(mask | tiles, inputs, "centroid(metric='key', unit=8)")
    assert [plan.tile_size for plan in plans] == [16, 1, 1]
    assert [plan.is_removed for plan in plans] == [False, False, True]
    assert [plan.key_index.shape[-1] for plan in plans[1:]] == [5, 5]
    alone = attend(*inputs, plans[2], scale=SCALE)
    both = attend_all(*inputs, plans[:1], scale=SCALE), attend_all(*inputs, plans[::2], scale=SCALE)
    torch.testing.assert_close(both[0].lse.exp() - alone.lse.exp(), both[1].lse.exp())
    # alone they are tiles of one row, and with a floor for the row sums all lists are joined
    assert [plan.tile_size for plan in plans_of(mask, inputs, None)] == [1]
    floor = RowSumRule(log_floor=torch.zeros(1, HEADS, 64))
    assert [plan.tile_size for plan in plans_of(mask | tiles, inputs, None, floor)] == [1]


def test_a_cap_holds_for_what_is_taken_out_as_for_what_it_is_taken_from() -> None:
    mask = lists(40, 40, heads=HEADS, tile_size=1, is_causal=True, seed=0)
    tiles = lists(40, 40, heads=HEADS, tile_size=8, is_causal=True, seed=1)
    inputs = tensors(40, 40)
    cap = RowSumRule(log_cap=torch.full((1, HEADS, 40), -0.2))
    plans = plans_of(mask | tiles, inputs, "centroid(metric='key', unit=8)", cap)
    assert plans[2].log_cap is plans[0].log_cap is not None
    found = attend_all(*inputs, plans, scale=SCALE, backend="torch").lse
    means = plans[0].summary_key
    assert means is not None
    key = torch.cat([inputs[1], means], dim=2).repeat_interleave(HEADS // KEY_HEADS, dim=1)
    logits = SCALE * inputs[0] @ key.transpose(-1, -2)
    total = weights(plans, part="heavy") * logits.exp()
    total = total + weights(plans, part="sampled") * logits.clamp(max=-0.2).exp()
    torch.testing.assert_close(found, total.sum(dim=-1).log())


@pytest.mark.parametrize("residual", [None, "uniform", "centroid(metric='key', unit=8)"])
def test_whole_attention_takes_rows_beside_tiles(residual: str | None) -> None:
    inputs = tensors(70, 70)
    attention = HyperAttention(
        detector="sliding_window(width=4) | lsh_topk(tile_size=1, num_keys=9)",
        sampler=residual or "uniform", num_samples=8 if residual else 0, min_seq_len=0,
        strict_causal=True,
    )  # fmt: skip
    out = attention(*inputs, is_causal=True)
    assert torch.isfinite(out).all()
