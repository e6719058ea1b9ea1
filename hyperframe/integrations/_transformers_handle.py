"""What `apply` did to a model, and how it is undone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from ._transformers_routes import ROUTE_ATTRIBUTE, Settings
from .policy import Policy

__all__ = [
    "HANDLE_ATTRIBUTE",
    "IMPLEMENTATION",
    "Applied",
    "former",
    "handles_in",
    "live",
    "replace",
]

#: the name under which the attention and mask functions are registered with transformers
IMPLEMENTATION = "hyperframe"
HANDLE_ATTRIBUTE = "_hyperframe_applied"
# only to share configs correctly (two models may hold the same config object), never to dispatch
live: weakref.WeakSet[Applied] = weakref.WeakSet()


class Applied:
    """What `apply` did to a model; leaving it as a context manager, or `remove`, undoes it.

    Attributes:
        model: the model.
        layers: indices of the layers that are approximated, at least in some heads, ascending.
        all_layers: indices of all attention layers, ascending.
        attention: the callable that serves `layers`, None where a policy says what serves them.
        policy: who attends how, callables as selectors replaced by the layers that they picked;
            None where `apply` was given a callable that is no `HyperAttention` with a spec.
        windows: the sliding window, or chunk, of those of `layers` that have one, in keys. On
            inputs with more keys than that these layers stay exact, with their window.
        left_exact: the layers of `layers` where that happened so far, with the reason.
    """

    def __init__(
        self, *, model: nn.Module, layers: tuple[int, ...], modules: dict[int, nn.Module],
        attention: Callable[..., Tensor] | None, policy: Policy | None, windows: dict[int, int],
        settings: Settings, previous: list[tuple[Any, str | None]],
    ) -> None:  # fmt: skip
        self.model = model
        self.layers = layers
        self.all_layers = tuple(sorted(modules))
        self.attention = attention
        self.policy = policy
        self.windows = windows
        self._modules = modules
        self._settings = settings
        self._previous = previous

    @property
    def left_exact(self) -> dict[int, str]:
        """See the attributes of the class."""
        return dict(sorted(self._settings.left_exact.items()))

    def remove(self) -> None:
        """Restores the attention implementation that the model had before; twice is harmless."""
        if self.model.__dict__.get(HANDLE_ATTRIBUTE) is not self:
            return
        del self.model.__dict__[HANDLE_ATTRIBUTE]
        for module in self._modules.values():
            module.__dict__.pop(ROUTE_ATTRIBUTE, None)
        live.discard(self)
        shared = {id(config) for other in live for config, _ in other._previous}
        for config, implementation in self._previous:
            # another model may still need the config, and a later choice of the caller's stands
            if id(config) not in shared and config._attn_implementation == IMPLEMENTATION:
                config._attn_implementation_internal = implementation

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.remove()

    def __repr__(self) -> str:
        name = type(self.model).__name__
        windows = f", windows {self.windows}" if self.windows else ""
        return (
            f"<Applied to {name}: layers {list(self.layers)} of {list(self.all_layers)}{windows}>"
        )


def handles_in(model: nn.Module) -> list[Applied]:
    """What is applied to a model or to a part of it, for example to what PEFT has wrapped."""
    found = (module.__dict__.get(HANDLE_ATTRIBUTE) for module in model.modules())
    return [handle for handle in found if isinstance(handle, Applied)]


def former(config: Any) -> str | None:
    """What to restore: the present implementation, or what ours has replaced in a shared config."""
    present: str | None = config._attn_implementation
    if present == IMPLEMENTATION:
        for other in live:
            for known, implementation in other._previous:
                if known is config:
                    return implementation
    return present


def replace(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Drops the handles whose layers get a new one; the configs stay with that."""
    ours = set(map(id, modules))
    for other in list(live):
        if other.model is model or ours & set(map(id, other._modules.values())):
            for module in other._modules.values():
                module.__dict__.pop(ROUTE_ATTRIBUTE, None)
            other.model.__dict__.pop(HANDLE_ATTRIBUTE, None)
            live.discard(other)
