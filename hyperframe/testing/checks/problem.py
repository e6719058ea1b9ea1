"""What the checks ask with: small inputs from seeds, ways to disturb them, and how a check fails.

Inputs are made on the CPU from a seed and then moved, so that a check asks the same numbers on
every device and never fails by chance. The generators that components get are on the device, as
those of an attention call are.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn

import torch
from torch.overrides import TorchFunctionMode

from ...component import AbstractComponent

__all__ = [
    "DTYPES",
    "LENGTHS",
    "CheckSkippedError",
    "Inputs",
    "as_one_graph",
    "changed",
    "cpu_generator",
    "device",
    "fail",
    "generator",
    "global_seed",
    "has_own_generator",
    "inputs",
    "on_device",
    "same_bits",
    "strided",
    "why_no_device",
]

LENGTHS = ((40, 40), (29, 40), (40, 29), (1, 40), (40, 1), (1, 1), (63, 63))
"""`(n_q, n_k)`: square, a chunk with a cache, more queries than keys, single tokens, ragged."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that every component takes."""

_DEVICE: ContextVar[torch.device | None] = ContextVar("device", default=None)


class CheckSkippedError(Exception):
    """A check does not apply to a component; the message says why."""


class Inputs(NamedTuple):
    """Query `[B, Hq, n_q, d]`, key `[B, Hkv, n_k, d]` and value `[B, Hkv, n_k, d_v]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


@contextlib.contextmanager
def on_device(where: torch.device | str) -> Iterator[None]:
    """Let the checks inside the block ask with tensors on a device."""
    token = _DEVICE.set(torch.device(where))
    try:
        yield
    finally:
        _DEVICE.reset(token)


def why_no_device(where: torch.device | str) -> str | None:
    """Return why nothing can be asked on a device, or None."""
    if torch.device(where).type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def device() -> torch.device:
    """Return the device on which the checks ask."""
    return _DEVICE.get() or torch.device("cpu")


def cpu_generator(seed: int = 0) -> torch.Generator:
    """Return a generator for inputs: alike whatever device they are moved to."""
    return torch.Generator().manual_seed(seed)


def generator(seed: int = 0) -> torch.Generator:
    """Return a generator for a component, on the device on which the checks ask."""
    return torch.Generator(device()).manual_seed(seed)


@contextlib.contextmanager
def global_seed(seed: int) -> Iterator[Callable[[], bool]]:
    """Seed torch's global generators inside the block, and put them back afterwards.

    Yields:
        A function that says whether they were drawn from.
    """
    states = _global_states()
    try:
        torch.manual_seed(seed)
        before = _global_states()
        yield lambda: not all(map(torch.equal, before, _global_states()))
    finally:
        torch.random.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, device())


def _global_states() -> list[torch.Tensor]:
    states = [torch.random.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device())] if device().type == "cuda" else [])


class _Draws(TorchFunctionMode):
    """Sees the generators by which torch draws."""

    def __init__(self) -> None:
        super().__init__()
        self.generators: list[torch.Generator] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call what is called, and keep the generator that it is given."""
        found = (kwargs or {}).get("generator")
        if isinstance(found, torch.Generator):
            self.generators.append(found)
        return func(*args, **(kwargs or {}))


def has_own_generator(component: AbstractComponent, call: Callable[[torch.Generator], Any]) -> bool:
    """Whether a call draws by a generator of its own, and never by the one it is given.

    One that is made from draws of the given one is welcome, and so is one of a parameter `seed`.

    Args:
        component: what is called.
        call: calls it with a generator.
    """
    given = generator(1)
    before = given.get_state()
    with _Draws() as draws:
        call(given)
    others = [found for found in draws.generators if found is not given]
    is_ignored = bool(others) and torch.equal(given.get_state(), before)
    return is_ignored and not hasattr(component, "seed")


def inputs(
    seed: int = 0, *, batch: int = 2, query_heads: int = 4, key_heads: int = 2,
    num_queries: int = 40, num_keys: int = 40, head_dim: int = 8, value_dim: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Inputs:  # fmt: skip
    """Return normal queries and keys, and values with norms between 0.5 and 3.

    Norms of values stay away from 0, so that every key is drawn often enough to be counted.
    """
    g = cpu_generator(seed)
    query = torch.randn(batch, query_heads, num_queries, head_dim, generator=g)
    key = torch.randn(batch, key_heads, num_keys, head_dim, generator=g)
    value = torch.randn(batch, key_heads, num_keys, value_dim, generator=g)
    length = 0.5 + 2.5 * torch.rand(batch, key_heads, num_keys, 1, generator=g)
    value = length * value / value.norm(dim=-1, keepdim=True).clamp(min=1e-3)
    return Inputs(*(x.to(device(), dtype) for x in (query, key, value)))


def changed(tensor: torch.Tensor, where: Any, seed: int = 77) -> torch.Tensor:
    """Return a copy with other, larger numbers at an index."""
    drawn = torch.randn(tensor.shape, generator=cpu_generator(seed)).to(tensor.device, tensor.dtype)
    other = tensor.clone()
    other[where] = 3 * drawn[where] + 1
    return other


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return equal numbers laid out as `[B, n, H, d]`, every other element of a larger tensor."""
    wide = tensor.transpose(1, 2).repeat_interleave(2, dim=-1).contiguous()
    return wide[..., ::2].transpose(1, 2)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every element (NaN equals NaN)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def as_one_graph(
    component: AbstractComponent, called: Callable[..., tuple[torch.Tensor, ...]], *args: Any
) -> None:
    """Check that a call compiles to one graph, which returns what the call does.

    Args:
        component: for the message.
        called: returns tensors; makes its `Stream` inside, from a seed among the tensors.
        args: tensors.
    """
    want = called(*args)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, from inside of its compiler
        try:
            compiled = torch.compile(called, fullgraph=True, dynamic=False, backend="eager")
            got = compiled(*args)
        except Exception as error:
            remedy = "read no values (.item(), bool()), or set takes_stream = False"
            found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            fail(component, "for one graph", found, remedy)
        finally:
            torch._dynamo.reset()
    if not all(map(same_bits, want, got)):
        remedy = "draw by hyperframe.randomness alone"
        fail(component, "compiled and eager with one seed", "two results", remedy)


def fail(component: AbstractComponent, asked: str, found: str, remedy: str) -> NoReturn:
    """Raise what a failed check raises: what was asked, what was found, what to do.

    Raises:
        AssertionError: always.
    """
    raise AssertionError(f"{component!r}: asked {asked}; found {found}; {remedy}.")
