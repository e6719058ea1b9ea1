"""Samples of rectangles: where they lie, what they weigh, and that few operations draw them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from scipy.stats import binom
from torch.utils._python_dispatch import TorchDispatchMode

from hyperframe import HyperAttention, pipeline
from hyperframe.randomness import Stream
from hyperframe.rectangles import causal_levels, level_rectangles
from hyperframe.samplers import Stratified, Uniform, create
from hyperframe.samplers.base import AbstractSampler
from hyperframe.samples import KeySample

FALSE_ALARM = 1e-6
RECTANGLES = ((3, 6, 0, 3), (9, 12, 6, 9), (6, 12, 0, 6), (12, 20, 0, 12))


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, 20, 3, generator=g)
    return torch.randn(2, 4, 20, 3, generator=g), key, key


def test_every_rectangle_has_its_own_keys_and_weights() -> None:
    sample = Uniform().sample_rectangles(
        *tensors(), num_samples=4, rectangles=RECTANGLES,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert sample is not None
    assert sample.index.shape == sample.log_weight.shape == (2, 2, 4, 4)
    assert sample.index.dtype == torch.int64
    assert sample.log_weight.dtype == torch.float32
    for number, (_, _, start, stop) in enumerate(RECTANGLES):
        index, log_weight = sample.index[:, :, number], sample.log_weight[:, :, number]
        assert ((index >= start) & (index < stop)).all()
        if stop - start <= 4:  # taken whole
            assert (index[..., : stop - start] == torch.arange(start, stop)).all()
            assert (log_weight[..., : stop - start] == 0).all()
            assert (log_weight[..., stop - start :] == -torch.inf).all()
        else:
            torch.testing.assert_close(
                log_weight, torch.full_like(log_weight, math.log((stop - start) / 4))
            )
    drawn = sample.index[:, :, 3].flatten(0, 1).tolist()
    assert len({tuple(x) for x in drawn}) == 4  # heads and batch items draw on their own


@pytest.mark.parametrize("num_samples", [2, 4])
def test_a_stream_draws_the_keys_that_its_uniform_numbers_name(num_samples: int) -> None:
    found = Uniform().sample_rectangles(
        *tensors(), num_samples=num_samples, rectangles=RECTANGLES, generator=Stream(5)
    )
    assert found is not None
    draws = Stream(5).uniform((2, 2, 4, num_samples), torch.device("cpu"))
    for number, (_, _, start, stop) in enumerate(RECTANGLES):
        expected = (draws[:, :, number] * (stop - start)).long() + start
        if stop - start <= num_samples:
            expected = (start + torch.arange(num_samples)).clamp(max=stop - 1).expand_as(expected)
        assert torch.equal(found.index[:, :, number], expected)


def test_the_weights_of_drawn_rectangles_are_stored_once() -> None:
    sample = Uniform().sample_rectangles(*tensors(), num_samples=2, rectangles=RECTANGLES)
    assert sample is not None
    assert sample.log_weight.untyped_storage().nbytes() == 4 * len(RECTANGLES)


@pytest.mark.statistical
def test_keys_of_a_rectangle_are_equally_likely() -> None:
    draws = 20_000
    sample = Uniform().sample_rectangles(
        *tensors(), num_samples=draws, rectangles=((13, 20, 0, 13), (7, 13, 2, 7)),
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    assert sample is not None
    # more samples than keys: taken whole
    assert (sample.log_weight.exp().sum(-1) == torch.tensor([13.0, 5.0])).all()
    rectangles = ((20, 40, 0, 7), (20, 40, 9, 20))
    many = torch.zeros(1, 1, 20, 1).expand(5000, 1, -1, -1)
    sample = Uniform().sample_rectangles(
        many, many, many, num_samples=4, rectangles=rectangles,
        generator=torch.Generator().manual_seed(6),
    )  # fmt: skip
    assert sample is not None
    tail = FALSE_ALARM / (2 * (7 + 11))
    for number, (_, _, start, stop) in enumerate(rectangles):
        counts = sample.index[:, :, number].flatten().bincount(minlength=20)
        assert counts[:start].sum() == counts[stop:].sum() == 0
        p = 1 / (stop - start)
        for count in counts[start:stop].tolist():
            assert binom.ppf(tail, draws, p) <= count <= binom.isf(tail, draws, p)


class _Operations(TorchDispatchMode):
    """Operations that would launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        is_view = any(x.alias_info is not None for x in func._schema.returns)
        if not is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["uniform", "stratified"])
@pytest.mark.parametrize("num_samples", [2, 16])
def test_all_levels_are_drawn_in_a_few_operations(num_samples: int, name: str) -> None:
    rectangles = tuple(
        places for level in causal_levels(256, 8) for places in level_rectangles(level, 256)
    )
    inputs = (torch.zeros(1, 1, 256, 1),) * 3

    def draw() -> None:
        create(name).sample_rectangles(*inputs, num_samples=num_samples, rectangles=rectangles)

    draw()  # the tables are made
    with _Operations() as operations:
        draw()
    assert 3 <= len(operations.names) <= 5, operations.names
    assert "aten._local_scalar_dense.default" not in operations.names


def test_samplers_that_draw_otherwise_have_no_samples_of_rectangles() -> None:
    @dataclass(frozen=True, kw_only=True)
    class FirstKeys(Uniform):
        def sample(self, *args: Any, **options: Any) -> Any:
            raise NotImplementedError

    @dataclass(frozen=True, kw_only=True)
    class Lengths(Uniform):
        def density(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            return key.norm(dim=-1)

    @dataclass(frozen=True, kw_only=True)
    class Shifted(Stratified):
        def sample(self, *args: Any, **options: Any) -> Any:
            raise NotImplementedError

    @dataclass(frozen=True, kw_only=True)
    class Weighted(Stratified):
        def density(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            return key.norm(dim=-1)

    samplers: list[AbstractSampler] = [
        FirstKeys(), Lengths(), Shifted(), Weighted(), create("row_norm"), create("importance"),
    ]  # fmt: skip
    for sampler in samplers:
        source = torch.Generator().manual_seed(0)
        before = source.get_state()
        drawn = sampler.sample_rectangles(
            *tensors(), num_samples=2, rectangles=RECTANGLES, generator=source
        )
        assert drawn is None
        assert torch.equal(source.get_state(), before)


# --------------------------------------------------------------- in the recursion


class _Levels:
    """What the pipeline built of all levels at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[Any] = []
        build = pipeline.build_level_plans

        def keep(*args: Any) -> Any:
            built = build(*args)
            self.plans += built or []
            return built

        monkeypatch.setattr(pipeline, "build_level_plans", keep)


@dataclass(frozen=True, kw_only=True)
class LastKeys(AbstractSampler):
    """The last keys of each rectangle: no density, no draw."""

    def density(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor | None:
        return None

    def sample_rectangles(  # type: ignore[no-untyped-def]
        self, query, key, value, *, num_samples, rectangles, generator=None
    ):
        stop = torch.tensor([places[3] for places in rectangles]).unsqueeze(-1)
        index = (stop - 1 - torch.arange(num_samples)).expand(*key.shape[:2], -1, -1)
        return KeySample(index=index, log_weight=torch.zeros(index.shape))


def attend(sampler: Any, **options: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    query = torch.randn(2, 4, 61, 8, generator=g)
    key, value = torch.randn(2, 2, 2, 61, 8, generator=g)
    attention = HyperAttention(
        detector="sort_lsh(block_size=5)", sampler=sampler, num_samples=3, min_seq_len=8,
        causal="recursive", **options,
    )  # fmt: skip
    return attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("sampler", ["stratified", LastKeys()], ids=["stratified", "last keys"])
def test_a_sampler_that_draws_for_rectangles_in_its_own_way_has_all_levels_at_once(
    sampler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = _Levels(monkeypatch)
    attend(sampler)
    assert [plan.num_samples for plan in levels.plans] == [3, 3, 3]
    if isinstance(sampler, LastKeys):
        for plan in levels.plans:
            for number, (*_, stop) in enumerate(plan.rectangles):
                drawn = plan.sample_index[:, :, number]
                assert (drawn == torch.tensor([stop - 1, stop - 2, stop - 3])).all()


@pytest.mark.parametrize("sampler", ["importance", "row_norm"])
def test_other_samplers_are_not_asked_and_the_detector_finds_nothing_in_vain(
    sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = _Levels(monkeypatch)
    found = attend(sampler)
    assert levels.plans == []
    # and draws what it drew without the other way
    monkeypatch.setattr(pipeline.Pipeline, "_solve_square", lambda *args: None)
    assert torch.equal(found, attend(sampler))
