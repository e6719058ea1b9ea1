"""Which layers and heads of a model attend how, as a value and as a small JSON file.

A *rule* says for some layers, or for some key heads of them, how they attend; a *policy* is a list
of rules, where later ones override earlier ones, and what no rule names stays exact:

    >>> policy = Policy(rules=[
    ...     Rule(layers="all", attention={"detector": "balanced", "num_samples": 128}),
    ...     Rule(layers=[0, -1], attention="exact"),
    ... ])
    >>> [len(layer) for layer in policy.resolve(num_layers=4, num_key_heads=2)]
    [1, 1, 1, 1]
    >>> policy.resolve(4, 2)[0], policy.resolve(4, 2)[1][0].attention["detector"]
    ((Part(key_heads=None, attention='exact'),), 'balanced')
    >>> Policy.from_dict(policy.to_dict()) == policy
    True

`hyperframe.integrations.transformers.apply(model, policy=...)` takes one, or the path of a file.
Nothing here needs transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError, ArgumentTypeError, HyperframeError
from ._policy_file import check_info, check_keys, kind_of_json, read_json
from ._policy_options import check_attention, options_of
from ._policy_parts import Part, check_heads, resolve_rules
from ._selectors import Selector, check_selector

__all__ = ["POLICY_FILE", "Part", "Policy", "Rule", "options_of"]

POLICY_FILE = "hyperframe_policy.json"
"""The name of a policy file in a folder, beside the weights."""

_FORMAT, _VERSION = "hyperframe-policy", 1


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How some layers, or some key heads of them, attend.

    Args:
        layers: "all", "none", "first:4", "last:8", a slice of layer indices ("2:30:3"), an index
            (-1 is the last layer), a wildcard on the name of the layer's module
            ("*.layers.1?.self_attn"), a list of these; in Python also a callable
            `(layer index, module) -> bool`, which no file can hold.
        attention: arguments of `HyperAttention` by name (text, numbers, booleans and None;
            components may be instances, which become spec strings), or "exact".
        key_heads: the rule holds for these key heads and their query heads only; None is for all.

    Raises:
        ArgumentError, ArgumentTypeError: something of these is wrong; options and components are
            checked as `HyperAttention` does.
    """

    layers: Selector
    attention: Mapping[str, Any] | str
    key_heads: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Check, and bring equal rules into the same form."""
        object.__setattr__(self, "layers", check_selector(self.layers))
        if self.layers == ():
            raise ArgumentError("layers=[] names no layer; name some, or leave the rule out")
        object.__setattr__(self, "attention", check_attention(self.attention))
        if self.key_heads is not None:
            object.__setattr__(self, "key_heads", check_heads(self.key_heads))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form.

        Raises:
            ArgumentError: the layers are given by a callable.
        """
        if callable(self.layers):
            raise ArgumentError(
                "layers is a callable, which no file can hold; write the layers that it picks as a "
                "list"
            )
        layers = list(self.layers) if isinstance(self.layers, tuple) else self.layers
        attention = self.attention if isinstance(self.attention, str) else dict(self.attention)
        heads = None if self.key_heads is None else list(self.key_heads)
        form = {"layers": layers, "attention": attention}
        return form if heads is None else {**form, "key_heads": heads}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Rules for the layers of a model; later ones override earlier ones.

    Args:
        rules: of type `Rule`; layers and heads that none of them names are exact.
        model: the model that it was made for, in words; not compared with anything.
        info: whatever else JSON can hold, for example what was measured.
    """

    rules: Sequence[Rule]
    model: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    # where it comes from, for messages
    _source: str = field(default="policy", init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check the types."""
        if isinstance(self.rules, Rule) or not isinstance(self.rules, Sequence):
            raise ArgumentTypeError(f"Policy: rules={self.rules!r} is no list of Rule objects")
        for number, rule in enumerate(self.rules):
            if not isinstance(rule, Rule):
                raise ArgumentTypeError(
                    f"Policy: rules[{number}] is a {type(rule).__name__}; write "
                    "Rule(layers=..., attention=...)"
                )
        if self.model is not None and not isinstance(self.model, str):
            raise ArgumentTypeError(
                f"Policy: model is a {type(self.model).__name__}; pass a name, or None"
            )
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "info", check_info(self.info))

    def resolve(
        self, num_layers: int | Sequence[int], num_key_heads: int, *,
        names: Sequence[str] | None = None, modules: Sequence[nn.Module] | None = None,
    ) -> tuple[tuple[Part, ...], ...]:  # fmt: skip
        """Return how every attention layer attends.

        Args:
            num_layers: number of attention layers, or their indices, ascending, where there are
                gaps between them.
            num_key_heads: key heads of each layer.
            names: of the layers' modules, where a rule has a wildcard.
            modules: the modules, where a rule has a callable.

        Returns:
            For each layer its parts: one with `key_heads=None` where all heads attend alike, else
            one for each way of attending, in the order of their first heads. Together they hold
            every head once.

        Raises:
            ArgumentError: a rule that names no layer, or layers or heads that there are not.
        """
        existing = range(num_layers) if isinstance(num_layers, int) else tuple(num_layers)
        return resolve_rules(
            self.rules, existing, num_key_heads, names=names, modules=modules, place=self._source
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as it stands in a file.

        Raises:
            ArgumentError: a rule gives its layers by a callable.
        """
        rules = []
        for number, rule in enumerate(self.rules):
            try:
                rules.append(rule.to_dict())
            except ArgumentError as error:
                raise ArgumentError(f"{self._source}: rules[{number}]: {error}") from None
        return {
            "format": _FORMAT, "version": _VERSION, "model": self.model, "rules": rules,
            "info": dict(self.info),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, form: Any, *, source: str = "policy") -> Policy:
        """Make a policy from its JSON form.

        Args:
            form: what `to_dict` returns; `model` and `info` may be left out.
            source: what it is called in messages.

        Raises:
            ArgumentError: something in it is wrong; the message names the place.
        """
        known = {"format", "version", "model", "rules", "info"}
        check_keys(form, known, {"format", "version", "rules"}, source)
        if form["format"] != _FORMAT:
            raise ArgumentError(f"{source}: format is {form['format']!r}, not {_FORMAT!r}")
        if form["version"] != _VERSION or isinstance(form["version"], bool):
            raise ArgumentError(
                f"{source}: version is {form['version']!r}, and this hyperframe reads version "
                f"{_VERSION}; a newer hyperframe may have written it"
            )
        if not isinstance(form["rules"], list):
            raise ArgumentError(f"{source}: rules is {kind_of_json(form['rules'])}, not a list")
        rules = []
        for number, rule in enumerate(form["rules"]):
            place = f"{source}: rules[{number}]"
            needed = {"layers", "attention"}
            check_keys(rule, needed | {"key_heads"}, needed, place)
            try:
                rules.append(Rule(**rule))
            except HyperframeError as error:
                raise ArgumentError(f"{place}: {error}") from error
        try:
            policy = cls(rules=rules, model=form.get("model"), info=form.get("info", {}))
        except HyperframeError as error:
            raise ArgumentError(f"{source}: {error}") from error
        object.__setattr__(policy, "_source", source)
        return policy

    def save(self, path: str | Path) -> Path:
        """Write the file.

        Args:
            path: the file, or an existing folder: then it is `hyperframe_policy.json` in it.

        Returns:
            The file.

        Raises:
            ArgumentError: a rule gives its layers by a callable, or there is no such folder.
        """
        file = _file(path)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        if not file.parent.is_dir():
            raise ArgumentError(f"{file}: there is no folder {file.parent}; make it first")
        file.write_text(text, encoding="utf-8")
        return file

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a file.

        Args:
            path: the file, or the folder that has `hyperframe_policy.json` in it.

        Raises:
            ArgumentError: there is none, or something in it is wrong; the message names the file
                and the place.
        """
        file = _file(path)
        made_by = "hyperframe tune, Policy.save and transformers.save_policy make one"
        return cls.from_dict(read_json(file, missing=made_by), source=str(file))


def _file(path: str | Path) -> Path:
    if not isinstance(path, (str, Path)):
        raise ArgumentTypeError(f"path is of type {type(path).__name__}; pass text or a Path")
    return Path(path) / POLICY_FILE if Path(path).is_dir() else Path(path)
