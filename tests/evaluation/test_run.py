"""An evaluation goes on where it stopped, says what failed, and writes a page of its own."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from hyperframe import evaluation as library
from hyperframe.errors import (
    ArgumentError,
    HyperframeError,
    MissingDependencyError,
    UnknownComponentError,
    UnsupportedError,
)
from hyperframe.evaluation import (
    EVAL_KEYS,
    EvalSettings,
    LanguageModel,
    evaluate,
    known_rows,
    load_language_model,
    of_parts,
    run,
)
from hyperframe.evaluation.figures import FIGURES
from hyperframe.evaluation.tables import tables
from tests.evaluation.tiny_model import letters, llama, prose

SPEC = "sliding_window(width=8, num_sinks=2); num_samples=4"


def options_of(folder: Path) -> dict[str, Any]:
    return {
        "texts": [folder / "text.txt"], "lengths": [256, 272], "layers": [1, "all"],
        "specs": [SPEC], "depths": [0.0], "trials": 1, "repeats": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("out") / "deep"
    said: list[tuple[int, int, str]] = []
    made = evaluate(
        str(folder / "llama"), out=out, progress=lambda *x: said.append(x), **options_of(folder)
    )
    return made, said, out


def test_a_row_for_everything_in_the_order_of_lengths(made: Any) -> None:
    found, said, out = made
    rows = found.rows
    assert len(rows) == 2 * 4 * 3
    assert all(list(row) == list(EVAL_KEYS) for row in rows)
    assert [row["failure"] for row in rows] == [None] * len(rows)
    assert [row["n"] for row in rows] == [256] * 12 + [272] * 12
    names = [(row["run"], row["layers"]) for row in rows[:3]]
    assert names == [("exact", 0), (SPEC, 1), (SPEC, 3)]
    lines = (out / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert [number for number, *_ in said] == list(range(25))
    assert {total for _, total, _ in said} == {24}
    assert said[-1][2] == ""
    assert said[1][2] == f"perplexity, n = 256, text.txt: {SPEC}, last 1"


def test_the_page_needs_no_other_file_and_shows_what_rows_say(made: Any) -> None:
    found, _, out = made
    names = ["index.html", *(f"{name}.png" for name in FIGURES), "rows.jsonl"]
    assert [file.name for file in found.files] == names
    text = found.page.read_text()
    inline = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(data) for data in inline] == [
        (out / name).read_bytes() for name in names[1:-1]
    ]
    rest = re.sub(r'"data:image/[^"]*"', '""', text)
    for word in ("http", "//", "<script", "<link", "url(", "@import"):
        assert word not in rest
    assert 'name="viewport"' in rest
    row = next(row for row in found.rows if row["task"] == "perplexity" and row["layers"] == 3)
    assert f"<td>{row['exact']:.3f}</td>" in rest
    assert f"<td>{row['change']:+.2f} ± {row['change_error']:.2f}</td>" in rest
    assert [table.name for table in tables(found.rows)] == [
        "perplexity", "prefill", "passkey", "induction"
    ]  # fmt: skip


def test_every_table_has_exact_beside_every_number(made: Any) -> None:
    for table in tables(made[0].rows):
        assert "exact" in table.head
        column = list(table.head).index("exact")
        for line in table.lines:
            assert len(line) == len(table.head)
            assert float(line[column].replace(",", "")) >= 0


def test_questions_and_keys_are_summed_up_beside_exact() -> None:
    empty = dict.fromkeys(EVAL_KEYS)
    rows = []
    for example, exact, value in (("1", 1.0, 0.5), ("2", 0.5, 0.5), ("3", 0.0, 0.25)):
        common = {**empty, "task": "questions", "input": "q.jsonl", "n": 64, "quantity": "f1",
                  "example": example, "details": {"dataset": "qasper"}, "exact": exact}  # fmt: skip
        rows.append({**common, "run": "exact", "layers": 0, "value": exact})
        rows.append({**common, "run": "fast", "layers": 3, "value": value})
    for depth, exact, value in ((0.0, 1.0, 0.5), (1.0, 0.5, 0.25)):
        common = {**empty, "task": "passkey", "n": 64, "depth": depth, "exact": exact}
        rows.append({**common, "run": "fast", "layers": 3, "value": value})
    passkey, questions = tables(rows)
    # differences -0.5, 0, 0.25: mean -1/12, standard deviation 0.38188 over the root of 3
    assert questions.lines[1] == [
        "fast, last 3", "q.jsonl, qasper", "-0.083 ± 0.220", "0.417 ± 0.083", "0.500", "83.3",
        "f1", "3", "64",
    ]  # fmt: skip
    assert questions.lines[0][2:5] == ["", "0.500 ± 0.289", "0.500"]
    assert passkey.lines == [["fast, last 3", "64", "0.375", "0.750", "50.0", "0.50", "0.25"]]


def test_what_is_there_is_not_measured_again(
    made: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _, out = made
    model = load_language_model(str(folder / "llama"))
    rows_file = tmp_path / "rows.jsonl"
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    # all but one row are there, and half a line of a program that was killed
    missing = next(
        i for i, row in enumerate(found.rows) if row["task"] == "induction" and row["layers"] == 1
    )
    rows_file.write_text("".join(lines[:missing] + lines[missing + 1 :]) + lines[missing][:50])
    scored = []
    score = LanguageModel.score

    def watched(self: LanguageModel, tokens: torch.Tensor, **options: Any) -> Any:
        scored.append(len(tokens))
        return score(self, tokens, **options)

    monkeypatch.setattr(LanguageModel, "score", watched)
    settings = EvalSettings(**options_of(folder))
    again = list(run(model, settings, out=rows_file))
    assert scored == [256]
    same = [{**row, "time": ""} for row in again]
    assert same == [{**row, "time": ""} for row in found.rows]
    assert len(known_rows(rows_file)) == len(found.rows)
    # another seed, text, spec or number of trials is another measurement
    assert len(list(run(model, settings, out=rows_file))) == len(found.rows)
    assert scored == [256]
    for change in ({"trials": 2}, {"seed": 1}):
        changed = {**options_of(folder), "tasks": ["induction"], "lengths": [256], **change}
        scored.clear()
        list(run(model, EvalSettings(**changed), out=rows_file))
        assert len(scored) == 3 * changed["trials"]


def test_other_weights_are_another_model(folder: Path, tmp_path: Path) -> None:
    first = load_language_model(str(folder / "llama"))
    assert first.weights == of_parts(llama(), letters(), name="x").weights
    assert first.weights != of_parts(llama(seed=1), letters(), name="x").weights


def test_what_fails_is_a_row_that_says_why_and_is_tried_again(
    tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose(200))
    score, errors = LanguageModel.score, [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        UnsupportedError("no such thing\nhere"),
    ]  # fmt: skip

    def failing(self: LanguageModel, tokens: torch.Tensor, **options: Any) -> Any:
        if self.model._hyperframe_applied.layers and errors:
            raise errors.pop(0)
        return score(self, tokens, **options)

    monkeypatch.setattr(LanguageModel, "score", failing)
    settings = EvalSettings(
        texts=[text], lengths=[64], layers=[1, 2, 3], specs=[SPEC], tasks=["perplexity"]
    )
    rows_file = tmp_path / "rows.jsonl"
    exact, gpu, cpu, refused = run(tiny, settings, out=rows_file)
    assert exact["failure"] is None
    assert gpu["failure"] == (
        "out of memory: CUDA out of memory. Tried to allocate 9 GiB.; ask for a shorter --length, "
        "or --dtype bfloat16"
    )
    assert cpu["failure"].startswith("out of memory: DefaultCPUAllocator")
    assert (refused["failure"], refused["refused"]) == ("UnsupportedError: no such thing", True)
    assert gpu["value"] is None
    assert "_hyperframe_applied" not in vars(tiny.model)
    again = list(run(tiny, settings, out=rows_file))
    assert [row["failure"] for row in again] == [None, None, None, refused["failure"]]
    assert len(rows_file.read_text().splitlines()) == 6
    page = library.write(tiny, settings, [exact, gpu], out=tmp_path, is_whole=False).page
    assert "Not measured" in page.read_text()
    assert "Interrupted" in page.read_text()


def test_numbers_that_are_not_finite_are_failures(
    tmp_path: Path, tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose(100))

    def nothing(self: LanguageModel, tokens: torch.Tensor, **options: Any) -> Any:
        return torch.full((len(tokens) - 1,), float("nan")), torch.zeros(len(tokens) - 1).bool()

    monkeypatch.setattr(LanguageModel, "score", nothing)
    (row,) = run(tiny, EvalSettings(texts=[text], lengths=[64], specs=[], tasks=["perplexity"]))
    assert row["failure"] == "ArithmeticError: the perplexity is not finite"


def test_a_policy_is_a_run(tiny: LanguageModel, tmp_path: Path) -> None:
    from hyperframe.integrations.policy import Policy, Rule

    text = tmp_path / "text.txt"
    text.write_text(prose(200))
    options = {"detector": "sliding_window(width=8, num_sinks=2)", "num_samples": 4}
    policy = Policy(
        rules=(Rule(layers="last:2", attention={**options, "min_seq_len": 0, "seed": 0}),)
    )
    policy.save(tmp_path / "mine.json")
    exact, by_spec, by_policy = run(
        tiny,
        EvalSettings(
            texts=[text], lengths=[100], layers=[2], specs=[SPEC], tasks=["perplexity"],
            policies=[tmp_path / "mine.json"],
        ),
    )  # fmt: skip
    assert (by_policy["run"], by_policy["layers"]) == ("mine.json", None)
    assert len(by_policy["policy"]) == 12
    assert by_policy["value"] == by_spec["value"] != exact["value"]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ArgumentError, match=r"bad\.json"):
        list(
            run(
                tiny,
                EvalSettings(
                    tasks=["induction"], lengths=[64], policies=[tmp_path / "bad.json"], specs=()
                ),
            )
        )


def test_layers_that_stay_exact_with_their_window_are_named(tmp_path: Path) -> None:
    """Their perplexity is that of exact attention, which must not look like a success."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = MistralConfig(
        num_key_value_heads=2, num_hidden_layers=3, vocab_size=100, sliding_window=64, **sizes
    )
    model = of_parts(MistralForCausalLM(config).eval(), letters(), name="mistral")
    text = tmp_path / "text.txt"
    text.write_text(prose(200))
    settings = EvalSettings(
        texts=[text], lengths=[64, 65], layers=[2], specs=[SPEC], tasks=["perplexity"]
    )
    rows = list(run(model, settings))
    assert [row["details"].get("left_exact") for row in rows] == [None, None, None, [1, 2]]
    assert rows[1]["value"] != rows[0]["value"]
    assert rows[3]["value"] == rows[2]["value"]
    page = library.write(model, settings, rows, out=tmp_path).page.read_text()
    assert f"{SPEC}, last 2: up to 2 layers stayed exact, whose sliding window" in page


def test_lengths_unless_given_are_those_that_fit(tiny: LanguageModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose(90))
    options: dict[str, Any] = {"texts": [text], "specs": []}
    assert {row["n"] for row in run(tiny, EvalSettings(tasks=["perplexity"], **options))} == {90}
    assert {row["n"] for row in run(tiny, EvalSettings(tasks=["induction"], specs=[]))} == {512}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"tasks": ["perplexity"]}, "perplexity needs a text"),
        ({"tasks": ["passkeys"]}, "Did you mean 'passkey'"),
        ({"tasks": []}, "tasks=()"),
        ({"tasks": ["induction", "induction"]}, "each once"),
        ({"texts": ["a/x.txt", "b/x.txt"]}, "the texts x.txt, x.txt do not differ in their names"),
        ({"policies": ["a/p.json", "b/p.json"]}, "the policies p.json, p.json do not differ"),
        ({"tasks": ["a/q.jsonl", "b/q.jsonl"]}, "the tasks q.jsonl, q.jsonl do not differ"),
        ({"specs": ["fast; num_samples"]}, "'num_samples' is no option"),
        ({"specs": ["fast; num_samples=-1"]}, "num_samples=-1"),
        ({"lengths": [8]}, "--length 8: is too short"),
        ({"depths": [1.5]}, "--depth 1.5"),
        ({"metric": "bleu"}, "metric='bleu'"),
        ({"windows": 0}, "windows=0"),
        ({"layers": [-1]}, "layers=-1"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(HyperframeError) as raised:
        EvalSettings(**{"tasks": ["induction"], **options})
    assert said in str(raised.value)


def test_unknown_detectors_are_refused_at_once() -> None:
    with pytest.raises(UnknownComponentError, match="sort_lsh"):
        EvalSettings(tasks=["induction"], specs=["sort_lhs"])


def test_a_package_that_a_gguf_file_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")

    def lacking(*args: object, **options: object) -> None:
        raise ImportError("Please install torch and gguf>=0.10.0 to load it.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lacking)
    with pytest.raises(MissingDependencyError, match=r"gguf.*pip install .*\[hf\]"):
        load_language_model(str(file))


def test_models_that_cannot_be_evaluated_are_refused(folder: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    torn = tmp_path / "torn.gguf"
    torn.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    with pytest.raises(ArgumentError, match=r"torn\.gguf"):
        load_language_model(str(torn))
    (tmp_path / "no.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ArgumentError, match=r"no\.gguf"):
        load_language_model(str(tmp_path / "no.gguf"))
    with pytest.raises(ArgumentError, match="there is no such file"):
        load_language_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(ArgumentError, match="there is no such folder"):
        load_language_model(str(tmp_path / "absent"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertLMHeadModel(BertConfig(vocab_size=100, intermediate_size=16, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    letters().save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedError, match="does not attend causally"):
        load_language_model(str(tmp_path / "bert"))


def test_what_all_layers_refuse_is_said_once_and_when_the_model_is_loaded(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    gemma = Gemma2Config(
        num_key_value_heads=2, head_dim=8, num_hidden_layers=1, vocab_size=100,
        query_pre_attn_scalar=8, bos_token_id=None, eos_token_id=None, **sizes,
    )  # fmt: skip
    Gemma2ForCausalLM(gemma).save_pretrained(tmp_path / "gemma")
    t5 = T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name, said in (
        ("gemma", r"gemma: Gemma2ForCausalLM: layer 0 asks for softcap \(50\.0\)"),
        ("t5", r"^T5Config is made of several models \(encoder, decoder\).*save_pretrained"),
    ):
        letters().save_pretrained(tmp_path / name)
        with pytest.raises(UnsupportedError, match=said):
            load_language_model(str(tmp_path / name))


def test_without_matplotlib_nothing_is_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"hyperframe-attention\[plot\]"):
        evaluate(str(folder / "llama"), out=tmp_path / "out", **options_of(folder))
    assert not (tmp_path / "out").exists()


def test_a_file_of_other_rows_is_refused(tmp_path: Path, tiny: LanguageModel) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ArgumentError, match=r"line 2 of .* is no JSON object"):
        list(run(tiny, EvalSettings(tasks=["induction"]), out=tmp_path / "rows.jsonl"))
