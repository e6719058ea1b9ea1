"""Draw the pictures of docs/sketching.md; writes sketching-*.png beside this file.

    python docs/images/make_sketching.py

`sketching-descent.png` is a real search: the bytes that `count_sketch` adds up at every node of its
tree for one column, and the nodes that it keeps. `sketching-cost.png` is drawn from the rows of
`benchmarks/results/sketches.jsonl`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

from hyperframe.sketching.columns import ColumnProblem
from hyperframe.sketching.count_sketch import BRANCHING, CountSketch

HERE = Path(__file__).parent
ROWS = HERE.parents[1] / "benchmarks" / "results" / "sketches.jsonl"
NUM_ROWS, TAU, REPETITIONS, WIDTH = 2048, 8, 8, 64
HEAVY = (300, 1111, 1700)
COLOURS = {"#d8d8d8": "never looked at", "#7aa6d8": "looked at", "#c8403c": "kept"}


def draw_descent(path: Path) -> None:
    """Draw the share of a heavy row's energy that every node shows, and what is kept."""
    g = torch.Generator().manual_seed(3)
    query = torch.randn(1, 1, NUM_ROWS, 16, generator=g)
    key = torch.randn(1, 1, 1, 16, generator=g)
    direction = key[0, 0, 0] / key.norm()
    for row in HEAVY:
        query[0, 0, row] += 24 * direction
    problem = ColumnProblem.of(query, key)
    drawn = CountSketch.draw(
        1, num_rows=NUM_ROWS, width=WIDTH, repetitions=REPETITIONS, device=torch.device("cpu"),
        generator=g,
    )  # fmt: skip
    unit = min(15, 127 // REPETITIONS)
    least = -(-REPETITIONS * unit // 5)
    figure, axes = plt.subplots(len(drawn.levels), 1, figsize=(9, 5.6))
    kept = torch.arange(drawn.levels[0])
    for level, (axis, sketch) in enumerate(zip(axes, drawn.apply(problem.query), strict=True)):
        value = sketch[0] @ problem.key[0, 0]  # [repetitions, buckets]
        byte = (value.square() * TAU * (unit + 0.5)).clamp(max=unit).floor()
        nodes = torch.arange(drawn.levels[level])
        bucket = nodes.expand(REPETITIONS, -1)
        if level:
            block = drawn.blocks(level - 1)[0]
            bucket = block[:, nodes // BRANCHING] * BRANCHING + nodes % BRANCHING
            kept = (kept.unsqueeze(-1) * BRANCHING + torch.arange(BRANCHING)).flatten()
        score = byte.gather(1, bucket).sum(dim=0)
        share, span = score / (REPETITIONS * unit), NUM_ROWS // drawn.levels[level]
        place = (nodes + 0.5) * span
        looked = torch.zeros(len(nodes), dtype=torch.bool).scatter(0, kept, True)
        chosen = looked & (score >= least)
        for which, colour in zip((~looked, looked & ~chosen, chosen), COLOURS, strict=True):
            axis.bar(place[which], share[which], width=max(span * 0.9, 5), color=colour,
                     zorder=2 if colour == "#d8d8d8" else 3)  # fmt: skip
        axis.axhline(0.2, color="black", linewidth=0.7, linestyle=":")
        axis.set(ylim=(0, 1.05), xlim=(0, NUM_ROWS), ylabel=f"{drawn.levels[level]:,} nodes")
        kept = nodes[chosen]
    handles = [Patch(color=colour, label=label) for colour, label in COLOURS.items()]
    axes[0].legend(handles=handles, fontsize=8, loc="lower right", ncols=3, bbox_to_anchor=(1, 1))
    axes[0].set_title("share of a heavy row's energy that a node shows", fontsize=10, loc="left")
    axes[-1].set_xlabel(f"row of Q; heavy in this column: {', '.join(map(str, HEAVY))}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    assert set(kept.tolist()) >= set(HEAVY)


def draw_cost(path: Path) -> None:
    """Draw point queries and rows of the sketches as functions of n, from the rows measured."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for axis, field, title in zip(
        axes, ("point_queries", "sketch_rows"),
        ("numbers that the search of a column looks at", "rows of the sketch"), strict=True,
    ):  # fmt: skip
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = sorted((r["n"], r[field]) for r in rows if r["method"] == method)
            style = "-" if method.startswith("expander") else "--"
            axis.plot(*zip(*chosen, strict=True), style, marker="o", markersize=4, label=method)
        lengths = sorted({row["n"] for row in rows})
        axis.plot(lengths, lengths, color="grey", linestyle=":", label="all products")
        axis.set(xscale="log", yscale="log", xlabel="n", ylabel=title)
        axis.set_xticks(lengths, [f"$2^{{{int(math.log2(n))}}}$" for n in lengths])
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    draw_descent(HERE / "sketching-descent.png")
    draw_cost(HERE / "sketching-cost.png")
