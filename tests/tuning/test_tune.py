"""Tuning tiny models: hard layers stay exact, limits are kept, and the policy does what it says."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", minversion="5.0")
import transformers

from hyperframe.errors import ArgumentError, HyperframeError, UnsupportedError
from hyperframe.evaluation.model import of_parts
from hyperframe.integrations.policy import Policy
from hyperframe.integrations.transformers import apply
from hyperframe.tuning import Tuned, TuneSettings, increase_on, split, tune
from hyperframe.tuning.tables import print_tuned

Make = Callable[..., Any]
Draw = Callable[[int, int], Tensor]

WINDOW = "sliding_window(width=16, num_sinks=0); num_samples=16"
WIDE = "sliding_window(width=64, num_sinks=0); num_samples=16"
COMMON: dict[str, Any] = {"length": 128, "specs": (WINDOW, WIDE), "cost": "keys", "rounds": 3}


def tuned(model: Any, draw: Draw, **options: Any) -> Tuned:
    settings = TuneSettings(**(COMMON | options))
    choosing, verifying = ([draw(128, seed) for seed in seeds] for seeds in ((0,), (1, 2)))
    return tune(of_parts(model, None, name="tiny"), choosing, verifying, settings)


def loss(model: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return float(F.cross_entropy(logits.double(), tokens[1:]))


def test_hard_layer_stays_exact_and_the_easy_ones_are_replaced(
    make_llama: Make, random_tokens: Draw
) -> None:
    model = make_llama(sharp=(0,), layers=4)
    found = tuned(model, random_tokens, max_increase=0.01, mixed=False)
    rungs = [option.rungs for option in found.choice.options.values()]
    assert rungs[0] == (-1, -1)
    assert all(-1 not in of_layer for of_layer in rungs[1:])
    assert found.is_reached
    assert found.trial is not None
    assert found.trial.upper <= math.log1p(0.01)
    assert found.speed > 1
    rows = found.layers()
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["rungs"] == ["exact", "exact"]
    assert rows[1]["rungs"] in ([WINDOW] * 2, [WIDE] * 2)
    assert rows[0]["relative_error"] == 0.0 < rows[1]["relative_error"]


def test_policy_measures_as_the_tuner_said(
    make_llama: Make, random_tokens: Draw, tmp_path: Path
) -> None:
    model = make_llama(sharp=(0,), layers=3)
    found = tuned(model, random_tokens, max_increase=0.01)
    file = found.policy.save(tmp_path / "policy.json")
    policy = Policy.load(file)
    assert policy.rules == found.policy.rules
    increases = []
    for seed in (1, 2):
        tokens = random_tokens(128, seed)
        exact = loss(model, tokens)
        with apply(model, policy=file):
            increases.append(loss(model, tokens) - exact)
    assert found.trial is not None
    mean = sum(increases) / 2
    assert found.trial.verified.increase.mean == pytest.approx(mean, abs=1e-6)
    info = policy.info["tuned"]
    assert info["measured"]["percent"] == pytest.approx(100 * math.expm1(mean), abs=1e-4)
    assert info == json.loads(json.dumps(found.to_dict()))
    again = increase_on(of_parts(model, None, name="tiny"), policy, [random_tokens(128, 1)])
    assert again.mean == pytest.approx(increases[0], abs=1e-6)


def test_same_seed_gives_the_same_policy(make_llama: Make, random_tokens: Draw) -> None:
    model = make_llama(sharp=(0,), layers=3)
    first, again = (tuned(model, random_tokens, max_increase=0.02, seed=3) for _ in range(2))
    assert first.policy.rules == again.policy.rules
    assert all(rule.attention["seed"] == 3 for rule in first.policy.rules)  # type: ignore[index]


def test_limit_that_no_rung_keeps_leaves_everything_exact_and_says_so(
    make_llama: Make, random_tokens: Draw
) -> None:
    model = make_llama(sharp=(0, 1))
    found = tuned(model, random_tokens, max_increase=0.0)
    assert found.policy.rules == ()
    assert found.is_reached
    assert "every layer stays exact" in found.message
    assert found.to_dict()["measured"] is None
    with apply(model, policy=found.policy) as applied:
        assert applied.layers == ()


def test_rungs_that_do_not_pay_are_left_out_after_one_call(
    make_llama: Make, random_tokens: Draw
) -> None:
    everything = "sliding_window(width=16, num_sinks=0); num_samples=1000"
    found = tuned(
        make_llama(), random_tokens, max_increase=0.01, specs=(everything,), cost="seconds"
    )
    # on a CPU at 128 tokens nothing is faster than exact attention
    assert list(found.skipped) == [everything]
    assert "times what exact attention does" in found.skipped[everything]
    assert found.policy.rules == ()
    assert "no rung costs less" in found.message


@pytest.mark.parametrize("cost", ["keys", "seconds"])
def test_rungs_that_answer_exactly_at_this_length_are_no_choice(
    make_llama: Make, random_tokens: Draw, cost: str
) -> None:
    exact = ["heavy_columns; causal=recursive", "fast; min_seq_len=128"]
    found = tuned(make_llama(), random_tokens, max_increase=0.05, specs=[*exact, WINDOW], cost=cost)
    for spec in exact:
        assert found.skipped[spec] == "answers 128 tokens exactly"
    assert {rung.label for rung in found.rungs} <= {WINDOW}


def test_a_policy_that_is_slower_in_the_whole_model_says_so(
    make_llama: Make, random_tokens: Draw, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tuned(make_llama(), random_tokens, max_increase=0.05, specs=[WINDOW])
    assert found.trial is not None
    cases = (("seconds", 2.0, True), ("seconds", 0.5, False), ("keys", 2.0, False))
    for cost, factor, is_said in cases:
        seconds = {layer: factor * found.exact_seconds[layer] for layer in found.choice.options}
        verified = dataclasses.replace(found.trial.verified, seconds=seconds)
        trial = dataclasses.replace(found.trial, verified=verified)
        print_tuned(dataclasses.replace(found, trial=trial, facts={**found.facts, "cost": cost}))
        said = " ".join(capsys.readouterr().out.split())
        assert f"attention {1 / factor:.2f}x (seconds, this device)" in said
        assert ("in the whole model it is no faster" in said) == is_said


def test_speed_target_takes_the_mildest_policy_of_that_speed(
    make_llama: Make, random_tokens: Draw
) -> None:
    model = make_llama(sharp=(0,), layers=4)
    found = tuned(model, random_tokens, max_increase=None, speed_target=1.3, mixed=False)
    assert found.is_reached
    assert found.speed >= 1.3
    assert found.trial is not None
    # the hard layer is the last one that would be replaced
    assert found.choice.options[0].rungs == (-1, -1)
    assert found.choice.loss == min(trial.choice.loss for trial in found.trials)


def test_speed_that_cannot_be_reached_says_what_can(make_llama: Make, random_tokens: Draw) -> None:
    found = tuned(make_llama(), random_tokens, max_increase=None, speed_target=50.0)
    assert not found.is_reached
    assert f"the fastest policy reaches {found.speed:.2f}x" in found.message
    assert 1 < found.speed < 50
    assert found.policy.rules


def test_one_head_may_be_exact_where_the_other_is_not(
    make_llama: Make, random_tokens: Draw
) -> None:
    model = make_llama(sharp=(0,), layers=2)
    # of the sharp layer the first key head with its two query heads has no say
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :16] = 0.0
    found = tuned(model, random_tokens, max_increase=0.01)
    assert found.choice.options[0].rungs[0] >= 0
    assert found.choice.options[0].rungs[1] == -1
    assert [rule.key_heads for rule in found.policy.rules if 0 in rule.layers] == [(0,)]
    whole = tuned(model, random_tokens, max_increase=0.01, mixed=False)
    assert whole.choice.options[0].rungs == (-1, -1)
    assert found.speed > whole.speed


def test_progress_goes_from_nothing_to_all(make_llama: Make, random_tokens: Draw) -> None:
    seen: list[tuple[int, int, str]] = []
    settings = TuneSettings(**COMMON)
    language = of_parts(make_llama(), None, name="tiny")
    tune(
        language, [random_tokens(128, 0)], [random_tokens(128, 1)], settings,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1]
    assert all(done <= total for done, total, _ in seen)
    assert any("errors of layer 2" in what for _, _, what in seen)


def test_model_is_left_as_it_was(make_llama: Make, random_tokens: Draw) -> None:
    model = make_llama()
    before = model.config._attn_implementation
    tokens = random_tokens(128, 5)
    expected = loss(model, tokens)
    tuned(model, random_tokens)
    assert model.config._attn_implementation == before
    assert loss(model, tokens) == expected


def test_model_without_a_vocabulary_is_refused(make_llama: Make, random_tokens: Draw) -> None:
    with pytest.raises(UnsupportedError, match="LlamaModel has no output layer"):
        tuned(make_llama().model, random_tokens)


def gemma(layer_types: list[str]) -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=len(layer_types), vocab_size=61, head_dim=8, sliding_window=32,
        layer_types=layer_types, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.Gemma3ForCausalLM(config).eval()


def test_layers_with_a_window_of_their_own_are_left_alone(random_tokens: Draw) -> None:
    model = gemma(["sliding_attention", "full_attention"] * 2)
    found = tuned(model, random_tokens, max_increase=0.05)
    assert list(found.choice.options) == [1, 3]
    with pytest.raises(ArgumentError, match="Gemma3ForCausalLM has no layer that could be"):
        tuned(gemma(["sliding_attention"]), random_tokens)


def test_windows_are_apart_and_spread_over_the_text() -> None:
    settings = TuneSettings(length=100, choosing=2, verifying=3)
    tokens = torch.arange(1000)
    choosing, verifying = split(tokens, settings)
    assert (len(choosing), len(verifying)) == (2, 3)
    every = torch.cat([*choosing, *verifying])
    assert len(every.unique()) == 500
    assert {0, 999} <= set(every.tolist())
    with pytest.raises(ArgumentError, match=r"has 499 tokens, fewer than the 500 of 2 \+ 3"):
        split(tokens[:499], settings)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"max_increase": None}, "give one of"),
        ({"speed_target": 2.0}, "give one of"),
        ({"max_increase": -0.1}, "--max-ppl-increase -0.1: must be"),
        ({"max_increase": math.nan}, "--max-ppl-increase nan"),
        ({"max_increase": None, "speed_target": 0.5}, "--speed-target 0.5"),
        ({"length": 10}, "length=10"),
        ({"verifying": 0}, "verifying=0"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"cost": "joules"}, "cost='joules'"),
        ({"specs": ()}, "name one at least"),
        ({"specs": (WINDOW, WINDOW)}, "each once"),
        ({"specs": ("sort_lhs",)}, "Did you mean 'sort_lsh'"),
        ({"specs": ("fast; num_sample=3",)}, "num_sample"),
        ({"specs": ("fast; seed=3",)}, "holds a seed"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(HyperframeError, match=re.escape(said)):
        TuneSettings(**options)
