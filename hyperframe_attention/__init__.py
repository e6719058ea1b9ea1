"""The API of hyperframe under a name that nobody else uses.

`hyperframe` is also the import name of a popular HTTP/2 framing library. Both distributions write
into the same folder, and the one that was installed last owns `hyperframe/__init__.py`; the
submodules of both stay in place. This package therefore imports from submodules only, and works in
either order:

    from hyperframe_attention import HyperAttention

Names are looked up when they are first used, so that `python -m hyperframe_attention doctor` can
still say what is wrong when `hyperframe` itself cannot be imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyperframe import detectors as detectors
    from hyperframe import diagnostics as diagnostics
    from hyperframe import estimators as estimators
    from hyperframe import samplers as samplers
    from hyperframe.attention import HyperAttention as HyperAttention
    from hyperframe.attention import hyper_attention as hyper_attention
    from hyperframe.errors import ArgumentError as ArgumentError
    from hyperframe.errors import ArgumentTypeError as ArgumentTypeError
    from hyperframe.errors import BackendUnavailableError as BackendUnavailableError
    from hyperframe.errors import HyperframeError as HyperframeError
    from hyperframe.errors import MissingDependencyError as MissingDependencyError
    from hyperframe.errors import PluginError as PluginError
    from hyperframe.errors import SpecError as SpecError
    from hyperframe.errors import UnknownComponentError as UnknownComponentError
    from hyperframe.errors import UnsupportedError as UnsupportedError
    from hyperframe.masks import HeavyMask as HeavyMask
    from hyperframe.plan import TilePlan as TilePlan
    from hyperframe.rowsums import RowSums as RowSums
    from hyperframe.samples import KeySample as KeySample
    from hyperframe.state import AttentionState as AttentionState

    __version__: str

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "AttentionState",
    "BackendUnavailableError",
    "HeavyMask",
    "HyperAttention",
    "HyperframeError",
    "KeySample",
    "MissingDependencyError",
    "PluginError",
    "RowSums",
    "SpecError",
    "TilePlan",
    "UnknownComponentError",
    "UnsupportedError",
    "detectors",
    "diagnostics",
    "estimators",
    "hyper_attention",
    "samplers",
]

_DISTRIBUTION = "hyperframe-attention"

# where every public name lives; a value that ends with the name itself is a submodule
_HOMES = {
    "ArgumentError": "hyperframe.errors",
    "ArgumentTypeError": "hyperframe.errors",
    "AttentionState": "hyperframe.state",
    "BackendUnavailableError": "hyperframe.errors",
    "HeavyMask": "hyperframe.masks",
    "HyperAttention": "hyperframe.attention",
    "HyperframeError": "hyperframe.errors",
    "KeySample": "hyperframe.samples",
    "MissingDependencyError": "hyperframe.errors",
    "PluginError": "hyperframe.errors",
    "RowSums": "hyperframe.rowsums",
    "SpecError": "hyperframe.errors",
    "TilePlan": "hyperframe.plan",
    "UnknownComponentError": "hyperframe.errors",
    "UnsupportedError": "hyperframe.errors",
    "detectors": "hyperframe.detectors",
    "diagnostics": "hyperframe.diagnostics",
    "estimators": "hyperframe.estimators",
    "hyper_attention": "hyperframe.attention",
    "samplers": "hyperframe.samplers",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        # something else that is missing (torch, say) speaks for itself
        if error.name is None or error.name.partition(".")[0] != "hyperframe":
            raise
        raise ImportError(
            f"{__name__}.{name} lives in {home}, which cannot be imported ({error}): the files of "
            f"{_DISTRIBUTION} are missing or hidden by another package named hyperframe. Run "
            f"`python -m {__name__} doctor`, which says what is wrong and how to repair it."
        ) from error
    value = module if home.endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown (not installed as a distribution)"
