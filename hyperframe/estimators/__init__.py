"""Estimators: how the row sums (the normaliser) are estimated."""

from ..registry import Registry
from .base import AbstractEstimator

__all__ = ["AbstractEstimator", "create", "entries", "names", "register", "registry", "to_spec"]

registry = Registry(
    kind="estimator",
    group="hyperframe.estimators",
    base=AbstractEstimator,
    builtins={
        "exact": ".estimators.exact:Exact",
        "uniform": ".estimators.uniform:Uniform",
    },
    package="hyperframe",
)
create = registry.create
names = registry.names
register = registry.register
entries = registry.entries
to_spec = registry.to_spec
