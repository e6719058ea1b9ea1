"""Tuning a model: which layers and heads may attend approximately, and how, under a limit.

`tune` measures the output errors of a ladder of attentions in every layer, predicts from one
backward pass what each does to the loss, chooses the cheapest mix under a limit, and verifies it on
other text with the whole model. `hyperframe tune` is the command, docs/tuning.md the page.

>>> import torch
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> from hyperframe.evaluation.model import of_parts
>>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
...                      num_key_value_heads=2, num_hidden_layers=2, vocab_size=100)
>>> language = of_parts(LlamaForCausalLM(config).eval(), tokenizer=None, name="tiny")
>>> settings = TuneSettings(max_increase=0.01, length=128, choosing=1, verifying=1, cost="keys",
...                         specs=["sliding_window(width=16); num_samples=16"])
>>> chooses, verifies = split(torch.randint(100, (256,)), settings)
>>> found = tune(language, chooses, verifies, settings)
>>> found.is_reached, found.trial is None or found.trial.upper <= settings.limit
(True, True)

`found.policy` is what `hyperframe.integrations.transformers.apply(model, policy=...)` takes, and
`found.policy.save("policy.json")` writes it.
"""

from __future__ import annotations

from .outcome import Tuned
from .paired import Increase, paired_increase
from .run import tune
from .rungs import DEFAULT_LADDER, Rung, ladder, parse_rung
from .scoring import increase_on
from .settings import TuneSettings, parse_percent, parse_speed
from .windows import split

__all__ = [
    "DEFAULT_LADDER",
    "Increase",
    "Rung",
    "TuneSettings",
    "Tuned",
    "increase_on",
    "ladder",
    "paired_increase",
    "parse_percent",
    "parse_rung",
    "parse_speed",
    "split",
    "tune",
]
