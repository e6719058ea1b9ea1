"""Which implementation decodes a sketch: torch's operators (Triton on a GPU), or numba on a CPU."""

from __future__ import annotations

import importlib

import torch

from ..component import check_choice
from ..errors import MissingDependencyError, UnsupportedError

__all__ = ["DECODERS", "LEAST_PRODUCTS", "choose_decoder"]

DECODERS = ("auto", "torch", "numba")

LEAST_PRODUCTS = 1 << 29
"""Products of columns with rows of the sketch from which `auto` takes numba.

On one core numba saves about 3 ns of each; to import it and to compile for the first time takes two
seconds (half a second once that is on disk). So the first call that takes it is hardly slower. The
rule knows sizes only: equal calls are decoded alike, whatever came before them.
"""


def choose_decoder(name: str, *, device: torch.device, products: int) -> str:
    """Return the decoder that runs for a request: `"torch"` or `"numba"`.

    Args:
        name: one of `DECODERS`.
        device: where the sketch is.
        products: columns of all heads, times rows of the sketch.

    Raises:
        MissingDependencyError: numba was asked for and is not installed.
        UnsupportedError: numba was asked for where it does not run.
    """
    check_choice("decoder", "decoder", name, DECODERS)
    if name == "auto":
        is_large = device.type == "cpu" and products >= LEAST_PRODUCTS
        takes = is_large and not torch.compiler.is_compiling() and _why_not_numba() is None
        return "numba" if takes else "torch"
    if name == "numba":
        if device.type != "cpu":
            raise UnsupportedError(
                f"decoder='numba' runs on a CPU, but the inputs are on {device}; use "
                "decoder='auto', which has kernels there"
            )
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "decoder='numba' cannot be part of a graph of torch.compile; use decoder='auto', "
                "or call outside of it"
            )
        reason = _why_not_numba()
        if reason is not None:
            raise MissingDependencyError(
                f"decoder='numba' needs numba, and {reason}; pip install -U "
                "'hyperframe-attention[numba]', or use decoder='auto'"
            )
    return name


def _why_not_numba() -> str | None:
    """Return why numba cannot be imported; imports it. It refuses what numpy it does not know."""
    try:
        importlib.import_module("numba")
    except ImportError as error:
        return str(error).splitlines()[0]
    return None
