"""Memory of finding: linear in the length, beside chunks of a bounded size."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import hyperframe.detectors
import hyperframe.kernels
from hyperframe.detectors import create

CHUNK = 1 << 18  # small beside what the lists of these lengths take
LENGTH = 4096
SPECS = [
    "antidiagonal", "auto", "auto(preset='fast')", "balanced_lsh", "bigbird", "butterfly",
    "dilated", "heavy_columns", "kmeans", "lsh_topk", "pca_tree", "pooled_topk", "quest",
    "refined(candidates='vertical_slash', num_keys=256)", "reformer_lsh", "sliding_window",
    "sort_lsh", "strided", "vertical_slash",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chunks be small, wherever there are any."""
    names = ["hyperframe.ragged", "hyperframe.plan"]
    for package in (hyperframe.detectors, hyperframe.kernels):
        found = pkgutil.iter_modules(package.__path__, package.__name__ + ".")
        names += [module.name for module in found]
    patched = 0
    for name in names:
        module = importlib.import_module(name)
        if hasattr(module, "_CHUNK_BYTES"):
            monkeypatch.setattr(module, "_CHUNK_BYTES", CHUNK)
            patched += 1
    assert patched >= 8


def held(spec: str, length: int, *, is_causal: bool) -> int:
    """The most bytes at once that `find` allocates on top of its inputs."""
    g = torch.Generator().manual_seed(length)
    query, key = torch.randn(2, 1, 1, length, 8, generator=g).unbind(0)
    detector = create(spec)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        detector.find(query, key, is_causal=is_causal, generator=g)
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    now, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_twice_the_length_takes_twice_the_memory(spec: str, is_causal: bool) -> None:
    once, twice = (held(spec, n, is_causal=is_causal) for n in (LENGTH, 2 * LENGTH))
    # a square would be four times; a chunk may be reached by the longer input alone
    assert twice <= 2.3 * once + 2 * CHUNK, (once, twice)
    # never the scores of all pairs, of which a byte each would be too many
    assert twice < (2 * LENGTH) ** 2 / 2, (once, twice)
