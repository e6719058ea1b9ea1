"""The command `hyperframe eval`."""

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
from .parsing import DTYPES, check_out_folder, device_of, integers
from .progress import shown_progress

__all__ = ["EXAMPLES", "evaluate"]

EXAMPLES = """Examples:

hyperframe eval ./my-llama --text book.txt

hyperframe eval model-q8.gguf --text book.txt --length 1024,4096,8192 --layers 0,10,20,all

hyperframe eval ./my-llama --text book.txt --spec fast --spec 'sort_lsh; causal=recursive'

hyperframe eval ./my-llama --text book.txt --policy policy.json --tasks perplexity,prefill

hyperframe eval ./my-llama --tasks passkey,induction,questions.jsonl --length 8192 --json"""


# Optional[...] and not `| None`: typer reads these annotations on Python 3.10 too
def evaluate(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="A folder that save_pretrained wrote, a GGUF file, a name on the "
        "hub, or 'smollm2', the demonstration model: a decoder of text.", show_default=False)],
    text: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        help="File of text, or of JSON lines with a field text; may be repeated.")] = None,
    length: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Tokens, separated by commas; 1024,2048,4096 as far as they fit unless given.")]
    = None,
    layers: Annotated[str, typer.Option(
        help="How many of the last layers are replaced, separated by commas, or all. 0 is exact "
        "attention, which is always measured.")] = "all",
    spec: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        help="A preset or detector, options behind semicolons: 'balanced; num_samples=512'; may be "
        "repeated. balanced unless given.")] = None,
    policy: Annotated[Optional[list[Path]], typer.Option(  # noqa: UP045
        help="A policy file, such as hyperframe tune writes; may be repeated. Instead of specs, or "
        "beside those that are given.")] = None,
    tasks: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="perplexity, prefill, passkey, induction, or files of questions (FILE.jsonl), "
        "separated by commas; the first four unless given.")] = None,
    windows: Annotated[int, typer.Option(
        help="Pieces of each text, one after the other; more make the errors smaller.")] = 1,
    depth: Annotated[str, typer.Option(
        help="Of the passkey, from 0 (first) to 1, separated by commas.")] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(
        help="Keys of each depth, and sequences of induction.")] = 4,
    repeats: Annotated[int, typer.Option(help="Of each timed prefill.")] = 3,
    template: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Of questions: text with {context} and {input}, or @FILE that holds it.")] = None,
    metric: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Of questions: f1, rouge_l, classification, code_similarity or number; by the name of "
        "the data set unless given.")] = None,
    max_new_tokens: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="Of answers; by the name of the data set unless given.")] = None,
    max_examples: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="First questions of each file; all unless given.")] = None,
    gguf: Annotated[Optional[str], typer.Option(  # noqa: UP045
        metavar="FILE", help="Name of a GGUF file in the folder.")] = None,
    device: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Where the model runs; a GPU if there is one.")] = None,
    dtype: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help=f"Of the weights: {', '.join(DTYPES)}; bfloat16 on a GPU, float32 elsewhere.")]
    = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    out: Annotated[Path, typer.Option(
        help="The folder to write to: index.html, rows.jsonl and pictures. Rows that are there "
        "are not measured again.")] = Path("eval"),
    form: Annotated[str, typer.Option("--format", help="Of the pictures: png or svg.")] = "png",
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print a JSON array of the rows instead of tables.")] = False,
) -> None:  # fmt: skip
    """Measure what approximate attention costs a language model, and what it saves.

    Perplexity, seconds and memory of a prefill, a passkey, induction, files of questions: every
    number beside that of exact attention. What cannot be measured is a line that says why. Ctrl-C
    keeps what was measured; the same command goes on from there.
    """
    from .. import evaluation as library
    from ..report.drawing import FORMATS

    where = device_of(device)
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    check_choice("eval", "dtype", dtype, tuple(DTYPES))
    check_choice("eval", "format", form, tuple(FORMATS))
    options: dict[str, Any] = {}
    if tasks is not None:
        options["tasks"] = tuple(part.strip() for part in tasks.split(",") if part.strip())
    if spec or policy:
        options["specs"] = tuple(spec or ())
    settings = library.EvalSettings(
        texts=text or (), lengths=integers("--length", length), layers=_layers(layers),
        policies=policy or (), windows=windows, depths=_depths(depth), trials=trials,
        repeats=repeats, template=_template(template), metric=metric,
        max_new_tokens=max_new_tokens, max_examples=max_examples, device=where,
        dtype=DTYPES[dtype], seed=seed, **options,
    )  # fmt: skip
    check_out_folder(out)
    library.check_plotting()
    rows: list[dict[str, Any]] = []
    loaded, is_whole = None, False
    with contextlib.suppress(KeyboardInterrupt):
        with shown_progress(is_shown=sys.stderr.isatty()) as progress:
            progress(0, None, f"loading {model}")
            loaded = library.load_language_model(
                model, gguf=gguf, device=where, dtype=DTYPES[dtype]
            )
            measured = library.run(loaded, settings, out=out / library.ROWS, progress=progress)
            for row in measured:
                rows.append(row)  # noqa: PERF402 - what is there when Ctrl-C comes stays
        is_whole = True
    if loaded is None or not rows:
        typer.echo("interrupted before anything was measured", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED)
    made = library.write(loaded, settings, rows, out=out, form=form, is_whole=is_whole)
    if as_json:
        echo_json(rows)
    else:
        library.print_tables(rows)
        typer.echo(f"{len(rows)} rows, {len(made.files) - 2} pictures -> {made.page}")
    if not is_whole:
        typer.echo(f"interrupted after {len(rows)} rows; the same command goes on", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED)
    fail_if_nothing(rows)


def _layers(text: str) -> tuple[int | str, ...]:
    """Return the numbers of `0,10,all`."""
    found: list[int | str] = []
    for part in text.replace(",", " ").split():
        if part != "all" and not part.isdigit():
            raise ArgumentError(
                f"--layers {text}: {part!r} is no number of layers; write 0,10,20 or all"
            )
        found.append(part if part == "all" else int(part))
    return tuple(found)


def _depths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ArgumentError(f"--depth {text}: is no list of shares; write 0,0.5,1") from None


def _template(text: str | None) -> str | None:
    """Return the template, from its file where a name follows an @."""
    if text is None:
        return None
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(
                f"--template {text}: cannot be read ({error}); name a file of text"
            ) from error
    if "{context}" not in text and "{input}" not in text:
        raise ArgumentError(
            f"--template {text[:40]!r}: holds neither {{context}} nor {{input}}; write where the "
            "question goes, or @FILE for a file that does"
        )
    return text
