"""Choice of a backend by name. A requested backend runs or is refused; it is never replaced."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from ..errors import ArgumentError, BackendUnavailableError
from ..plan import TilePlan
from ..state import AttentionState
from . import reference, torch_backend

__all__ = ["BACKENDS", "attend", "available_backends", "resolve_backend"]

_LOGGER = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "triton", "numba")
"""Every name that `backend=` accepts; `available_backends` lists those that can run."""

_IMPLEMENTED: dict[str, Callable[..., AttentionState]] = {
    "reference": reference.attend,
    "torch": torch_backend.attend,
}


def available_backends() -> tuple[str, ...]:
    """Return the names of the backends that can run in this installation."""
    return tuple(_IMPLEMENTED)


def resolve_backend(name: str, device: torch.device) -> str:
    """Return the backend that runs for a request on a device.

    Raises:
        ArgumentError: the name is none of `BACKENDS`.
        BackendUnavailableError: the name is known but cannot run here.
    """
    if name == "auto":
        if not torch.compiler.is_compiling():  # a log record would break the graph
            _log_choice("torch", device.type)
        return "torch"
    if name not in BACKENDS:
        raise ArgumentError(f"backend: {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name not in _IMPLEMENTED:
        raise BackendUnavailableError(
            f"backend: {name!r} was asked for, but this version has no {name} kernels; "
            f"choose one of {', '.join(available_backends())}, or 'auto'"
        )
    return name


@functools.cache
def _log_choice(name: str, device_type: str) -> None:
    """Say once for every device what `auto` means."""
    _LOGGER.info(
        "backend='auto' runs %r on %s: the fastest backend of this version there", name, device_type
    )


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TilePlan, *, scale: float,
    backend: str = "auto",
) -> AttentionState:  # fmt: skip
    """Attend by a plan with the backend of that name; shapes as in `TilePlan`.

    Raises:
        ArgumentError: the plan was made for other shapes.
        BackendUnavailableError: the backend cannot run here.
    """
    plan.check_inputs(query, key)
    return _IMPLEMENTED[resolve_backend(backend, query.device)](
        query, key, value, plan, scale=scale
    )
