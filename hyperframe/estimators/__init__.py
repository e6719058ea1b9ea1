"""Estimators: how the row sums (the normaliser) are estimated."""

from ..lazy import lazy_names
from ..registry import Registry
from .base import AbstractEstimator

__all__ = ["AbstractEstimator", "create", "entries", "names", "register", "registry", "to_spec"]

_BUILTINS = {
    "approx_d": ".estimators.approx_d:ApproxD",
    "exact": ".estimators.exact:Exact",
    "kde": ".estimators.kde:Kde",
    "uniform": ".estimators.uniform:Uniform",
}

registry = Registry(
    kind="estimator",
    group="hyperframe.estimators",
    base=AbstractEstimator,
    builtins=_BUILTINS,
    package="hyperframe",
)
create = registry.create
names = registry.names
register = registry.register
entries = registry.entries
to_spec = registry.to_spec

# the classes too, by name: `from hyperframe.estimators import ...`
__getattr__ = lazy_names(__name__, {path.partition(":")[2]: path for path in _BUILTINS.values()})
