"""Samplers: which columns stand for the ones that are not computed exactly."""

from ..lazy import lazy_names
from ..registry import Registry
from .base import AbstractSampler

__all__ = ["AbstractSampler", "create", "entries", "names", "register", "registry", "to_spec"]

_BUILTINS = {
    "auto": ".samplers.auto:Auto",
    "centroid": ".samplers.centroid:Centroid",
    "importance": ".samplers.importance:Importance",
    "kde": ".samplers.kde:Kde",
    "leverage": ".samplers.leverage:Leverage",
    "row_norm": ".samplers.row_norm:RowNorm",
    "stratified": ".samplers.stratified:Stratified",
    "uniform": ".samplers.uniform:Uniform",
}

registry = Registry(
    kind="sampler",
    group="hyperframe.samplers",
    base=AbstractSampler,
    builtins=_BUILTINS,
    package="hyperframe",
)
create = registry.create
names = registry.names
register = registry.register
entries = registry.entries
to_spec = registry.to_spec

# the classes too, by name: `from hyperframe.samplers import ...`
__getattr__ = lazy_names(__name__, {path.partition(":")[2]: path for path in _BUILTINS.values()})
