"""From what `apply` was asked to what serves every head of every layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..attention import HyperAttention, check_options
from ..errors import ArgumentError, ArgumentTypeError, SpecError, UnsupportedError
from ._selectors import Selector, choose_layers
from ._transformers_layers import key_heads, layer_names
from ._transformers_routes import HeadPart
from .exact import exact_attention
from .policy import Policy, Rule, options_of

__all__ = ["by_options", "by_policy", "refuse_both"]

#: what one layer's heads are served by
_Parts = tuple[HeadPart, ...]
_EXACT: _Parts = (HeadPart(key_heads=None, attention=None),)


def refuse_both(
    layers: Selector | None, attention: Callable[..., Tensor] | None, options: dict[str, Any]
) -> None:
    """Refuses a policy beside what it would say."""
    given = {"layers": layers, "attention": attention, **options}
    names = [name for name, value in given.items() if value is not None or name in options]
    if names:
        raise ArgumentError(
            f"policy= was given together with {names}: a policy says already which layers attend "
            "how. Pass one or the other."
        )


def by_options(
    model: nn.Module, modules: dict[int, nn.Module], layers: Selector | None,
    attention: Callable[..., Tensor] | None, options: dict[str, Any],
) -> tuple[dict[int, _Parts], Policy | None, Callable[..., Tensor]]:  # fmt: skip
    """The parts of every layer, the policy that says the same, and what serves the chosen ones."""
    found = list(modules.values())
    names = layer_names(model, found)
    asked = "all" if layers is None else layers
    chosen = choose_layers(asked, list(modules), names=names, modules=found)
    built = exact_attention if not chosen and attention is None and not options else None
    built = built or _attention(attention, options)
    approximated: _Parts = (HeadPart(key_heads=None, attention=built),)
    parts = {index: approximated if index in chosen else _EXACT for index in modules}
    if not chosen:
        return parts, Policy(rules=()), built
    if not isinstance(built, HyperAttention):
        return parts, None, built
    try:
        rule = Rule(layers=chosen, attention=options_of(built))
    except SpecError:  # a component without a name
        return parts, None, built
    return parts, Policy(rules=(rule,)), built


def by_policy(
    model: nn.Module, modules: dict[int, nn.Module], policy: Policy
) -> tuple[dict[int, _Parts], Policy, Callable[..., Tensor] | None]:
    """As `by_options`; the policy that comes back can be written to a file."""
    found = list(modules.values())
    names = layer_names(model, found)
    heads = {key_heads(module, model) for module in found}
    count = next(iter(heads)) if len(heads) == 1 else None
    if count is None and any(rule.key_heads is not None for rule in policy.rules):
        raise UnsupportedError(
            f"policy: key_heads is asked for, but the layers of {type(model).__name__} do not all "
            "have the same known number of key heads; leave key_heads out"
        )
    resolved = policy.resolve(list(modules), count or 1, names=names, modules=found)
    built: dict[str, HyperAttention] = {}

    def attention_of(way: dict[str, Any] | str) -> HyperAttention | None:
        if isinstance(way, str):
            return None
        return built.setdefault(json.dumps(way, sort_keys=True), HyperAttention(**way))

    parts = {
        index: tuple(
            HeadPart(key_heads=part.key_heads, attention=attention_of(part.attention))
            for part in layer
        )
        for index, layer in zip(modules, resolved, strict=True)
    }
    rules = [
        Rule(
            layers=choose_layers(rule.layers, list(modules), modules=found),
            attention=rule.attention,
            key_heads=rule.key_heads,
        )
        if callable(rule.layers)
        else rule
        for rule in policy.rules
    ]
    named = Policy(rules=rules, model=policy.model, info=policy.info)
    return parts, named, next(iter(built.values())) if len(built) == 1 else None


def _attention(
    attention: Callable[..., Tensor] | None, options: dict[str, Any]
) -> Callable[..., Tensor]:
    if attention is None:
        check_options(options, owner="apply")
        return HyperAttention(**options)
    if options:
        raise ArgumentError(
            f"attention= was given together with {sorted(options)}: these options belong to "
            "the HyperAttention that apply would build. Pass one or the other."
        )
    if not callable(attention):
        raise ArgumentTypeError(
            f"attention must be callable, got {type(attention).__name__}; pass a HyperAttention, "
            "or its options by name (detector='sort_lsh', ...)."
        )
    return attention
