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

Which layers and heads attend how may also be a *policy*, a value or a small JSON file beside the
weights (`hyperframe.integrations.policy`): `apply(model, policy=folder)`.

Padding on either side, packed `position_ids`, static and dynamic caches, prefill in chunks,
decoding and grouped-query attention work, in encoders (`is_causal=False`) as in decoders; dropout,
softcap, sinks with their own logit, position biases, paged caches and, on approximated layers,
masks per query and key are refused by name. A layer whose sliding window or chunk is shorter than
the keys stays exact, with its window; the handle says which and why. Packed sequences are separated
in causal models only, as transformers does.

Not covered: `torch.compile` of a prefill in one graph (whether rows are packed is read from
`position_ids`, which breaks the graph).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError, UnsupportedError
from ._selectors import Selector
from ._transformers_call import hyperframe_attention
from ._transformers_choice import by_options, by_policy, refuse_both
from ._transformers_handle import (
    HANDLE_ATTRIBUTE,
    IMPLEMENTATION,
    Applied,
    former,
    handles_in,
    live,
    replace,
)
from ._transformers_layers import attention_layers, window_of
from ._transformers_masks import hyperframe_mask, transformers_library
from ._transformers_routes import ROUTE_ATTRIBUTE, AttentionCall, Route, Settings
from .policy import Policy

__all__ = ["IMPLEMENTATION", "Applied", "AttentionCall", "apply", "remove", "save_policy"]


def apply(
    model: nn.Module,
    layers: Selector | None = None,
    *,
    policy: Policy | str | Path | None = None,
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
        layers: "all" (what None is), "none" (all layers exact: the baseline to time), "first:4",
            "last:8", a slice of layer indices such as "2:30:3", a wildcard on the names of the
            modules such as "*.layers.1?.self_attn", a layer index (negative ones count from the
            end), a list of these, or a callable `(layer index, module) -> bool`.
        policy: instead of `layers` and the options: who attends how, see
            `hyperframe.integrations.policy`; or the path of its file, or of the folder that holds
            `hyperframe_policy.json`.
        attention: a callable to use instead of `HyperAttention(**attention_args)`, called as
            `attention(query, key, value, is_causal=, scale=, key_padding_mask=, generator=)` with
            the shapes of `HyperAttention`; its `seed` attribute, if any, seeds the
            generator: a `torch.Generator`, or a `hyperframe.randomness.Stream` where its attribute
            `takes_stream` is True.
        observer: called with an `AttentionCall` after every attention call, exact or not. It makes
            each call wait for the device.
        **attention_args: options of `HyperAttention`, for example `detector="sort_lsh"`.

    Returns:
        A handle, see `Applied`; also a context manager.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong `layers`, `attention` or option, a policy
            that cannot be read or does not fit the model.
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
    modules = dict(sorted(attention_layers(model).items()))
    if policy is None:
        parts, policy, attention = by_options(model, modules, layers, attention, attention_args)
    else:
        refuse_both(layers, attention, attention_args)
        policy = policy if isinstance(policy, Policy) else Policy.load(policy)
        parts, policy, attention = by_policy(model, modules, policy)
    settings = Settings(observer=observer)

    configs = _configs(model)
    before = [(config, config._attn_implementation) for config in configs]
    previous = [(config, former(config)) for config in configs]
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

    replace(model, modules.values())
    routes = {
        index: Route(layer_idx=index, parts=parts[index], settings=settings) for index in modules
    }
    chosen = tuple(index for index, route in routes.items() if route.approximate)
    windows = {index: window_of(modules[index]) for index in chosen}
    handle = Applied(
        model=model, layers=chosen, modules=modules, attention=attention, policy=policy,
        windows={index: window for index, window in windows.items() if window is not None},
        settings=settings, previous=previous,
    )  # fmt: skip
    for index, module in modules.items():
        setattr(module, ROUTE_ATTRIBUTE, routes[index])
    model.__dict__[HANDLE_ATTRIBUTE] = handle
    live.add(handle)
    return handle


def remove(model: nn.Module) -> None:
    """Restores the attention implementation that `model`, or parts of it, had before `apply`.

    A model to which nothing is applied is left as it is.
    """
    for handle in handles_in(model):
        handle.remove()


def save_policy(
    model: nn.Module, directory: str | Path, *, info: Mapping[str, Any] | None = None
) -> Path:
    """Writes who attends how in a routed model as `hyperframe_policy.json`, beside its weights.

    `model.save_pretrained(directory)` saves the weights and knows nothing of the routing; after
    `from_pretrained(directory)`, `apply(model, policy=directory)` routes the model as before.

    Args:
        model: a model to which `apply` was applied.
        directory: the folder; made where there is none.
        info: free JSON to keep in the file beside what the policy has.

    Returns:
        The file.

    Raises:
        ArgumentError: nothing is applied, or the attention is a callable that no file can hold.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
        ...                      num_hidden_layers=3, vocab_size=100)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = apply(model, "last:2", detector="heavy_columns")
        ...     _ = save_policy(model, folder)
        ...     applied = apply(LlamaForCausalLM(config), policy=folder)
        >>> applied.layers, applied.policy.rules[0].attention
        ((1, 2), {'detector': 'heavy_columns'})
    """
    handles = handles_in(model)
    if len(handles) != 1:
        many = f"{len(handles)} parts of it are routed, each by its own apply"
        raise ArgumentError(
            f"save_policy: {type(model).__name__} has no one policy: "
            f"{many if handles else 'nothing is applied to it'}; call "
            f"{'save_policy for each part' if handles else 'apply first'}"
        )
    policy = handles[0].policy
    if policy is None:
        raise ArgumentError(
            f"save_policy: layers {list(handles[0].layers)} are served by "
            f"{handles[0].attention!r:.120}, which no file can hold; apply options of "
            "HyperAttention, with components that have a name"
        )
    policy = Policy(
        rules=policy.rules,
        model=type(handles[0].model).__name__ if policy.model is None else policy.model,
        info={**policy.info, **(info or {})},
    )
    Path(directory).mkdir(parents=True, exist_ok=True)
    return policy.save(directory)


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


def _implementation(module: nn.Module, model: nn.Module) -> str | None:
    config = getattr(module, "config", None) or getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None)
