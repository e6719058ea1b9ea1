"""Draw the pictures of docs/concepts.md with the library itself; writes concepts-*.png beside it.

    python docs/images/make_concepts.py

One head of 128 tokens with a few planted heavy columns is taken through all steps: what is heavy
(`mask`), which keys stand for the rest (`sample`), how good the row sums are (`rows`), what a plan
of it looks like (`plan`), and how causal attention is cut into parts (`causal`).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from hyperframe import detectors, estimators, samplers
from hyperframe.builder import build_plans
from hyperframe.masks import HeavyMask
from hyperframe.rectangles import causal_levels, leaf_size, level_rectangles
from hyperframe.rowsums import RowSums

HERE = Path(__file__).parent
LENGTH, DIM, SAMPLES, TILE = 128, 16, 8, 16
COLUMNS = (3, 22, 51)
EXACT, SAMPLED, LIGHT = "#c8403c", "#3f73b5", "#e4e4e4"
LEVELS = ("#c8403c", "#7aa6d8", "#e0a645", "#77a877")
SCALE = DIM**-0.5


def heads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries and keys with neighbours that are alike, and columns that all rows like."""
    g = torch.Generator().manual_seed(5)
    walk = torch.randn(LENGTH, DIM, generator=g).cumsum(dim=0)
    walk = 4.5 * walk / walk.norm(dim=-1, keepdim=True)
    query, key = (walk + 0.7 * torch.randn(2, LENGTH, DIM, generator=g)).unbind()
    common = torch.zeros(DIM)
    common[0] = 3.5
    query += common  # a direction that all queries share, and single keys have
    key[list(COLUMNS)] = 1.6 * common
    value = torch.randn(LENGTH, DIM, generator=g)
    return query[None, None], key[None, None], value[None, None]


def found(query: torch.Tensor, key: torch.Tensor) -> HeavyMask:
    columns = f"heavy_columns(num_columns={len(COLUMNS) + 1}, tile_size={TILE // 2})"
    spec = f"sliding_window(width=8, num_sinks=1) | {columns}"
    g = torch.Generator().manual_seed(0)
    return detectors.create(spec).find(query, key, is_causal=True, generator=g)


def softmax(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    logits = SCALE * (query @ key.transpose(-1, -2))[0, 0]
    return logits.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf).softmax(dim=-1)


def _matrix(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set(xticks=[], yticks=[], xlabel="key", ylabel="query", xlim=(0, LENGTH), ylim=(LENGTH, 0))
    for side in axis.spines.values():
        side.set_color("#999999")


def _show(axis: Axes, values: torch.Tensor, **options: object) -> None:
    axis.imshow(values.numpy(), extent=(0, LENGTH, LENGTH, 0), interpolation="nearest", **options)


def _save(figure: plt.Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(HERE / f"concepts-{name}.png", dpi=120)
    plt.close(figure)


def draw_mask() -> None:
    """Draw a softmax matrix, and what a detector holds of it."""
    query, key, _ = heads()
    share, held = softmax(query, key), found(query, key).to_dense()[0, 0]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6))
    _matrix(axes[0], "softmax of the logits: few entries are heavy")
    _show(axes[0], share.sqrt(), cmap="Greys", vmin=0, vmax=0.7)
    mass = float(share[held].sum() / LENGTH)
    part = float(held.sum() / (LENGTH * (LENGTH + 1) / 2))
    _matrix(axes[1], f"HeavyMask: {mass:.0%} of the mass in {part:.0%} of the entries")
    _show(axes[1], share.sqrt(), cmap="Greys", vmin=0, vmax=0.7)
    over = torch.where(held, 1.0, torch.nan)
    _show(axes[1], over, cmap=ListedColormap([EXACT]), alpha=0.55)
    _save(figure, "mask")


def draw_sample() -> None:
    """Draw weights of one row: exact keys have 1, sampled ones what makes up for the others."""
    query, key, value = heads()
    mask, row = found(query, key), 120
    figure, axes = plt.subplots(3, 1, figsize=(9, 4.6), sharex=True)
    for axis, name in zip(axes, ("uniform", "stratified", "row_norm"), strict=True):
        draw = samplers.create(name).draws(
            query, key, value, num_samples=SAMPLES, generator=torch.Generator().manual_seed(2)
        )
        plans = build_plans(mask, key_heads=1, draw=draw)
        weight = torch.stack([plan.to_dense() for plan in plans]).sum(dim=0)[0, 0, row]
        held = mask.to_dense()[0, 0, row]
        axis.axhline(1, color="#aaaaaa", linewidth=0.7, linestyle=":")
        for which, colour in ((held, EXACT), (~held & (weight > 0), SAMPLED)):
            place = which.nonzero().squeeze(-1)
            axis.vlines(place, 0, weight[place], color=colour, linewidth=3)
        axis.set(xlim=(-1, LENGTH), ylim=(0, None), ylabel=name)
        axis.tick_params(labelsize=8)
    axes[0].set_title(
        f"weights of the keys of row {row}: held exactly (red), sampled for the rest (blue)",
        fontsize=10, loc="left",
    )  # fmt: skip
    axes[-1].set_xlabel("key")
    _save(figure, "sample")


def draw_rows() -> None:
    """Draw the error of row sums, row by row, for what is known of them."""
    query, key, _ = heads()
    mask = found(query, key)
    exact = estimators.create("exact").row_sums(query, key, mask).log_sum[0, 0].exp()
    plans = build_plans(mask, key_heads=1)
    held = torch.stack([plan.to_dense() for plan in plans]).sum(dim=0)[0, 0]
    logits = SCALE * (query @ key.transpose(-1, -2))[0, 0].double()
    partial = RowSums(log_sum=(held * logits.exp()).sum(dim=-1).log()[None, None])
    figure, axis = plt.subplots(figsize=(9, 3.4))
    axis.axhline(1, color="black", linewidth=0.8)
    axis.plot(partial.log_sum[0, 0].exp() / exact, color=EXACT, label="heavy entries alone")
    for count, colour in ((8, "#9dbbe0"), (32, SAMPLED)):
        sums = torch.stack([
            estimators.create("uniform").row_sums(
                query, key, mask, num_samples=count, generator=torch.Generator().manual_seed(seed)
            ).log_sum[0, 0].exp()
            for seed in range(25)
        ])  # fmt: skip
        low, high = (sums.quantile(q, dim=0) / exact for q in (0.1, 0.9))
        axis.fill_between(range(LENGTH), low, high, color=colour, alpha=0.8, linewidth=0,
                          label=f"and {count} sampled columns (8 draws of 10)")  # fmt: skip
    axis.set(xlabel="row", ylabel="row sums, estimated / exact", xlim=(0, LENGTH - 1))
    axis.legend(fontsize=8, loc="lower right", ncols=3, bbox_to_anchor=(1, 1), frameon=False)
    _save(figure, "rows")


def draw_plan() -> None:
    """Draw the weight matrix of a plan, with its tiles."""
    query, key, value = heads()
    draw = samplers.create("uniform").draws(
        query, key, value, num_samples=SAMPLES, generator=torch.Generator().manual_seed(1)
    )
    g = torch.Generator().manual_seed(0)
    spec = f"pooled_topk(tile_size={TILE}, block_size=8, num_blocks=2)"
    mask = detectors.create(spec).find(query, key, is_causal=True, generator=g)
    plans = build_plans(mask, key_heads=1, draw=draw)
    weight = torch.stack([plan.to_dense() for plan in plans]).sum(dim=0)[0, 0]
    held = mask.to_dense()[0, 0]
    figure, axis = plt.subplots(figsize=(6.4, 5))
    _matrix(axis, "TilePlan.to_dense(): weight 1 (red), above 1 (blue)")
    _show(axis, torch.where(held, 1.0, torch.nan), cmap=ListedColormap([EXACT]))
    sampled = torch.where(~held & (weight > 0), weight, torch.nan)
    image = axis.imshow(sampled.numpy(), extent=(0, LENGTH, LENGTH, 0), cmap="Blues", vmin=0)
    bar = figure.colorbar(image, ax=axis, shrink=0.7)
    bar.set_label("weight of a sampled key", fontsize=8)
    for row in range(TILE, LENGTH, TILE):
        axis.axhline(row, color="#555555", linewidth=0.7)
    axis.plot([0, LENGTH], [0, LENGTH], color="#555555", linewidth=0.7, linestyle=":")
    axis.set_yticks(range(TILE // 2, LENGTH, TILE), [f"tile {t}" for t in range(LENGTH // TILE)])
    axis.tick_params(axis="y", labelsize=8, length=0)
    _save(figure, "plan")


def draw_causal() -> None:
    """Draw the parts of both ways to attend causally."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.6))
    _matrix(axes[0], 'causal="single_pass": one problem, tiles')
    for row in range(0, LENGTH, TILE):
        axes[0].add_patch(Rectangle((0, row), row, TILE, color=LEVELS[1], linewidth=0))
        axes[0].add_patch(Rectangle((row, row), TILE, TILE, color=LEVELS[0], alpha=0.6))
        axes[0].axhline(row, color="white", linewidth=1)
    axes[0].fill_between([0, LENGTH], [0, LENGTH], 0, color="white")
    _matrix(axes[1], 'causal="recursive": leaves, and squares without a mask')
    leaf = leaf_size(LENGTH, LENGTH // 8)
    for number, level in enumerate(causal_levels(LENGTH, leaf)):
        for top, bottom, left, right in level_rectangles(level, LENGTH):
            axes[1].add_patch(Rectangle(
                (left, top), right - left, bottom - top, facecolor=LEVELS[1 + number % 3],
                edgecolor="white",
            ))  # fmt: skip
    for start in range(0, LENGTH, leaf):
        axes[1].fill([start, start, start + leaf], [start, start + leaf, start + leaf],
                     color=LEVELS[0], alpha=0.8, linewidth=0)  # fmt: skip
    _save(figure, "causal")


if __name__ == "__main__":
    for draw in (draw_mask, draw_sample, draw_rows, draw_plan, draw_causal):
        draw()
