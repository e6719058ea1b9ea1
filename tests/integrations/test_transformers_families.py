"""Families of models: with every entry held exactly, a routed model's logits are eager's.

The oracle with a budget for every key makes each approximated layer an exact one by way of the
whole machinery (plans, masks of padding, tiles), so what is compared is how the attention of each
family is called, in every situation. Logits to 1e-4 in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")
from hyperframe.integrations.transformers import AttentionCall, apply  # noqa: E402

LENGTH = 24
ORACLE: dict[str, Any] = {"detector": "oracle(budget=64)", "num_samples": 0, "min_seq_len": 0}
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2,
    "vocab_size": 60, "max_position_embeddings": 128, "attn_implementation": "eager",
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", SMALL | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", GROUPED),
    "gemma3": (
        "Gemma3Text",
        GROUPED
        | {
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    "mistral-window": ("Mistral", GROUPED | {"sliding_window": 8}),
    "phi": ("Phi", SMALL | {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", SMALL | {"num_key_value_heads": 2}),
    "gpt-neox": ("GPTNeoX", SMALL | {"rotary_pct": 0.5}),
}
"""Name of the configuration class without "Config", and its arguments."""

SITUATIONS = [
    "plain", "left", "right", "packed", "chunked", "chunked-left", "static", "static-left",
    "static-chunked-left",
]  # fmt: skip


def decoder(family: str) -> Any:
    name, settings = DECODERS[family]
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(2, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def padding(kind: str) -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    if kind == "left":
        mask[0, :9] = 0
    elif kind == "right":
        mask[1, -7:] = 0
    return mask


def logits(model: Any, situation: str) -> Tensor:
    """What the model says of the real tokens, in one of the situations that callers make."""
    ids = tokens()
    kind = situation.removeprefix("static-").removeprefix("chunked-")
    mask = padding(kind)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past: Any = None
    if situation.startswith("static"):
        past = transformers.StaticCache(config=model.config, max_cache_len=40)
    if situation == "packed":
        positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
        return model(ids[:1], position_ids=positions, use_cache=False).logits[0]
    if "chunked" in situation:
        parts = []
        if past is None:
            past = transformers.DynamicCache(config=model.config)
        for start, stop in ((0, 10), (10, 17), (17, 22), (22, 23), (23, 24)):
            of_part = {} if kind == "chunked" else {
                "attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]
            }  # fmt: skip
            parts.append(model(ids[:, start:stop], past_key_values=past, **of_part).logits)
        return torch.cat(parts, 1)[mask.bool()]
    args = {"attention_mask": None if kind == "plain" else mask, "position_ids": positions}
    return model(ids, past_key_values=past, **args).logits[mask.bool()]


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_every_situation_of_a_decoder_agrees_with_eager(family: str) -> None:
    model = decoder(family)
    expected = {situation: logits(model, situation) for situation in SITUATIONS}
    for situation in SITUATIONS:
        calls: list[AttentionCall] = []
        with apply(model, observer=calls.append, **ORACLE) as applied:
            actual = logits(model, situation)
        close(actual, expected[situation])
        windows = set(applied.windows)
        assert windows == {"gemma3": {0}, "mistral-window": {0, 1}}.get(family, set())
        # a window that binds is the only reason to be exact in a prefill
        assert all(call.exact == (call.layer_idx in windows) for call in calls if call.n_q > 8)
        assert set(applied.left_exact) == windows


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_generation_with_a_padded_batch_agrees_with_eager(family: str, cache: str) -> None:
    model = decoder(family)
    args = {
        "attention_mask": padding("left"),
        "max_new_tokens": 4,
        "do_sample": False,
        "cache_implementation": cache,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = model.generate(tokens(), **args)
    for options in (ORACLE, {"min_seq_len": LENGTH}):
        with apply(model, **options):
            actual = model.generate(tokens(), **args)
        assert actual.sequences.equal(expected.sequences)
        close(torch.stack(actual.logits), torch.stack(expected.logits))


def encoder(family: str, side: str = "right") -> tuple[Any, Callable[[], Tensor]]:
    """A tiny encoder, and a forward of it: the last hidden states of its real positions."""
    small = {key: value for key, value in SMALL.items() if not key.endswith("token_id")}
    torch.manual_seed(0)
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**small)).eval()
        mask = padding(side)
        return model, lambda: model(tokens(), attention_mask=mask).last_hidden_state[mask.bool()]
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8)
    model = transformers.ViTModel(config).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return model, lambda: model(pixels).last_hidden_state


@pytest.mark.parametrize(
    "family, side", [("bert", "none"), ("bert", "left"), ("bert", "right"), ("vit", "none")]
)
@torch.no_grad()
def test_encoders_agree_with_eager(family: str, side: str) -> None:
    model, run = encoder(family, side)
    expected = run()
    calls: list[AttentionCall] = []
    with apply(model, observer=calls.append, **ORACLE):
        close(run(), expected)
    assert [call.exact for call in calls] == [False, False]


@pytest.mark.parametrize(
    "options",
    [ORACLE, {"detector": "sort_lsh(block_size=8)", "num_samples": 4, "min_seq_len": 0},
     {"detector": "heavy_columns", "causal": "recursive", "min_seq_len": 8}],
    ids=["oracle", "sort_lsh", "recursive"],
)  # fmt: skip
@torch.no_grad()
def test_a_row_of_nothing_but_padding_harms_no_other(options: dict[str, Any]) -> None:
    model, mask = decoder("llama"), padding("none")
    mask[0] = 0
    with apply(model, **options):
        found = model(tokens(), attention_mask=mask).logits
        alone = model(tokens(), attention_mask=padding("none")).logits
    assert found.isfinite().all()
    if options is ORACLE:
        close(found[1], alone[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_is_at_most_twice_as_far_from_fp32_as_eager_is(dtype: torch.dtype) -> None:
    expected = logits(decoder("qwen3"), "left")
    model = decoder("qwen3").to(dtype)
    eager = logits(model, "left")
    with apply(model, **ORACLE):
        actual = logits(model, "left")
    assert actual.dtype == dtype
    assert (actual - expected).norm() <= 2 * (eager - expected).norm()


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
@torch.no_grad()
def test_a_budget_for_few_keys_is_seen(family: str) -> None:
    # what the comparisons above compare is not exact attention by another way
    model = decoder(family)
    expected = logits(model, "plain")
    with apply(model, **(ORACLE | {"detector": "oracle(budget=4)"})):
        assert (logits(model, "plain") - expected).abs().max() > 1e-2
