"""hyperframe: near-linear attention with pluggable heavy-entry detectors.

Attention computes the few heavy entries of `exp(scale * Q K^T)` exactly, samples the rest, and
normalises with an estimate of the row sums (HyperAttention, arXiv 2310.05869).

    >>> import torch
    >>> from hyperframe import HyperAttention
    >>> q, k, v = torch.randn(3, 1, 2, 1024, 32).unbind()
    >>> attn = HyperAttention(detector="sliding_window | heavy_columns", min_seq_len=256)
    >>> attn(q, k, v, is_causal=True).shape
    torch.Size([1, 2, 1024, 32])
"""

from . import detectors, diagnostics, estimators, samplers
from .attention import HyperAttention, hyper_attention
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailableError,
    HyperframeError,
    MissingDependencyError,
    PluginError,
    SpecError,
    UnknownComponentError,
    UnsupportedError,
)
from .lazy import lazy_names
from .masks import HeavyMask
from .plan import TilePlan
from .rowsums import RowSums
from .samples import KeySample
from .state import AttentionState

__distribution__ = "hyperframe-attention"
__version__ = "0.1.0"

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

# not loaded by `import hyperframe`, but there when asked for: `hyperframe.testing`
__getattr__ = lazy_names(
    __name__, {name: f".{name}" for name in ("integrations", "masks", "testing", "trace")}
)
