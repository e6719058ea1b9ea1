"""What the pictures of an evaluation show, read off their axes: every number is that of a row."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from hyperframe.evaluation import EVAL_KEYS
from hyperframe.evaluation.figures import FIGURES, draw
from hyperframe.evaluation.rows import Row

SPECS = ("fast", "balanced")
LENGTHS = (64, 256)
TEXTS = ("a.txt", "b.txt")


def row_of(task: str, run: str, **fields: Any) -> Row:
    return dict.fromkeys(EVAL_KEYS) | {"task": task, "run": run, "layers": 0} | fields


def curve(n: int, loss: float) -> list[dict[str, Any]]:
    firsts = [first for first in (1, 2, 4, 8, 16, 32, 64, 128) if first < n]
    return [
        {"first": first, "last": min(2 * first, n) - 1, "loss": loss + 1 / first}
        for first in firsts
    ]


def perplexities() -> list[Row]:
    """Exact attention 20 plus a little, each replaced layer 1 more, with errors of 2 percent."""
    rows = []
    for n in LENGTHS:
        for place, text in enumerate(TEXTS):
            exact = 20.0 + place + n / 1000
            common: dict[str, Any] = {"input": text, "n": n, "exact": exact}
            details = {"positions": curve(n, 3.0)}
            rows.append(row_of("perplexity", "exact", value=exact, details=details, **common))
            for number, spec in enumerate(SPECS, start=1):
                rows += [
                    row_of(
                        "perplexity", spec, layers=layers, value=exact + number * layers,
                        change=1.0, change_error=2.0, **common,
                        details={"positions": curve(n, 3.0 + number * layers / 10)},
                    )
                    for layers in (1, 3)
                ]  # fmt: skip
    return rows


def of_prefill() -> list[Row]:
    exact = {"attention": 0.25}
    rows = []
    for n in LENGTHS:
        rows.append(row_of("prefill", "exact", n=n, value=1.0, exact=1.0, details=exact))
        found: dict[str, Any] = {"value": 0.8, "exact": 1.0, "change": 1.25}
        rows.append(row_of("prefill", "fast", n=n, layers=3, **found, details={"attention": 0.05}))
    return rows


def errors_of(axis: Any) -> dict[str, list[tuple[float, float, float]]]:
    """Of every line with error bars: place, value and half the length of the bar."""
    found = {}
    for container in axis.containers:
        line, _, (segments,) = container.lines
        points = zip(*line.get_data(), segments.get_segments(), strict=True)
        found[container.get_label()] = [(x, y, (bar[1][1] - bar[0][1]) / 2) for x, y, bar in points]
    return found


def test_perplexity_against_layers_has_a_panel_each_errors_and_a_line_of_exact_attention() -> None:
    drawn = draw("layers", perplexities())
    titles = [f"{text}, n = {n}" for n in LENGTHS for text in TEXTS]
    assert [axis.get_title() for axis in drawn.axes] == titles
    for axis, n, place in zip(drawn.axes, (64, 64, 256, 256), (0, 1, 0, 1), strict=True):
        exact = 20.0 + place + n / 1000
        found = errors_of(axis)
        assert list(found) == list(SPECS)
        for number, spec in enumerate(SPECS, start=1):
            # exact attention itself has no error: it is what the others are compared with
            expected = [(0, exact, 0.0)] + [
                (layers, exact + number * layers, 0.02 * exact) for layers in (1, 3)
            ]
            assert [pytest.approx(point) for point in expected] == found[spec]
        (level,) = (line for line in axis.lines if line.get_label() == "exact")
        assert list(level.get_ydata()) == [exact, exact]
        assert axis.get_ylabel() == "perplexity, base e"
        assert list(axis.get_xticks()) == [0, 1, 3]
    assert drawn.axes[-1].get_xlabel() == "replaced layers, from the last one"
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["exact", *SPECS]


def test_perplexity_against_n_is_on_a_logarithmic_axis_with_a_grey_line_of_exact_attention() -> (
    None
):
    drawn = draw("lengths", perplexities())
    assert [axis.get_title() for axis in drawn.axes] == list(TEXTS)
    for axis, place in zip(drawn.axes, (0, 1), strict=True):
        assert axis.get_xscale() == "log"
        assert [label.get_text() for label in axis.get_xticklabels()] == ["64", "256"]
        found = errors_of(axis)
        assert found["exact"] == [(64, 20.064 + place, 0.0), (256, 20.256 + place, 0.0)]
        names = ["exact", "fast, last 1", "fast, last 3", "balanced, last 1", "balanced, last 3"]
        assert list(found) == names
        for _, value, error in found["balanced, last 3"]:
            assert error == pytest.approx(0.02 * (value - 6))
        colours = {each.get_label(): each.lines[0].get_color() for each in axis.containers}
        assert len(set(colours.values())) == len(names)
        assert colours["exact"] == "0.25"
        assert axis.get_ylabel() == "perplexity, base e"
    assert drawn.axes[-1].get_xlabel() == "n, tokens"


def test_loss_by_position_is_of_the_longest_text_in_nats_and_below_beside_exact() -> None:
    losses, added = draw("positions", perplexities()).axes
    assert losses.get_title() == "a.txt, n = 256"
    for axis, label in ((losses, "loss, nats"), (added, "loss - exact, nats")):
        assert axis.get_xscale() == "log"
        assert axis.get_ylabel() == label
        assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "4", "16", "64"]
    assert added.get_xlabel() == "position of the predicted token"
    exact, *others = losses.lines
    assert exact.get_label() == "exact"
    # at the geometric mean of first and last position
    firsts = [2**power for power in range(8)]
    assert list(exact.get_xdata()) == [(first * (2 * first - 1)) ** 0.5 for first in firsts]
    assert list(exact.get_ydata()) == [3.0 + 1 / first for first in firsts]
    for line, shift in zip(added.lines, (0.0, 0.1, 0.3, 0.2, 0.6), strict=True):
        assert list(line.get_ydata()) == pytest.approx([shift] * 8)
    assert len(others) == 4


def test_a_prefill_is_a_bar_of_seconds_whose_dark_part_is_attention() -> None:
    drawn = draw("prefill", of_prefill())
    assert [axis.get_title() for axis in drawn.axes] == ["n = 64", "n = 256"]
    for axis in drawn.axes:
        parts = [(bar.get_x(), bar.get_width()) for bar in axis.patches]
        expected = [(0, 0.25), (0.25, 0.75), (0, 0.05), (0.05, 0.75)]
        assert parts == [pytest.approx(part) for part in expected]
        dark, light = axis.patches[2:]
        assert light.get_alpha() < 1
        assert dark.get_alpha() is None
        assert [text.get_text() for text in axis.texts] == [" 1 s", " 0.8 s, 1.25x"]
        names = [label.get_text() for label in axis.get_yticklabels()]
        assert names == ["exact", "fast, last 3"]
    assert drawn.axes[-1].get_xlabel().startswith("seconds; attention dark")


def test_a_passkey_is_a_map_for_each_run_with_its_numbers() -> None:
    rows = [
        row_of("passkey", run, n=n, depth=depth, layers=layers, value=value)
        for run, layers, shift in (("exact", 0, 0.5), ("fast", 3, 0.0))
        for n, depth, value in ((64, 0.0, shift), (64, 1.0, shift + 0.25), (256, 1.0, shift + 0.5))
    ]
    drawn = draw("passkey", rows)
    for axis, shift in zip(drawn.axes, (0.5, 0.0), strict=True):
        grid = axis.images[0].get_array()
        assert grid[0, 0] == shift
        assert [grid[1, 0], grid[1, 1]] == [shift + 0.25, shift + 0.5]
        assert str(grid[0, 1]) in ("nan", "--")  # was not measured
        assert [text.get_text() for text in axis.texts] == [
            f"{shift + more:.2g}" for more in (0, 0.25, 0.5)
        ]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["64", "256"]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1"]
    assert drawn.get_supxlabel() == "n, tokens"
    assert drawn.get_supylabel() == "depth of the key"


def test_induction_is_a_bar_of_a_share_with_its_error() -> None:
    rows = [
        row_of("induction", "exact", n=64, value=0.5, standard_error=0.125),
        row_of("induction", "fast", n=64, layers=3, value=0.25, standard_error=None),
    ]
    (axis,) = draw("induction", rows).axes
    assert [bar.get_width() for bar in axis.patches] == [0.5, 0.25]
    first, second = (
        container.errorbar.lines[2][0].get_segments()[0] for container in axis.containers
        if hasattr(container, "errorbar") and container.errorbar is not None
    )  # fmt: skip
    assert (first[0][0], first[1][0]) == (0.375, 0.625)
    assert (second[0][0], second[1][0]) == (0.25, 0.25)
    assert axis.get_xlabel() == "share predicted"


@pytest.mark.parametrize("name", ["layers", "lengths", "positions"])
def test_rounding_does_not_fill_an_axis_and_numbers_stand_as_they_are(name: str) -> None:
    tiny = 1e-7
    rows = perplexities()
    for row in rows:
        row["value"] = row["exact"] + tiny * row["layers"]
        row["change_error"] = None
        first = rows[0]["details"]["positions"]
        row["details"] = {
            "positions": [entry | {"loss": entry["loss"] + tiny * row["layers"]} for entry in first]
        }
    drawn = draw(name, rows)
    for axis in drawn.axes:
        low, high = axis.get_ylim()
        assert high - low >= 0.999 * 0.002 * max(1.0, (low + high) / 2)
        assert low < min(line.get_ydata()[0] for line in axis.lines) < high
        assert not axis.yaxis.get_major_formatter().get_useOffset()


def test_a_figure_without_rows_is_none_and_failures_are_not_drawn() -> None:
    assert all(draw(name, []) is None for name in FIGURES)
    failed = [row | {"failure": "why", "value": None} for row in perplexities() + of_prefill()]
    assert all(draw(name, failed) is None for name in FIGURES)
    # a run that failed where the first panel is, is named all the same
    rows = perplexities()
    rows = [row for row in rows if not (row["run"] == "fast" and row["input"] == "a.txt")]
    (legend,) = draw("lengths", rows).legends
    names = {text.get_text() for text in legend.get_texts()}
    assert names >= {"fast, last 1", "fast, last 3"}
