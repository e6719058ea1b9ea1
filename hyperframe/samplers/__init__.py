"""Samplers: which columns stand for the ones that are not computed exactly."""

from ..registry import Registry
from .base import AbstractSampler

__all__ = ["AbstractSampler", "create", "entries", "names", "register", "registry", "to_spec"]

registry = Registry(
    kind="sampler",
    group="hyperframe.samplers",
    base=AbstractSampler,
    builtins={
        "row_norm": ".samplers.row_norm:RowNorm",
        "uniform": ".samplers.uniform:Uniform",
    },
    package="hyperframe",
)
create = registry.create
names = registry.names
register = registry.register
entries = registry.entries
to_spec = registry.to_spec
