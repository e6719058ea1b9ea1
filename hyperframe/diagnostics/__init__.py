"""Diagnostics: the paper's parameters measured, and what an approximation costs in accuracy.

What the inputs are like: `alpha` (columns of the softmax matrix), `kappa` (rows of what a mask
leaves), `entropy`, `softmax_norm`, `softmax_stable_rank`, `stable_rank`; exact in memory linear in
n, and `sampled_alpha`, `sampled_log_kappa`, `sampled_entropy`, `sampled_mass` in linear time, as
an `Estimate` with limits. What an approximation is worth: `relative_error`, `spectral_error`,
`normaliser_error`, and `mask_quality` of what a detector found; `recursion_report` measures every
rectangle of the causal recursion. What the lemmas ask for: `sample_size`, `value_sample_size`.
"""

from .columns import alpha
from .errors import relative_error
from .intervals import Estimate
from .operators import NormBounds, softmax_norm
from .quality import MaskQuality, mask_quality
from .recursion import RectangleReport, RecursionReport, recursion_report
from .rows import entropy, kappa, log_kappa
from .sampled import sampled_alpha, sampled_entropy, sampled_log_kappa, sampled_mass
from .sizes import sample_size, value_sample_size
from .spectral import normaliser_error, softmax_stable_rank, spectral_error, stable_rank

__all__ = [
    "Estimate",
    "MaskQuality",
    "NormBounds",
    "RectangleReport",
    "RecursionReport",
    "alpha",
    "entropy",
    "kappa",
    "log_kappa",
    "mask_quality",
    "normaliser_error",
    "recursion_report",
    "relative_error",
    "sample_size",
    "sampled_alpha",
    "sampled_entropy",
    "sampled_log_kappa",
    "sampled_mass",
    "softmax_norm",
    "softmax_stable_rank",
    "spectral_error",
    "stable_rank",
    "value_sample_size",
]
