"""Detectors: which entries of `Q K^T` are heavy."""

from ..registry import Registry
from .base import AbstractDetector

__all__ = [
    "AbstractDetector",
    "create",
    "entries",
    "names",
    "register",
    "registry",
    "to_spec",
]

registry = Registry(
    kind="detector",
    group="hyperframe.detectors",
    base=AbstractDetector,
    builtins={
        "block_list": ".detectors.block_list:BlockList",
        "heavy_columns": ".detectors.heavy_columns:HeavyColumns",
        "oracle": ".detectors.oracle:Oracle",
        "sliding_window": ".detectors.sliding_window:SlidingWindow",
        "sort_lsh": ".detectors.sort_lsh:SortLSH",
        "union": ".detectors.union:Union",
    },
    package="hyperframe",
)
create = registry.create
names = registry.names
register = registry.register
entries = registry.entries
to_spec = registry.to_spec
