"""From rules to what every head of every layer does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import nn

from ..errors import ArgumentError, ArgumentTypeError
from ._selectors import choose_layers

__all__ = ["Part", "check_heads", "resolve_rules"]


class Part(NamedTuple):
    """How some heads of one layer attend.

    Attributes:
        key_heads: indices of key heads, ascending, with their query heads; None is all of them.
        attention: arguments of `HyperAttention`, or "exact".
    """

    key_heads: tuple[int, ...] | None
    attention: dict[str, Any] | str


class _Rule(Protocol):
    """What is read of a rule."""

    @property
    def layers(self) -> Any: ...
    @property
    def attention(self) -> Mapping[str, Any] | str: ...
    @property
    def key_heads(self) -> Sequence[int] | None: ...


def resolve_rules(
    rules: Sequence[_Rule], existing: Sequence[int], num_key_heads: int, *,
    names: Sequence[str] | None, modules: Sequence[nn.Module] | None, place: str,
) -> tuple[tuple[Part, ...], ...]:  # fmt: skip
    """Return how every layer attends; see `hyperframe.integrations.policy.Policy.resolve`.

    Args:
        rules: later ones override earlier ones.
        existing: indices of the attention layers, ascending.
        num_key_heads: key heads of each.
        names: of the layers' modules.
        modules: the modules.
        place: what the policy is called in messages.

    Raises:
        ArgumentError: a rule that names no layer, or layers or heads that there are not.
    """
    if not existing or num_key_heads < 1:
        raise ArgumentError(
            f"{place}: num_layers={len(existing)} and num_key_heads={num_key_heads}; there "
            "must be at least one of each"
        )
    heads = range(num_key_heads)
    ways: dict[int, list[dict[str, Any] | str]] = {
        index: ["exact" for _ in heads] for index in existing
    }
    for number, rule in enumerate(rules):
        where = f"{place}: rules[{number}]"
        chosen = choose_layers(
            rule.layers, existing, names=names, modules=modules, owner=f"{where}.layers"
        )
        if not chosen and rule.layers != "none":
            shown = "its callable" if callable(rule.layers) else f"layers={rule.layers!r}"
            raise ArgumentError(
                f"{where} names no layer: {shown} picks none of the {len(existing)} attention "
                "layers; correct it or leave the rule out"
            )
        missing = [head for head in rule.key_heads or () if head not in heads]
        if missing:
            raise ArgumentError(
                f"{where}.key_heads holds {missing[0]}, but there are {num_key_heads} key "
                f"heads, 0 to {num_key_heads - 1}"
            )
        for index in chosen:
            for head in heads if rule.key_heads is None else rule.key_heads:
                way = rule.attention
                ways[index][head] = way if isinstance(way, str) else dict(way)
    return tuple(_parts(ways[index]) for index in existing)


def check_heads(heads: Any) -> tuple[int, ...]:
    """Return the indices of key heads, ascending, each once.

    Raises:
        ArgumentError, ArgumentTypeError: no list of indices, or an empty one.
    """
    if isinstance(heads, (str, Mapping)) or not isinstance(heads, Iterable):
        raise ArgumentTypeError(
            f"key_heads={heads!r} is no list of head indices; for one head write [0]"
        )
    found = list(heads)
    for head in found:
        if isinstance(head, bool) or not isinstance(head, int) or head < 0:
            raise ArgumentError(f"key_heads holds {head!r}; indices are integers from 0")
    if not found:
        raise ArgumentError("key_heads is empty; name at least one, or None for all")
    return tuple(sorted(set(found)))


def _parts(ways: list[dict[str, Any] | str]) -> tuple[Part, ...]:
    """The heads of a layer by how they attend."""
    kinds: list[dict[str, Any] | str] = []
    heads: list[list[int]] = []
    for head, way in enumerate(ways):
        if way not in kinds:
            kinds.append(way)
            heads.append([])
        heads[kinds.index(way)].append(head)
    if len(kinds) == 1:
        return (Part(None, kinds[0]),)
    return tuple(Part(tuple(own), kind) for own, kind in zip(heads, kinds, strict=True))
