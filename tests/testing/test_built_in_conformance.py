"""Every built-in component keeps what the library asks of any component."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from hyperframe import detectors, estimators, samplers
from hyperframe.component import AbstractComponent
from hyperframe.testing import parametrize_with_checks

# torch's own: its compiler makes an instance of the function to trace it
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

# small parameters, with which 40 keys are many; what has none here is checked by its name
SMALL: dict[str, list[str]] = {
    "antidiagonal": ["antidiagonal(block_size=6, num_blocks=2, stride=3, tile_size=9)"],
    "auto": ["auto", "auto(preset='fast')"],
    "balanced_lsh": ["balanced_lsh(block_size=6, num_projections=3, checkpoint=5)"],
    "bigbird": ["bigbird(block_size=6, window_blocks=2, num_random=1, num_global=7, seed=4)"],
    "block_list": ["block_list(blocks=((0, 0),), block_size=9)"],
    "butterfly": ["butterfly(block_size=6)"],
    "count_sketch": [
        "count_sketch(tau=6, tile_size=9, search='sketch', repetitions=5)",
        "count_sketch(tau=6, tile_size=9, positive_only=True, center=True)",
        "count_sketch(tau=6, tile_size=16, max_keys_per_tile=9)",
    ],
    "dilated": ["dilated(width=6, dilation=3)"],
    "expander_sketch": ["expander_sketch(tau=6, tile_size=16)",
                        "expander_sketch(tau=6, tile_size=9, search='sketch', repetitions=2)"],
    "heavy_columns": ["heavy_columns(num_columns=6, num_queries=5, tile_size=9)",
                      "heavy_columns(num_columns=0.1)"],
    "kmeans": ["kmeans(tile_size=9, chunk_size=18, block_size=6, num_blocks=2, batch_size=20)"],
    "learned_count_sketch": [
        "learned_count_sketch(tau=6, tile_size=9, search='sketch', repetitions=5)",
        (
            "learned_count_sketch(tau=6, tile_size=9, search='sketch', width=0.5, num_unique=9, "
            "oracle='leverage', positive_only=True, center=True)"
        ),
    ],
    "lsh_topk": ["lsh_topk(num_keys=6, num_buckets=8, reach=9, tile_size=9)"],
    "oracle": ["oracle(budget=6)"],
    "pca_tree": ["pca_tree(tile_size=9, num_means=2, chunk_size=18, leaf_size=6, num_leaves=2)"],
    "pooled_topk": [
        "pooled_topk(tile_size=9, num_means=2, chunk_size=18, block_size=6, num_blocks=2)"
    ],
    "quest": ["quest(block_size=6, num_blocks=2, num_queries=3, tile_size=9)"],
    "refined": ["refined(candidates='oracle(budget=60)', num_keys=6, top_p=0.9, tile_size=9)"],
    "reformer_lsh": ["reformer_lsh(block_size=6, num_buckets=8, num_rounds=2)"],
    "sliding_window": ["sliding_window(width=6, num_sinks=2)"],
    "sort_lsh": ["sort_lsh(block_size=6)", "sort_lsh(block_size=6, num_rounds=2)",
                 "sort_lsh(block_size=7, centre_keys=True)"],
    "strided": ["strided(num_keys=6)"],
    "union": ["oracle(budget=6) | sort_lsh(block_size=6) | sliding_window(width=5)"],
    "vertical_slash": [
        "vertical_slash(num_columns=6, num_diagonals=24, num_queries=3, tile_size=8)"
    ],
}  # fmt: skip
SMALL_SAMPLERS: dict[str, list[str]] = {
    "importance": ["importance(tile_size=4, num_queries=5)"],
    "kde": ["kde(num_queries=5)"],
    "row_norm": ["row_norm", "row_norm(replacement=False)"],
    "stratified": ["stratified", "stratified(strata='detector')"],
    "uniform": ["uniform", "uniform(replacement=False)"],
}
SMALL_ESTIMATORS: dict[str, list[str]] = {
    "approx_d": ["approx_d", "approx_d(strict=True)", "approx_d(cap_attention=True, kappa=3.0)"],
}

GRAPH = "compiles_to_one_graph"
EXPECTED: dict[str, Mapping[str, str]] = {}


def specs(registry: Any, small: dict[str, list[str]]) -> list[str]:
    names = [entry.name for entry in registry.entries() if entry.origin == "builtin"]
    assert set(small) <= set(names)
    return [spec for name in names for spec in small.get(name, [name])]


def expected(component: AbstractComponent) -> Mapping[str, str]:
    if getattr(component, "max_keys_per_tile", None) is not None:
        return {"finds_what_it_says": "max_keys_per_tile leaves out entries"}
    return EXPECTED.get(component.name, {})


def marks(component: AbstractComponent, name: str) -> Any:
    if name == GRAPH:  # together half of the time
        return pytest.mark.slow
    is_statistical = name.startswith(("weights_", "sums_are_right", "draws_beside"))
    return pytest.mark.statistical if is_statistical else None


@parametrize_with_checks(
    specs(detectors.registry, SMALL), kind="detector", expected_failed_checks=expected, marks=marks
)
def test_a_built_in_detector_conforms(check: Any) -> None:
    check()


@parametrize_with_checks(specs(samplers.registry, SMALL_SAMPLERS), kind="sampler", marks=marks)
def test_a_built_in_sampler_conforms(check: Any) -> None:
    check()


@parametrize_with_checks(
    specs(estimators.registry, SMALL_ESTIMATORS), kind="estimator", marks=marks
)
def test_a_built_in_estimator_conforms(check: Any) -> None:
    check()
