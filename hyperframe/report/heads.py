"""Figure: error, mass held and alpha / n of every head, as heat maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .alpha import QUANTITY, alpha_rows
from .drawing import figure, label_log, panel_title
from .rows import Row, Task, make_row, measured, over_heads
from .source import Source

__all__ = ["CAPTION", "draw", "summary", "tasks"]

CAPTION = (
    "Every head of every layer: the relative error of its output and the share of the softmax mass "
    "that the detector holds, and alpha / n without the first columns. Layers go down, heads to "
    "the right; darker is worse. Errors and alpha on logarithmic scales, one for all detectors."
)


def tasks(source: Source) -> Iterator[Task]:
    """Yield error and mass of every spec and layer, and alpha of every layer."""
    specs = source.settings.specs
    for number, layer in enumerate(source.problem.layers):
        for index, spec in enumerate(specs):
            yield Task(
                f"{spec}, layer {layer.layer_idx}", (index, number),
                lambda spec=spec, n=number: _rows(source, spec, n),  # type: ignore[misc]
                source.row("heads", "error", spec=spec, number=number),
            )  # fmt: skip
        if source.problem.length > source.settings.skip_first:
            yield Task(
                f"alpha of layer {layer.layer_idx}", (len(specs), number),
                lambda n=number: _alpha(source, n),  # type: ignore[misc]
                source.row("heads", QUANTITY, number=number),
            )  # fmt: skip


def _rows(source: Source, spec: str, number: int) -> Iterator[Row]:
    num_samples = source.settings.num_samples
    errors = source.errors(spec, number, num_samples=num_samples)
    yield from source.head_rows(
        "heads", "error", errors, spec=spec, number=number, num_samples=num_samples
    )
    mass, keys = source.held(spec, number)
    yield from source.head_rows("heads", "mass", mass, spec=spec, number=number)
    yield source.row("heads", "keys", statistic="layer", spec=spec, number=number, value=keys)


def _alpha(source: Source, number: int) -> list[Row]:
    rows = alpha_rows(source, number, source.problem.length, "heads")
    return [row for row in rows if row["skip_first"] == source.settings.skip_first]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return median and quartiles of every spec's errors and masses, and the mean of its keys."""
    shown = measured(rows, "heads")
    found = over_heads(
        [row for row in shown if row["quantity"] != QUANTITY],
        by=("spec", "quantity", "num_samples", "n"),
    )
    for spec in dict.fromkeys(row["spec"] for row in shown if row["quantity"] == "keys"):
        of_spec = [row for row in shown if row["quantity"] == "keys" and row["spec"] == spec]
        value = sum(row["value"] for row in of_spec) / len(of_spec)
        kept = {name: of_spec[0][name] for name in ("figure", "file", "digest", "n", "seed")}
        found.append(make_row(**kept, quantity="keys", spec=spec, statistic="mean", value=value))
    return found


def draw(rows: Sequence[Row], specs: Sequence[str]) -> Any:
    """Draw a line of maps for each spec, and one of alpha; None where there are no rows."""
    shown = measured(rows, "heads", statistic="head")
    lines: list[list[tuple[str, list[Row]]]] = []
    for spec in specs:
        of_spec = [row for row in shown if row["spec"] == spec]
        if of_spec:
            lines.append(
                [
                    (f"{name}: {spec}", [row for row in of_spec if row["quantity"] == name])
                    for name in ("error", "mass")
                ]
            )
    alphas = [row for row in shown if row["quantity"] == QUANTITY]
    if alphas:
        skipped = alphas[0]["skip_first"]
        lines.append([(f"{QUANTITY}, without the first {skipped} columns", alphas)])
    if not lines:
        return None
    layers = sorted({row["layer"] for row in shown})
    heads = list(dict.fromkeys(row["head"] for row in shown))
    scales = {
        "error": {"cmap": "Reds", "norm": _decades(shown, "error")},
        "mass": {"cmap": "Blues_r", "vmin": 0.0, "vmax": 1.0},
        QUANTITY: {"cmap": "Purples", "norm": _decades(shown, QUANTITY)},
    }
    drawn = figure(0.4 + len(lines) * (1.0 + 0.16 * len(layers)))
    axes = drawn.subplots(len(lines), 2, squeeze=False)
    for of_line, panels in zip(axes, lines, strict=True):
        for axis in of_line[len(panels) :]:
            axis.set_axis_off()
        for axis, (title, some) in zip(of_line, panels, strict=False):
            known = {(row["layer"], row["head"]): row["value"] for row in some}
            grid = [[known.get((layer, head), float("nan")) for head in heads] for layer in layers]
            quantity = some[0]["quantity"] if some else "error"
            image = axis.imshow(grid, aspect="auto", **scales[quantity])
            bar = drawn.colorbar(image, ax=axis)
            if quantity != "mass":
                label_log(bar.ax.yaxis)
                bar.minorticks_off()
            bar.ax.tick_params(labelsize=6)
            axis.set_title(panel_title(title), fontsize=7)
            _ticks(axis, heads, layers)
    return drawn


def _decades(rows: Sequence[Row], quantity: str) -> Any:
    """Return a logarithmic scale, three decades at most; what is below has the lightest colour."""
    from matplotlib.colors import LogNorm

    values = [row["value"] for row in rows if row["quantity"] == quantity]
    top = max(values, default=0.0) or 1.0
    least = min(max(min(values, default=0.0), 1e-3 * top), 0.5 * top)
    return LogNorm(vmin=least, vmax=top, clip=True)


def _ticks(axis: Any, heads: Sequence[int], layers: Sequence[int]) -> None:
    """Name the heads and layers, as many of them as fit."""
    every, each = -(-len(heads) // 9), -(-len(layers) // 12)
    axis.set_xticks(range(0, len(heads), every), [str(head) for head in heads[::every]])
    axis.set_yticks(range(0, len(layers), each), [str(layer) for layer in layers[::each]])
    axis.tick_params(labelsize=6)
