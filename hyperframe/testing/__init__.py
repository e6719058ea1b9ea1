"""Public helpers for testing components: float64 oracles and input strategies."""

from .oracles import causal_mask, dense_attention, masked_attention, plan_attention

__all__ = ["causal_mask", "dense_attention", "masked_attention", "plan_attention"]
