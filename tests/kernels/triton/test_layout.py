"""Plans laid out by one launch mean what the builder's lists mean; interpreted without a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe import positional
from hyperframe.builder import build_plans
from hyperframe.kernels.layout import TileLists
from hyperframe.kernels.ops.layout import WHOLE_BLOCK, num_slots
from hyperframe.masks import BandMask, HeavyMask, ListMask
from hyperframe.samplers.uniform import Uniform
from hyperframe.samples import KeySample, SampleDraw

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton.layout import triton_tile_lists  # noqa: E402

DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")


def lists(
    sizes: dict[str, Any], heads: int, tile_size: int, longest: int, generator: torch.Generator,
    *, is_ascending: bool,
) -> ListMask:  # fmt: skip
    """Random distinct keys; the first list is empty."""
    num_keys, tiles = sizes["num_keys"], -(-sizes["num_queries"] // tile_size)
    index = torch.rand(2, heads, tiles, num_keys, generator=generator).argsort(dim=-1)
    longest = min(longest, num_keys)
    count = torch.randint(0, longest + 1, index.shape[:3], generator=generator)
    count[..., 0] = 0
    index = index[..., :longest]
    if is_ascending:
        used = torch.arange(longest) < count.unsqueeze(-1)
        index = index.masked_fill(~used, num_keys).sort(dim=-1).values.clamp(max=num_keys - 1)
    return ListMask(
        **sizes, key_index=index.to(DEVICE), key_count=count.to(DEVICE), tile_size=tile_size,
        is_ascending=is_ascending,
    )  # fmt: skip


def both(mask: HeavyMask, sample: KeySample | None) -> tuple[Any, Any, bool]:
    """The plan that sorts and scatters make, the one of the kernel, and whether it was launched."""
    launches = []
    draw: SampleDraw | None = None if sample is None else (lambda prefixes: sample)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positional, "can_lay_out", lambda device: False)
        (expected,) = build_plans(mask, key_heads=2, draw=draw)
        patch.setattr(positional, "can_lay_out", lambda device: True)

        def launched(
            *tensors: torch.Tensor, band: tuple[int, int, int] | None, **rest: Any
        ) -> TileLists:
            bounds = list(band or (-1, -1, 0))
            slots = num_slots(
                tensors[0], tensors[2], bounds, rest["tile_size"], rest["num_keys"],
                rest["is_causal"],
            )  # fmt: skip
            launches.append(slots)
            keys, weights, counts = triton_tile_lists(
                *tensors, bounds, **rest, slots=slots, whole=WHOLE_BLOCK
            )
            return TileLists(keys, weights, *counts.unbind())

        patch.setattr(positional, "tile_lists", launched)
        (found,) = build_plans(mask, key_heads=2, draw=draw)
    return found, expected, bool(launches)


@given(
    left=st.integers(-1, 20), right=st.integers(0, 9), sinks=st.integers(0, 40),
    num_queries=st.integers(9, 50), num_keys=st.integers(1, 50), is_causal=st.booleans(),
    is_ascending=st.booleans(), heads=st.sampled_from([1, 2, 4]), samples=st.integers(0, 30),
    pieces=st.integers(0, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_launch_makes_the_plan_of_the_builder(
    left: int, right: int, sinks: int, num_queries: int, num_keys: int, is_causal: bool,
    is_ascending: bool, heads: int, samples: int, pieces: int, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, Any] = {
        "batch_size": 2, "num_query_heads": 4, "num_queries": num_queries, "num_keys": num_keys,
        "is_causal": is_causal,
    }  # fmt: skip
    parts: list[HeavyMask] = [
        lists(sizes, heads, 8 * (number + 1), 20, generator, is_ascending=is_ascending)
        for number in range(pieces)
    ]
    if left >= 0:
        parts.append(BandMask(**sizes, left=left, right=right, num_sinks=sinks, on_device=DEVICE))
    if not parts:
        return
    mask = parts[0]
    for part in parts[1:]:
        mask = mask | part
    sample = None
    if samples:
        query, key = torch.zeros(2, 4, num_queries, 1), torch.zeros(2, 2, num_keys, 1)
        draw = Uniform().draws(query, key, key, num_samples=samples, generator=generator)
        assert draw is not None
        tile = 8 if pieces else min(64, num_queries)
        ends = (torch.arange(-(-num_queries // tile)) + 1) * tile + num_keys - num_queries
        drawn = draw(ends.clamp(0, num_keys) if is_causal else None)
        sample = KeySample(index=drawn.index.to(DEVICE), log_weight=drawn.log_weight.to(DEVICE))
    found, expected, is_laid_out = both(mask, sample)
    assert found.disjoint
    found.validate()
    for part in ("heavy", "sampled"):
        torch.testing.assert_close(found.to_dense(part=part), expected.to_dense(part=part))
    if not is_laid_out:
        return  # tiles that share one list
    # lists are joined without repeats, and end with a whole block
    slots = torch.arange(found.key_index.shape[-1], device=DEVICE)
    assert found.log_weight is not None
    counts = (slots < found.key_count.unsqueeze(-1)) & (found.log_weight > float("-inf"))
    assert bool((counts.sum(dim=-1) <= expected.key_count).all())
    assert bool((found.key_count % WHOLE_BLOCK == 0).all())
    if bool((found.key_count > 0).any()):  # an unused slot names a key of its own list
        spare = found.key_index.gather(-1, (found.key_count - 1).clamp(min=0).long().unsqueeze(-1))
        own = (found.key_index == spare) & (found.log_weight > float("-inf"))
        assert bool((own.any(dim=-1) | (found.key_count == 0)).all())
