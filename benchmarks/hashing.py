"""How long `hash_orders` takes on a GPU, stage by stage, beside the torch implementation.

Medians of CUDA event times, in milliseconds: the three launches of the fused kernels, all of them
replayed as one CUDA graph (launches and allocations left out), and the torch implementation. One
row for a single run of all rows, one for the doubling run sizes of the causal recursion.

    python benchmarks/hashing.py
    python benchmarks/hashing.py --sweep --lengths 131072
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from hyperframe.kernels.hashing import hash_orders, torch_hash_orders
from hyperframe.kernels.triton.hashing import HashSort, Tuning

SMALLEST_RUN = 1024
TUNINGS = [
    Tuning(chunk=chunk, block_rows=rows, num_warps=warps, num_stages=stages)
    for chunk in (256, 512, 1024)
    for rows, warps in ((32, 1), (64, 2), (64, 4), (128, 4), (128, 8))
    for stages in (2, 3, 4)
]


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median time of some calls, each on a cold L2 cache."""
    cold = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    function()
    times = []
    for _ in range(repeats):
        cold.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """Return the function as a CUDA graph."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**e for e in range(12, 21, 2)])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--projections", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="time the hash kernel's tunings")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.dtype}")
    print(f"{'n':>8} {'d':>4} {'runs':>4} {'codes':>7} {'places':>7} {'orders':>7} "
          f"{'graph':>7} {'eager':>7} {'torch':>8} {'read ms':>8}")  # fmt: skip
    for length in options.lengths:
        for head_dim in options.head_dims:
            q, k = torch.randn(2, 1, options.heads, length, head_dim, device="cuda").to(dtype)
            shape = (1, options.heads, head_dim, options.projections)
            projection = torch.randn(shape, device="cuda").to(dtype).float()
            doubling = [SMALLEST_RUN << i for i in range(30) if SMALLEST_RUN << i < length]
            for runs in ((length,), tuple(doubling)):
                arguments = (q, k, projection, None, runs)
                sort = HashSort(*arguments)
                stages = (sort.write_codes, sort.write_first_places, sort.write_orders)
                calls: list[Callable[[], object]] = [captured(stage) for stage in stages]

                def call(arguments: tuple = arguments) -> object:  # type: ignore[type-arg]
                    return hash_orders(*arguments[:3], runs=arguments[4])

                calls += [captured(call), call, lambda a=arguments: torch_hash_orders(*a)]
                times = [milliseconds(call, options.repeats) for call in calls]
                # what a copy would take for the bytes of query and key, at 3 TB/s
                floor = 2 * q.numel() * q.element_size() / 3e9
                print(f"{length:>8} {head_dim:>4} {len(runs):>4} "
                      + " ".join(f"{x:7.3f}" for x in times[:5])
                      + f" {times[5]:8.3f} {floor:8.3f}", flush=True)  # fmt: skip
            if options.sweep:
                for tuning in TUNINGS:
                    sort = HashSort(q, k, projection, None, (length,), tuning)
                    time = milliseconds(captured(sort.write_codes), options.repeats)
                    print(f"{length:>8} {head_dim:>4} {time:7.3f}  {tuning}", flush=True)


if __name__ == "__main__":
    main()
