"""Tiny language models whose layers differ in how hard their attention is to approximate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

VOCABULARY = 61


@pytest.fixture
def make_llama() -> Callable[..., Any]:
    """Make a Llama; layers in `sharp` attend to single keys, and others hardly matter."""

    def make(
        *, sharp: tuple[int, ...] = (), layers: int = 3, dtype: torch.dtype = torch.float32
    ) -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
            num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=512,
            initializer_range=0.15, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
        with torch.no_grad():
            for index, layer in enumerate(model.model.layers):
                attention = layer.self_attn
                attention.q_proj.weight.mul_(6.0 if index in sharp else 0.3)
                attention.k_proj.weight.mul_(3.0 if index in sharp else 0.3)
                attention.o_proj.weight.mul_(2.0 if index in sharp else 0.05)
        return model

    return make


@pytest.fixture
def random_tokens() -> Callable[[int, int], torch.Tensor]:
    def draw(length: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCABULARY, (length,), generator=generator)

    return draw
