"""The heads that are measured on, and what exact attention says of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import ArgumentError
from ...integrations.capture import CapturedHeads, load
from ...kernels import exact_attention
from ...kernels.exact import exact_output
from ...precision import without_autocast
from ..timing import Candidate, Timing, measure

__all__ = ["RECALLED", "Problem", "Reference", "load_problem"]

RECALLED = 256
"""Keys of a row that recall asks for: the ones with the largest logits."""
_RECALL_ROWS = 64


@dataclass(frozen=True, eq=False)
class Reference:
    """Exact attention of one layer.

    Attributes:
        out: `[batch, query_heads, n_q, d_v]`, in float32 at least.
        lse: natural log of the row sums, `[batch, query_heads, n_q]`.
        rows: int64 `[R]`, the rows that recall looks at: one in each of up to 64 equal runs.
        top: int64 `[batch, query_heads, R, k]`, the keys with the largest logits of those rows,
            best first; k is 256, or all keys.
        num_top: int64 `[R]`, how many of them the row sees.
    """

    out: torch.Tensor
    lse: torch.Tensor
    rows: torch.Tensor
    top: torch.Tensor
    num_top: torch.Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """Captured layers of one file, cut to a length and some heads.

    Args:
        file: name of the file, without its folders.
        digest: of its content.
        layers: what was captured; one shape, one kind of causality.

    Cost: `reference` of a layer is one exact attention, O(n^2 d), and keeps an output and a log
    sum for every layer.
    """

    file: str
    digest: str
    layers: tuple[CapturedHeads, ...]

    def __post_init__(self) -> None:
        """Check that the layers belong together."""
        if not self.layers:
            raise ArgumentError(f"{self.file}: holds no layers; capture one at least")
        kinds = {
            (tuple(x.query.shape), tuple(x.key.shape), tuple(x.value.shape), x.is_causal)
            for x in self.layers
        }
        if len(kinds) > 1:
            raise ArgumentError(
                f"{self.file}: its layers differ in shape or causality ({len(kinds)} kinds); "
                "capture those of one kind"
            )

    @property
    def is_causal(self) -> bool:
        """Whether the model's attention was causal."""
        return self.layers[0].is_causal

    @property
    def length(self) -> int:
        """Number of keys."""
        return self.layers[0].key.shape[2]

    def cut(self, *, length: int | None = None, heads: int | None = None) -> Problem:
        """Return the first positions and the first query heads, with the key heads they use.

        Raises:
            ArgumentError: there are fewer, or the heads cut a group that shares keys.
        """
        query, key = self.layers[0].query, self.layers[0].key
        length = self.length if length is None else length
        heads = query.shape[1] if heads is None else heads
        group = query.shape[1] // key.shape[1]
        if not 1 <= length <= self.length:
            raise ArgumentError(
                f"--lengths {length}: {self.file} holds {self.length} positions; ask for 1 to "
                f"{self.length}"
            )
        if length < self.length and query.shape[2] != self.length:
            raise ArgumentError(
                f"--lengths {length}: {self.file} holds {query.shape[2]} queries and "
                f"{self.length} keys, which have no common beginning; leave the option out"
            )
        if not 1 <= heads <= query.shape[1] or heads % group:
            raise ArgumentError(
                f"--heads {heads}: {self.file} holds {query.shape[1]} query heads, {group} for "
                f"each key head; ask for a multiple of {group} up to {query.shape[1]}"
            )
        if (length, heads) == (self.length, query.shape[1]):
            return self
        layers = tuple(
            dataclasses.replace(
                layer,
                query=layer.query[:, :heads, :length],
                key=layer.key[:, : heads // group, :length],
                value=layer.value[:, : heads // group, :length],
            )
            for layer in self.layers
        )
        return dataclasses.replace(self, layers=layers)

    @functools.cached_property
    def _references(self) -> dict[tuple[int, bool], Reference]:
        return {}

    def reference(self, number: int, *, is_causal: bool) -> Reference:
        """Return exact attention of the layer of that number in `layers`; computed once."""
        if (number, is_causal) not in self._references:
            found = _reference(self.layers[number], is_causal=is_causal)
            self._references[number, is_causal] = found
        return self._references[number, is_causal]

    @property
    def timed(self) -> int:
        """Number of the layer that is timed: the middle one."""
        return len(self.layers) // 2

    @functools.cached_property
    def _exact_times(self) -> dict[bool, Timing]:
        return {}

    def exact_time(self, *, is_causal: bool, repeats: int) -> Timing:
        """Return how long exact attention of the timed layer takes; measured once."""
        if is_causal not in self._exact_times:
            layer = self.layers[self.timed]

            def call() -> torch.Tensor:
                return exact_output(
                    layer.query, layer.key, layer.value, scale=layer.scale, is_causal=is_causal
                )

            device = layer.query.device
            with torch.no_grad():
                found = measure(
                    {"exact": Candidate(call)}, device=device, seconds=1.0, repeats=max(3, repeats)
                )["exact"]
            assert isinstance(found, Timing)
            self._exact_times[is_causal] = found
        return self._exact_times[is_causal]


def load_problem(path: Path | str, device: torch.device | str = "cpu") -> Problem:
    """Read a file that `hyperframe.integrations.capture.save` wrote.

    Raises:
        ArgumentError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ArgumentError(
            f"{path}: there is no such file; make one with `hyperframe capture`, or with "
            "hyperframe.integrations.capture.save"
        )
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    heads: Mapping[int, CapturedHeads]
    try:
        heads = load(path, device)
    except ArgumentError:
        raise
    except Exception as error:  # safetensors has a class of its own for files of others
        raise ArgumentError(
            f"{path}: is no safetensors file ({type(error).__name__}: {error}); make one with "
            "hyperframe.integrations.capture.save"
        ) from error
    layers = tuple(heads[layer] for layer in sorted(heads))
    return Problem(file=path.name, digest=digest.hexdigest()[:12], layers=layers)


@torch.no_grad()
def _reference(layer: CapturedHeads, *, is_causal: bool) -> Reference:
    dtype = torch.promote_types(layer.query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (layer.query, layer.key, layer.value))
    state = exact_attention(query, key, value, scale=layer.scale, is_causal=is_causal)
    (batch, heads, num_queries, head_dim), num_keys = query.shape, key.shape[2]
    runs = min(_RECALL_ROWS, num_queries)
    bounds = torch.arange(runs + 1, device=query.device) * num_queries // runs
    rows = (bounds[:-1] + bounds[1:]) // 2
    chosen = (query[:, :, rows] * layer.scale).reshape(batch, key.shape[1], -1, head_dim)
    with without_autocast(query):
        logits = (chosen @ key.transpose(-1, -2)).view(batch, heads, runs, num_keys)
    seen = torch.full_like(rows, num_keys)
    if is_causal:
        seen = (rows + 1 + num_keys - num_queries).clamp(min=0)
        hidden = torch.arange(num_keys, device=query.device) >= seen.unsqueeze(-1)
        logits.masked_fill_(hidden, float("-inf"))
    top = logits.topk(min(RECALLED, num_keys), dim=-1).indices
    return Reference(
        out=state.out, lse=state.lse, rows=rows, top=top, num_top=seen.clamp(max=top.shape[-1])
    )
