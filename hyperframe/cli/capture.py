"""The command `hyperframe capture`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..component import check_choice
from ..errors import ArgumentError
from .codes import ExitCode
from .output import echo_json
from .parsing import DTYPES, check_out, device_of, integers

__all__ = ["EXAMPLES", "capture"]

EXAMPLES = """Examples:

hyperframe capture ./my-llama --text book.txt --layers 1,8,15 --length 8192

hyperframe capture ./my-bert --text book.txt --out bert.safetensors

hyperframe capture ./my-vit --image photo.jpg --layers last:4

hyperframe capture model-q8.gguf --text book.txt --dtype float16"""


# Optional[...] and not `| None`: typer reads these annotations on Python 3.10 too
def capture(
    model: Annotated[str, typer.Argument(
        metavar="MODEL", help="A folder that save_pretrained wrote, a GGUF file, a name on the "
        "hub, or smollm2: a decoder or an encoder of text, or a vision transformer.",
        show_default=False)],
    text: Annotated[Optional[Path], typer.Option(  # noqa: UP045
        help="File that a model of text reads, UTF-8.")] = None,
    image: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="File that a vision transformer sees, or 'random'.")] = None,
    layers: Annotated[str, typer.Option(
        help="all, first:4, last:8, or indices separated by commas; -1 is the last one.")] = "all",
    length: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="Tokens; those of the text unless given, up to 4096 and the model's positions.")]
    = None,
    heads: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Query heads by index, separated by commas; all unless given.")] = None,
    causal: Annotated[Optional[bool], typer.Option(  # noqa: UP045
        "--causal/--no-causal", help="Write this of the mask instead of what the model does, "
        "which attends as ever.", show_default=False)] = None,
    gguf: Annotated[Optional[str], typer.Option(  # noqa: UP045
        metavar="FILE", help="Name of a GGUF file in the folder.")] = None,
    device: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Where the model runs; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(
        help=f"Of weights and heads: {', '.join(DTYPES)}.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of random pixels.")] = 0,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("heads.safetensors"),
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print what was written as one JSON object.")] = False,
) -> None:  # fmt: skip
    """Write queries, keys and values of a model's attention layers to a file.

    The model runs once, exactly. `hyperframe report` and `hyperframe frontier` read the file.
    """
    check_choice("capture", "dtype", dtype, tuple(DTYPES))
    where = device_of(device)
    chosen = integers("--heads", heads)
    wanted: str | tuple[int, ...] = layers
    if layers.strip()[:1].isdigit() or layers.strip()[:1] == "-":
        wanted = integers("--layers", layers) or ()
    content = None if text is None else _read(text)
    check_out(out)
    from ..integrations import capture as library
    from ..integrations.capture_model import capture_model, summary

    try:
        found, about = capture_model(
            model, text=content, image=image, layers=wanted, length=length, heads=chosen,
            is_causal=causal, gguf=gguf, device=where, dtype=DTYPES[dtype], seed=seed,
        )  # fmt: skip
        about["input"] = str(image) if text is None else text.name
        beside = out.with_name(out.name + ".part")  # a file that is there is a whole one
        library.save(beside, found, about=about)
        beside.replace(out)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    written = {"out": str(out), **summary(found, about)}
    if as_json:
        echo_json(written)
        return
    for layer in written["layers"]:
        query, key = (" x ".join(map(str, layer[name])) for name in ("query", "key"))
        mask = "causal" if layer["is_causal"] else "no mask"
        typer.echo(f"layer {layer['layer']}: query {query}, key and value {key}, {mask}")
    typer.echo(f"{about['model_class']}, {about['length']} positions -> {out}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(
            f"--text {path}: cannot be read ({error.strerror}); name a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"--text {path}: is not UTF-8 ({error.reason} at byte {error.start}); convert it"
        ) from error
