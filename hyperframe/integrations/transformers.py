"""HyperAttention inside models of the transformers library (version 5).

`apply` routes the attention of chosen layers through `HyperAttention` and every other layer through
exact SDPA of the same function, so that the two can be compared and timed side by side; `remove`
puts the former implementation back.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
    ...                      num_key_value_heads=2, num_hidden_layers=3, vocab_size=100)
    >>> model = LlamaForCausalLM(config).eval()
    >>> with apply(model, layers="last:2", num_samples=64, min_seq_len=0) as applied:
    ...     logits = model(torch.arange(50)[None]).logits
    >>> applied.layers, applied.all_layers
    ((1, 2), (0, 1, 2))

Padding on either side, packed `position_ids`, static and dynamic caches, prefill in chunks,
decoding and grouped-query attention work, in encoders (`is_causal=False`) as in decoders; dropout,
softcap, sinks with their own logit, position biases, paged caches and, on approximated layers,
masks per query and key are refused by name. Packed sequences are separated in causal models only,
as transformers does.

Not covered: `torch.compile` of a prefill in one graph (whether rows are packed is read from
`position_ids`, which breaks the graph).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
)
from ._exact import exact_attention
from ._transformers_call import (
    ROUTE_ATTRIBUTE,
    AttentionCall,
    Route,
    Settings,
    hyperframe_attention,
)
from ._transformers_layers import attention_layers, choose_layers
from ._transformers_masks import hyperframe_mask, transformers_library

__all__ = ["IMPLEMENTATION", "Applied", "AttentionCall", "apply", "remove"]

#: the name under which the attention and mask functions are registered with transformers
IMPLEMENTATION = "hyperframe"
_HANDLE_ATTRIBUTE = "_hyperframe_applied"
# only to share configs correctly (two models may hold the same config object), never to dispatch
_live: weakref.WeakSet[Applied] = weakref.WeakSet()


class Applied:
    """What `apply` did to a model; leaving it as a context manager, or `remove`, undoes it.

    Attributes:
        model: the model.
        layers: indices of the approximated layers, ascending.
        all_layers: indices of all attention layers, ascending.
        attention: the callable that serves `layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: tuple[int, ...],
        modules: dict[int, nn.Module],
        settings: Settings,
        previous: list[tuple[Any, str | None]],
    ) -> None:
        self.model = model
        self.layers = layers
        self.all_layers = tuple(sorted(modules))
        self.attention = settings.attention
        self._modules = modules
        self._previous = previous

    def remove(self) -> None:
        """Restores the attention implementation that the model had before; twice is harmless."""
        if self.model.__dict__.get(_HANDLE_ATTRIBUTE) is not self:
            return
        del self.model.__dict__[_HANDLE_ATTRIBUTE]
        for module in self._modules.values():
            module.__dict__.pop(ROUTE_ATTRIBUTE, None)
        _live.discard(self)
        shared = {id(config) for other in _live for config, _ in other._previous}
        for config, implementation in self._previous:
            # another model may still need the config, and a later choice of the caller's stands
            if id(config) not in shared and config._attn_implementation == IMPLEMENTATION:
                config._attn_implementation_internal = implementation

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"<Applied to {name}: layers {list(self.layers)} of {list(self.all_layers)}>"


def apply(
    model: nn.Module,
    layers: str | Iterable[int] = "all",
    *,
    attention: Callable[..., Tensor] | None = None,
    observer: Callable[[AttentionCall], None] | None = None,
    **attention_args: Any,
) -> Applied:
    """Approximates the attention of chosen layers of a transformers model, in place.

    The weights stay as they are. Applying again replaces the former choice, and models do not
    disturb one another. A model of several stacks (encoder-decoder, vision and language) is treated
    one stack at a time: `apply(model.model.decoder, ...)`; cross-attention stays exact.

    Args:
        model: a transformers model, or a submodel of one, whose attention goes through
            `AttentionInterface`.
        layers: "all", "none" (all layers exact: the baseline to time), "first:4", "last:8", or
            layer indices; negative ones count from the end.
        attention: a callable to use instead of `HyperAttention(**attention_args)`, called as
            `attention(query, key, value, is_causal=, scale=, key_padding_mask=, generator=)` with
            the shapes of `HyperAttention`; its `seed` attribute, if any, seeds the
            generator: a `torch.Generator`, or a `hyperframe.randomness.Stream` where its attribute
            `takes_stream` is True.
        observer: called with an `AttentionCall` after every attention call, exact or not. It makes
            each call wait for the device.
        **attention_args: options of `HyperAttention`, for example `detector="sort_lsh"`.

    Returns:
        A handle with `layers`, `all_layers`, `remove()`; also a context manager.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong `layers`, `attention` or option.
        UnsupportedError: the model's attention cannot be replaced; nothing has been changed then.

    Randomness: each layer, chunk and packed sequence draws its own samples. In eval mode they
    follow from the seed alone; a training forward draws entropy from torch's CPU generator, so that
    steps differ and gradient checkpointing recomputes the same ones.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTModel
        >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...                            intermediate_size=64, image_size=32, patch_size=8)).eval()
        >>> calls = []
        >>> applied = apply(model, layers=[-1], observer=calls.append, min_seq_len=0)
        >>> _ = model(torch.zeros(1, 3, 32, 32))
        >>> [(call.layer_idx, call.n_k, call.exact) for call in calls]
        [(0, 17, True), (1, 17, False)]
        >>> remove(model)
    """
    if not callable(getattr(model, "set_attn_implementation", None)):
        raise UnsupportedError(
            f"model is a {type(model).__name__}, which has no set_attn_implementation: only models "
            "of transformers 5 can be routed. Pass the PreTrainedModel itself."
        )
    if observer is not None and not callable(observer):
        raise ArgumentTypeError(
            f"observer must be callable with an AttentionCall, got {type(observer).__name__}."
        )
    modules = attention_layers(model)
    chosen = choose_layers(layers, sorted(modules))
    if not chosen and attention is None and not attention_args:
        attention = exact_attention
    settings = Settings(attention=_attention(attention, attention_args), observer=observer)

    configs = _configs(model)
    before = [(config, config._attn_implementation) for config in configs]
    previous = [(config, _former(config)) for config in configs]
    transformers_library.AttentionInterface.register(IMPLEMENTATION, hyperframe_attention)
    transformers_library.AttentionMaskInterface.register(IMPLEMENTATION, hyperframe_mask)
    try:
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        deaf = [i for i, m in modules.items() if _implementation(m, model) != IMPLEMENTATION]
        if deaf:
            raise UnsupportedError(
                f"{type(model).__name__} did not accept the attention implementation "
                f"{IMPLEMENTATION!r} in layers {deaf}: it does not go through transformers' "
                "AttentionInterface. Use a model that does, or a newer transformers."
            )
    except Exception as error:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        if isinstance(error, UnsupportedError):
            raise
        raise UnsupportedError(
            f"{type(model).__name__} refused the attention implementation {IMPLEMENTATION!r}: "
            f"{error}. Nothing was changed; use a model that goes through AttentionInterface."
        ) from error

    for other in list(_live):
        if other.model is model or set(map(id, other._modules.values())) & set(
            map(id, modules.values())
        ):
            _forget(other)
    handle = Applied(model, chosen, modules, settings, previous)
    for index, module in modules.items():
        route = Route(layer_idx=index, approximate=index in chosen, settings=settings)
        setattr(module, ROUTE_ATTRIBUTE, route)
    model.__dict__[_HANDLE_ATTRIBUTE] = handle
    _live.add(handle)
    return handle


def remove(model: nn.Module) -> None:
    """Restores the attention implementation that `model` had before `apply`.

    A model to which nothing is applied is left as it is.
    """
    handle = model.__dict__.get(_HANDLE_ATTRIBUTE)
    if isinstance(handle, Applied):
        handle.remove()


def _attention(
    attention: Callable[..., Tensor] | None, attention_args: dict[str, Any]
) -> Callable[..., Tensor]:
    if attention is None:
        from ..attention import HyperAttention, check_options

        check_options(attention_args, owner="apply")
        built: Callable[..., Tensor] = HyperAttention(**attention_args)
        return built
    if attention_args:
        raise ArgumentError(
            f"attention= was given together with {sorted(attention_args)}: these options belong to "
            "the HyperAttention that apply would build. Pass one or the other."
        )
    if not callable(attention):
        raise ArgumentTypeError(
            f"attention must be callable, got {type(attention).__name__}; pass a HyperAttention, "
            "or its options by name (detector='sort_lsh', ...)."
        )
    return attention


def _configs(model: nn.Module) -> list[Any]:
    """Every config that set_attn_implementation may change, each once."""
    found: dict[int, Any] = {}
    queue = [getattr(module, "config", None) for module in model.modules()]
    while queue:
        config = queue.pop()
        if hasattr(config, "_attn_implementation_internal") and id(config) not in found:
            found[id(config)] = config
            queue += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())


def _former(config: Any) -> str | None:
    """What to restore: the present implementation, or what ours has replaced in a shared config."""
    present: str | None = config._attn_implementation
    if present == IMPLEMENTATION:
        for other in _live:
            for known, implementation in other._previous:
                if known is config:
                    return implementation
    return present


def _implementation(module: nn.Module, model: nn.Module) -> str | None:
    config = getattr(module, "config", None) or getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None)


def _forget(handle: Applied) -> None:
    """Drops a handle that another one replaces; the configs stay with the new one."""
    for module in handle._modules.values():
        module.__dict__.pop(ROUTE_ATTRIBUTE, None)
    handle.model.__dict__.pop(_HANDLE_ATTRIBUTE, None)
    _live.discard(handle)
