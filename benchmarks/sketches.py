"""Point queries that decoding a column costs, by two linear sketches, as the column grows.

Columns of energy 1 with `tau / 2` rows at the bound, the rest of the energy normal noise. Each
sketch is asked for all rows that hold `1 / tau` of the energy, and counted are the numbers of the
sketch that the search looks at (point queries), the rows of the sketch, and what it finds:

- expander: one query for every cell of every layer, and one for every bit of the name of a cell
  whose plain sum is large enough to go on;
- dyadic: a CountSketch for every level of a tree over the rows; one query for every child of every
  node that is kept and every repetition. A node is kept if the median of its squares is at least
  half of the bound. Once with 9 repetitions, and once with `log2 n`, which a guarantee for all of
  n rows asks for. (The textbook's descent; the detector `count_sketch` scores nodes otherwise.)

The count of a dense product, `n`, is the line that both have to stay below.

`--growth` times the detector `count_sketch` instead, one head on a CPU, on rows of Pareto norms:
seconds of the processor, of `find` and of the decoding alone, with each decoder and all products,
and how they grow from one length to the next.

    python benchmarks/sketches.py --out benchmarks/results/sketches.jsonl
    python benchmarks/sketches.py --growth --tau 32 --out benchmarks/results/sketch-growth.jsonl
    python benchmarks/sketches.py --plot sketches.png --read benchmarks/results/sketches.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hyperframe.benchmarking.report import append_rows
from hyperframe.detectors.count_sketch import CountSketch as Detector
from hyperframe.detectors.expander_sketch import distinct
from hyperframe.kernels.ops.names import NUM_OUTPUTS, VERTICES
from hyperframe.sketching.columns import ColumnProblem
from hyperframe.sketching.count_sketch import BRANCHING, CountSketch
from hyperframe.sketching.expander_decoding import PLAIN, expander_rows
from hyperframe.sketching.expander_sketch import ExpanderSketch

CPU = torch.device("cpu")
WIDTH = 8  # cells or buckets, times tau


def problem(num_rows: int, tau: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return columns `[1, n, count]`, and their heavy rows `[count, tau / 2]`."""
    g = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.randperm(num_rows, generator=g)[: tau // 2] for _ in range(count)])
    x = torch.randn(count, num_rows, generator=g).scatter_(-1, place, 0.0)
    x = x / x.norm(dim=-1, keepdim=True) * 0.5**0.5
    sign = 1.0 - 2 * torch.randint(0, 2, place.shape, generator=g)
    return x.scatter(-1, place, sign * tau**-0.5).T[None].contiguous(), place


def expander(x: torch.Tensor, tau: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Return the counts of an ExpanderSketch, and candidates `[count, C]`."""
    g, rows, queries, size = torch.Generator().manual_seed(seed), [], 0.0, 0
    for _ in range(repetitions):
        drawn = ExpanderSketch.draw(1, num_rows=x.shape[1], tau=tau, width=WIDTH, device=CPU,
                                    generator=g)  # fmt: skip
        sketch, key = drawn.apply(x), torch.eye(x.shape[-1])[None]
        looked = int((tau * sketch[:, :, 0].square() >= PLAIN).sum()) / x.shape[-1]
        queries += drawn.layout.num_buckets * VERTICES + (NUM_OUTPUTS - 1) * looked
        size += drawn.layout.num_outputs
        rows.append(expander_rows(drawn, sketch, key, tau=tau, capacity=3 * tau))
    found = distinct(torch.cat(rows, dim=-1))[0]
    return {"sketch_rows": size, "point_queries": queries, "found": found}


def dyadic(x: torch.Tensor, tau: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Return the counts of a descent of the tree, one column after another, and candidates."""
    count = x.shape[-1]
    drawn = CountSketch.draw(1, num_rows=x.shape[1], width=WIDTH * tau, repetitions=repetitions,
                             device=CPU, generator=torch.Generator().manual_seed(seed))  # fmt: skip
    levels = [level[0] for level in drawn.apply(x)]
    found, queries = torch.full((count, 4 * tau), -1), 0
    for column in range(count):
        energy = levels[0][..., column].square()  # [repetitions, nodes]
        node = torch.arange(energy.shape[-1])
        for number in range(len(levels)):
            queries += energy.numel()
            node = node[energy.median(dim=0).values >= 0.5 / tau]
            if number + 1 == len(levels):
                break
            child = torch.arange(BRANCHING)
            bucket = drawn.blocks(number)[0][:, node].unsqueeze(-1) * BRANCHING + child
            energy = levels[number + 1][..., column].gather(-1, bucket.flatten(1)).square()
            node = (node.unsqueeze(-1) * BRANCHING + child).flatten()
        kept = node[: found.shape[-1]]
        found[column, : len(kept)] = kept
    size = sum(level.shape[0] * level.shape[1] for level in levels)
    return {"sketch_rows": size, "point_queries": queries / count, "found": found}


def measure(num_rows: int, tau: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Return the rows of one length."""
    x, place = problem(num_rows, tau, count, seed)
    many = max(9, math.ceil(math.log2(num_rows)) // 2 * 2 + 1)
    methods = {
        "expander, 1 map": lambda: expander(x, tau, 1, seed),
        "expander, 2 maps": lambda: expander(x, tau, 2, seed),
        "dyadic, 9 repetitions": lambda: dyadic(x, tau, 9, seed),
        f"dyadic, log2(n) = {many} repetitions": lambda: dyadic(x, tau, many, seed),
    }
    rows = []
    for name, method in methods.items():
        counts = method()
        found = counts.pop("found")
        recall = (found.unsqueeze(-1) == place.unsqueeze(-2)).any(dim=-2).double().mean()
        rows.append({
            "method": name.split(" =")[0], "n": num_rows, "tau": tau, "columns": count,
            "seed": seed, **counts, "candidates": float((found >= 0).sum()) / count,
            "recall": float(recall), "torch": torch.__version__,
        })  # fmt: skip
    return rows


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Return seconds of the processor: the least of some runs, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        before = time.process_time()
        call()
        found.append(time.process_time() - before)
    return min(found)


def growth(num_rows: int, tau: int, seed: int, repeats: int = 3) -> list[dict[str, Any]]:
    """Return times of `find` and of the decoding of one head, for each way to search."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 1, num_rows, 64, generator=g)
    query *= torch.rand(num_rows, 1, generator=g) ** -0.6
    key = torch.randn(1, 1, num_rows, 64, generator=g)
    rows = []
    for method in ("sketch, torch", "sketch, numba", "all products"):
        search, _, decoder = method.partition(", ")
        detector = Detector(tau=tau, search="sketch" if decoder else "exact",
                            decoder=decoder or "auto")  # fmt: skip
        times = {"find_s": timed(
            lambda: detector.find(query, key, generator=torch.Generator().manual_seed(seed)),  # noqa: B023
            repeats,
        )}  # fmt: skip
        if decoder:
            problem = ColumnProblem.of(query, key)
            search, _ = detector._search(problem, float(tau), torch.Generator().manual_seed(seed))
            step = 2048
            parts = problem.key.split(step, dim=1)
            times["decode_s"] = timed(lambda: [search(part) for part in parts], repeats)  # noqa: B023
        rows.append({
            "method": method, "n": num_rows, "tau": tau, "seed": seed, **times,
            "threads": torch.get_num_threads(), "torch": torch.__version__,
        })  # fmt: skip
    return rows


def print_growth(rows: list[dict[str, Any]]) -> None:
    """Print times, and their ratio to those of the length before."""
    print(f"{'method':>14} {'n':>8} {'find, s':>9} {'growth':>7} {'decode, s':>10} {'growth':>7}")
    before: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["method"], row["n"])):
        last = before.get(row["method"], {})
        cells = ""
        for field, width in (("find_s", 9), ("decode_s", 10)):
            now, then = row.get(field), last.get(field)
            cells += f" {now:>{width}.2f}" if now else " " * (width + 1)
            cells += f" {now / then:>6.1f}x" if now and then else " " * 8
        print(f"{row['method']:>14} {row['n']:>8}{cells}")
        before[row["method"]] = row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw point queries and rows of the sketch as functions of n."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for axis, field in zip(axes, ("point_queries", "sketch_rows"), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = sorted((r["n"], r[field]) for r in rows if r["method"] == method)
            axis.plot(*zip(*chosen, strict=True), marker="o", label=method)
        lengths = sorted({row["n"] for row in rows})
        axis.plot(lengths, lengths, color="grey", linestyle=":", label="all products")
        axis.set(xscale="log", yscale="log", xlabel="n", ylabel=field.replace("_", " "))
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, and append the rows to a file; or draw the rows of one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=None,
                        help="2^10 to 2^20; with --growth 2^13 and 2^15")  # fmt: skip
    parser.add_argument("--growth", action="store_true", help="time the detector instead")
    parser.add_argument("--tau", type=int, default=16)
    parser.add_argument("--columns", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the rows to this JSON-lines file")
    parser.add_argument("--read", type=Path, help="measure nothing; take the rows of this file")
    parser.add_argument("--plot", type=Path, help="draw the rows to this picture")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.read:
        rows = [json.loads(line) for line in options.read.read_text().splitlines()]
    elif options.growth:
        torch.set_num_threads(1)
        for length in options.lengths or [2**13, 2**15]:
            rows += growth(length, options.tau, options.seed)
        if options.out:
            append_rows(options.out, rows)
    else:
        print(f"{'method':>26} {'n':>8} {'rows':>7} {'queries':>8} {'found':>6} {'recall':>7}")
        for length in options.lengths or [2**e for e in range(10, 21, 2)]:
            for row in measure(length, options.tau, options.columns, options.seed):
                print(f"{row['method']:>26} {row['n']:>8} {row['sketch_rows']:>7} "
                      f"{row['point_queries']:>8.0f} {row['candidates']:>6.1f} "
                      f"{row['recall']:>7.4f}", flush=True)  # fmt: skip
                rows.append(row)
        if options.out:
            append_rows(options.out, rows)
    if options.growth:
        print_growth(rows)
    elif options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
