"""Sliding windows and chunks: where they bind a layer stays exact, elsewhere it is approximated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")
from hyperframe.errors import UnsupportedError  # noqa: E402
from hyperframe.integrations.transformers import AttentionCall, apply  # noqa: E402

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "attn_implementation": "eager",
}  # fmt: skip


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.fixture
def gemma() -> Any:
    """A layer with a window of 8 keys, and one without."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config).eval()


@torch.no_grad()
def test_the_handle_says_which_layers_a_window_leaves_exact_and_why(gemma: Any, dense: Any) -> None:
    ids = torch.arange(2, 32)[None]
    long, short = gemma(ids).logits, gemma(ids[:, :8]).logits
    calls: list[AttentionCall] = []
    with apply(gemma, attention=dense, observer=calls.append) as applied:
        assert (applied.layers, applied.windows) == ((0, 1), {0: 8})
        assert "windows {0: 8}" in repr(applied)
        close(gemma(ids[:, :8]).logits, short)
        assert [call.exact for call in calls] == [False, False]
        assert applied.left_exact == {}
        close(gemma(ids).logits, long)
        close(gemma(ids, use_cache=False).logits, long)
        assert [call.exact for call in calls[2:]] == [True, False] * 2
        assert applied.left_exact == {0: "its window of 8 keys is shorter than the 30 keys of the "
                                         "call"}  # fmt: skip
    assert [call["n_q"] for call in dense.calls] == [8, 8, 30, 30]


@torch.no_grad()
def test_a_window_longer_than_the_keys_does_not_bind(dense: Any) -> None:
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(**SMALL, sliding_window=30)
    ).eval()
    ids = torch.arange(2, 34)[None]
    expected = model(ids).logits
    with apply(model, attention=dense) as applied:
        close(model(ids[:, :30]).logits, expected[:, :30])
        assert len(dense.calls) == 2
        close(model(ids).logits, expected)
        assert len(dense.calls) == 2
    assert set(applied.left_exact) == {0, 1}


@pytest.mark.parametrize("layers", ["all", "none"])
@torch.no_grad()
def test_packed_sequences_stay_apart_under_a_window(gemma: Any, dense: Any, layers: str) -> None:
    ids = torch.arange(2, 26).reshape(1, 24)
    positions = torch.cat([torch.arange(5), torch.arange(19)])[None]
    apart = torch.cat([gemma(part).logits for part in ids.split([5, 19], 1)], 1)
    with apply(gemma, layers, attention=dense if layers == "all" else None):
        # without a cache the mask says so, with one the positions alone
        for use_cache in (False, True):
            close(gemma(ids, position_ids=positions, use_cache=use_cache).logits, apart)


@torch.no_grad()
def test_padding_under_a_window_is_no_packed_sequence(gemma: Any, dense: Any) -> None:
    ids = torch.arange(2, 50).reshape(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :12] = 0
    # what generate passes: positions of padding are 1, and start again where the real ones begin
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)

    def run() -> Tensor:
        past, parts = transformers.DynamicCache(config=gemma.config), []
        for start, stop in ((0, 10), (10, 24)):
            part = gemma(
                ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past,
                position_ids=positions[:, start:stop],
            )  # fmt: skip
            parts.append(part.logits)
        return torch.cat(parts, 1)[mask.bool()]

    expected = run()
    with apply(gemma, attention=dense):
        close(run(), expected)


@pytest.mark.parametrize("layers", ["all", "none"])
@torch.no_grad()
def test_chunks_bind_in_every_step_of_a_decode(dense: Any, layers: str) -> None:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **SMALL, intermediate_size_mlp=48, attention_chunk_size=8, no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"], num_local_experts=2,
        num_experts_per_tok=1, moe_layers=[],
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).eval()
    ids = torch.arange(2, 24).reshape(2, 11)
    expected = model(ids).logits

    def run() -> Tensor:
        past, parts = transformers.DynamicCache(config=config), []
        # the last steps see a cache of 7 keys from two chunks
        for start, stop in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 11)):
            parts.append(model(ids[:, start:stop], past_key_values=past).logits)
        return torch.cat(parts, 1)

    close(run(), expected)
    with apply(model, layers, attention=dense if layers == "all" else None) as applied:
        close(run(), expected)
        assert applied.left_exact == {}
        close(model(ids).logits, expected)
    assert set(applied.left_exact) == ({0} if layers == "all" else set())


@torch.no_grad()
def test_a_caller_s_pattern_is_refused_where_no_window_binds(gemma: Any, dense: Any) -> None:
    ids = torch.arange(2, 12)[None]
    pattern = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    with (
        apply(gemma, attention=dense),
        pytest.raises(UnsupportedError, match=r"layer 1 .*\(1, 1, 10, 10\).*2-D padding mask"),
    ):
        gemma(ids, attention_mask={"full_attention": pattern, "sliding_attention": pattern})
