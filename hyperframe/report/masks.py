"""Figure: which entries detectors hold, over the attention matrix of one head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..diagnostics.scores import Scores, exponentials
from ..errors import ArgumentError
from .drawing import WIDTH, colour_of, figure, panel_title
from .rows import Row, Task, measured
from .source import Source

__all__ = ["CAPTION", "cell_means", "draw", "tasks"]

CAPTION = (
    "One head. Grey: the attention matrix, the logarithm of the mean softmax entry of each cell; "
    "queries go down, keys to the right. Colour: the share of a cell's entries that the detector "
    "holds. Dark cells without colour are left to the samples. After the paper's Figure 1."
)
_DECADES = 4.0  # of the grey scale


def tasks(source: Source) -> Iterator[Task]:
    """Yield the attention matrix, and the mask of every spec."""
    number, place = _chosen(source)
    where = f"layer {source.layer(number).layer_idx}, head {source.head_names[place]}"
    common = {"number": number, "place": place}
    yield Task(
        f"attention matrix of {where}", (-1, number), lambda: [_attention_row(source, common)],
        source.row("masks", "attention", **common),
    )  # fmt: skip
    for index, spec in enumerate(source.settings.specs):
        yield Task(
            f"mask of {spec}, {where}", (index, number),
            lambda spec=spec: _mask_rows(source, spec, common),  # type: ignore[misc]
            source.row("masks", "held", spec=spec, **common),
        )  # fmt: skip


def _chosen(source: Source) -> tuple[int, int]:
    """Return the places of layer and head in the file."""
    layers = [layer.layer_idx for layer in source.problem.layers]
    if source.settings.head is None:
        return len(layers) // 2, 0
    layer, head = source.settings.head
    if layer not in layers or head not in source.head_names:
        raise ArgumentError(
            f"--head {layer}.{head}: {source.problem.file} holds the layers {layers} and of each "
            f"the heads {source.head_names}; name one of them"
        )
    return layers.index(layer), source.head_names.index(head)


def _attention_row(source: Source, common: dict[str, int]) -> Row:
    scores = _scores(source, common)

    def softmax(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        terms, total, _ = exponentials(logits)
        return terms[0, 0].double() / torch.where(total > 0, total, 1.0)[0, 0]

    values = cell_means(scores, source.settings.cells, softmax)
    return source.row("masks", "attention", statistic="map", values=_plain(values), **common)


def _mask_rows(source: Source, spec: str, common: dict[str, int]) -> list[Row]:
    scores, number, place = _scores(source, common), common["number"], common["place"]
    mask = source.mask(spec, number)
    num_held = 0

    def held(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        nonlocal num_held
        some = mask.rows(int(rows[0]), int(rows[-1]) + 1)[0, place, :, : logits.shape[-1]]
        num_held += int(some.sum())
        return some.double()

    values = cell_means(scores, source.settings.cells, held)
    density = num_held / max(1, int(scores.num_visible().sum()))
    mass = source.held(spec, number)[0][place]
    return [
        source.row("masks", "held", statistic="map", spec=spec, values=_plain(values), **common),
        source.row("masks", "density", statistic="head", spec=spec, value=density, **common),
        source.row("masks", "mass", statistic="head", spec=spec, value=mass, **common),
    ]


def _scores(source: Source, common: dict[str, int]) -> Scores:
    """Return the scores of the head, of the first batch item."""
    layer, place = source.layer(common["number"]), common["place"]
    key_place = place * layer.key.shape[1] // layer.query.shape[1]
    return Scores.of(
        layer.query[:1, place : place + 1], layer.key[:1, key_place : key_place + 1],
        scale=layer.scale, is_causal=layer.is_causal, dtype=None,
    )  # fmt: skip


def cell_means(
    scores: Scores, cells: int, of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the means of a matrix over the visible entries of cells of a coarse grid.

    Args:
        scores: of one batch item and head.
        cells: of the longer side at most; a shorter matrix has a cell for each entry.
        of: some rows and their logits `[1, 1, R, seen]` -> float64 `[R, seen]`, 0 where hidden.

    Returns:
        float64 `[cells_q, cells_k]`; nan where no entry is visible.

    Cost: one pass over the logits, in chunks of rows.
    """
    num_rows, num_keys = scores.num_queries, scores.num_keys
    step = max(1, -(-max(num_rows, num_keys) // cells))
    shape = (-(-num_rows // step), -(-num_keys // step))
    device = scores.query.device
    column_cell = torch.arange(num_keys, device=device) // step
    edges = torch.arange(shape[1] + 1, device=device).mul(step).clamp(max=num_keys)
    visible = scores.num_visible()
    total, count = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
    for chunk in scores.chunks():
        entries = of(chunk.rows, chunk.logits)
        row_cell = chunk.rows.to(device) // step
        pooled = entries.new_zeros(len(row_cell), shape[1])
        pooled.index_add_(1, column_cell[: entries.shape[-1]], entries)
        total.index_add_(0, row_cell, pooled)
        seen = torch.minimum(visible[chunk.rows.to(device)].unsqueeze(-1), edges).diff(dim=-1)
        count.index_add_(0, row_cell, seen.double())
    return total / torch.where(count > 0, count, float("nan"))


def _plain(values: torch.Tensor) -> list[list[float | None]]:
    """Return a matrix in values of JSON, with four digits; nan becomes null."""
    return [[None if math.isnan(x) else float(f"{x:.4g}") for x in row] for row in values.tolist()]


def draw(rows: Sequence[Row], specs: Sequence[str]) -> Any:
    """Draw the maps; None where there are none.

    Args:
        rows: of a report.
        specs: in the order of the panels.
    """
    maps = measured(rows, "masks", statistic="map", quantity="attention")
    held = [
        row
        for spec in specs
        for row in measured(rows, "masks", statistic="map", quantity="held", spec=spec)
    ]
    if not maps:
        return None
    grey = torch.tensor(_with_nan(maps[0]["values"])).clamp(min=1e-30).log10()
    top = float(grey.nan_to_num(-30.0).max())
    panels = [*maps, *held]
    lines = -(-len(panels) // 2)
    drawn = figure((WIDTH / 2 + 0.35) * lines)
    axes = drawn.subplots(lines, 2, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, panels, strict=False):
        shown = grey if row["spec"] is None else grey.masked_fill(grey.isnan(), top - _DECADES)
        num_rows = row["n"] * shown.shape[0] / shown.shape[1]  # up to a part of a cell
        extent = (0, row["n"], num_rows, 0)
        scale = {"extent": extent, "interpolation": "nearest", "aspect": "equal"}
        axis.imshow(shown.numpy(), cmap="Greys", vmin=top - _DECADES, vmax=top, **scale)
        axis.tick_params(labelsize=6)
        if row["spec"] is None:
            title = f"layer {row['layer']}, head {row['head']}\nattention, n = {row['n']:,}"
        else:
            share = torch.tensor(_with_nan(row["values"])).nan_to_num(0.0)
            paint = torch.tensor([*_rgb(colour_of(specs, row["spec"])), 0.0])
            paint = paint.repeat(*share.shape, 1)
            paint[..., 3] = 0.75 * share.sqrt()  # so that a few entries of a cell can be seen
            axis.imshow(paint.numpy(), **scale)
            title = f"{panel_title(row['spec'])}\n{_numbers(rows, row['spec'])}"
        axis.set_title(title, fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("query", fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("key", fontsize=7)
    return drawn


def _numbers(rows: Sequence[Row], spec: str) -> str:
    found = {
        name: measured(rows, "masks", spec=spec, quantity=name)[0]["value"]
        for name in ("density", "mass")
    }
    percent = 100 * found["density"]
    share = format(percent, ".2g" if percent < 10 else ".0f")  # 100 and not 1e+02
    return f"mass {found['mass']:.3f} in {share}% of the entries"


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    found: tuple[float, float, float] = to_rgb(colour)
    return found


def _with_nan(values: list[list[float | None]]) -> list[list[float]]:
    return [[float("nan") if x is None else x for x in row] for row in values]
