"""How long each Triton kernel takes by itself, over block sizes; the table of `configs` is from it.

Times the launches of the forward and of the backward of two plans, one by one, by CUDA events:
`blocks`, what sort_lsh without a mask makes (b = m = 256), and `tiles`, the causal plan of the
suite `tiles`. One row for each kernel and configuration; the default is the configuration in use.

    python benchmarks/kernels.py --out benchmarks/results/kernels-h100.jsonl
    python benchmarks/kernels.py --sweep
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from hyperframe import detectors, samplers
from hyperframe.benchmarking.methods import tile_plan
from hyperframe.builder import build_plans
from hyperframe.kernels.triton import attend
from hyperframe.kernels.triton.configs import OVERRIDES, Config
from hyperframe.randomness import Stream

KERNELS = ("forward", "small forward", "rows", "range", "sampled", "scatter")
SWEEP = [
    Config(64, 64, 4, 2), Config(64, 64, 4, 2, 128), Config(64, 64, 4, 2, 168),
    Config(64, 64, 4, 3), Config(64, 64, 4, 3, 168), Config(64, 32, 4, 3, 168),
    Config(64, 128, 4, 2), Config(64, 128, 4, 3), Config(128, 64, 8, 2, 128),
    Config(128, 64, 8, 3, 128), Config(128, 128, 8, 2),
]  # fmt: skip


def plans(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """Return the two plans by name."""
    seed = Stream.of(0, query.device)
    mask = detectors.create("sort_lsh").find(query, key, generator=seed)
    draw = samplers.create("uniform").draws(query, key, key, num_samples=256, generator=seed)
    (blocks,) = build_plans(mask, key_heads=key.shape[1], draw=draw)
    yield "blocks", blocks
    yield "tiles", tile_plan(query, key, seed=0)


def step(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad_out: torch.Tensor, plan: Any
) -> None:
    """Attend by a plan, forward and backward."""
    scale = query.shape[-1] ** -0.5
    out, lse, floored = attend.forward(query, key, value, [plan], None, scale)
    attend.backward(grad_out, None, query, key, value, out, lse, floored, [plan], None, scale)


def launches(call: Callable[[], object], repeats: int) -> dict[str, tuple[float, Config]]:
    """Return the median milliseconds of every kernel that a call launches, and what it ran with."""
    found: dict[str, list[tuple[Any, Any, Config]]] = {}
    launch = attend.launch

    def timed(kernel: Any, key: tuple[Any, ...], *arguments: Any) -> Config:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        used = launch(kernel, key, *arguments)
        stop.record()
        found.setdefault(str(key[0]), []).append((start, stop, used))
        return used

    call()
    torch.cuda.synchronize()
    attend.launch = timed
    try:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    finally:
        attend.launch = launch
    return {
        name: (statistics.median(start.elapsed_time(stop) for start, stop, _ in runs), runs[0][2])
        for name, runs in found.items()
    }


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="time other configurations too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for head_dim in options.head_dims:
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (1, options.heads, options.length, head_dim)
        query, key, value, grad_out = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
            for _ in range(4)
        )
        for name, plan in plans(query, key):
            for config in [None, *(SWEEP if options.sweep else [])]:
                OVERRIDES.clear()
                if config is not None:
                    OVERRIDES.update({(kernel, head_dim): config for kernel in KERNELS})
                call = functools.partial(step, query, key, value, grad_out, plan)
                for kernel, (milliseconds, used) in launches(call, options.repeats).items():
                    if config is not None and used != config:
                        continue  # the compiler refused it
                    row = {
                        "plan": name, "kernel": kernel, "n": options.length,
                        "heads": options.heads, "head_dim": head_dim, "dtype": "bfloat16",
                        "ms": milliseconds, "in_use": config is None, "config": vars(used),
                        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                        "triton": triton.__version__,
                    }  # fmt: skip
                    rows.append(row)
                    print(f"{head_dim:>4} {name:<7}{kernel:<9}{milliseconds:>8.3f} ms  {used}",
                          flush=True)  # fmt: skip
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
