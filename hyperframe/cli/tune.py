"""The command `hyperframe tune`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer

from ..component import check_choice
from ..errors import ArgumentError
from .codes import ExitCode
from .output import echo_json
from .parsing import DTYPES, check_out, device_of
from .progress import shown_progress

__all__ = ["EXAMPLES", "tune"]

EXAMPLES = """Examples:

hyperframe tune ./my-llama --text book.txt --max-ppl-increase 1% --out policy.json

hyperframe tune smollm2 --text book.txt --held-out other.txt --length 4096

hyperframe tune ./my-llama --text book.txt --speed-target 2x --spec fast --spec balanced

hyperframe tune ./my-llama --text book.txt --cost keys --spec 'balanced; num_samples=128' --json"""


# Optional[...] and not `| None`: typer reads these annotations on Python 3.10 too
def tune(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="A causal language model: a folder that save_pretrained wrote, a "
        "GGUF file, a name on the hub, or smollm2.", show_default=False)],
    text: Annotated[Optional[list[Path]], typer.Option(  # noqa: UP045
        help="File to calibrate on, UTF-8 or JSON lines with a field \"text\"; may be repeated.")]
    = None,
    max_ppl_increase: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Limit of the increase of the perplexity, such as 1% or 0.01; 1% unless a speed is "
        "asked for.", show_default=False)] = None,
    speed_target: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Instead: attention is to cost this many times less, such as 2x.")] = None,
    spec: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        help="A rung, such as 'balanced; num_samples=128'; may be repeated. A ladder from cheap "
        "to accurate unless given.")] = None,
    cost: Annotated[str, typer.Option(
        help="What is saved: seconds on this device at this length, or keys of a query.")]
    = "seconds",
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    choosing: Annotated[int, typer.Option(help="Sequences that errors are measured on.")] = 1,
    verifying: Annotated[int, typer.Option(help="Other sequences, which decide.")] = 2,
    rounds: Annotated[int, typer.Option(help="Policies that are verified at most.")] = 4,
    confidence: Annotated[float, typer.Option(
        help="Probability with which the increase has to keep the limit.")] = 0.95,
    per_head: Annotated[bool, typer.Option(
        "--per-head/--per-layer", help="Whether key heads of a layer may attend in two ways.")]
    = True,
    held_out: Annotated[Optional[list[Path]], typer.Option(  # noqa: UP045
        help="File on which the result is measured once more, at the end; may be repeated.")]
    = None,
    gguf: Annotated[Optional[str], typer.Option(  # noqa: UP045
        metavar="FILE", help="Name of a GGUF file in the folder.")] = None,
    device: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Where the model runs; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(
        help=f"Of weights: {', '.join(DTYPES)}.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    out: Annotated[Path, typer.Option(help="The policy file to write.")] = Path("policy.json"),
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print what was found as one JSON object.")] = False,
) -> None:  # fmt: skip
    """Choose for every layer how it attends, under a limit of the perplexity or for a speed.

    Output errors and one backward pass predict what each rung does to the loss; the cheapest mix
    under the limit is verified on other parts of the text. The policy file is what `apply` and
    `hyperframe eval --policy` read. A speed that cannot be reached ends with exit code 3; the
    file then holds the fastest policy.
    """
    from ..tuning import TuneSettings, parse_percent, parse_speed

    check_choice("tune", "dtype", dtype, tuple(DTYPES))
    where = device_of(device)
    increase = None if max_ppl_increase is None else parse_percent(max_ppl_increase)
    speed = None if speed_target is None else parse_speed(speed_target)
    if increase is None and speed is None:
        increase = 0.01
    options: dict[str, Any] = {"specs": spec} if spec else {}
    settings = TuneSettings(
        max_increase=increase, speed_target=speed, cost=cost, length=length, choosing=choosing,
        verifying=verifying, rounds=rounds, confidence=confidence, mixed=per_head, seed=seed,
        **options,
    )  # fmt: skip
    if not text:
        raise ArgumentError("--text: name a file to calibrate on, of the kind that will be read")
    check_out(out)
    try:
        found = _tuned(
            model, text, held_out or [], settings, gguf=gguf, device=where, dtype=DTYPES[dtype],
            as_json=as_json, out=out,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    if not found:
        raise typer.Exit(ExitCode.GATE_FAILED)


def _tuned(
    model: str, texts: list[Path], held_out: list[Path], settings: Any, *, gguf: str | None,
    device: torch.device, dtype: torch.dtype, as_json: bool, out: Path,
) -> bool:  # fmt: skip
    """Tune, write and print; return whether what was asked for is reached."""
    from ..evaluation.model import load_language_model
    from ..tuning import tune as library
    from ..tuning.scoring import increase_on
    from ..tuning.tables import print_tuned
    from ..tuning.windows import held_out_windows, split, tokens_of

    language = load_language_model(model, gguf=gguf, device=device, dtype=dtype)
    chooses, verifies = split(tokens_of(texts, language, settings), settings)
    others = {path.name: held_out_windows(path, language, settings) for path in held_out}
    with shown_progress(is_shown=sys.stderr.isatty()) as progress:
        tuned = library(
            language, chooses, verifies, settings, progress=progress,
            facts={"texts": [path.name for path in texts]},
        )  # fmt: skip
        increases = {}
        if not tuned.policy.rules:  # nothing is replaced, and nothing increases
            others = {}
        for number, (name, windows) in enumerate(others.items()):
            progress(number, len(others), f"held out: {name}")
            increases[name] = increase_on(language, tuned.policy, windows)
    shown = {
        name: {"percent": found.percent, "standard_error": found.percent_error}
        for name, found in increases.items()
    }
    policy = dataclasses.replace(tuned.policy, info={**tuned.policy.info, "held_out": shown})
    beside = out.with_name(out.name + ".part")  # a file that is there is a whole one
    policy.save(beside)
    beside.replace(out)
    if as_json:
        echo_json({"out": str(out), **tuned.to_dict(), "held_out": shown})
    else:
        print_tuned(tuned, held_out=increases)
        typer.echo(f"{len(tuned.policy.rules)} rules -> {out}")
    return tuned.is_reached
