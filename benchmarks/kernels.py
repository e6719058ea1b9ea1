"""How long each Triton kernel takes by itself, over block sizes; the table of `configs` is from it.

Times the launches of the forward and of the backward of two plans, one by one, by CUDA events:
`blocks`, what sort_lsh without a mask makes (b = m = 256), and `tiles`, the causal plan of the
suite `tiles`. One row for each kernel and configuration; the first of a kernel is the one in use.

    python benchmarks/kernels.py --out benchmarks/results/kernels-h100.jsonl
    python benchmarks/kernels.py --sweep --jobs 14
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from hyperframe import detectors, samplers
from hyperframe.benchmarking.methods import tile_plan
from hyperframe.benchmarking.report import append_rows
from hyperframe.builder import build_plans
from hyperframe.kernels.triton import attend, plan_gradients, sample_gradients
from hyperframe.kernels.triton.configs import OVERRIDES, Config
from hyperframe.randomness import Stream

PLANS = {
    "blocks": ("forward", "rows", "range", "sampled"),
    "tiles": ("small forward", "tile backward"),
}
"""The kernels that a plan runs, by their names in the table of `configs`."""

_SHORT = 16384  # positions: enough to compile what runs at every length
_WIDE = [
    Config(64, 64, 4, 2), Config(64, 64, 4, 3), Config(64, 64, 4, 2, 168),
    Config(64, 32, 4, 3, 168), Config(64, 32, 4, 2), Config(128, 64, 8, 2, 128),
    Config(128, 32, 8, 3, 128),
]  # fmt: skip
_NARROW = [
    Config(64, 64, 4, 2, 128), Config(64, 64, 4, 3, 128), Config(64, 64, 4, 3, 168),
    Config(64, 128, 4, 2, 168), Config(64, 128, 4, 3), Config(128, 64, 8, 3, 128),
    Config(128, 64, 8, 2, 128), Config(64, 32, 4, 3, 168),
]  # fmt: skip
SWEEP = {64: _NARROW, 128: _WIDE}
"""Configurations to try, by head size."""


def plan_of(name: str, query: torch.Tensor, key: torch.Tensor) -> Any:
    """Return one of the plans by name."""
    if name == "tiles":
        return tile_plan(query, key, seed=0)
    seed = Stream.of(0, query.device)
    mask = detectors.create("sort_lsh").find(query, key, generator=seed)
    draw = samplers.create("uniform").draws(query, key, key, num_samples=256, generator=seed)
    (blocks,) = build_plans(mask, key_heads=key.shape[1], draw=draw)
    return blocks


def step_of(name: str, length: int, heads: int, head_dim: int) -> Callable[[], None]:
    """Return a function that attends by a plan, forward and backward."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, heads, length, head_dim)
    query, key, value, grad_out = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(4)
    )
    plan = plan_of(name, query, key)
    scale = head_dim**-0.5

    def step() -> None:
        out, lse, floored = attend.forward(query, key, value, [plan], None, scale)
        attend.backward(grad_out, None, query, key, value, out, lse, floored, [plan], None, scale)

    return step


def compile_one(name: str, heads: int, head_dim: int, kernel: str, config: Config | None) -> None:
    """Compile what a plan runs, with a configuration for one of its kernels, into the cache."""
    if config is not None:
        OVERRIDES[kernel, head_dim] = config
    step_of(name, _SHORT, heads, head_dim)()
    torch.cuda.synchronize()


def launches(step: Callable[[], object], repeats: int) -> dict[str, tuple[float, Config]]:
    """Return the median milliseconds of every kernel that a step launches, and what it ran with.

    By the names under which they are launched, which leave out how many rows a tile has.
    """
    found: dict[str, list[tuple[Any, Any, Config]]] = {}
    modules = (attend, plan_gradients, sample_gradients)
    launch = attend.launch

    def timed(kernel: Any, key: tuple[Any, ...], *arguments: Any) -> Config:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        used = launch(kernel, key, *arguments)
        stop.record()
        found.setdefault(str(key[0]), []).append((start, stop, used))
        return used

    step()
    torch.cuda.synchronize()
    for module in modules:
        module.launch = timed
    try:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    finally:
        for module in modules:
            module.launch = launch
    return {
        name: (statistics.median(start.elapsed_time(stop) for start, stop, _ in runs), runs[0][2])
        for name, runs in found.items()
    }


_LAUNCHED_AS = {"small forward": "forward"}


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="time other configurations too")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile beforehand")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cases: list[tuple[str, int, str, Config | None]] = [
        (name, head_dim, kernel, config)
        for head_dim in options.head_dims
        for name, kernels in PLANS.items()
        for kernel in kernels
        for config in (None, *(SWEEP[head_dim] if options.sweep else ()))
    ]
    if options.jobs > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            for future in [
                pool.submit(compile_one, name, options.heads, head_dim, kernel, config)
                for name, head_dim, kernel, config in cases
            ]:
                future.result()
    rows = []
    steps: dict[tuple[str, int], Callable[[], None]] = {}
    for name, head_dim, kernel, config in cases:
        if (name, head_dim) not in steps:
            steps = {(name, head_dim): step_of(name, options.length, options.heads, head_dim)}
        OVERRIDES.clear()
        if config is not None:
            OVERRIDES[kernel, head_dim] = config
        found = launches(steps[name, head_dim], options.repeats)
        milliseconds, used = found[_LAUNCHED_AS.get(kernel, kernel)]
        if config is not None and used != config:
            continue  # the compiler refused it
        rows.append({
            "plan": name, "kernel": kernel, "n": options.length, "heads": options.heads,
            "head_dim": head_dim, "dtype": "bfloat16", "ms": milliseconds,
            "in_use": config is None, "config": vars(used),
            "device": torch.cuda.get_device_name(), "torch": torch.__version__,
            "triton": triton.__version__,
        })  # fmt: skip
        print(f"{head_dim:>4} {name:<7}{kernel:<14}{milliseconds:>8.3f} ms  {used}", flush=True)
    if options.out:
        append_rows(options.out, rows)


if __name__ == "__main__":
    main()
