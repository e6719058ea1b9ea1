"""Applying, replacing, removing; several models; randomness of layers and steps."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")
from hyperframe.integrations.transformers import AttentionCall, apply, remove  # noqa: E402
from hyperframe.randomness import Stream  # noqa: E402


class Noisy:
    """Draws from the generator that it is given, so that the output shows the randomness."""

    def __init__(self, seed: int | None = 0) -> None:
        self.seed = seed
        self.drawn: list[int] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        generator = options["generator"]
        self.drawn.append(generator.initial_seed())
        noise = torch.randn(query.shape[-1], generator=generator)
        return query * noise


def test_remove_restores_the_former_implementation(llama: Any, dense: Any) -> None:
    llama.set_attn_implementation("sdpa")
    handle = apply(llama, attention=dense)
    assert llama.config._attn_implementation == "hyperframe"
    remove(llama)
    handle.remove()
    remove(llama)
    assert llama.config._attn_implementation == "sdpa"
    assert not any("hyperframe" in name for m in llama.modules() for name in vars(m))


def test_remove_respects_a_later_choice(llama: Any, dense: Any) -> None:
    apply(llama, attention=dense)
    llama.set_attn_implementation("sdpa")
    remove(llama)
    assert llama.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_context_ends_even_after_an_error(llama: Any, dense: Any) -> None:
    with pytest.raises(KeyError), apply(llama, attention=dense):
        raise KeyError
    assert llama.config._attn_implementation == "eager"


@torch.no_grad()
def test_applying_twice_replaces_the_former(llama: Any, tokens: Tensor, dense: Any) -> None:
    first = apply(llama, "all", attention=Noisy())
    second = apply(llama, "first:1", attention=dense)
    llama(tokens)
    assert len(dense.calls) == 1
    first.remove()  # a replaced handle does nothing
    llama(tokens)
    assert len(dense.calls) == 2
    second.remove()
    assert llama.config._attn_implementation == "eager"


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_models_do_not_disturb_one_another(tokens: Tensor, make_llama: Any, shared: bool) -> None:
    one = make_llama()
    two = make_llama()
    if shared:
        two = transformers.LlamaForCausalLM(one.config).eval()
        two.load_state_dict(one.state_dict())
    expected = one(tokens).logits
    noisy, calls = Noisy(), []
    apply(one, "all", attention=noisy)
    # a model that shares the config of a routed one stays exact
    torch.testing.assert_close(two(tokens).logits, expected, rtol=2e-4, atol=2e-4)
    apply(two, "last:1", attention=noisy, observer=calls.append)
    one(tokens)
    assert len(noisy.drawn) == 3
    two(tokens)
    assert len(noisy.drawn) == 4
    assert [c.exact for c in calls] == [True, True, False]
    remove(one)
    two(tokens)
    assert len(noisy.drawn) == 5
    torch.testing.assert_close(one(tokens).logits, expected, rtol=2e-4, atol=2e-4)
    assert len(noisy.drawn) == 5
    remove(two)
    assert one.config._attn_implementation == two.config._attn_implementation == "eager"


@torch.no_grad()
def test_copies_of_a_routed_model_keep_their_route(llama: Any, tokens: Tensor, dense: Any) -> None:
    apply(llama, "last:1", attention=dense)
    expected = llama(tokens).logits
    for twin in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert twin(tokens).logits.equal(expected)
        remove(twin)
        assert twin.config._attn_implementation == "eager"
    assert llama.config._attn_implementation == "hyperframe"
    assert "hyperframe" not in llama.config.to_json_string()


@torch.no_grad()
def test_layers_chunks_and_seeds_draw_their_own_numbers(llama: Any, tokens: Tensor) -> None:
    noisy = Noisy(seed=7)
    apply(llama, attention=noisy)
    first = llama(tokens).logits
    once = list(noisy.drawn)
    assert len(set(once)) == 3
    assert llama(tokens).logits.equal(first)
    assert noisy.drawn == once * 2
    past = llama(tokens[:, :12]).past_key_values
    llama(tokens[:, 12:], past_key_values=past)
    assert len(set(noisy.drawn)) == 6  # the second chunk has 24 keys, as the whole has
    other = Noisy(seed=8)
    apply(llama, attention=other)
    llama(tokens)
    assert not set(other.drawn) & set(noisy.drawn)


@torch.no_grad()
def test_rows_packed_in_different_ways_draw_their_own_numbers(llama: Any, tokens: Tensor) -> None:
    def packed(*cuts: int) -> Tensor:
        return torch.stack([torch.cat([torch.arange(cut), torch.arange(24 - cut)]) for cut in cuts])

    noisy = Noisy(seed=7)
    apply(llama, attention=noisy)
    args = {"position_ids": packed(10, 5), "use_cache": False}
    first = llama(tokens, **args).logits
    assert len(noisy.drawn) == len(set(noisy.drawn)) == 3 * 2 * 2  # layers, rows, sequences
    assert llama(tokens, **args).logits.equal(first)
    # row 0 and an unpacked batch share their start, and so their numbers
    noisy.drawn.clear()
    llama(tokens, position_ids=packed(10, 10), use_cache=False)
    alike = list(noisy.drawn)
    noisy.drawn.clear()
    llama(tokens, use_cache=False)
    assert noisy.drawn == alike[::2]


@torch.no_grad()
def test_an_attention_that_takes_streams_gets_them(llama: Any, tokens: Tensor) -> None:
    sources = []

    def attend(query: Tensor, *rest: Tensor, generator: Stream, **options: Any) -> Tensor:
        sources.append(generator)
        return query * 0

    def seeds() -> list[int | Tensor]:
        sources.clear()
        llama(tokens)
        assert all(type(source) is Stream for source in sources)
        return [source.seed for source in sources]

    attend.takes_stream = True  # type: ignore[attr-defined]
    apply(llama, attention=attend)
    first = seeds()
    assert len(set(first)) == 3  # one for each layer
    assert seeds() == first


@torch.no_grad()
def test_eval_leaves_the_global_generator_alone(llama: Any, tokens: Tensor) -> None:
    apply(llama, attention=Noisy())
    before = torch.get_rng_state()
    llama(tokens)
    assert torch.get_rng_state().equal(before)


@torch.no_grad()
def test_seed_none_draws_anew_each_time(llama: Any, tokens: Tensor) -> None:
    noisy = Noisy(seed=None)
    apply(llama, attention=noisy)
    torch.manual_seed(3)
    llama(tokens)
    llama(tokens)
    torch.manual_seed(3)
    llama(tokens)
    assert len(set(noisy.drawn)) == 6
    assert noisy.drawn[:3] == noisy.drawn[6:]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_bits(
    llama: Any, tokens: Tensor, reentrant: bool
) -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(5)
        llama.zero_grad()
        llama(tokens, labels=tokens, use_cache=False).loss.backward()
        return [p.grad.clone() for p in llama.parameters() if p.grad is not None]

    noisy = Noisy()
    llama.train()
    apply(llama, attention=noisy)
    plain = gradients()
    assert len(noisy.drawn) == 3
    llama(tokens, use_cache=False)
    assert len(set(noisy.drawn)) == 6  # another step, other numbers
    noisy.drawn.clear()
    enable = getattr(llama, "activation_checkpointing_enable", None)
    (enable or llama.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    checkpointed = gradients()
    assert len(noisy.drawn) == 6
    assert set(noisy.drawn[:3]) == set(noisy.drawn[3:])
    torch.testing.assert_close(checkpointed, plain)


def test_gradients_agree_with_eager(llama: Any, tokens: Tensor, dense: Any) -> None:
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]
    args = {"position_ids": positions, "labels": tokens, "use_cache": False}
    grads = []
    for layers in (None, "all", "none"):
        llama.zero_grad()
        if layers is not None:
            apply(llama, layers, attention=dense)
        llama(tokens, **args).loss.backward()
        grads.append([p.grad.clone() for p in llama.parameters()])
        remove(llama)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_observer_sees_every_call(llama: Any, tokens: Tensor, dense: Any) -> None:
    calls: list[AttentionCall] = []
    with apply(llama, [1], attention=dense, observer=calls.append):
        llama(tokens)
    assert [(c.layer_idx, c.n_q, c.n_k, c.exact) for c in calls] == [
        (0, 24, 24, True),
        (1, 24, 24, False),
        (2, 24, 24, True),
    ]
    assert sum(c.seconds for c in calls) > 0


@torch.inference_mode()
def test_inference_mode_keeps_packed_sequences_apart(
    llama: Any, tokens: Tensor, dense: Any
) -> None:
    args = {"position_ids": torch.cat([torch.arange(9), torch.arange(15)])[None]}
    expected = llama(tokens, use_cache=False, **args).logits
    apply(llama, attention=dense)
    actual = llama(tokens, **args).logits
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_changed_positions_are_noticed(llama: Any, tokens: Tensor, dense: Any) -> None:
    apply(llama, attention=dense)
    positions = torch.arange(24)[None].clone()
    llama(tokens, position_ids=positions)
    positions[:, 12:] -= 12
    llama(tokens, position_ids=positions)
    assert [c["n_q"] for c in dense.calls] == [24] * 3 + [12] * 6
