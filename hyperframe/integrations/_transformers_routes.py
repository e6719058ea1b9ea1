"""How the attention modules of one model are served: routes, their parts, and split heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..randomness import Stream, fold_in
from ._transformers_rows import RowMemory

__all__ = [
    "ROUTE_ATTRIBUTE",
    "AttentionCall",
    "HeadPart",
    "Route",
    "Settings",
    "by_heads",
    "source",
]

ROUTE_ATTRIBUTE = "_hyperframe_route"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What one attention call was and how long it took; given to the `observer` of `apply`.

    Attributes:
        layer_idx: the layer.
        n_q: number of queries.
        n_k: number of keys (real ones; the unused tail of a static cache counts only in decode).
        exact: True when all heads of the layer were left exact, when it decodes one token, or when
            its sliding window is shorter than the keys. An approximated call that falls below its
            own `min_seq_len` counts as approximated.
        seconds: wall time of the attention alone; on a GPU the device is synchronised before and
            after.
    """

    layer_idx: int
    n_q: int
    n_k: int
    exact: bool
    seconds: float


@dataclasses.dataclass(kw_only=True)
class Settings:
    """What the layers of one `apply` share."""

    observer: Callable[[AttentionCall], None] | None = None
    rows: RowMemory = dataclasses.field(default_factory=RowMemory)
    windowed_rows: RowMemory = dataclasses.field(default_factory=RowMemory)
    left_exact: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPart:
    """Some heads of a layer.

    Attributes:
        key_heads: indices of key heads, ascending, with their query heads; None is all of them.
        attention: what serves them; None is exact attention.
    """

    key_heads: tuple[int, ...] | None
    attention: Callable[..., Tensor] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """How one attention module is served.

    Attributes:
        layer_idx: the layer.
        parts: of its heads, every head once.
        settings: of its model.
    """

    layer_idx: int
    parts: tuple[HeadPart, ...]
    settings: Settings

    @property
    def approximate(self) -> bool:
        """Whether any of its heads is approximated."""
        return any(part.attention is not None for part in self.parts)


def by_heads(
    attend: Callable[[HeadPart, Tensor, Tensor, Tensor], Tensor], parts: tuple[HeadPart, ...],
    query: Tensor, key: Tensor, value: Tensor,
) -> Tensor:  # fmt: skip
    """Attention of each part of the heads, put together in the order of the heads.

    Args:
        attend: attention of one part, called with its heads alone.
        parts: every key head once.
        query: `[batch, heads, n_q, d]`.
        key: `[batch, kv_heads, n_k, d]`.
        value: `[batch, kv_heads, n_k, d_v]`.

    Returns:
        `[batch, heads, n_q, d_v]`.

    Raises:
        UnsupportedError: the layer has another number of key heads than its configuration says.

    Cost: a copy of what a part reads, unless all heads attend alike.
    """
    if len(parts) == 1 and parts[0].key_heads is None:
        return attend(parts[0], query, key, value)
    held = sum(len(part.key_heads or ()) for part in parts)
    if held != key.shape[1]:
        raise UnsupportedError(
            f"key_heads: the parts hold {held} key heads, but the layer was called with "
            f"{key.shape[1]}; its configuration does not tell. Leave key_heads out for this layer."
        )
    group = query.shape[1] // key.shape[1]
    outs, order = [], []
    for part in parts:
        keys = part.key_heads or ()
        queries = [head * group + member for head in keys for member in range(group)]
        own = torch.tensor(keys, device=key.device)
        rows = torch.tensor(queries, device=query.device)
        outs.append(
            attend(
                part,
                query.index_select(1, rows),
                key.index_select(1, own),
                value.index_select(1, own),
            )
        )
        order += queries
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(outs, 1).index_select(1, torch.tensor(inverse, device=query.device))


def source(
    module: nn.Module, route: Route, part: HeadPart, device: torch.device, n_k: int, start: int,
    row: int,
) -> torch.Generator | Stream:  # fmt: skip
    """The random numbers of one call: its own for each layer, part, chunk and packed sequence.

    `row` is the first row of a group of rows that are packed alike, 0 where nothing is packed.

    In eval mode they depend on the seed of the attention alone. In training, or with seed None,
    fresh entropy comes from torch's global CPU generator, which `torch.utils.checkpoint` restores
    when it recomputes a forward.
    """
    attention: Any = part.attention
    seed = getattr(attention, "seed", 0)
    entropy = 0
    # not `and torch.is_grad_enabled()`: reentrant checkpointing runs its first forward without
    # gradients and has to draw the same number there
    if module.training or seed is None:
        entropy = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu"))
    place = (start, row) if row else (start,)
    mixed = fold_in(seed or 0, entropy, route.layer_idx, n_k, *place)
    if part.key_heads is not None:
        # parts of one layer must not draw alike
        mixed = fold_in(mixed, part.key_heads[0])
    if getattr(attention, "takes_stream", False):
        return Stream(mixed)
    return torch.Generator(device=device).manual_seed(mixed)
