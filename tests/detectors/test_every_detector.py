"""Every built-in detector: found by its name, and made again from its spec."""

from __future__ import annotations

from dataclasses import fields

import pytest

from hyperframe import detectors

# every parameter differs from its default
SPECS = {
    "antidiagonal": "antidiagonal(block_size=6, num_blocks=2, stride=3, top_p=0.5, tile_size=9)",
    "auto": "auto(preset='fast')",
    "balanced_lsh": "balanced_lsh(block_size=6, num_projections=3, num_rounds=2, checkpoint=5)",
    "bigbird": ("bigbird(block_size=6, window_blocks=2, num_random=1, num_global=7, seed=4)"),
    "block_list": "block_list(blocks=((0, 0), (2, 1)), block_size=9)",
    "butterfly": "butterfly(block_size=6)",
    "count_sketch": (
        "count_sketch(tau=3, positive_only=True, center=True, repetitions=5, width=4, keep=3, "
        "search='sketch', max_keys_per_tile=6, tile_size=9, max_bytes=70000, decoder='torch')"
    ),
    "dilated": "dilated(width=6, dilation=3)",
    "expander_sketch": (
        "expander_sketch(tau=6, positive_only=True, center=True, search='sketch', "
        "max_keys_per_tile=9, tile_size=16, max_bytes=99, repetitions=3, width=4, keep=5, "
        "spectral=False, decoder='torch')"
    ),
    "heavy_columns": "heavy_columns(num_columns=6, num_queries=5, tile_size=9)",
    "kmeans": (
        "kmeans(tile_size=9, num_means=2, chunk_size=18, block_size=6, num_blocks=2, num_steps=3, "
        "batch_size=20)"
    ),
    "learned_count_sketch": (
        "learned_count_sketch(tau=3, positive_only=True, center=True, repetitions=5, width=4, "
        "keep=3, search='sketch', max_keys_per_tile=6, tile_size=9, max_bytes=70000, "
        "num_unique=7, oracle='leverage', decoder='torch')"
    ),
    "lsh_topk": (
        "lsh_topk(num_rounds=2, keep=3, num_keys=6, num_buckets=8, reach=9, min_offset=3, "
        "tile_size=9, votes=4)"
    ),
    "oracle": "oracle(budget=6)",
    "pca_tree": "pca_tree(tile_size=9, num_means=2, chunk_size=18, leaf_size=6, num_leaves=2)",
    "pooled_topk": (
        "pooled_topk(tile_size=9, num_means=2, chunk_size=18, block_size=6, num_blocks=2, "
        "pool_step=3)"
    ),
    "quest": "quest(block_size=6, num_blocks=2, num_queries=3, reduction='max', tile_size=9)",
    "refined": (
        "refined(candidates='oracle(budget=60)', num_keys=6, top_p=0.9, tile_size=9, vote_step=3)"
    ),
    "reformer_lsh": "reformer_lsh(block_size=6, num_buckets=8, num_rounds=2)",
    "sliding_window": "sliding_window(width=6, num_sinks=2)",
    "sort_lsh": "sort_lsh(block_size=6, num_projections=3, centre_keys=True, num_rounds=2)",
    "strided": "strided(num_keys=6)",
    "union": "union(detectors=('oracle(budget=6)', 'sliding_window(width=5)'))",
    "vertical_slash": (
        "vertical_slash(num_columns=6, num_diagonals=9, num_queries=3, num_segments=4, "
        "min_offset=2, tile_size=9, num_near=4, near_queries=2, min_segment=20)"
    ),
}


def test_every_built_in_detector_is_tested_here() -> None:
    assert set(SPECS) == set(detectors._BUILTINS)


@pytest.mark.parametrize("name", SPECS)
def test_a_detector_is_found_by_its_name_and_its_class_by_that_of_the_class(name: str) -> None:
    detector = detectors.create(name)
    assert detector.name == name
    assert detectors.to_spec(detector) == name
    assert type(detector) is getattr(detectors, type(detector).__name__)
    assert type(detector).__module__ == f"hyperframe.detectors.{name}"


@pytest.mark.parametrize("name, spec", SPECS.items())
def test_the_spec_of_a_detector_makes_an_equal_one(name: str, spec: str) -> None:
    detector, default = detectors.create(spec), detectors.create(name)
    for field in fields(detector):
        assert getattr(detector, field.name) != getattr(default, field.name), field.name
    again = detectors.create(detectors.to_spec(detector))
    assert again == detector != default
    assert repr(again) == repr(detector)
