"""A budget sets the parameter that a detector's rule names, and what rows hold is about that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from hyperframe import detectors
from hyperframe.benchmarking.frontier import (
    BUDGET_RULES,
    TileOracle,
    default_detectors,
    has_budget,
    with_budget,
)
from hyperframe.benchmarking.frontier.budgets import LEFT_OUT, with_tile_size
from hyperframe.benchmarking.frontier.configurations import Configuration, configurations
from hyperframe.detectors import AbstractDetector
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.testing.oracles import causal_mask


@pytest.mark.parametrize("name", sorted({*BUDGET_RULES} & {*detectors.names()}))
def test_rules_name_registered_detectors_and_hold_about_the_budget(name: str) -> None:
    budget = 128
    detector = with_budget(detectors.create(name), budget)
    assert type(detector) is type(detectors.create(name))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 1024, 16, generator=generator).unbind()
    mask = detector.find(query, key, generator=generator)
    held = float(mask.nnz().double().mean()) / 1024
    # parts overlap, and fixed patterns come in steps of blocks; 64 leading keys are bigbird's own
    assert budget / 3 <= held <= 2 * budget + 64


@pytest.mark.parametrize(
    "spec, keys, expected",
    [
        ("heavy_columns", 100, "heavy_columns(num_columns=100)"),
        ("vertical_slash", 128, "vertical_slash(num_columns=96, num_diagonals=32)"),
        ("reformer_lsh(num_rounds=2)", 128, "reformer_lsh(num_rounds=2)"),
        ("quest(block_size=32)", 16, "quest(block_size=32, num_blocks=1)"),
        ("kmeans", 320, "kmeans(num_blocks=10)"),
        ("pca_tree(leaf_size=32)", 320, "pca_tree(leaf_size=32, num_leaves=10)"),
        ("bigbird", 320, "bigbird(num_random=2)"),
        ("bigbird", 64, "bigbird(num_random=0)"),
        ("strided | quest", 64, "strided(num_keys=32) | quest(num_blocks=2)"),
        ("block_list", 64, "block_list"),
    ],
)
def test_other_parameters_stay(spec: str, keys: int, expected: str) -> None:
    assert with_budget(detectors.create(spec), keys) == detectors.create(expected)


def test_every_registered_detector_is_measured_or_left_out_for_a_reason() -> None:
    named = set(default_detectors())
    assert named | set(LEFT_OUT) == {*detectors.names(), "none"}
    builtin = {entry.name for entry in detectors.entries() if entry.origin == "builtin"}
    for name in builtin - set(LEFT_OUT):
        assert has_budget(detectors.create(name)), f"{name} has no rule in BUDGET_RULES"


def test_presets_go_by_their_names() -> None:
    base = Configuration(detector="none", budget=None, sampler="uniform")
    found = configurations(
        base, names=["fast", "quest"], chosen_samplers=["uniform"], budgets=[128]
    )
    assert [(one.detector, one.budget) for one in found] == [
        ("auto(preset='fast')", None), ("quest", 128),
    ]  # fmt: skip


def test_own_rule_goes_first() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Strided(AbstractDetector):  # the name of one that has a rule in the table
        size: int = 1

        @classmethod
        def with_budget(cls, keys: int) -> Any:
            return "nothing" if keys == 13 else cls(size=2 * keys)

        def find(self, query: Any, key: Any, **options: Any) -> Any:
            raise AssertionError

    assert with_budget(Strided(), 4) == Strided(size=8)
    with pytest.raises(ArgumentTypeError, match="with_budget that returned str"):
        with_budget(Strided(), 13)
    with pytest.raises(ArgumentError, match="budget"):
        with_budget(Strided(), 0)


def test_tile_size_reaches_members() -> None:
    found = with_tile_size(detectors.create("sliding_window | quest"), 32)
    assert found == detectors.create("sliding_window | quest(tile_size=32)")
    assert with_tile_size(detectors.create("strided"), 32) == detectors.create("strided")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_queries", [40, 64])
def test_tile_oracle_holds_the_columns_with_most_mass(is_causal: bool, num_queries: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, num_queries, 8, generator=generator)
    key = torch.randn(1, 2, 64, 8, generator=generator)
    beside = detectors.create("sliding_window(width=4, num_sinks=2)")
    oracle = TileOracle(budget=5, tile_size=16, beside=beside)
    mask = oracle.find(query, key, scale=0.7, is_causal=is_causal).to_dense()
    logits = 0.7 * query.double() @ key.double().repeat_interleave(2, dim=1).transpose(-1, -2)
    seen = torch.ones(num_queries, 64, dtype=torch.bool)
    if is_causal:
        seen = causal_mask(num_queries, 64)
    mass = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    held = beside.find(query, key, is_causal=is_causal).to_dense()
    mass = mass.masked_fill(held, 0)
    for start in range(0, num_queries, 16):
        rows = slice(start, min(start + 16, num_queries))
        best = mass[:, :, rows].sum(dim=2).topk(5, dim=-1)
        expected = torch.zeros(1, 4, 64, dtype=torch.bool)
        expected.scatter_(-1, best.indices, best.values > 0)
        assert torch.equal(mask[:, :, rows], expected.unsqueeze(2) & seen[rows])
