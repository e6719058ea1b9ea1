"""Which modules of a model are attention layers, and what can be read off them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable

from torch import nn

from ..errors import UnsupportedError

__all__ = ["attention_layers", "key_heads", "layer_names", "window_of"]

# cross-attention shares the layer_idx of the self-attention beside it, and stays exact
_CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)


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
    # mypy takes the hash of a class for that of its instances
    callers = {kind for kind in kinds if _calls_interface(kind)}  # type: ignore[arg-type]
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
            f"AttentionInterface, so its attention cannot be replaced.{_about_alibi(model)} Use a "
            "model that does."
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


def _about_alibi(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    own = getattr(config, "attn_config", config)
    is_biased = getattr(own, "alibi", False) or getattr(config, "model_type", "") == "bloom"
    added = " It adds a bias per query and key to the logits (ALiBi), which is not supported."
    return added if is_biased else ""


@functools.cache  # reading sources takes a third of a second a model
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


def layer_names(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    """The names of modules inside a model, as `model.named_modules()` has them.

    A model that PEFT wraps is looked at without the wrapper, so that names stay what they were.
    """
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    named = {id(module): name for name, module in inner.named_modules()}
    return [named.get(id(module), "") for module in modules]


def key_heads(module: nn.Module, model: nn.Module) -> int | None:
    """The number of key heads of an attention module, None where nothing tells it."""
    config = getattr(module, "config", None) or getattr(model, "config", None)
    for holder in (module, config):
        for name in ("num_key_value_heads", "num_attention_heads", "num_heads"):
            found = getattr(holder, name, None)
            if isinstance(found, int):
                return found
    return None


def window_of(module: nn.Module) -> int | None:
    """The sliding window or chunk of an attention module, in keys; None where it sees them all."""
    own: int | None = getattr(module, "sliding_window", None)
    if own is not None:
        return own
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None or index is None or index >= len(kinds):
        # models without kinds of layers pass the config's window to every one of them
        window: int | None = getattr(config, "sliding_window", None) if kinds is None else None
        return window
    name = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    found: int | None = getattr(config, name.get(kinds[index], ""), None)
    return found
