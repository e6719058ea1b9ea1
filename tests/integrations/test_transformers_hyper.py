"""HyperAttention itself inside models: exact where its budget covers everything, near elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("hyperframe.attention")
from hyperframe.detectors.block_list import BlockList  # noqa: E402
from hyperframe.integrations.transformers import AttentionCall, apply, remove  # noqa: E402

ALL_HEAVY = {"num_samples": 0, "min_seq_len": 0}
COVERING = ALL_HEAVY | {"detector": BlockList(blocks=((0, 0),), block_size=64)}
# in one causal pass sort_lsh looks inside hash buckets only; in the recursion one block is enough
RECURSIVE = ALL_HEAVY | {"detector": "sort_lsh(block_size=64)", "causal": "recursive"}
EXACT = [
    pytest.param({"min_seq_len": 10_000}, id="below-min-seq-len"),
    pytest.param(COVERING, id="one-block-holds-every-key"),
    pytest.param(RECURSIVE, id="recursive"),
    pytest.param(RECURSIVE | {"min_seq_len": 5}, id="recursive-with-exact-leaves"),
    pytest.param({"num_samples": 64, "min_seq_len": 0}, id="every-key-is-sampled"),
]


@pytest.mark.parametrize("options", EXACT)
@pytest.mark.parametrize("kind", ["none", "left", "right", "packed", "chunked", "static"])
@torch.no_grad()
def test_a_budget_for_every_key_agrees_with_eager(
    llama: Any, tokens: Tensor, options: dict[str, Any], kind: str
) -> None:
    mask = torch.ones_like(tokens)
    if kind == "left":
        mask[0, :9] = 0
    elif kind == "right":
        mask[0, -9:] = 0

    def run() -> Tensor:
        if kind == "packed":
            positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
            return llama(tokens, position_ids=positions, use_cache=False).logits
        if kind == "chunked":
            first = llama(tokens[:, :10])
            rest = llama(tokens[:, 10:], past_key_values=first.past_key_values)
            return torch.cat([first.logits, rest.logits], 1)
        past = None
        if kind == "static":
            past = transformers.StaticCache(config=llama.config, max_cache_len=40)
        return llama(tokens, attention_mask=mask, past_key_values=past).logits

    expected = run()
    with apply(llama, **options):
        actual = run()
    assert actual.isfinite().all()
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("options", EXACT[:2])
@torch.no_grad()
def test_generation_agrees_with_eager(llama: Any, tokens: Tensor, options: dict[str, Any]) -> None:
    args = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "do_sample": False}
    expected = llama.generate(tokens, **args)
    with apply(llama, **options):
        assert llama.generate(tokens, **args).equal(expected)


@torch.no_grad()
def test_an_approximation_is_finite_near_and_reproducible(make_llama: Any) -> None:
    model = make_llama(initializer_range=0.05)
    ids = torch.randint(2, 101, (2, 200), generator=torch.Generator().manual_seed(4))
    expected = model(ids).logits
    options = {"detector": "sort_lsh(block_size=32)", "num_samples": 64, "min_seq_len": 0}
    calls: list[AttentionCall] = []
    apply(model, "last:2", observer=calls.append, **options)
    actual = model(ids).logits
    assert actual.isfinite().all()
    # values of a random model average out to little, so samples are a hard case here
    error = (actual - expected).norm() / expected.norm()
    assert 0 < error < 0.35
    assert [(c.layer_idx, c.exact) for c in calls] == [(0, True), (1, False), (2, False)]
    assert model(ids).logits.equal(actual)
    apply(model, "last:2", **(options | {"num_samples": 8}))
    assert (model(ids).logits - expected).norm() / expected.norm() > 1.5 * error
    apply(model, "last:2", seed=1, **options)
    assert not model(ids).logits.equal(actual)
    remove(model)
    assert model(ids).logits.equal(expected)


def test_gradients_agree_with_eager_when_every_key_is_covered(llama: Any, tokens: Tensor) -> None:
    grads = []
    for routed in (False, True):
        llama.zero_grad()
        if routed:
            apply(llama, **COVERING)
        llama(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in llama.parameters()])
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-3, atol=1e-4)


def test_training_steps_differ_and_checkpointing_recomputes_them(make_llama: Any) -> None:
    model = make_llama(initializer_range=0.05).train()
    ids = torch.randint(2, 101, (1, 150), generator=torch.Generator().manual_seed(4))
    apply(model, detector="sort_lsh(block_size=16)", num_samples=16, min_seq_len=0)

    def gradient(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain, other = gradient(5), gradient(6)
    assert not plain.equal(other)
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    torch.testing.assert_close(gradient(5), plain)


@torch.no_grad()
def test_an_encoder_with_padding_is_near_eager() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        vocab_size=50, attn_implementation="eager", initializer_range=0.1,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    ids = torch.arange(2 * 120).reshape(2, 120) % 50
    mask = torch.ones_like(ids)
    mask[0, 90:] = 0
    expected = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    covering = {"detector": "sort_lsh(block_size=128)", "num_samples": 0, "min_seq_len": 0}
    with apply(model, **covering):
        actual = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=5e-4, atol=5e-4)
    with apply(model, detector="sort_lsh(block_size=16)", num_samples=48, min_seq_len=0):
        actual = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert (actual - expected).norm() / expected.norm() < 0.1


def test_wrong_options_are_refused_before_anything_changes(llama: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        apply(llama, detector="no_such_detector")
    assert llama.config._attn_implementation == "eager"
