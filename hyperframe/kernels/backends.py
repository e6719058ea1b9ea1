"""Choice of a backend by name. A requested backend runs or is refused; it is never replaced."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..blockplan import BlockPlan
from ..errors import ArgumentError, BackendUnavailableError, UnsupportedError
from ..plan import TilePlan
from ..state import AttentionState, merge
from ..validation import is_debugging
from . import reference, torch_backend, triton_backend
from .exact import exact_leaves

__all__ = ["BACKENDS", "attend", "attend_all", "available_backends", "resolve_backend"]

_LOGGER = logging.getLogger(__name__)

BACKENDS = ("auto", "reference", "torch", "triton", "numba")
"""Every name that `backend=` accepts; `available_backends` lists those that can run."""

_IMPLEMENTED: dict[str, Callable[..., AttentionState]] = {
    "reference": reference.attend,
    "torch": torch_backend.attend,
}
_NAMES = (*_IMPLEMENTED, "triton")


def available_backends(device: torch.device | str | None = None) -> tuple[str, ...]:
    """Return the names of the backends that can run.

    Args:
        device: where; None is the GPU if there is one, else the CPU.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = triton_backend.why_not(torch.device(device)) is not None
    return tuple(name for name in _NAMES if name != "triton" or not missing)


def resolve_backend(
    name: str, device: torch.device, *, query: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
) -> str:  # fmt: skip
    """Return the backend that runs for a request on a device.

    Args:
        name: one of `BACKENDS`.
        device: where the inputs are.
        query: the inputs, if they are known: `auto` and the refusals then look at dtype and sizes.
        value: likewise.

    Raises:
        ArgumentError: the name is none of `BACKENDS`.
        BackendUnavailableError: the name is known but cannot run here.
        UnsupportedError: it cannot take inputs like these.
    """
    if name == "auto":
        chosen = "torch"
        if device.type == "cuda" and triton_backend.why_not(device) is None:
            chosen = "torch" if _why_not_inputs(query, value) else "triton"
        if not torch.compiler.is_compiling():  # a log record would break the graph
            _log_choice(chosen, device.type)
        return chosen
    if name not in BACKENDS:
        raise ArgumentError(f"backend: {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name not in _NAMES:
        raise BackendUnavailableError(
            f"backend: {name!r} was asked for, but this version has no {name} kernels; "
            f"choose one of {', '.join(available_backends(device))}, or 'auto'"
        )
    if name == "triton":
        reason = triton_backend.why_not(device)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend: 'triton' was asked for, but {reason}; choose one of "
                f"{', '.join(available_backends(device))}, or 'auto'"
            )
        reason = _why_not_inputs(query, value)
        if reason is not None:
            raise UnsupportedError(
                f"backend: 'triton' {reason}; backend='torch' takes them, or change the inputs"
            )
    return name


def _why_not_inputs(query: torch.Tensor | None, value: torch.Tensor | None) -> str | None:
    """Return what the Triton kernels cannot take of the inputs; None where they are not known."""
    if query is None or value is None:
        return None
    return triton_backend.why_not_inputs(query, value)


@functools.cache
def _log_choice(name: str, device_type: str) -> None:
    """Say once for every device and choice what `auto` means."""
    _LOGGER.info(
        "backend='auto' runs %r on %s: the fastest backend that takes these inputs there",
        name, device_type,
    )  # fmt: skip


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TilePlan | BlockPlan, *,
    scale: float, backend: str = "auto",
) -> AttentionState:  # fmt: skip
    """Attend by a plan with the backend of that name; shapes as in `TilePlan`.

    With the environment variable `HYPERFRAME_DEBUG=1` the indices of the plan are checked first,
    which reads the device. Without, an index outside the keys means the nearest key on the
    Triton backend (nothing else is read), and is an error of the indexing on the others.

    Raises:
        ArgumentError: the plan was made for other shapes.
        BackendUnavailableError: the backend cannot run here.
        UnsupportedError: the backend cannot take inputs like these.
    """
    if isinstance(plan, TilePlan) and plan.is_removed:  # by itself it is a plan like any other
        plan = replace(plan, is_removed=False)
    return attend_all(query, key, value, [plan], scale=scale, backend=backend)


def attend_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    plans: Sequence[TilePlan | BlockPlan], *, scale: float, backend: str = "auto",
    leaf: int | None = None,
) -> AttentionState:  # fmt: skip
    """Attend by plans of disjoint support, less those that are removed; return the merged state.

    Args:
        query: `[batch, query_heads, n_q, d]`.
        key: `[batch, key_heads, n_k, d]`.
        value: `[batch, key_heads, n_k, d_v]`.
        plans: at least one, unless there are leaves.
        scale: factor of the logits.
        backend: a name of `BACKENDS`.
        leaf: also attend causally inside consecutive runs of this many rows (`n_q == n_k`).
    """
    if value.shape[:3] != key.shape[:3] or key.shape[3:] != query.shape[3:]:
        raise ArgumentError(
            "attend: expected query [batch, query_heads, n_q, d], key [batch, key_heads, n_k, d] "
            f"and value [batch, key_heads, n_k, d_v], got {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ArgumentError(
            f"attend: query, key and value are of one dtype; got {query.dtype}, {key.dtype} and "
            f"{value.dtype}"
        )
    for plan in plans:
        plan.check_inputs(query, key)
        if is_debugging():
            plan.validate()
    name = resolve_backend(backend, query.device, query=query, value=value)
    if name == "triton":
        return triton_backend.attend_all(query, key, value, plans, scale=scale, leaf=leaf)
    attend_one = _IMPLEMENTED[name]
    states: list[AttentionState] = []
    removed: list[AttentionState] = []
    if leaf is not None:
        states.append(exact_leaves(query, key, value, leaf=leaf, scale=scale))
    for plan in plans:
        listed = plan.to_tile_plan() if isinstance(plan, BlockPlan) else plan
        state = attend_one(query, key, value, listed, scale=scale)
        (removed if listed.is_removed else states).append(state)
    return merge(*states, removed=removed)
