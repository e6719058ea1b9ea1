"""The conformance suite on a CUDA device: the example's detector, and built-ins of each form."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyperframe.testing import check_detector, check_estimator, check_sampler

# torch's own: its compiler makes an instance of the function to trace it
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "hyperframe-topk-detector" / "src"

BUILT_IN = (
    "sort_lsh(block_size=8)",  # blocks in orders of their own
    "sliding_window(width=5, num_sinks=1)",  # a band
    "heavy_columns(num_columns=6, tile_size=8)",  # lists of keys
)


@pytest.fixture
def tile_topk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The detector of the example, from its source."""
    monkeypatch.syspath_prepend(EXAMPLE)
    yield importlib.import_module("hyperframe_topk_detector").tile_topk
    for name in [name for name in sys.modules if name.startswith("hyperframe_topk_detector")]:
        del sys.modules[name]


def test_the_example_conforms_on_cuda(tile_topk: Any) -> None:
    check_detector(tile_topk(tile_size=8, num_keys=10), device="cuda")


@pytest.mark.parametrize("spec", BUILT_IN)
def test_built_in_detectors_conform_on_cuda(spec: str) -> None:
    check_detector(spec, device="cuda")


@pytest.mark.parametrize("spec", ["uniform", "row_norm"])
def test_built_in_samplers_conform_on_cuda(spec: str) -> None:
    check_sampler(spec, device="cuda")


@pytest.mark.parametrize("spec", ["uniform", "exact"])
def test_built_in_estimators_conform_on_cuda(spec: str) -> None:
    check_estimator(spec, device="cuda")
