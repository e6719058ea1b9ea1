"""With an exact attention in the layers, a routed model agrees with the eager one everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")
from hyperframe.integrations.transformers import AttentionCall, apply  # noqa: E402

LAYERS = ["all", "none", [1]]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def padding(kind: str, length: int) -> Tensor:
    mask = torch.ones(2, length, dtype=torch.int64)
    if kind == "left":
        mask[0, :9] = 0
    elif kind == "right":
        mask[1, -7:] = 0
    elif kind == "both":
        mask[0, :3], mask[1, -2:] = 0, 0
    return mask


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", ["none", "ones", "left", "right", "both"])
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_padding_agrees_with_eager(
    llama: Any, tokens: Tensor, dense: Any, layers: Any, kind: str, use_cache: bool
) -> None:
    mask = None if kind == "none" else padding(kind, tokens.shape[1])
    args = {"attention_mask": mask, "use_cache": use_cache}
    expected = llama(tokens, **args).logits
    with apply(llama, layers, attention=dense) as applied:
        actual = llama(tokens, **args).logits
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    close(actual[real], expected[real])
    assert actual.isfinite().all()
    assert len(dense.calls) == len(applied.layers)
    # padding costs a mask only where there is some, and K and V come un-repeated
    assert all(c["masked"] == (kind in ("left", "right", "both")) for c in dense.calls)
    assert all(c["kv_heads"] == 2 and c["is_causal"] for c in dense.calls)


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_packed_positions_keep_sequences_apart(
    llama: Any, tokens: Tensor, dense: Any, layers: Any
) -> None:
    row = tokens[:1]
    lengths = [7, 1, 10, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    apart = torch.cat([llama(part).logits for part in row.split(lengths, 1)], 1)
    eager = llama(row, position_ids=positions, use_cache=False).logits
    close(eager, apart)
    with apply(llama, layers, attention=dense):
        close(llama(row, position_ids=positions, use_cache=False).logits, apart)
        # with a cache, or with a mask of ones, eager attends across; here a restart always cuts
        close(llama(row, position_ids=positions, use_cache=True).logits, apart)
        ones = torch.ones_like(row)
        close(llama(row, position_ids=positions, attention_mask=ones).logits, apart)
    if layers == "all":
        assert [c["n_q"] for c in dense.calls[:3]] == [7, 10, 6]


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_packed_rows_may_differ(llama: Any, tokens: Tensor, dense: Any, layers: Any) -> None:
    positions = torch.stack(
        [
            torch.cat([torch.arange(10), torch.arange(14)]),
            torch.cat([torch.arange(5), torch.arange(3, 12), torch.arange(10)]),
        ]
    )
    args = {"position_ids": positions, "use_cache": False}
    expected = llama(tokens, **args).logits
    with apply(llama, layers, attention=dense):
        close(llama(tokens, **args).logits, expected)


@torch.no_grad()
def test_packed_positions_reach_models_that_do_not_pass_them_on(dense: Any) -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=50, attn_implementation="eager",
            initializer_range=0.3, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    row = torch.arange(2, 22)[None]
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    args = {"position_ids": positions, "use_cache": False}
    expected = model(row, **args).logits
    with apply(model, attention=dense):
        close(model(row, **args).logits, expected)
    assert [c["n_q"] for c in dense.calls] == [12, 8, 12, 8]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_prefill_in_chunks_then_decode(
    llama: Any, tokens: Tensor, dense: Any, layers: Any, kind: str, cache: str
) -> None:
    def run() -> Tensor:
        mask = padding(kind, tokens.shape[1])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        if cache == "static":
            past = transformers.StaticCache(config=llama.config, max_cache_len=40)
        else:
            past = transformers.DynamicCache(config=llama.config)
        logits, seen = [], 0
        for count in (10, 7, 5, 1, 1):
            stop = seen + count
            out = llama(
                tokens[:, seen:stop],
                attention_mask=None if kind == "none" else mask[:, :stop],
                position_ids=positions[:, seen:stop],
                past_key_values=past,
            )
            logits.append(out.logits)
            seen = stop
        return torch.cat(logits, 1)[padding(kind, tokens.shape[1]).bool()]

    expected = run()
    calls: list[AttentionCall] = []
    with apply(llama, layers, attention=dense, observer=calls.append) as applied:
        close(run(), expected)
    approximate = [c for c in calls if not c.exact]
    assert {c.layer_idx for c in approximate} == set(applied.layers)
    first = [(c.n_q, c.n_k) for c in approximate if c.layer_idx == applied.layers[0]] if (
        applied.layers) else []  # fmt: skip
    assert first == ([(10, 10), (7, 17), (5, 22)] if applied.layers else [])
    assert [c.n_q for c in calls if c.layer_idx == 1] == [10, 7, 5, 1, 1]
    assert all(c.exact for c in calls if c.n_q == 1)
    assert all(c.seconds >= 0 for c in calls)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["none", "left"])
@torch.no_grad()
def test_generate_agrees_with_eager(
    llama: Any, tokens: Tensor, dense: Any, cache: str, kind: str
) -> None:
    args = {
        "attention_mask": padding(kind, tokens.shape[1]),
        "max_new_tokens": 6,
        "do_sample": False,
        "cache_implementation": cache,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = llama.generate(tokens, **args)
    with apply(llama, attention=dense):
        actual = llama.generate(tokens, **args)
    assert actual.sequences.equal(expected.sequences)
    close(torch.stack(actual.logits), torch.stack(expected.logits))
    assert [c["n_q"] for c in dense.calls] == [24, 24, 24]


@pytest.mark.parametrize("layers", ["all", "none", "first:1"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_encoder_with_key_padding(dense: Any, layers: str, padded: bool) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        vocab_size=50, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = torch.arange(40).reshape(2, 20)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 13:] = 0
    expected = model(ids, attention_mask=mask).last_hidden_state
    with apply(model, layers, attention=dense):
        actual = model(ids, attention_mask=mask).last_hidden_state
    close(actual[mask.bool()], expected[mask.bool()])
    assert all(c["masked"] == padded and not c["is_causal"] for c in dense.calls)


@torch.no_grad()
def test_vision_transformer_layers_are_numbered_in_order(dense: Any) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, attn_implementation="eager", initializer_range=0.3,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = model(pixels).last_hidden_state
    calls: list[AttentionCall] = []
    with apply(model, [-1], attention=dense, observer=calls.append) as applied:
        close(model(pixels).last_hidden_state, expected)
    assert (applied.layers, applied.all_layers) == ((2,), (0, 1, 2))
    assert [(c.layer_idx, c.n_k, c.exact) for c in calls] == [
        (0, 17, True),
        (1, 17, True),
        (2, 17, False),
    ]
    assert len(dense.calls) == 1


@torch.no_grad()
def test_one_stack_of_an_encoder_decoder(dense: Any) -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50,
        attn_implementation="eager", init_std=0.3,
    )  # fmt: skip
    model = transformers.BartModel(config).eval()
    ids, target = torch.arange(3, 33).reshape(2, 15), torch.arange(3, 23).reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    args = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
    expected = model(**args).last_hidden_state
    for stack, causal in ((model.encoder, False), (model.decoder, True)):
        dense.calls.clear()
        with apply(stack, attention=dense):
            close(model(**args).last_hidden_state, expected)
        assert [c["is_causal"] for c in dense.calls] == [causal] * 2


@torch.no_grad()
def test_beams_and_draft_tokens_agree_with_eager(llama: Any, tokens: Tensor, dense: Any) -> None:
    mask = padding("left", 24)
    beams = {"attention_mask": mask, "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    drafts = {"max_new_tokens": 8, "prompt_lookup_num_tokens": 3, "do_sample": False}
    expected = llama.generate(tokens, **beams), llama.generate(tokens[:1], **drafts)
    apply(llama, attention=dense)
    assert llama.generate(tokens, **beams).equal(expected[0])
    assert llama.generate(tokens[:1], **drafts).equal(expected[1])


@torch.no_grad()
def test_a_decoder_may_run_without_causality(llama: Any, tokens: Tensor, dense: Any) -> None:
    mask = padding("both", 24)
    args = {"attention_mask": mask, "is_causal": False, "use_cache": False}
    expected = llama(tokens, **args).logits
    apply(llama, "first:2", attention=dense)
    close(llama(tokens, **args).logits[mask.bool()], expected[mask.bool()])
    assert not any(c["is_causal"] for c in dense.calls)


@torch.no_grad()
def test_a_mask_as_wide_as_the_static_cache(llama: Any, tokens: Tensor, dense: Any) -> None:
    mask = padding("left", 24)
    wide = torch.nn.functional.pad(mask, (0, 16))

    def run() -> Tensor:
        past = transformers.StaticCache(config=llama.config, max_cache_len=40)
        return llama(tokens, attention_mask=wide, past_key_values=past).logits[mask.bool()]

    expected = run()
    apply(llama, attention=dense)
    close(run(), expected)
    assert all(c["n_k"] == 24 for c in dense.calls)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_decode_step_is_one_graph(llama: Any, tokens: Tensor, dense: Any) -> None:
    compiled = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    args = {
        "attention_mask": padding("left", 24),
        "max_new_tokens": 5,
        "do_sample": False,
        "cache_implementation": "static",
    }
    expected = llama.generate(tokens, **args)
    apply(llama, attention=dense)
    assert llama.generate(tokens, compile_config=compiled, **args).equal(expected)
