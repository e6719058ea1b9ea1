"""Algorithm 3 as published: `D~^-1 A S^T S V`, with D~ and S from samples of their own.

    D~_ii = sum_{j in M_i} A_ij + n/m sum_s (1 - M_{i,s}) A_{i,s}    m uniform columns: Algorithm 2
    N_i   = sum_r A_{i,l_r} v_{l_r} / (m p_{l_r})                    m columns drawn by p: Lemma 2

The rows of S are drawn from all columns, whether the mask holds them or not, so heavy entries are
sampled in the numerator like all others. (What `assembly="residual"` does instead: heavy entries
exactly in both, and the same columns for the rest of both.)

Under a causal mask every tile of rows draws its columns from its own prefix. In the recursion each
rectangle is an instance of Algorithm 3; numerators and normalisers of the parts of a row add up.
"""

from __future__ import annotations

import torch

from .errors import UnsupportedError
from .masks import HeavyMask
from .plan import TilePlan
from .positional import POSITION_TILE, tile_ends
from .samples import SampleDraw
from .state import AttentionState

__all__ = ["no_columns", "product_plan", "renormalised"]


def product_plan(mask: HeavyMask, draw: SampleDraw, *, sampler: str) -> TilePlan:
    """Return the plan of `A S^T S V`: drawn columns and nothing else.

    Args:
        mask: the problem; its entries are not looked at.
        draw: draws the columns: of all keys, or of the prefixes of tiles under a causal mask.
        sampler: its name, for the message.

    Returns:
        One list for all rows, or one for each tile of `POSITION_TILE` rows. A column drawn twice
        counts twice.

    Raises:
        UnsupportedError: what is drawn are groups of keys.
    """
    num_rows = max(1, mask.num_queries)
    tile_size = min(POSITION_TILE, num_rows) if mask.is_causal else num_rows
    sample = draw(tile_ends(mask, tile_size) if mask.is_causal else None)
    if sample.summaries is not None:
        raise UnsupportedError(no_columns(sampler))
    index, log_weight = sample.index, sample.log_weight
    if not mask.is_causal:
        index, log_weight = index.unsqueeze(2), log_weight.unsqueeze(2)
    used = torch.full((1,), index.shape[-1], dtype=torch.int32, device=index.device)
    return TilePlan(
        key_index=index.int(), key_count=used.expand(index.shape[:3]),
        heavy_count=torch.zeros_like(used).expand(index.shape[:3]), tile_size=tile_size,
        num_query_heads=mask.num_query_heads, num_queries=mask.num_queries,
        num_keys=mask.num_keys, log_weight=log_weight, is_causal=mask.is_causal,
        query_offset=mask.query_offset, disjoint=True,
    )  # fmt: skip


def no_columns(sampler: str) -> str:
    """Return why a sampler cannot draw S."""
    return (
        f"assembly='paper': S consists of drawn columns, and the sampler {sampler} makes groups of "
        "keys; take row_norm (Lemma 2), leverage, uniform, stratified or importance, or "
        "assembly='residual'"
    )


def renormalised(state: AttentionState, log_sum: torch.Tensor) -> AttentionState:
    """Return the state with its numerator kept and its normaliser replaced.

    Args:
        state: any state.
        log_sum: `[batch, query_heads, n_q]`, the logarithm of the new normaliser.

    Returns:
        `out * exp(lse - log_sum)`, and `log_sum`; a row whose new normaliser is `-inf` is empty.
    """
    is_empty = torch.isinf(log_sum)
    # subtract 0 there, so that no gradient becomes NaN
    log_factor = state.lse - torch.where(is_empty, 0, log_sum)
    largest = 700.0 if log_factor.dtype == torch.float64 else 80.0  # stays finite
    factor = torch.exp(log_factor.clamp(max=largest)).masked_fill(is_empty, 0).unsqueeze(-1)
    return AttentionState(
        out=(state.out * factor).to(state.out.dtype), lse=log_sum.to(state.lse)
    )  # fmt: skip
