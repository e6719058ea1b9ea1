"""What is predicted of the loss: against finite differences, and against divergences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperframe.integrations.exact import exact_attention
from hyperframe.integrations.transformers import apply
from hyperframe.tuning.gradients import loss_gradients
from hyperframe.tuning.rungs import parse_rung
from hyperframe.tuning.sensitivity import add_damage, damage_of, measure_damage

Make = Callable[..., Any]
Draw = Callable[[int, int], Tensor]


def in_float64(model: Any) -> Any:
    """The model in float64, its norms as well, which transformers computes in float32."""

    class Norm(torch.nn.Module):
        def __init__(self, of: Any) -> None:
            super().__init__()
            self.weight, self.epsilon = of.weight, of.variance_epsilon

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()

    model = model.double()
    for layer in model.model.layers:
        layer.input_layernorm = Norm(layer.input_layernorm)
        layer.post_attention_layernorm = Norm(layer.post_attention_layernorm)
    model.model.norm = Norm(model.model.norm)
    return model


def with_errors(model: Any, tokens: Tensor, deltas: dict[int, Tensor]) -> Tensor:
    """Logits of the model where the attention of some layers is off by these errors."""
    layers = iter(range(len(model.model.layers)))

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        out = exact_attention(
            query, key, value, is_causal=options["is_causal"], scale=options["scale"]
        )
        layer = next(layers)
        return out + deltas[layer] if layer in deltas else out

    with torch.no_grad(), apply(model, "all", attention=attend):
        logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return logits


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], tokens[1:])


@pytest.mark.parametrize("layer", [0, 2])
def test_first_order_term_is_the_directional_derivative(
    make_llama: Make, random_tokens: Draw, layer: int
) -> None:
    model, tokens = in_float64(make_llama(sharp=(1,))), random_tokens(40, 0)
    gradients = loss_gradients(model, tokens)
    gradient = gradients.of_layer[layer]
    delta = torch.randn(gradient.shape, dtype=torch.float64, generator=seeded(1))
    step = 1e-5
    # one group of heads at a time: two query heads each
    for head in range(2):
        mine = torch.zeros_like(delta)
        mine[:, 2 * head : 2 * head + 2] = delta[:, 2 * head : 2 * head + 2]
        exact = torch.zeros_like(delta)
        terms = damage_of(mine, exact, gradient, num_key_heads=2)
        up, down = (
            loss_of(with_errors(model, tokens, {layer: sign * step * mine}), tokens)
            for sign in (1, -1)
        )
        # times n - 1 over n - 1: both are means over the predicted tokens
        assert terms["first"][head] == pytest.approx(float(up - down) / (2 * step), rel=1e-6)
        assert terms["first"][1 - head] == 0.0


def test_losses_are_those_of_the_model_and_weights_want_gradients_as_before(
    make_llama: Make, random_tokens: Draw
) -> None:
    model, tokens = make_llama(), random_tokens(512, 0)
    frozen = model.lm_head.weight.requires_grad_(False)
    gradients = loss_gradients(model, tokens)
    logits = model(input_ids=tokens[None]).logits[0, :-1]
    expected = F.cross_entropy(logits, tokens[1:], reduction="none")
    torch.testing.assert_close(gradients.losses, expected, rtol=1e-4, atol=1e-4)
    wanting = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not frozen.requires_grad
    assert len(wanting) == len(list(model.parameters())) - 1
    assert all(weight.grad is None for weight in model.parameters())
    assert list(gradients.of_layer) == [0, 1, 2]


def test_quadratic_term_is_the_divergence_on_texts_of_the_model_itself(make_llama: Make) -> None:
    """On its own texts the mean of `<g, delta>^2 / 2` is the divergence, to second order.

    Four texts of 200 tokens: 800 squared terms, about chi-squared, whose mean is off by 5 % in the
    mean square, and as much again for products of different rows, whose signs are random. Fixed
    seeds; the bound is 25 %, and a factor of 2 would be caught.
    """
    model = in_float64(make_llama(sharp=(0, 1), layers=2))
    generator = seeded(3)
    tokens = torch.randint(0, 61, (4, 1), generator=generator)
    with torch.no_grad():
        step = model(input_ids=tokens, use_cache=True)
        for _ in range(199):
            probabilities = step.logits[:, -1].softmax(-1)
            drawn = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, drawn], dim=1)
            step = model(input_ids=drawn, past_key_values=step.past_key_values, use_cache=True)
    predicted, divergence = 0.0, 0.0
    for text in tokens:
        gradient = loss_gradients(model, text).of_layer[0]
        delta = 0.03 * torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        terms = damage_of(delta, torch.zeros_like(delta), gradient, num_key_heads=1)
        predicted += terms["quadratic"][0]
        before = with_errors(model, text, {})[:-1].log_softmax(-1)
        after = with_errors(model, text, {0: delta})[:-1].log_softmax(-1)
        divergence += float((before.exp() * (before - after)).sum(-1).mean())
    assert predicted == pytest.approx(divergence, rel=0.25)


def test_sharp_layers_are_the_hard_ones(make_llama: Make, random_tokens: Draw) -> None:
    model, tokens = make_llama(sharp=(0,)), random_tokens(200, 0)
    rungs = [
        parse_rung("sliding_window(width=16, num_sinks=0); num_samples=16"),
        parse_rung("sliding_window(width=400, num_sinks=0); num_samples=0"),
    ]
    steps: list[int] = []
    found = measure_damage(
        model, tokens, loss_gradients(model, tokens), rungs, seed=0, step=steps.append
    )
    assert steps == [0, 1, 2]
    assert set(found) == {(layer, number) for layer in range(3) for number in range(2)}
    hard = min(found[0, 0].quadratic)
    assert hard > 20 * max(found[1, 0].quadratic + found[2, 0].quadratic)
    # though their outputs are as far off: an error alone does not say what it does to the loss
    assert min(found[1, 0].error) > 0.1
    for layer in range(3):  # a window over everything is exact
        assert max(found[layer, 1].error) < 1e-5
        assert max(found[layer, 1].quadratic) < 1e-9
        assert found[layer, 1].seconds > 0 < found[layer, 1].exact_seconds


def test_errors_are_those_of_each_group_of_heads() -> None:
    out, exact, gradient = torch.randn(3, 1, 4, 7, 5, generator=seeded(0)).unbind()
    terms = damage_of(out, exact, gradient, num_key_heads=2)
    for head in range(2):
        mine = slice(2 * head, 2 * head + 2)
        expected = (out - exact)[:, mine].norm() / exact[:, mine].norm()
        assert terms["error"][head] == pytest.approx(float(expected), rel=1e-5)
        rows = (gradient * (out - exact))[0, mine].sum(dim=(0, 2))
        assert terms["quadratic"][head] == pytest.approx(float(rows.square().sum()) / 12, rel=1e-5)


def test_several_sequences_are_averaged_and_the_fastest_counts(
    make_llama: Make, random_tokens: Draw
) -> None:
    model = make_llama(layers=2)
    rungs = [parse_rung("sliding_window(width=16, num_sinks=0); num_samples=0")]
    tables = []
    for seed in range(2):
        tokens = random_tokens(100, seed)
        gradients = loss_gradients(model, tokens)
        tables.append(measure_damage(model, tokens, gradients, rungs, seed=0))
    mean = add_damage(tables)[1, 0]
    parts = [table[1, 0] for table in tables]
    assert mean.quadratic[1] == pytest.approx((parts[0].quadratic[1] + parts[1].quadratic[1]) / 2)
    assert mean.seconds == min(part.seconds for part in parts)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
