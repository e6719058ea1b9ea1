"""Detectors: which entries of `Q K^T` are heavy."""

from ..lazy import lazy_names
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

_BUILTINS = {
    "antidiagonal": ".detectors.antidiagonal:Antidiagonal",
    "auto": ".detectors.auto:Auto",
    "balanced_lsh": ".detectors.balanced_lsh:BalancedLSH",
    "bigbird": ".detectors.bigbird:BigBird",
    "block_list": ".detectors.block_list:BlockList",
    "butterfly": ".detectors.butterfly:Butterfly",
    "count_sketch": ".detectors.count_sketch:CountSketch",
    "dilated": ".detectors.dilated:Dilated",
    "expander_sketch": ".detectors.expander_sketch:ExpanderSketch",
    "heavy_columns": ".detectors.heavy_columns:HeavyColumns",
    "kmeans": ".detectors.kmeans:KMeans",
    "learned_count_sketch": ".detectors.learned_count_sketch:LearnedCountSketch",
    "lsh_topk": ".detectors.lsh_topk:LSHTopK",
    "oracle": ".detectors.oracle:Oracle",
    "pca_tree": ".detectors.pca_tree:PCATree",
    "pooled_topk": ".detectors.pooled_topk:PooledTopK",
    "quest": ".detectors.quest:Quest",
    "refined": ".detectors.refined:Refined",
    "reformer_lsh": ".detectors.reformer_lsh:ReformerLSH",
    "sliding_window": ".detectors.sliding_window:SlidingWindow",
    "sort_lsh": ".detectors.sort_lsh:SortLSH",
    "strided": ".detectors.strided:Strided",
    "union": ".detectors.union:Union",
    "vertical_slash": ".detectors.vertical_slash:VerticalSlash",
}

registry = Registry(
    kind="detector",
    group="hyperframe.detectors",
    base=AbstractDetector,
    builtins=_BUILTINS,
    package="hyperframe",
)
create = registry.create
names = registry.names
register = registry.register
entries = registry.entries
to_spec = registry.to_spec

# the classes too, by name: `from hyperframe.detectors import ...`
__getattr__ = lazy_names(__name__, {path.partition(":")[2]: path for path in _BUILTINS.values()})
