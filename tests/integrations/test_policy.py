"""Policies as values and as files: later rules win, files come back, what is wrong is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import AbstractDetector, SortLSH
from hyperframe.errors import ArgumentError, ArgumentTypeError, HyperframeError, UnsupportedError
from hyperframe.integrations.policy import POLICY_FILE, Part, Policy, Rule, options_of

WAYS: list[Any] = ["exact", {"detector": "sort_lsh", "num_samples": 8}, {"num_samples": 0}]
LAYERS, HEADS = 6, 3
NAMES = [f"model.layers.{index}.self_attn" for index in range(LAYERS)]

# a selector, and the layers of six that it means
SELECTORS: list[tuple[Any, set[int]]] = [
    ("all", set(range(6))),
    ("none", set()),
    ("first:2", {0, 1}),
    ("last:1", {5}),
    ("1:6:2", {1, 3, 5}),
    (":-4", {0, 1}),
    (slice(4, None), {4, 5}),
    (3, {3}),
    (-2, {4}),
    ([0, -1, "2:4"], {0, 2, 3, 5}),
    ("*.[14].*", {1, 4}),
    ("model.layers.2.self_attn", {2}),
    (["*.layers.0.*", 5], {0, 5}),
]


def rules() -> st.SearchStrategy[Any]:
    """A rule, and the layers that it means."""
    heads = st.none() | st.lists(st.integers(0, HEADS - 1), min_size=1, unique=True)
    return st.tuples(st.sampled_from(SELECTORS), st.sampled_from(WAYS), heads).map(
        lambda drawn: (
            Rule(layers=drawn[0][0], attention=drawn[1], key_heads=drawn[2]),
            drawn[0][1],
        )
    )


@given(drawn=st.lists(rules(), max_size=5))
def test_the_last_rule_that_names_a_head_decides(drawn: list[tuple[Rule, set[int]]]) -> None:
    policy = Policy(rules=[rule for rule, _ in drawn])
    resolved = policy.resolve(LAYERS, HEADS, names=NAMES)
    assert len(resolved) == LAYERS
    for layer, parts in enumerate(resolved):
        for head in range(HEADS):
            expected: Any = "exact"
            for rule, meant in drawn:
                if layer in meant and (rule.key_heads is None or head in rule.key_heads):
                    expected = rule.attention
            owners = [part for part in parts if part.key_heads is None or head in part.key_heads]
            assert [part.attention for part in owners] == [expected]
        ways = [part.attention for part in parts]
        assert all(way not in ways[:place] for place, way in enumerate(ways))
        assert (len(parts) == 1) == (parts[0].key_heads is None)


@given(
    drawn=st.lists(rules(), max_size=5), info=st.dictionaries(st.text(), st.integers() | st.none())
)
def test_a_file_gives_the_policy_back(
    drawn: list[tuple[Rule, set[int]]], info: dict[str, Any], tmp_path_factory: Any
) -> None:
    policy = Policy(rules=[rule for rule, _ in drawn], model="tiny", info=info)
    file = policy.save(tmp_path_factory.mktemp("policy") / "some.json")
    assert Policy.load(file) == policy
    assert Policy.from_dict(json.loads(file.read_text(encoding="utf-8"))) == policy


def test_the_file_has_the_documented_form(tmp_path: Path) -> None:
    policy = Policy(
        rules=[
            Rule(layers=slice(2, 30, 3), attention={"detector": SortLSH(block_size=64)}),
            Rule(layers=(0, -1), attention="exact", key_heads=[2, 0]),
        ],
        model="tiny",
        info={"perplexity": 12.5, "lengths": (1, 2)},
    )
    file = policy.save(tmp_path)
    assert file == tmp_path / POLICY_FILE
    assert POLICY_FILE == "hyperframe_policy.json"
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "format": "hyperframe-policy",
        "version": 1,
        "model": "tiny",
        "rules": [
            {"layers": "2:30:3", "attention": {"detector": "sort_lsh(block_size=64)"}},
            {"layers": [0, -1], "attention": "exact", "key_heads": [0, 2]},
        ],
        "info": {"perplexity": 12.5, "lengths": [1, 2]},
    }
    assert Policy.load(tmp_path) == Policy.load(str(file)) == policy


def test_gaps_between_attention_layers() -> None:
    policy = Policy(rules=[Rule(layers=["first:1", -1, 7], attention=WAYS[1])])
    resolved = policy.resolve([3, 7, 11, 15], 2)
    assert [layer[0].attention for layer in resolved] == [WAYS[1], WAYS[1], "exact", WAYS[1]]
    sliced = Policy(rules=[Rule(layers="4:12", attention=WAYS[1])]).resolve([3, 7, 11, 15], 2)
    assert [layer[0].attention for layer in sliced] == ["exact", WAYS[1], WAYS[1], "exact"]


def test_callables_pick_layers_in_python_and_not_in_files(tmp_path: Path) -> None:
    modules: list[Any] = ["a", "b", "b"]
    rule = Rule(layers=lambda index, module: module == "b" and index > 1, attention=WAYS[1])
    policy = Policy(rules=[rule])
    resolved = policy.resolve(3, 1, modules=modules)
    assert resolved == ((Part(None, "exact"),), (Part(None, "exact"),), (Part(None, WAYS[1]),))
    with pytest.raises(ArgumentError, match=r"rules\[0\].layers is a callable, .*modules="):
        policy.resolve(3, 1)
    with pytest.raises(ArgumentError, match=r"rules\[0\]: layers is a callable, which no file"):
        policy.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_that_make_a_hyper_attention_again() -> None:
    for attention in (
        HyperAttention(),
        HyperAttention(detector="accurate", sampler="uniform", seed=None),
        HyperAttention(estimator="kde", detector="sort_lsh"),
        HyperAttention(assembly="paper", num_samples=3, min_seq_len=0, causal="recursive"),
        HyperAttention(detector="heavy_columns", strict_causal=True, backend="torch"),
    ):
        options = options_of(attention)
        assert HyperAttention(**options) == attention
        assert json.loads(json.dumps(options)) == options
        assert Rule(layers="all", attention=attention).attention == options


class Unnamed(AbstractDetector):
    """A detector that no registry knows."""

    def find(self, *args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    "rule,error,message",
    [
        ({"layers": [], "attention": "exact"}, ArgumentError, "names no layer"),
        ({"layers": "midle", "attention": "exact"}, ArgumentError, "'midle' is not understood"),
        ({"layers": None, "attention": "exact"}, ArgumentTypeError, "NoneType names no layers"),
        ({"layers": [[1]], "attention": "exact"}, ArgumentTypeError, r"layers holds \[1\]"),
        ({"layers": [True], "attention": "exact"}, ArgumentTypeError, "True of type bool"),
        ({"layers": "all", "attention": "exakt"}, ArgumentError, "Did you mean 'exact'"),
        ({"layers": "all", "attention": "sort_lsh"}, ArgumentError, "{'detector': 'sort_lsh'}"),
        ({"layers": "all", "attention": None}, ArgumentTypeError, "NoneType"),
        (
            {"layers": "all", "attention": {"detectr": "x"}},
            ArgumentTypeError,
            "no option detectr='x'.*Did you mean 'detector'",
        ),
        (
            {"layers": "all", "attention": {"detector": "sort_lhs"}},
            ArgumentError,
            "Did you mean 'sort_lsh'",
        ),
        ({"layers": "all", "attention": {"softcap": 30.0}}, UnsupportedError, "softcap"),
        ({"layers": "all", "attention": {"seed": [1]}}, ArgumentTypeError, "seed is of type list"),
        (
            {"layers": "all", "attention": {"num_samples": float("nan")}},
            ArgumentError,
            "num_samples=nan is no finite number",
        ),
        ({"layers": "all", "attention": {"detector": Unnamed()}}, ArgumentError, "no spec string"),
        (
            {"layers": 0, "attention": "exact", "key_heads": 1},
            ArgumentTypeError,
            r"for one head write \[0\]",
        ),
        ({"layers": 0, "attention": "exact", "key_heads": []}, ArgumentError, "key_heads is empty"),
        ({"layers": 0, "attention": "exact", "key_heads": [-1]}, ArgumentError, "holds -1"),
        ({"layers": 0, "attention": "exact", "key_heads": [True]}, ArgumentError, "holds True"),
    ],
)
def test_wrong_rules_are_refused(
    rule: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        Rule(**rule)
    try:
        text = json.dumps({"format": "hyperframe-policy", "version": 1, "rules": [rule]})
    except TypeError:  # an instance, which no file holds
        return
    file = tmp_path / "wrong.json"
    file.write_text(text, encoding="utf-8")
    # the file and the place; NaN is no JSON to begin with
    with pytest.raises(ArgumentError, match=r"wrong\.json: (rules\[0\]|.*NaN)"):
        Policy.load(file)


GOOD: dict[str, Any] = {
    "format": "hyperframe-policy", "version": 1, "rules": [{"layers": "all", "attention": {}}],
}  # fmt: skip


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "is not JSON: Expecting value at line 1, column 1"),
        ('{"format":\n  "hyperframe-policy",,}', "is not JSON: .* at line 2, column"),
        ("[1]", "is a list, not an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"version": 1, "version": 1}', "the key 'version' stands twice"),
        (GOOD | {"format": "other"}, "format is 'other', not 'hyperframe-policy'"),
        (GOOD | {"version": 2}, "version is 2, .*reads version 1; a newer hyperframe"),
        (GOOD | {"version": "1"}, "version is '1'"),
        (GOOD | {"version": True}, "version is True"),
        (GOOD | {"rule": []}, r"there is no key 'rule'.*Did you mean 'rules'\?"),
        ({"format": "hyperframe-policy", "version": 1}, "the key 'rules' is missing"),
        (GOOD | {"rules": {}}, "rules is an object, not a list"),
        (GOOD | {"rules": ["all"]}, r"rules\[0\] is text, not an object"),
        (GOOD | {"rules": [{"layers": "all"}]}, r"rules\[0\]: the key 'attention' is missing"),
        (
            GOOD | {"rules": [*GOOD["rules"], {"layer": 0, "attention": "exact"}]},
            r"rules\[1\]: there is no key 'layer'.*Did you mean 'layers'\?",
        ),
        (GOOD | {"info": 3}, "info is a number, not an object"),
        (GOOD | {"model": 3}, "model is a int; pass a name"),
    ],
)
def test_corrupt_files_are_refused_with_the_place(text: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "corrupt.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    with pytest.raises(ArgumentError, match=rf"(?s)corrupt\.json.*{message}"):
        Policy.load(file)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"hyperframe_policy\.json: there is no such file; .*"):
        Policy.load(tmp_path)
    said = r"none\.json: there is no such file; hyperframe tune, Policy\.save"
    with pytest.raises(ArgumentError, match=said):
        Policy.load(tmp_path / "none.json")
    (tmp_path / "weights").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArgumentError, match=r"weights: is not text in UTF-8"):
        Policy.load(tmp_path / "weights")
    with pytest.raises(ArgumentTypeError, match="path is of type int"):
        Policy.load(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"there is no folder .*gone; make it first"):
        Policy(rules=[]).save(tmp_path / "gone" / "policy.json")


@pytest.mark.parametrize(
    "rule,message",
    [
        ({"layers": 6}, r"rules\[1\]\.layers=6, but the model has 6 attention layers \(0 to 5\)"),
        ({"layers": "last:9"}, r"rules\[1\]\.layers='last:9' asks for 9 layers"),
        ({"layers": "7:9"}, r"rules\[1\] names no layer: layers='7:9' picks none of the 6"),
        ({"layers": "first:0"}, r"rules\[1\] names no layer"),
        ({"layers": "*.decoder.*"}, r"rules\[1\]\.layers='\*\.decoder\.\*' matches none"),
        (
            {"layers": 0, "key_heads": [1, 3]},
            r"rules\[1\]\.key_heads holds 3, .* 3 key heads, 0 to 2",
        ),
    ],
)
def test_rules_that_fit_no_layer_are_refused_with_the_file(
    rule: dict[str, Any], message: str, tmp_path: Path
) -> None:
    policy = Policy(rules=[Rule(layers="all", attention={}), Rule(attention="exact", **rule)])
    with pytest.raises(ArgumentError, match=f"^policy: {message}"):
        policy.resolve(LAYERS, HEADS, names=NAMES)
    loaded = Policy.load(policy.save(tmp_path / "mine.json"))
    with pytest.raises(ArgumentError, match=rf"mine\.json: {message}"):
        loaded.resolve(LAYERS, HEADS, names=NAMES)


def test_wrong_policies_are_refused() -> None:
    rule = Rule(layers="all", attention="exact")
    with pytest.raises(ArgumentTypeError, match=r"rules=Rule.* is no list of Rule objects"):
        Policy(rules=rule)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"rules\[1\] is a dict; write Rule"):
        Policy(rules=[rule, {}])  # type: ignore[list-item]
    with pytest.raises(ArgumentTypeError, match="info holds something that JSON does not have"):
        Policy(rules=[], info={"x": object()})
    with pytest.raises(ArgumentTypeError, match="info holds something that JSON does not have"):
        Policy(rules=[], info={"x": float("inf")})
    with pytest.raises(ArgumentError, match="num_layers=0 and num_key_heads=2"):
        Policy(rules=[rule]).resolve(0, 2)
    with pytest.raises(ArgumentError, match=r"rules\[0\]\.layers='\*a\*' goes by the names"):
        Policy(rules=[Rule(layers="*a*", attention="exact")]).resolve(1, 1)
    with pytest.raises(HyperframeError, match="layers is a Linear"):
        Rule(layers=torch.nn.Linear(1, 1), attention="exact")  # type: ignore[arg-type]


def test_a_policy_needs_no_transformers() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from hyperframe.integrations.policy import Policy, Rule\n"
        "print(len(Policy(rules=[Rule(layers='all', attention='exact')]).resolve(2, 1)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr
