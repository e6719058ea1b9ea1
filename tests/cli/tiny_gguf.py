"""A tiny Llama in a GGUF file, tokenizer included: a token for each letter and digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

POSITIONS = 64
_PIECES = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(97, 123)), *map(str, range(10))]
_UNKNOWN, _CONTROL, _NORMAL = 2, 3, 1


def save_tiny_gguf(path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(_PIECES))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(_PIECES)
    writer.add_token_scores([-float(place) for place in range(len(_PIECES))])
    writer.add_token_types([_UNKNOWN, _CONTROL, _CONTROL, *[_NORMAL] * (len(_PIECES) - 3)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    draws = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        content = np.ones(32) if not shape else 0.2 * draws.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", content.astype(np.float32))

    add("token_embd", len(_PIECES), 32)
    add("output", len(_PIECES), 32)
    add("output_norm")
    for block in ("blk.0.", "blk.1."):
        add(f"{block}attn_norm")
        add(f"{block}attn_q", 32, 32)
        add(f"{block}attn_k", 16, 32)
        add(f"{block}attn_v", 16, 32)
        add(f"{block}attn_output", 32, 32)
        add(f"{block}ffn_norm")
        add(f"{block}ffn_gate", 48, 32)
        add(f"{block}ffn_up", 48, 32)
        add(f"{block}ffn_down", 32, 48)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
