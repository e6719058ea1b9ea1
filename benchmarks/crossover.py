"""Where approximate attention overtakes exact attention on this machine.

Times the forward of exact attention (SDPA) and of several specs over growing lengths, in one run
and on the same inputs, with the error beside each time, and prints the first length from which
each spec stays faster. The inputs hold planted clusters: queries and keys of a cluster are close.

    python benchmarks/crossover.py --out benchmarks/results/crossover-cpu.jsonl
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hyperframe.attention import HyperAttention
from hyperframe.benchmarking.report import append_rows
from hyperframe.diagnostics import relative_error
from hyperframe.kernels.exact import exact_output

SPECS: dict[str, dict[str, Any]] = {
    "sort_lsh, non-causal": {"detector": "sort_lsh"},
    "heavy_columns, non-causal": {"detector": "heavy_columns"},
    "sort_lsh, recursive": {"detector": "sort_lsh", "causal": "recursive"},
    "heavy_columns, recursive": {"detector": "heavy_columns", "causal": "recursive"},
    "window | heavy_columns, single pass": {"detector": "sliding_window | heavy_columns"},
}


def planted(length: int, heads: int, head_dim: int, device: str) -> tuple[torch.Tensor, ...]:
    """Return query, key and value of 64 clusters; scaled so that a cluster carries most mass."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(1, heads, 64, head_dim, generator=generator)
    members = torch.randint(64, (2, length), generator=generator)
    noise = torch.randn(3, 1, heads, length, head_dim, generator=generator)
    query = 2 * (centres[:, :, members[0]] + 0.5 * noise[0])
    key = centres[:, :, members[1]] + 0.5 * noise[1]
    value = noise[2] + centres[:, :, members[1]]
    return tuple(tensor.to(device) for tensor in (query, key, value))


def seconds(function: Callable[[], torch.Tensor], repeats: int, device: str) -> float:
    """Return the median time of some calls after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**e for e in range(10, 16)])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    rows = []
    print(f"{'n':>7} {'exact ms':>9}  spec")
    for length in options.lengths:
        q, k, v = planted(length, options.heads, options.head_dim, options.device)
        scale = options.head_dim**-0.5
        for name, spec in SPECS.items():
            is_causal = "non-causal" not in name
            attention = HyperAttention(**{"min_seq_len": min(512, length // 4), **spec})
            with torch.no_grad():
                run_exact = functools.partial(
                    exact_output, q, k, v, scale=scale, is_causal=is_causal
                )
                run_ours = functools.partial(attention, q, k, v, is_causal=is_causal)
                exact = seconds(run_exact, options.repeats, options.device)
                ours = seconds(run_ours, options.repeats, options.device)
                out = attention(q, k, v, is_causal=is_causal)
                error = relative_error(q, k, v, out, is_causal=is_causal)
            row = {
                "spec": name, "n": length, "heads": options.heads, "head_dim": options.head_dim,
                "exact_ms": 1e3 * exact, "ms": 1e3 * ours, "speed_up": exact / ours,
                "relative_error": float(error.median()), "device": options.device,
                "threads": torch.get_num_threads(), "torch": torch.__version__,
                "machine": platform.machine(),
            }  # fmt: skip
            rows.append(row)
            print(
                f"{length:>7} {1e3 * exact:>9.1f}  {name:<36} {1e3 * ours:>9.1f} ms "
                f"{exact / ours:>6.2f}x  error {row['relative_error']:.3f}",
                flush=True,
            )
    print("\nfaster than exact attention from n =")
    for name in SPECS:
        slower = [row["n"] for row in rows if row["spec"] == name and row["speed_up"] <= 1]
        faster = [n for n in options.lengths if n > max(slower, default=0)]
        print(f"  {name:<36} {min(faster) if faster else 'never in this range'}")
    if options.out:
        append_rows(options.out, rows)


if __name__ == "__main__":
    main()
