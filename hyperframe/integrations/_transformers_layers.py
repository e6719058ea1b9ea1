"""Which modules of a model are attention layers, how they are numbered, and which are chosen."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Iterable

from torch import nn

from ..errors import ArgumentError, ArgumentTypeError, UnsupportedError

__all__ = ["attention_layers", "choose_layers"]

# cross-attention shares the layer_idx of the self-attention beside it, and stays exact
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)
_RANGE = re.compile(r"(first|last):(\d+)")


def attention_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Finds the self-attention modules that go through transformers' attention interface.

    Args:
        model: a transformers model or submodel.

    Returns:
        The modules by layer index: their own `layer_idx`, or, when no module has one (vision
        transformers), their order in the model.

    Raises:
        UnsupportedError: there are none, or the model has several stacks.
    """
    kinds = {type(module) for module in model.modules()}
    callers = {kind for kind in kinds if _calls_interface(kind)}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) in callers
        and not _CROSS.search(f"{name.rpartition('.')[2]} {type(module).__name__}")
        and not getattr(module, "is_cross_attention", False)
    ]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention module that goes through transformers' "
            "AttentionInterface, so its attention cannot be replaced. Use a model that does."
        )
    indices = [getattr(module, "layer_idx", None) for _, module in found]
    if all(index is None for index in indices):
        indices = list(range(len(found)))
    layers = {
        index: module
        for index, (_, module) in zip(indices, found, strict=True)
        if isinstance(index, int)
    }
    stacks = sorted({re.split(r"\.\d+(?:\.|$)", name)[0] for name, _ in found})
    if len(layers) != len(found):
        raise UnsupportedError(
            f"{type(model).__name__} has several stacks of attention layers ({', '.join(stacks)}), "
            "so a layer index does not name one layer. Apply to one stack at a time, for example "
            f"apply(model.{stacks[0].rpartition('.')[0] or stacks[0]}, ...)."
        )
    return layers


def _calls_interface(kind: type) -> bool:
    """Whether a class looks its attention function up in the interface, by its source."""
    if hasattr(kind, "set_attn_implementation"):
        return False  # a whole model, whose base class mentions the interface
    for base in kind.__mro__:
        if base is nn.Module:
            break
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        if "ALL_ATTENTION_FUNCTIONS" in source:
            return True
    return False


def choose_layers(layers: str | Iterable[int], existing: list[int]) -> tuple[int, ...]:
    """Resolves the `layers` argument of `apply`.

    Args:
        layers: "all", "none", "first:N", "last:N", or layer indices; -1 is the last layer.
        existing: the indices that the model has, ascending.

    Returns:
        The chosen indices, ascending, each once.

    Example:
        >>> choose_layers("last:2", [0, 1, 2, 3])
        (2, 3)
        >>> choose_layers([0, -1], [0, 1, 2, 3])
        (0, 3)
    """
    shown = f"{existing[0]} to {existing[-1]}" if len(existing) > 4 else str(existing)
    if isinstance(layers, str):
        if layers in ("all", "none"):
            return tuple(existing) if layers == "all" else ()
        match = _RANGE.fullmatch(layers.replace(" ", ""))
        if match is None:
            raise ArgumentError(
                f"layers={layers!r} is not understood: use 'all', 'none', 'first:N', 'last:N' or a "
                "list of layer indices."
            )
        count = int(match[2])
        if count > len(existing):
            raise ArgumentError(
                f"layers={layers!r} asks for {count} layers, but the model has {len(existing)} "
                f"attention layers ({shown}). Ask for at most {len(existing)}, or for 'all'."
            )
        return tuple(existing[:count] if match[1] == "first" else existing[len(existing) - count :])
    if not isinstance(layers, Iterable):
        raise ArgumentTypeError(
            f"layers={layers!r} must be a string or a list of layer indices; for one layer write "
            f"layers=[{layers!r}]."
        )
    chosen: set[int] = set()
    for item in layers:
        try:
            index = operator.index(item)
        except TypeError:
            index = None
        if index is None or isinstance(item, bool):
            raise ArgumentTypeError(
                f"layers holds {item!r} of type {type(item).__name__}: layer indices are integers."
            )
        if -len(existing) <= index < 0:
            index = existing[index]
        if index not in existing:
            raise ArgumentError(
                f"layers holds {item!r}, but the model has {len(existing)} attention layers "
                f"({shown}). Use those indices, or -{len(existing)} to -1."
            )
        chosen.add(index)
    return tuple(sorted(chosen))
