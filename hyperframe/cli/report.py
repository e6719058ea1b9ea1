"""The command `hyperframe report`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..component import check_choice
from ..errors import ArgumentError
from .codes import ExitCode
from .output import echo_json, fail_if_nothing
from .parsing import check_out_folder, device_of, integers
from .progress import shown_progress

__all__ = ["EXAMPLES", "report"]

EXAMPLES = """Examples:

hyperframe report heads.safetensors

hyperframe report heads.safetensors --spec sort_lsh --spec "sliding_window | quest" --out page

hyperframe report heads.safetensors --figure masks --head 15.0 --spec fast

hyperframe report heads.safetensors --figure alpha --lengths 1024,2048,4096 --json"""


# Optional[...] and not `| None`: typer reads these annotations on Python 3.10 too
def report(
    heads: Annotated[Path, typer.Argument(
        metavar="HEADS", help="File of captured heads (hyperframe capture).",
        show_default=False)],
    spec: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        help="A detector such as 'sort_lsh(block_size=128)', 'sliding_window | quest' or 'fast'; "
        "may be repeated. The published one, a simple one and a preset unless given.")] = None,
    out: Annotated[Path, typer.Option(
        help="The folder to write to: index.html, rows.jsonl and pictures.")] = Path("report"),
    figure: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        help="masks, alpha, samples, budgets, heads or recursion; may be repeated. All of them "
        "unless given.")] = None,
    sampler: Annotated[str, typer.Option(
        help="Of the residual; auto goes with the detector.")] = "auto",
    num_samples: Annotated[int, typer.Option(
        help="Sampled keys, of all figures but one.")] = 256,
    samples: Annotated[str, typer.Option(
        help="Numbers of samples of that one, separated by commas.")] = "0,64,256,1024",
    budget: Annotated[str, typer.Option(
        help="Keys that detectors aim at, separated by commas.")] = "64,128,256,512",
    lengths: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Prefixes on which alpha is measured; five that double unless given.")] = None,
    skip_first: Annotated[int, typer.Option(
        help="Leading columns that alpha also leaves out.")] = 32,
    head: Annotated[Optional[str], typer.Option(  # noqa: UP045
        metavar="LAYER.HEAD", help="Whose masks are drawn; of the middle layer unless given.")]
    = None,
    leaf: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="Rows of a leaf of the causal recursion, at most; an eighth of all, or twice the "
        "samples, unless given.")] = None,
    form: Annotated[str, typer.Option("--format", help="Of the pictures: png or svg.")] = "png",
    device: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Where to run; a GPU if there is one.")] = None,
    backend: Annotated[str, typer.Option(help="Backend of the attention.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Also print a JSON array of the rows.")] = False,
) -> None:  # fmt: skip
    """Draw masks, alpha and errors of captured heads, and write a page that shows them.

    The page is one HTML file that needs no other. What cannot be measured is a line that says
    why. Ctrl-C writes what was measured.
    """
    from ..report import ReportSettings, measure, source_of, write
    from ..report.drawing import FORMATS, check_plotting

    options: dict[str, Any] = {
        "sample_grid": integers("--samples", samples), "budgets": integers("--budget", budget),
        "lengths": integers("--lengths", lengths), "head": _head(head),
        "leaf": leaf,
    }  # fmt: skip
    if spec:
        options["specs"] = spec
    if figure:
        options["figures"] = figure
    settings = ReportSettings(
        sampler=sampler, num_samples=num_samples, skip_first=skip_first, backend=backend,
        seed=seed, device=device_of(device), **options,
    )  # fmt: skip
    check_choice("report", "format", form, tuple(FORMATS))
    check_out_folder(out)
    check_plotting()
    source = source_of(heads, settings)
    rows: list[dict[str, Any]] = []
    is_whole = False
    with contextlib.suppress(KeyboardInterrupt):
        with shown_progress(is_shown=sys.stderr.isatty()) as progress:
            for row in measure(source, progress):
                rows.append(row)  # noqa: PERF402 - what is there when Ctrl-C comes stays
        is_whole = True
    made = write(source, rows, out=out, form=form, is_whole=is_whole)
    if as_json:
        echo_json(made.rows)
    else:
        failures = {row["failure"]: row for row in made.rows if row["failure"] is not None}
        for reason, row in failures.items():
            what = row["spec"] or row["quantity"]
            typer.echo(f"not measured: {row['figure']}, {what}: {reason}")
        typer.echo(f"{len(made.rows)} rows, {len(made.files) - 2} pictures -> {made.page}")
    if not is_whole:
        typer.echo(f"interrupted after {len(rows)} rows", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED)
    fail_if_nothing(rows)


def _head(text: str | None) -> tuple[int, int] | None:
    """Return layer and head of `15.0`."""
    if text is None:
        return None
    layer, dot, head = text.partition(".")
    if not (dot and layer.isdigit() and head.isdigit()):
        raise ArgumentError(f"--head {text}: is no layer and head; write 15.0")
    return int(layer), int(head)
