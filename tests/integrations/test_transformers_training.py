"""Training through a routed model: gradients, checkpointed or not, of every backend; adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")
from hyperframe.integrations.policy import Policy, Rule  # noqa: E402
from hyperframe.integrations.transformers import apply, remove, save_policy  # noqa: E402

# peft asks a model in the way of transformers 4
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is dep:FutureWarning")

SPECS: dict[str, dict[str, Any]] = {
    "sort_lsh": {"detector": "sort_lsh(block_size=16)", "num_samples": 16},
    "columns": {"detector": "heavy_columns(num_columns=8)", "num_samples": 8, "sampler": "uniform"},
    "recursive": {
        "detector": "sort_lsh(block_size=8)", "causal": "recursive", "min_seq_len": 16,
        "num_samples": 8,
    },
    "union": {
        "detector": "sliding_window(width=8, num_sinks=2) | heavy_columns(num_columns=4)",
        "num_samples": 4,
    },
}  # fmt: skip


def options(spec: str) -> dict[str, Any]:
    return {"min_seq_len": 0} | SPECS[spec]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(2, 101, (2, 70), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    # the first real token is predicted from padding, whose output is nobody's business
    told = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(told == 0, -100)}


def checkpoint(model: Any, *, reentrant: bool) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})


def gradient(model: Any, batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(5)  # a training step draws anew, from here
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return torch.cat(grads)


@pytest.mark.parametrize("spec", SPECS)
def test_a_training_step_has_the_gradient_of_the_reference_backend(
    make_llama: Any, batch: dict[str, Tensor], spec: str
) -> None:
    model = make_llama(num_hidden_layers=2).double().train()
    found = {}
    with apply(model, "none"):
        exact = gradient(model, batch)
    for backend in ("reference", "torch", "auto"):
        with apply(model, backend=backend, **options(spec)):
            found[backend] = gradient(model, batch)
    for backend in ("torch", "auto"):
        torch.testing.assert_close(found[backend], found["reference"], rtol=1e-9, atol=1e-10)
    # and it is another one than that of exact attention: the layers are approximated
    assert (found["reference"] - exact).norm() > 1e-3 * exact.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_leaves_the_gradient_as_it_is(
    make_llama: Any, batch: dict[str, Tensor], reentrant: bool
) -> None:
    model = make_llama().train()
    rules = [
        Rule(layers="all", attention=options("sort_lsh")),
        # parts of a layer draw one after the other, and again in that order
        Rule(layers=1, attention=options("columns"), key_heads=[0]),
    ]
    apply(model, policy=Policy(rules=rules))
    plain = gradient(model, batch)
    checkpoint(model, reentrant=reentrant)
    torch.testing.assert_close(gradient(model, batch), plain, rtol=1e-5, atol=1e-7)
    torch.manual_seed(6)
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    other = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert not other.equal(plain)  # another step, other samples


def test_the_gradient_of_a_full_budget_is_that_of_eager(
    make_llama: Any, batch: dict[str, Tensor]
) -> None:
    model = make_llama().train()
    eager = gradient(model, batch)
    oracle = {"detector": "oracle(budget=80)", "num_samples": 0, "min_seq_len": 0}
    apply(model, **oracle)
    torch.testing.assert_close(gradient(model, batch), eager, rtol=1e-3, atol=1e-5)


@pytest.fixture
def lora(make_llama: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(make_llama(), config)


@PEFT_WARNS
def test_adapters_are_trained_under_a_routed_base(lora: Any, batch: dict[str, Tensor]) -> None:
    lora.train()
    eager = gradient(lora, batch)
    handle = apply(lora, "*.layers.[12].self_attn", detector="oracle(budget=80)", num_samples=0,
                   min_seq_len=0)  # fmt: skip
    assert handle.layers == (1, 2)
    found = gradient(lora, batch)
    assert found.numel() == sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n)
    torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-5)
    # names are those of the model without its wrapper
    assert apply(lora, "model.layers.0.self_attn", **options("sort_lsh")).layers == (0,)
    plain = gradient(lora, batch)
    assert not plain.equal(eager)
    checkpoint(lora, reentrant=False)
    torch.testing.assert_close(gradient(lora, batch), plain, rtol=1e-5, atol=1e-7)
    remove(lora)
    assert lora.config._attn_implementation == "eager"


@PEFT_WARNS
@torch.no_grad()
def test_a_model_routed_before_peft_wraps_it_stays_so(
    make_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = make_llama()
    exact = model(tokens).logits
    apply(model, "all", detector="sort_lsh(block_size=4)", num_samples=4, min_seq_len=0)
    expected = model(tokens).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.eval()
    # a new adapter adds zero
    assert wrapped(tokens).logits.equal(expected)
    save_policy(wrapped, tmp_path)
    remove(wrapped)
    torch.testing.assert_close(wrapped(tokens).logits, exact, rtol=1e-5, atol=1e-5)
    apply(wrapped, policy=tmp_path)
    assert wrapped(tokens).logits.equal(expected)
    merged = wrapped.merge_and_unload()
    assert merged(tokens).logits.equal(expected)
