"""Tiny random models and an exact stand-in for HyperAttention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")


class DenseAttention:
    """Textbook attention in float64 with the call signature of HyperAttention."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        key_padding_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        n_q, n_k = query.shape[2], key.shape[2]
        self.calls.append(
            {
                "n_q": n_q,
                "n_k": n_k,
                "kv_heads": key.shape[1],
                "is_causal": is_causal,
                "masked": key_padding_mask is not None,
                "seed": None if generator is None else generator.initial_seed(),
            }
        )
        group = query.shape[1] // key.shape[1]
        k = key.repeat_interleave(group, 1).double()
        v = value.repeat_interleave(group, 1).double()
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        logits = query.double() @ k.transpose(-1, -2) * scale
        allowed = torch.ones(n_q, n_k, dtype=torch.bool)
        if is_causal:
            allowed = allowed.tril(n_k - n_q)
        allowed = allowed[None, None]
        if key_padding_mask is not None:
            allowed = allowed & key_padding_mask[:, None, None, :]
        weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ v).to(query.dtype)


@pytest.fixture
def dense() -> DenseAttention:
    return DenseAttention()


def llama_config(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 101,
        "max_position_embeddings": 512,
        # large enough that attention is far from uniform
        "initializer_range": 0.2,
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return transformers.LlamaConfig(**(settings | changes))


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(llama_config(**changes)).eval()

    return make


@pytest.fixture
def llama(make_llama: Callable[..., Any]) -> Any:
    return make_llama()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, 101, (2, 24), generator=torch.Generator().manual_seed(1))
