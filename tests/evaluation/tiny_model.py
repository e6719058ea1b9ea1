"""A tiny random language model whose tokens are letters."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

POSITIONS = 512


def letters(**options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII, a token for each letter; letter i is token i - 32."""
    vocabulary = {chr(i): i - 32 for i in range(32, 127)} | {"\n": 95}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, " "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="~", **options)


def llama(layers: int = 3, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=layers, vocab_size=100, max_position_embeddings=POSITIONS,
        initializer_range=0.4, eos_token_id=94, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prose(length: int, seed: int = 0) -> str:
    """Words of random letters."""
    draws = torch.randint(0, 30, (length,), generator=torch.Generator().manual_seed(seed))
    return "".join(chr(97 + i) if i < 26 else " " for i in draws.tolist())
