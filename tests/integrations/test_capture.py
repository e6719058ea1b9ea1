"""Captured heads are what the attention of a model got, and survive a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from hyperframe.errors import ArgumentError, UnsupportedError
from hyperframe.integrations import capture as heads
from hyperframe.integrations.transformers import apply
from hyperframe.testing import dense_attention


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, vocab_size=100,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def vision() -> Any:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return ViTModel(config).eval()


CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "decoder": (llama, {"input_ids": torch.arange(60).view(2, 30)}, True),
    "encoder": (vision, {"pixel_values": torch.arange(3072.0).view(1, 3, 32, 32).sin()}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_of_the_captured_heads_is_what_the_layer_computed(case: str) -> None:
    make, inputs, is_causal = CASES[case]
    model = make()
    before = model.config._attn_implementation
    found = heads.capture(model, **inputs)
    assert model.config._attn_implementation == before
    # what goes into the projection after the attention of each layer, by the library alone
    projections = [m for n, m in model.named_modules() if n.endswith(("o_proj", "output.dense"))]
    projections = [m for m in projections if m.in_features == 32]
    seen: list[torch.Tensor] = []
    for module in projections:
        module.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    with torch.no_grad():
        model(**inputs)
    assert sorted(found) == list(range(len(found)))
    assert len(seen) == len(found)
    for layer, expected in zip(sorted(found), seen, strict=True):
        of_layer = found[layer]
        assert of_layer.layer_idx == layer
        assert of_layer.is_causal == is_causal
        tensors = (x.double() for x in (of_layer.query, of_layer.key, of_layer.value))
        out = dense_attention(*tensors, scale=of_layer.scale, is_causal=is_causal)[0]
        flat = out.transpose(1, 2).flatten(2)
        torch.testing.assert_close(flat, expected.double(), rtol=1e-4, atol=1e-5)


def test_layers_are_chosen_and_an_earlier_apply_is_replaced() -> None:
    model = llama()
    apply(model, "all", min_seq_len=0)
    found = heads.capture(model, [-1], input_ids=torch.arange(30)[None])
    assert list(found) == [2]
    assert found[2].key.shape == (1, 2, 30, 8)


def test_heads_survive_a_file(tmp_path: Path) -> None:
    found = heads.capture(llama(), [0, 2], input_ids=torch.arange(30)[None])
    heads.save(tmp_path / "heads.safetensors", found)
    again = heads.load(tmp_path / "heads.safetensors")
    assert list(again) == [0, 2]
    for layer, of_layer in found.items():
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(again[layer], name), getattr(of_layer, name))
        assert again[layer].scale == of_layer.scale
        assert again[layer].is_causal is True


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArgumentError, match="holds no captured heads"):
        heads.load(path)


def test_padding_packing_and_single_tokens_are_refused() -> None:
    model, ids = llama(), torch.arange(30)[None]
    mask = torch.ones_like(ids)
    mask[:, :5] = 0
    with pytest.raises(UnsupportedError, match="the inputs are padded"):
        heads.capture(model, input_ids=ids, attention_mask=mask)
    packed = torch.cat([torch.arange(10), torch.arange(20)])[None]
    with pytest.raises(UnsupportedError, match="attended more than once"):
        heads.capture(model, input_ids=ids, position_ids=packed)
    with pytest.raises(ArgumentError, match="did not attend to more than one query"):
        heads.capture(model, input_ids=ids[:, :1])
    # and the model is as it was
    assert heads.capture(model, [0], input_ids=ids)[0].query.shape == (1, 4, 30, 8)
