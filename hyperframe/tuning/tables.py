"""What people read of a tuning: a line for each layer, and what was predicted and measured."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from .outcome import Tuned, speed_of
from .paired import Increase

__all__ = ["print_tuned"]


def print_tuned(tuned: Tuned, *, held_out: dict[str, Increase] | None = None) -> None:
    """Print the rungs, the layers, and how the whole did.

    Args:
        tuned: what was found.
        held_out: increases on other texts, by their names.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    unit = "ms" if tuned.facts["cost"] == "seconds" else "keys"
    console.print(_rungs(tuned, unit))
    if not tuned.choice.is_exact:
        console.print(_layers(tuned, unit))
    if tuned.trials:
        console.print(_trials(tuned))
    for line in _summary(tuned, held_out or {}):
        console.print(line, markup=False, soft_wrap=True)


def _rungs(tuned: Tuned, unit: str) -> Any:
    from rich.table import Table

    table = Table(title=f"Rungs, {unit} of a layer at {tuned.facts['length']:,} tokens")
    for name, justify in (("", "right"), ("attention", "left"), ("cost", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_row("-", "exact", _cost(tuned.exact.whole, unit))
    for number, (rung, cost) in enumerate(zip(tuned.rungs, tuned.costs, strict=True)):
        table.add_row(str(number), _plain(rung.label), _cost(cost.whole, unit))
    for label, reason in tuned.skipped.items():
        table.add_row("", _plain(label), reason)
    return table


def _layers(tuned: Tuned, unit: str) -> Any:
    from rich.table import Table

    has_seconds = tuned.trial is not None
    table = Table(title="Layers")
    names = ["layer", "rung of each key head", "relative error", "predicted", f"cost, {unit}"]
    names += ["measured, ms", "exact, ms"] if has_seconds else []
    for name in names:
        table.add_column(name, justify="left" if name.startswith("rung") else "right")
    for row, option in zip(tuned.layers(), tuned.choice.options.values(), strict=True):
        numbers = ["-" if rung < 0 else str(rung) for rung in option.rungs]
        shown = numbers[0] if option.is_uniform else " ".join(numbers)
        cells = [
            str(row["layer"]), "exact" if shown == "-" else shown,
            f"{row['relative_error']:.3f}" if row["relative_error"] else "",
            f"{row['predicted_percent']:+.3f} %" if row["predicted_percent"] else "",
            _cost(row["cost"], unit),
        ]  # fmt: skip
        if has_seconds:
            cells += [f"{1000 * (row[name] or 0):.0f}" for name in ("seconds", "exact_seconds")]
        table.add_row(*cells)
    return table


def _trials(tuned: Tuned) -> Any:
    from rich.table import Table

    table = Table(title="Measured on the sequences that verify")
    for name in ("attention", "predicted", "increase", "at most", ""):
        table.add_column(name, justify="right")
    for trial in tuned.trials:
        table.add_row(
            f"{speed_of(trial.choice, tuned.exact):.2f}x",
            f"{100 * math.expm1(trial.choice.loss):+.2f} %", _increase(trial.verified.increase),
            f"{100 * math.expm1(trial.upper):.2f} %",
            "" if trial.budget is None else "kept" if trial.passed else "not kept",
        )  # fmt: skip
    return table


def _summary(tuned: Tuned, held_out: dict[str, Increase]) -> list[str]:
    facts = tuned.facts
    counts = Counter(
        "mixed" if not option.is_uniform else "exact" if option.rungs[0] < 0 else "replaced"
        for option in tuned.choice.options.values()
    )
    what = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    exact = f"{facts['exact_perplexity']:.3f} on {facts['verifying']} verifying sequences"
    lines = [
        f"{len(tuned.choice.options)} layers: {what}; exact perplexity {exact}",
        f"predicted: {100 * math.expm1(tuned.choice.loss):+.2f} %, attention {tuned.speed:.2f}x",
    ]
    if tuned.trial is not None:
        increase = tuned.trial.verified.increase
        measured = f"{_increase(increase)}, at most {100 * math.expm1(tuned.trial.upper):.2f} %"
        speed = tuned.measured_speed
        if speed is not None:
            measured += f", attention {speed:.2f}x (seconds, this device)"
            if speed < 1 and facts["cost"] == "seconds":
                measured += ": in the whole model it is no faster"
        lines.append(f"measured:  {measured}")
    lines += [f"held out:  {_increase(found)}, {name}" for name, found in held_out.items()]
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in tuned.seconds.items())
    return [*lines, f"{tuned.message} ({spent})"]


def _increase(increase: Increase) -> str:
    return f"{increase.percent:+.2f} % ± {increase.percent_error:.2f}"


def _cost(cost: float, unit: str) -> str:
    return f"{1000 * cost:.0f}" if unit == "ms" else f"{cost:.0f}"


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
