"""Long lives of a registry and of a plan's lists: whatever is done in whatever order, laws hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hyperframe.errors import HyperframeError
from hyperframe.estimators import AbstractEstimator
from hyperframe.masks import HeavyMask
from hyperframe.plan import TilePlan
from hyperframe.ragged import append_lists
from hyperframe.registry import Registry
from hyperframe.rowsums import RowSums

NAMES = st.sampled_from(["first", "second", "third_one", "exact"])


def component(label: str) -> type[AbstractEstimator]:
    """A class with one parameter."""

    @dataclass(frozen=True, kw_only=True)
    class Sized(AbstractEstimator):
        size: int = 3

        def row_sums(
            self, query: torch.Tensor, key: torch.Tensor, mask: HeavyMask, **options: Any
        ) -> RowSums:
            return RowSums(log_sum=query.new_zeros(query.shape[:3]))

    Sized.__qualname__ = Sized.__name__ = f"Sized{label}"
    return Sized


class RegistryLife(RuleBasedStateMachine):
    """Registering, creating, and asking for what is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.registry: Registry[AbstractEstimator] = Registry(
            kind="estimator", group="hyperframe.a_group_of_nobody", base=AbstractEstimator,
            builtins={"exact": ".estimators.exact:Exact"}, package="hyperframe",
        )  # fmt: skip
        self.known: dict[str, type[AbstractEstimator] | None] = {"exact": None}
        self.number = 0

    def new(self) -> type[AbstractEstimator]:
        self.number += 1
        return component(str(self.number))

    @rule(name=NAMES)
    def register(self, name: str) -> None:
        made = self.new()
        if name in self.known:
            with pytest.raises(HyperframeError, match=name):
                self.registry.register(name, made)
        else:
            self.registry.register(name, made)
            self.known[name] = made

    @rule(name=NAMES)
    def replace(self, name: str) -> None:
        self.known[name] = self.new()
        self.registry.register(name, self.known[name], replace=True)

    @rule(name=NAMES)
    def define_again(self, name: str) -> None:
        made = self.known.get(name)
        if made is not None:
            again = component(made.__name__.removeprefix("Sized"))
            self.registry.register(name, again)
            self.known[name] = again

    @rule(name=NAMES)
    def unregister(self, name: str) -> None:
        if self.known.get(name) is None:
            with pytest.raises(HyperframeError, match=name):
                self.registry.unregister(name)
            return
        self.registry.unregister(name)
        del self.known[name]
        if name == "exact":
            self.known[name] = None  # the built-in again

    @rule(name=NAMES, size=st.integers(-5, 5))
    def create(self, name: str, size: int) -> None:
        if name not in self.known:
            with pytest.raises(HyperframeError, match=name):
                self.registry.create(name)
            return
        made = self.known[name]
        if made is None:
            assert self.registry.to_spec(self.registry.create(name)).startswith("exact")
            return
        created: Any = self.registry.create(f"{name}(size={size})")
        assert type(created) is made
        assert created.size == size
        assert self.registry.create(self.registry.to_spec(created)) == created
        assert self.registry.create(name, size=size) == created

    @rule(name=NAMES)
    def ask_for_an_option_that_is_not_there(self, name: str) -> None:
        with pytest.raises(HyperframeError):
            self.registry.create(f"{name}(colour=1)")

    @invariant()
    def it_knows_what_was_registered(self) -> None:
        assert self.registry.names() == sorted(self.known)
        for name, made in self.known.items():
            assert made is None or self.registry.get(name) is made


HEADS, TILES, TILE, KEYS = 2, 3, 4, 12


class ListsUnderAppend(RuleBasedStateMachine):
    """Samples appended to the lists of a plan, again and again: the plan means their sums."""

    @initialize(seed=st.integers(0, 99), longest=st.integers(0, 5))
    def begin(self, seed: int, longest: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (1, HEADS, TILES)
        order = torch.rand((*shape, KEYS), generator=generator).argsort(dim=-1)
        self.count = torch.randint(0, longest + 1, shape, generator=generator)
        self.index = order[..., :longest].int()
        self.heavy = self.count
        self.weight: torch.Tensor | None = None
        self.dense = torch.zeros(HEADS, TILES, KEYS, dtype=torch.float64)
        for head in range(HEADS):
            for tile in range(TILES):
                held = order[0, head, tile, : self.count[0, head, tile]]
                self.dense[head, tile, held] = 1.0
        self.held = self.dense.bool()

    @rule(seed=st.integers(0, 99), extra=st.integers(0, 4), is_full=st.booleans())
    def append(self, seed: int, extra: int, is_full: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (1, HEADS, TILES)
        more = torch.randint(0, KEYS, (*shape, extra), generator=generator)
        weight = torch.randn(more.shape, generator=generator)
        used = torch.randint(0, extra + 1, shape, generator=generator)
        used = torch.full_like(used, extra) if is_full else used
        before, slots = self.weight, self.index.shape[-1]
        self.index, self.weight, total = append_lists(
            self.index, self.count, more, weight, None if is_full else used
        )
        if before is not None:
            old = torch.arange(slots) < self.count.unsqueeze(-1)
            first = torch.where(old, before, self.weight[..., :slots])
            self.weight = torch.cat([first, self.weight[..., slots:]], dim=-1)
        self.count = total
        for head in range(HEADS):
            for tile in range(TILES):
                for slot in range(int(used[0, head, tile])):
                    key = int(more[0, head, tile, slot])
                    if not self.held[head, tile, key]:
                        self.dense[head, tile, key] += weight[0, head, tile, slot].double().exp()

    @invariant()
    def the_plan_means_what_was_appended(self) -> None:
        if not hasattr(self, "index"):
            return  # before the beginning
        plan = TilePlan(
            key_index=self.index, key_count=self.count.int(), heavy_count=self.heavy.int(),
            tile_size=TILE, num_query_heads=HEADS, num_queries=TILES * TILE, num_keys=KEYS,
            log_weight=self.weight,
        ).validate()  # fmt: skip
        expected = self.dense.repeat_interleave(TILE, dim=1)
        torch.testing.assert_close(plan.to_dense()[0], expected, rtol=1e-5, atol=1e-7)


TestRegistryLife = RegistryLife.TestCase
TestListsUnderAppend = ListsUnderAppend.TestCase
for case in (TestRegistryLife, TestListsUnderAppend):
    case.settings = settings(
        # of one life fifteen steps; a night has more lives
        max_examples=max(15, settings.default.max_examples // 2), stateful_step_count=15,
    )  # fmt: skip
