"""Memory of the sketching detectors: linear in the length, never that of all pairs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hyperframe.detectors import create
from hyperframe.detectors.count_sketch import CountSketch


@functools.cache
def allocated(spec: str, n: int) -> tuple[int, int]:
    """Bytes that `find` allocates on top of its inputs: the most held at once, the largest one."""
    g = torch.Generator().manual_seed(n)
    query, key = torch.randn(2, 1, 1, n, 8, generator=g).unbind(0)
    detector = create(spec)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        detector.find(query, key, generator=g)
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    held, most, largest = 0, 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held, largest = held + event.nbytes(), max(largest, event.nbytes())
        most = max(most, held)
    return most, largest


@pytest.mark.parametrize("name", ["count_sketch", "expander_sketch"])
@pytest.mark.parametrize(
    "options",
    ["search='sketch', decoder='torch'", "search='sketch', decoder='numba'", "search='exact'"],
)
def test_memory_grows_with_the_length_and_not_with_its_square(name: str, options: str) -> None:
    if "numba" in options:
        pytest.importorskip("numba")
    spec = f"{name}(tau=4, max_bytes=1_000_000, max_keys_per_tile=32, {options})"
    n = 4096
    (most, largest), (most_twice, largest_twice) = allocated(spec, n), allocated(spec, 2 * n)
    # twice the length, and what levels and word sizes add by steps; a square would be four times
    assert most_twice <= 2.5 * most
    # not even a byte for each pair
    assert max(most, 4 * largest) < n * n
    assert max(most_twice, 4 * largest_twice) < 4 * n * n
    # the measure sees what is there: the entries alone, 8 bytes for each key and slot
    assert most > 8 * n * 4


def test_lists_without_a_limit_grow_with_keys_and_tiles_up_to_16_mib() -> None:
    # 64 tiles of 4,096 keys, 12 bytes each: 3 MiB; the limit is reached at about 9,000 rows
    n = 4096
    free, limited = (
        allocated(f"count_sketch(tau=4, search='sketch', max_bytes=1_000_000{more})", n)[0]
        for more in ("", ", max_keys_per_tile=32")
    )
    assert free - limited > 12 * n * n // 64
    longest = CountSketch(tau=4)._max_keys
    for rows in (1 << 14, 1 << 17, 1 << 20):
        assert -(-rows // 64) * longest(rows, rows) * 12 <= 1 << 24


def test_columns_are_searched_within_the_limit() -> None:
    small, large = (
        allocated(f"count_sketch(tau=4, search='sketch', max_keys_per_tile=32, {limit})", 4096)[0]
        for limit in ("max_bytes=1_000_000", "max_bytes=64_000_000")
    )
    # a limit of a 64th is felt
    assert small < 0.7 * large
    assert large - small < 64_000_000
