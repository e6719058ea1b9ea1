"""What every launch of a plan's kernels needs: precision, padded widths, the variant, the grid."""

from __future__ import annotations

from typing import Any

import torch

from .arguments import PlanView
from .configs import Config, padded

__all__ = ["grid", "precision", "shape", "variant"]


def precision(query: torch.Tensor) -> str:
    """Return that of products: true float32 unless the user has asked PyTorch for TF32."""
    return "tf32" if query.dtype == torch.float32 and _asks_for_tf32() else "ieee"


def _asks_for_tf32() -> bool:
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # asked by the newer name, after which the older one cannot be read
        return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def shape(query: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    """Return the padded widths of heads and the precision, by the kernels' names for them."""
    return {
        "BLOCK_D": padded(query.shape[-1]), "BLOCK_DV": padded(value.shape[-1]),
        "PRECISION": precision(query),
    }  # fmt: skip


def variant(view: PlanView, query: torch.Tensor, value: torch.Tensor) -> tuple[Any, ...]:
    """Return what a kernel is compiled for, but for its block sizes."""
    return (
        query.dtype, query.shape[-1], value.shape[-1], view.rows, view.group,
        *view.variant.values(), query.device.index,
    )  # fmt: skip


def grid(query: torch.Tensor, view: PlanView, config: Config) -> tuple[int, int, int]:
    """Return a program for every block of rows; divisions in the kernels would delay its loads."""
    return view.num_tiles * -(-view.places // config.block_m), view.plan_heads, query.shape[0]
