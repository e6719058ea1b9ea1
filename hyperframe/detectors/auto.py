"""Auto: what holds the most of real attention heads for a price, by preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch

from ..component import check_choice
from ..masks import HeavyMask
from .base import AbstractDetector

__all__ = ["PRESETS", "Auto", "Preset", "spec_of_preset"]


class Preset(NamedTuple):
    """The detectors of one preset, as specs.

    Attributes:
        causal: for causal attention, single pass or recursion.
        dense: where all rows see all keys.
        middle: like `causal`, for more than `LONG` keys: fewer rows vote, nothing is hashed.
        long: for more than `LONGER` keys.
        rows: what every row finds for itself, beside `causal`, `middle` or `long`, where no later
            query may help to choose.
    """

    causal: str
    dense: str
    middle: str
    long: str
    rows: str


def _refined(num_keys: int, *candidates: str, tile_size: int = 64) -> str:
    joined = " | ".join(candidates)
    return f"refined(candidates='{joined}', num_keys={num_keys}, tile_size={tile_size})"


def _by_row(num_rounds: int) -> str:
    return (
        f"lsh_topk(num_rounds={num_rounds}, keep=4, num_keys={4 * num_rounds}, min_offset=128, "
        "tile_size=1)"
    )


LONG = 16384
"""Keys up to which finding may cost more for each row; what the longest inputs cost counts most."""

LONGER = 65536
"""Keys up to which the launches of many small kernels count."""

_WINDOW = "sliding_window(width=128, num_sinks=64)"
_NEAR = "sliding_window(width=32, num_sinks=0)"


def _lines(num_columns: int, num_queries: int) -> str:
    return (
        f"vertical_slash(num_columns={num_columns}, num_diagonals=16, num_queries={num_queries}, "
        "min_offset=128)"
    )


def _long_lines(
    num_columns: int, num_queries: int, num_near: int, near_queries: int, tile_size: int = 64
) -> str:
    return (
        f"vertical_slash(num_columns={num_columns}, num_diagonals=16, num_queries={num_queries}, "
        f"min_offset=128, num_near={num_near}, near_queries={near_queries}, min_segment=2048, "
        f"tile_size={tile_size})"
    )


def _long_blocks(tile_size: int, pool_step: int) -> str:
    return (
        f"pooled_topk(block_size=64, num_blocks=2, num_means=1, pool_step={pool_step}, "
        f"tile_size={tile_size})"
    )


_LONG_WINDOW = "sliding_window(width=128, num_sinks=16)"
_FAST = f"{_LONG_WINDOW} | {_long_lines(40, 4, 88, 8)}"
_ACCURATE = _refined(
    512, _WINDOW, _lines(512, 16), "pooled_topk(num_blocks=32)",
    "lsh_topk(num_rounds=4, num_keys=128)",
)  # fmt: skip

PRESETS = {
    "fast": Preset(
        causal=_refined(192, _WINDOW, _lines(256, 8), "pooled_topk(num_blocks=16)"),
        dense=_refined(192, _NEAR, "pca_tree(num_leaves=32)"),
        middle=_FAST,
        long=_FAST,
        rows=_by_row(4),
    ),
    "balanced": Preset(
        causal=_refined(
            256, _WINDOW, _lines(512, 32), "pooled_topk(num_blocks=32, num_means=8)",
            "lsh_topk(num_rounds=8, num_keys=192)",
        ),
        dense=_refined(224, _NEAR, "pca_tree(num_leaves=64, tile_size=16)", tile_size=16),
        # wider tiles: half the lists; what they lose in quality, docs/results.md says
        middle=f"{_LONG_WINDOW} | {_long_lines(112, 8, 112, 8, 128)} | {_long_blocks(128, 1)}",
        long=f"{_LONG_WINDOW} | {_long_lines(64, 8, 160, 16)} | {_long_blocks(64, 4)}",
        rows=_by_row(8),
    ),
    "accurate": Preset(
        causal=_refined(
            768, _WINDOW, _lines(1024, 64), "pooled_topk(num_blocks=64, num_means=8)",
            "lsh_topk(num_rounds=16, num_keys=384)",
        ),
        dense=_refined(
            768, _NEAR, "pca_tree(num_leaves=96, tile_size=16)", "lsh_topk(num_keys=256)",
            tile_size=16,
        ),
        middle=_ACCURATE,
        long=_ACCURATE,
        rows=_by_row(16),
    ),
}  # fmt: skip
"""What each preset holds; see docs/how-to-choose.md for what that costs and gives."""


def spec_of_preset(detector: Any) -> Any:
    """Return the spec that the name of a preset stands for, and anything else as it is.

    Example:
        >>> spec_of_preset("fast"), spec_of_preset("quest")
        ("auto(preset='fast')", 'quest')
    """
    if isinstance(detector, str) and detector.strip() in PRESETS:
        return f"auto(preset={detector.strip()!r})"
    return detector


@dataclass(frozen=True, kw_only=True)
class Auto(AbstractDetector):
    """The library's choice: a window, and the best of the candidates of several detectors.

    Candidates come from columns and diagonals, from blocks of pooled scores, and (from `balanced`
    on) from hashing after centring, which finds single far keys that pooled scores blur; all rows
    of a tile then score them exactly (`refined`). For more than 16,384 keys fewer rows vote, and
    `fast` and `balanced` hash nothing and hold all that they find. Without a causal mask the leaves
    of a tree over the keys take the place of columns and blocks. `PRESETS` has the parts.

    In the strict form rows before a tile choose for it, and those copy from elsewhere: every row
    adds the keys that it finds by itself, by hashing.

    `sampler="auto"` is centroids beside this detector, where it is uniform beside others.

    Args:
        preset: `"fast"`, `"balanced"` or `"accurate"`.

    Cost: that of the parts; linear in n but for the pooled scores, 1/256 of all logits or less.
    Source: measured on real heads, docs/how-to-choose.md.

    Example:
        >>> Auto(preset="fast").parts["dense"].name
        'refined'
    """

    takes_stream: ClassVar[bool] = True  # every part is asked by itself
    residual: ClassVar[str] = "auto"
    break_even: ClassVar[Mapping[tuple[str, str, bool], int]] = MappingProxyType(
        {("cpu", "torch", True): 16384, ("cpu", "torch", False): 32768}
    )

    preset: str = "balanced"

    def __post_init__(self) -> None:
        """Create the parts."""
        from . import create

        check_choice(self, "preset", self.preset, tuple(PRESETS))
        chosen = PRESETS[self.preset]
        parts = {name: create(spec) for name, spec in chosen._asdict().items()}
        for name in ("causal", "middle", "long"):
            parts[f"strict {name}"] = create(f"{getattr(chosen, name)} | {chosen.rows}")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "is_positional", True)

    parts: ClassVar[dict[str, AbstractDetector]]

    def _part(self, key: torch.Tensor, is_causal: bool, strict: bool = False) -> AbstractDetector:
        if not is_causal:
            return self.parts["dense"]
        length = key.shape[2]
        name = "causal" if length <= LONG else "middle" if length <= LONGER else "long"
        return self.parts[f"strict {name}" if strict else name]

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return what the preset's detector for such a call finds."""
        return self._part(key, is_causal).find(
            query, key, scale=scale, is_causal=is_causal, generator=generator
        )

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return what its strictly causal form finds."""
        return self._part(key, is_causal, strict=True).find_strict(
            query, key, scale=scale, is_causal=is_causal, generator=generator,
            earlier_query=earlier_query,
        )  # fmt: skip

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, is_causal: bool = False,
        strict: bool = False, **options: Any,
    ) -> HeavyMask:  # fmt: skip
        """Return what it finds in a part of a call with padding."""
        return self._part(key, is_causal, strict).find_within(
            query, key, is_causal=is_causal, strict=strict, **options
        )

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, strict: bool = False, **options: Any
    ) -> HeavyMask:
        """Return what the detector for causal calls finds in a rectangle of the recursion."""
        return self._part(key, True, strict).find_rectangle(query, key, strict=strict, **options)
