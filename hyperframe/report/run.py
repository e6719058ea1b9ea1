"""Making a report: measure all rows, draw the figures from them, write the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..benchmarking.frontier import Problem, load_problem
from ..benchmarking.timing import Failure
from ..component import check_choice
from ..integrations.capture import CapturedHeads, load_about
from ..kernels import resolve_backend
from . import alpha, budgets, heads, masks, recursion, samples
from .drawing import FORMATS, check_plotting, encode
from .page import Picture, page
from .rows import Row
from .settings import ReportSettings
from .source import Source

__all__ = ["Progress", "Report", "measure", "report", "source_of", "write"]

Progress = Callable[[int, int, str], None]
"""Called with the number of a step, their total and a few words, before it is done, and with an
empty string after the last one."""

_MODULES: dict[str, ModuleType] = {
    "masks": masks, "alpha": alpha, "samples": samples, "budgets": budgets, "heads": heads,
    "recursion": recursion,
}  # fmt: skip
_MEMORY = "heads in memory"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured and written.

    Attributes:
        rows: see `ROW_KEYS`.
        page: the HTML page.
        files: all files that were written, the page first.
    """

    rows: list[Row]
    page: Path
    files: list[Path]


def report(
    heads: Path | str | Mapping[int, CapturedHeads], *, out: Path | str, form: str = "png",
    progress: Progress | None = None, **options: Any,
) -> Report:  # fmt: skip
    """Measure detectors on captured heads, and write pictures, rows and a page that shows them.

    Args:
        heads: a file of captured heads, or what `hyperframe.integrations.capture.capture` returns.
        out: the folder to write to; made if it is not there. Its files of these names are
            overwritten: `index.html`, `rows.jsonl`, and a picture for each figure.
        form: of the pictures, "png" or "svg".
        progress: told of every step.
        **options: of `ReportSettings`, such as `specs=["sort_lsh", "fast"]`.

    Raises:
        ArgumentError: heads, specs or numbers that cannot work, before anything is measured.
        MissingDependencyError: matplotlib is not installed.

    What cannot be measured is a row with its `failure`, and a line on the page. Cost: attention
    calls for `specs` x layers x (sample grid + budgets + 3), exact attention for each layer, a pass
    over the logits for each layer and length, and of the rectangles of the recursion for each spec
    and layer. Deterministic.
    """
    settings = ReportSettings(**options)
    check_choice("report", "form", form, tuple(FORMATS))
    check_plotting()
    source = source_of(heads, settings)
    rows = list(measure(source, progress))
    return write(source, rows, out=Path(out), form=form)


def source_of(heads: Path | str | Mapping[int, CapturedHeads], settings: ReportSettings) -> Source:
    """Return what the figures are measured from; refuses heads that cannot be had."""
    resolve_backend(settings.backend, torch.device(settings.device))
    if isinstance(heads, Mapping):
        layers = tuple(
            dataclasses.replace(
                heads[layer],
                **{
                    name: getattr(heads[layer], name).to(settings.device)
                    for name in ("query", "key", "value")
                },
            )
            for layer in sorted(heads)
        )
        return Source(Problem(file=_MEMORY, digest="", layers=layers), settings)
    problem = load_problem(heads, settings.device)
    about = load_about(heads)
    names = about.get("heads")
    if names is not None and len(names) != problem.layers[0].query.shape[1]:
        names = None  # written by somebody else
    return Source(problem, settings, names, about)


def measure(source: Source, progress: Progress | None = None) -> Iterator[Row]:
    """Yield the rows of all figures: those of single heads first, then what sums them up.

    Args:
        source: of the numbers.
        progress: told of every step.

    Raises:
        ArgumentError: the settings do not fit the heads, before anything is measured.
    """
    figures = {name: _MODULES[name] for name in _MODULES if source.settings.shows(name)}
    tasks = [task for module in figures.values() for task in module.tasks(source)]
    tasks.sort(key=lambda task: task.order)
    rows: list[Row] = []
    for done, task in enumerate(tasks):
        if progress is not None:
            progress(done, len(tasks), task.label)
        try:
            found = list(task.run())
        except Exception as error:
            reason = Failure.of(error).reason
            found = [task.known | {"failure": reason}]
        rows += found
        yield from found
    yield from summaries(source, rows)
    if progress is not None:
        progress(len(tasks), len(tasks), "")


def summaries(source: Source, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows that sum up those of single heads."""
    for name, module in _MODULES.items():
        if source.settings.shows(name) and hasattr(module, "summary"):
            yield from module.summary(rows)


def write(
    source: Source, rows: Sequence[Row], *, out: Path, form: str = "png", is_whole: bool = True
) -> Report:
    """Draw the figures and write the files.

    Args:
        source: as for `measure`.
        rows: that `measure` yielded, all of them, or those there are when it was interrupted.
        out: the folder.
        form: of the pictures.
        is_whole: whether these are all rows.
    """
    if not is_whole and not any(row["statistic"] == "median" for row in rows):
        rows = [*rows, *summaries(source, rows)]
    out.mkdir(parents=True, exist_ok=True)
    pictures, files = [], []
    for name, module in _MODULES.items():
        drawn = module.draw(rows, source.settings.specs)
        if drawn is not None:
            picture = Picture(
                name=name, form=form, content=encode(drawn, form), caption=module.CAPTION
            )
            files.append(out / f"{name}.{form}")
            files[-1].write_bytes(picture.content)
            pictures.append(picture)
    files.append(out / "rows.jsonl")
    with files[-1].open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    index = out / "index.html"
    tables = {name: module.table(rows, source.settings.specs)
              for name, module in _MODULES.items() if hasattr(module, "table")}  # fmt: skip
    text = page(
        rows, pictures, tables=tables, title=f"Attention of {_title(source)}",
        facts=_facts(source), specs=source.settings.specs, is_whole=is_whole,
    )  # fmt: skip
    index.write_text(text, encoding="utf-8")
    return Report(rows=list(rows), page=index, files=[index, *files])


def _title(source: Source) -> str:
    model = source.about.get("model_class")
    file = source.problem.file
    return file if model is None else f"{model} ({file})"


def _facts(source: Source) -> dict[str, Any]:
    problem, settings = source.problem, source.settings
    query = problem.layers[0].query
    facts = {
        "model": _model_name(source.about.get("model")), "input": source.about.get("input"),
        "positions": f"{problem.length:,}",
        "layers": ", ".join(str(layer.layer_idx) for layer in problem.layers),
        "query heads": query.shape[1], "key heads": problem.layers[0].key.shape[1],
        "head dimension": query.shape[-1],
        "mask": "causal" if problem.is_causal else "none",
        "sampler": settings.sampler, "samples": settings.num_samples, "seed": settings.seed,
        "dtype": str(query.dtype).removeprefix("torch."),
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


def _model_name(model: str | None) -> str | None:
    """Return the name of a model; of a folder, what it is called and not where it lies."""
    if model is None or not Path(model).is_absolute():
        return model
    return Path(model).name
