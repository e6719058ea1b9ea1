"""The command `hyperframe frontier`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .codes import ExitCode
from .output import echo_json, fail_if_nothing
from .parsing import check_out, check_plot, device_of, integers
from .progress import shown_progress

__all__ = ["EXAMPLES", "frontier"]

EXAMPLES = """Examples:

hyperframe frontier

hyperframe frontier heads.safetensors

hyperframe frontier heads.safetensors --detector quest --detector tile_oracle --budget 128,256

hyperframe frontier heads.safetensors --causal recursive --out rows.jsonl --plot frontier.png

hyperframe frontier heads.safetensors --detector 'quest(block_size=32)' --strict --json"""


SMOLLM2 = Path("heads-smollm2.safetensors")
LENGTH = 8192


# Optional[...] and not `| None`: typer reads these annotations on Python 3.10 too
def frontier(
    files: Annotated[Optional[list[Path]], typer.Argument(  # noqa: UP045
        metavar="[HEADS...]", help="Files of captured heads, as hyperframe capture writes them. "
        f"Unless given, five layers of SmolLM2 that read {LENGTH:,} tokens, captured once into "
        f"{SMOLLM2}.", show_default=False)] = None,
    detector: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        help="A name or spec such as 'quest(block_size=32)', 'none' (the window alone) or "
        "'tile_oracle'; may be repeated. All registered ones for which a budget makes sense.")]
    = None,
    sampler: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        help="Of the residual, may be repeated; uniform unless given.")] = None,
    budget: Annotated[str, typer.Option(
        help="Keys that detectors aim at, separated by commas.")] = "128,256,512",
    num_samples: Annotated[int, typer.Option(help="Sampled keys.")] = 256,
    causal: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="single_pass, recursive or none; as captured (single_pass) unless given.")] = None,
    window: Annotated[int, typer.Option(
        help="Keys of the sliding window beside every detector; 0 is none.")] = 128,
    sinks: Annotated[int, typer.Option(help="Leading keys that every row holds.")] = 64,
    strict: Annotated[bool, typer.Option(
        "--strict", help="Only earlier queries may help to choose.")] = False,
    tile_size: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="Rows of a tile, of detectors that have tiles.")] = None,
    min_seq_len: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="Longest exact leaf of the recursion; 512 unless given.")] = None,
    heads: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="Measure the first query heads only.")] = None,
    lengths: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Measure the first positions only, for each of these lengths.")] = None,
    device: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Where to run; a GPU if there is one.")] = None,
    backend: Annotated[str, typer.Option(help="Backend of the attention.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    oracle: Annotated[bool, typer.Option(
        "--oracle/--no-oracle", help="Compare with the best keys that a tile can share, found by "
        "looking at all (quadratic).")] = False,
    repeats: Annotated[int, typer.Option(
        help="Of each timed stage, on one layer; 0 takes no times.")] = 3,
    out: Annotated[Optional[Path], typer.Option(  # noqa: UP045
        help="Append the rows to this JSON-lines file; what it holds is not measured again.")]
    = None,
    plot: Annotated[Optional[Path], typer.Option(  # noqa: UP045
        help="Draw error against keys into this file.")] = None,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print a JSON array of the rows instead of tables.")] = False,
) -> None:  # fmt: skip
    """Measure detectors x samplers x budgets on captured heads, errors beside costs.

    Every configuration is the window and the detector at its budget, and samples of the rest. One
    that fails is a line that says why. Ctrl-C keeps what was measured.
    """
    from ..benchmarking import frontier as library

    if out is not None:
        check_out(out)
    if plot is not None:
        check_plot(plot)
        library.check_plotting()
    settings = library.FrontierSettings(
        files=files or [smollm2_heads()], detectors=detector, samplers=sampler or ["uniform"],
        budgets=integers("--budget", budget) or (), num_samples=num_samples, causal=causal,
        strict=strict, window=window, sinks=sinks, tile_size=tile_size, min_seq_len=min_seq_len,
        heads=heads, lengths=integers("--lengths", lengths), device=device_of(device),
        backend=backend, seed=seed, oracle=oracle, repeats=repeats,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    is_whole = False
    with contextlib.suppress(KeyboardInterrupt):
        with shown_progress(is_shown=sys.stderr.isatty()) as progress:
            for row in library.run(settings, out=out, progress=progress):
                rows.append(row)  # noqa: PERF402 - what is there when Ctrl-C comes stays
        is_whole = True
    if as_json:
        echo_json(rows)
    else:
        library.print_frontier(rows)
    if plot is not None and any(row["failure"] is None for row in rows):
        library.plot_frontier(plot, rows)
    if not is_whole:
        typer.echo(f"interrupted after {len(rows)} rows", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED)
    fail_if_nothing(rows)


def smollm2_heads() -> Path:
    """Return the file of heads that is measured by default; captures it where it is not there."""
    if not SMOLLM2.exists():
        from pydoc_data.topics import topics

        from ..integrations import capture as library
        from ..integrations.capture_model import capture_model

        typer.echo(f"no HEADS: capturing those of SmolLM2 -> {SMOLLM2}", err=True)
        text = "\n\n".join(topics[name] for name in sorted(topics))
        found, about = capture_model(
            "smollm2", text=text, layers=(1, 8, 15, 22, 29), length=LENGTH
        )  # fmt: skip
        beside = SMOLLM2.with_name(SMOLLM2.name + ".part")  # a file that is there is a whole one
        library.save(beside, found, about=about | {"input": "Python's documentation"})
        beside.replace(SMOLLM2)
    return SMOLLM2
