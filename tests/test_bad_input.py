"""Bad input: every refusal names the argument, what was found, and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hyperframe import detectors, samplers
from hyperframe.attention import HyperAttention, hyper_attention
from hyperframe.errors import (
    ArgumentError,
    ArgumentTypeError,
    HyperframeError,
    SpecError,
    UnknownComponentError,
    UnsupportedError,
)

NAN, INF = float("nan"), float("inf")


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


GOOD: dict[str, Any] = {"query": x(2, 4, 9, 8), "key": x(2, 2, 9, 8), "value": x(2, 2, 9, 8)}

CASES: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "no tensor": ({"query": [[1.0]]}, ArgumentTypeError, ["query", "list", "torch.as_tensor"]),
    "three dimensions": (
        {"key": x(2, 9, 8)}, ArgumentError, ["key", "4 dimensions", "(2, 9, 8)", "unsqueeze"],
    ),
    "integers": (
        {"value": x(2, 2, 9, 8, dtype=torch.int64)}, ArgumentTypeError,
        ["value", "torch.int64", "use float32"],
    ),
    "all integers": (
        {name: t.long() for name, t in GOOD.items()}, ArgumentTypeError, ["query", "torch.int64"],
    ),
    "two devices": (
        {"key": x(2, 2, 9, 8, device="meta")}, ArgumentError, ["key", "meta", "cpu", ".to"],
    ),
    "two dtypes": (
        {"value": x(2, 2, 9, 8, dtype=torch.bfloat16)}, ArgumentError,
        ["value", "bfloat16", "float32", "convert"],
    ),
    "batch sizes": (
        {"key": x(3, 2, 9, 8), "value": x(3, 2, 9, 8)}, ArgumentError, ["key", "batch size 3", "2"],
    ),
    "lengths": (
        {"value": x(2, 2, 8, 8)}, ArgumentError,
        ["value", "(2, 2, 8, 8)", "(2, 2, 9, 8)", "one value"],
    ),
    "value heads": ({"value": x(2, 4, 9, 8)}, ArgumentError, ["value", "(2, 4, 9, 8)", "heads"]),
    "head dimensions": (
        {"key": x(2, 2, 9, 6)}, ArgumentError, ["key", "head dimension 6", "8", "equal"],
    ),
    "groups": (
        {"query": x(2, 5, 9, 8)}, ArgumentError, ["query", "5 heads", "2 key heads", "% key_heads"],
    ),
    "fewer query heads": ({"query": x(2, 1, 9, 8)}, ArgumentError, ["query", "1 heads", "2 key"]),
    "no heads": (
        {"key": x(2, 0, 9, 8), "value": x(2, 0, 9, 8)}, ArgumentError, ["query", "0 key heads"],
    ),
    "no queries": ({"query": x(2, 4, 0, 8)}, ArgumentError, ["query", "0 positions", "leave out"]),
    "no keys": (
        {"key": x(2, 2, 0, 8), "value": x(2, 2, 0, 8)}, ArgumentError,
        ["key", "0 positions", "leave out"],
    ),
    "no batch": (
        {name: t[:0] for name, t in GOOD.items()}, ArgumentError, ["query", "0 batch items"],
    ),
    "wide heads": (
        {"query": x(2, 4, 9, 257), "key": x(2, 2, 9, 257)}, ArgumentError,
        ["query", "head dimension 257", "1..256"],
    ),
    "wide values": ({"value": x(2, 2, 9, 300)}, ArgumentError, ["value", "300", "1..256"]),
    "empty heads": (
        {"query": x(2, 4, 9, 0), "key": x(2, 2, 9, 0)}, ArgumentError, ["query", "dimension 0"],
    ),
    "scale nan": ({"scale": NAN}, ArgumentError, ["scale=nan", "finite", "None"]),
    "scale inf": ({"scale": INF}, ArgumentError, ["scale=inf", "finite"]),
    "scale text": ({"scale": "0.1"}, ArgumentTypeError, ["scale='0.1'", "str", "float"]),
    "scale bool": ({"scale": True}, ArgumentTypeError, ["scale=True", "bool"]),
    "scale tensor": ({"scale": torch.tensor(0.1)}, ArgumentTypeError, ["scale=", "Tensor"]),
    "causal as int": ({"is_causal": 1}, ArgumentTypeError, ["is_causal=1", "int", "True or False"]),
    "mask dtype": (
        {"key_padding_mask": torch.ones(2, 9)}, ArgumentTypeError,
        ["key_padding_mask", "float32", ".bool()"],
    ),
    "mask no tensor": (
        {"key_padding_mask": [[True]]}, ArgumentTypeError, ["key_padding_mask", "list", "bool"],
    ),
    "mask shape": (
        {"key_padding_mask": torch.ones(2, 8, dtype=torch.bool)}, ArgumentError,
        ["key_padding_mask", "(2, 8)", "(2, 9)"],
    ),
    "mask of scores": (
        {"key_padding_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool)}, ArgumentError,
        ["key_padding_mask", "(2, 1, 9, 9)", "[batch, n_k]"],
    ),
    "mask device": (
        {"key_padding_mask": torch.ones(2, 9, dtype=torch.bool, device="meta")}, ArgumentError,
        ["key_padding_mask", "meta", "cpu", ".to"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("min_seq_len", [0, 1000])
@pytest.mark.parametrize("changes, error, words", CASES.values(), ids=CASES)
def test_arguments_that_cannot_work_are_refused_in_one_clear_sentence(
    changes: dict[str, Any], error: type[Exception], words: list[str], min_seq_len: int
) -> None:
    arguments = GOOD | changes
    tensors = [arguments.pop(name) for name in ("query", "key", "value")]
    with pytest.raises(error) as caught:
        hyper_attention(*tensors, min_seq_len=min_seq_len, **arguments)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert isinstance(caught.value, HyperframeError)
    assert isinstance(caught.value, (ValueError, TypeError))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_values_that_are_not_finite_are_found_when_asked_for(name: str, bad: float) -> None:
    arguments = {key: tensor.clone() for key, tensor in GOOD.items()}
    arguments[name][0, 0, 3, :2] = bad
    tensors = list(arguments.values())
    total = tensors[["query", "key", "value"].index(name)].numel()
    with pytest.raises(ArgumentError, match=rf"{name}: 2 of its {total} values are NaN or inf"):
        hyper_attention(*tensors, check_finite=True)
    hyper_attention(*tensors)  # unasked, nothing is read
    hyper_attention(*GOOD.values(), check_finite=True)


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "unknown name": (
        {"detector": "sort_lhs"}, UnknownComponentError,
        ["detector='sort_lhs'", "sliding_window", "Did you mean 'sort_lsh'"],
    ),
    "unknown sampler": (
        {"sampler": "rownorm"}, UnknownComponentError, ["sampler='rownorm'", "'row_norm'"],
    ),
    "unknown estimator": (
        {"estimator": "exakt"}, UnknownComponentError, ["estimator='exakt'", "'exact'"],
    ),
    "unknown parameter": (
        {"detector": "oracle(bugdet=3)"}, SpecError,
        ["oracle", "'bugdet'", "Did you mean 'budget'"],
    ),
    "no spec": ({"detector": "oracle(budget=3"}, SpecError, ["oracle(budget=3"]),
    "kind by name": (
        {"detector": "row_norm"}, UnknownComponentError, ["detector='row_norm'", "sampler"],
    ),
    "kind by instance": (
        {"sampler": detectors.create("oracle")}, ArgumentTypeError,
        ["sampler=", "that is a detector", "AbstractSampler"],
    ),
    "kind of estimator": (
        {"estimator": samplers.create("uniform")}, ArgumentTypeError,
        ["estimator=", "that is a sampler"],
    ),
    "no component": ({"detector": 3}, ArgumentTypeError, ["detector=3", "int"]),
    "component None": ({"sampler": None}, ArgumentTypeError, ["sampler=None"]),
    "negative samples": (
        {"num_samples": -1}, ArgumentError, ["num_samples=-1", "at least 0"],
    ),
    "bool samples": ({"num_samples": True}, ArgumentTypeError, ["num_samples=True", "bool"]),
    "float samples": ({"num_samples": 2.0}, ArgumentTypeError, ["num_samples=2.0", "float"]),
    "negative length": ({"min_seq_len": -1}, ArgumentError, ["min_seq_len=-1", "at least 0"]),
    "bool length": ({"min_seq_len": False}, ArgumentTypeError, ["min_seq_len=False", "bool"]),
    "strategy": (
        {"causal": "recursiv"}, ArgumentError,
        ["causal='recursiv'", "'single_pass'", "Did you mean 'recursive'"],
    ),
    "strategy bool": ({"causal": True}, ArgumentTypeError, ["causal=True", "bool"]),
    "strict": ({"strict_causal": 1}, ArgumentTypeError, ["strict_causal=1", "True or False"]),
    "finite": ({"check_finite": "yes"}, ArgumentTypeError, ["check_finite='yes'"]),
    "seed bool": ({"seed": True}, ArgumentTypeError, ["seed=True", "bool", "None"]),
    "seed float": ({"seed": 1.0}, ArgumentTypeError, ["seed=1.0", "float"]),
    "backend": ({"backend": "cuda"}, ArgumentError, ["backend='cuda'", "'torch'"]),
    "backend None": ({"backend": None}, ArgumentTypeError, ["backend=None", "'auto'"]),
}  # fmt: skip


@pytest.mark.parametrize("options, error, words", OPTIONS.values(), ids=OPTIONS)
def test_options_that_cannot_work_are_refused_before_any_tensor_is_seen(
    options: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        HyperAttention(**options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert isinstance(caught.value, HyperframeError)


_COUNTS = [
    ("sort_lsh", "block_size"), ("sort_lsh", "num_projections"), ("sort_lsh", "num_rounds"),
    ("sliding_window", "width"), ("block_list", "block_size"), ("oracle", "budget"),
    ("heavy_columns", "num_columns"), ("heavy_columns", "num_queries"),
    ("heavy_columns", "tile_size"), ("vertical_slash", "num_columns"),
    ("vertical_slash", "num_diagonals"), ("antidiagonal", "num_blocks"), ("quest", "num_blocks"),
    ("pca_tree", "num_leaves"), ("kmeans", "num_blocks"), ("balanced_lsh", "block_size"),
    ("reformer_lsh", "block_size"), ("lsh_topk", "num_keys"),
]  # fmt: skip


@pytest.mark.parametrize(
    "value, error", [(0, ArgumentError), (-4, ArgumentError), (True, ArgumentTypeError),
                     (1.5, ArgumentTypeError), ("8", ArgumentTypeError), (None, ArgumentTypeError)],
)  # fmt: skip
@pytest.mark.parametrize("name, parameter", _COUNTS)
def test_budgets_are_positive_integers(
    name: str, parameter: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        detectors.create(name, **{parameter: value})
    message = str(caught.value)
    assert f"{name}: {parameter}={value!r}" in message
    assert "pass" in message


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("sliding_window", {"num_sinks": -1}, "num_sinks=-1"),
        ("sliding_window", {"num_sinks": True}, "num_sinks=True"),
        ("sort_lsh", {"num_projections": 63}, "num_projections=63.*at most 62"),
        ("sort_lsh", {"centre_keys": 1}, "centre_keys=1.*True or False"),
    ],
)
def test_other_parameters_are_checked_too(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(HyperframeError, match=words):
        detectors.create(name, **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("n", [1, 5])
def test_sizes_beyond_the_sequence_are_no_error(n: int, is_causal: bool) -> None:
    q = torch.randn(1, 2, n, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=is_causal)
    for spec in (
        "sort_lsh(block_size=256, num_rounds=2)",
        "heavy_columns(num_columns=256, num_queries=64, tile_size=64)",
        "oracle(budget=256)",
        "sliding_window(width=256, num_sinks=256)",
        "block_list(blocks=((0,0),), block_size=256)",
        "vertical_slash",
        "antidiagonal",
        "quest",
        "pca_tree",
        "kmeans",
        "balanced_lsh(num_rounds=2)",
        "reformer_lsh",
    ):
        out = hyper_attention(q, q, q, detector=spec, min_seq_len=0, is_causal=is_causal)
        torch.testing.assert_close(out, expected)


def test_the_widest_heads_that_are_allowed_work() -> None:
    q = torch.randn(1, 1, 20, 256)
    out = hyper_attention(q, q, q, detector="oracle(budget=20)", num_samples=0, min_seq_len=0)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("attn_mask", x(9, 9), ["attn_mask", "a Tensor", "key_padding_mask"]),
        ("attn_mask", x(1), ["attn_mask", "a Tensor", "key_padding_mask"]),
        ("attn_bias", x(4, 9, 9), ["attn_bias", "a Tensor", "exact attention"]),
        ("dropout_p", 0.1, ["dropout_p", "0.1", "no dropout"]),
        ("softcap", 50.0, ["softcap", "50.0", "capped logits"]),
        ("s_aux", x(4), ["s_aux", "a Tensor", "sink"]),
        ("temperature", 2.0, ["temperature", "2.0", "leave it out"]),
    ],
)
def test_arguments_of_other_attentions_are_refused_by_name(
    name: str, value: object, words: list[str]
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        HyperAttention()(**GOOD, **{name: value})
    assert all(word in str(caught.value) for word in words)


def test_arguments_of_other_attentions_that_say_nothing_are_taken() -> None:
    out = HyperAttention()(**GOOD, attn_mask=None, dropout_p=0.0, enable_gqa=True)
    torch.testing.assert_close(out, HyperAttention()(**GOOD))
