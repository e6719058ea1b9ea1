"""`hyperframe tune` writes a policy that keeps a limit, or says why it cannot."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import hyperframe.tuning as library
from hyperframe.cli import EXIT_CODES, main
from hyperframe.cli.app import app
from hyperframe.integrations.policy import Policy
from hyperframe.integrations.transformers import apply
from hyperframe_attention.__main__ import main as program
from tests.cli.word_tokenizer import save_word_tokenizer

WORDS = [f"w{number}" for number in range(60)]
WINDOW = "sliding_window(width=16, num_sinks=0); num_samples=16"
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 61, "max_position_embeddings": 200,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose first layer attends to single keys and whose others hardly matter."""
    found = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        num_key_value_heads=2, initializer_range=0.15, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, **SIZES,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj.weight.mul_(0.3 if index else 6.0)
            layer.self_attn.k_proj.weight.mul_(0.3 if index else 3.0)
            layer.self_attn.o_proj.weight.mul_(0.05 if index else 2.0)
    model.save_pretrained(found / "llama")
    BertModel(BertConfig(**SIZES)).save_pretrained(found / "bert")
    for name in ("llama", "bert"):
        save_word_tokenizer(WORDS, found / name)
    words = random.Random(0)
    for name, length in (("text", 500), ("other", 300), ("short", 200)):
        text = " ".join(words.choice(WORDS) for _ in range(length))
        (found / f"{name}.txt").write_text(text, encoding="utf-8")
    return found


def arguments(folder: Path, *more: str, name: str = "llama") -> list[str]:
    return [
        "tune", str(folder / name), "--text", str(folder / "text.txt"), "--length", "128",
        "--spec", WINDOW, "--cost", "keys", "--rounds", "2", "--device", "cpu", *more,
    ]  # fmt: skip


def test_policy_keeps_the_limit_and_is_what_apply_reads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "policy.json"
    held_out = ["--held-out", str(folder / "other.txt")]
    assert program(arguments(folder, *held_out, "--out", str(out), "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == str(out)
    assert found["is_reached"]
    assert found["max_increase"] == 0.01
    assert found["measured"]["upper_percent"] <= 1.0
    assert math.isfinite(found["held_out"]["other.txt"]["percent"])
    assert [row["rungs"] for row in found["layers"]] == [["exact"] * 2, [WINDOW] * 2, [WINDOW] * 2]
    assert [path.name for path in out.parent.iterdir()] == ["policy.json"]
    policy = Policy.load(out)
    assert policy.model == str(folder / "llama")
    assert policy.info["tuned"]["texts"] == ["text.txt"]
    assert policy.info["held_out"] == found["held_out"]
    model = LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    with apply(model, policy=out) as applied:
        assert applied.layers == (1, 2)


def test_people_see_rungs_layers_and_what_was_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    out = tmp_path / "policy.json"
    held_out = ["--held-out", str(folder / "other.txt")]
    result = CliRunner().invoke(
        app, arguments(folder, "--max-ppl-increase", "2%", *held_out, "--out", str(out))
    )
    assert result.exit_code == 0, result.output
    for said in (WINDOW, "exact", "predicted:", "measured:", "held out:", "the limit is kept"):
        assert said in result.output
    assert f"1 rules -> {out}" in result.output.replace("\n", "")


def test_speed_that_cannot_be_reached_is_exit_code_3_and_says_what_can(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "policy.json"
    code = main(arguments(folder, "--speed-target", "40x", "--out", str(out)))
    assert code == 3
    assert code in EXIT_CODES
    assert "40x cannot be reached with these rungs: the fastest" in capsys.readouterr().out
    assert Policy.load(out).rules


def test_that_everything_stays_exact_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "policy.json"
    more = ["--max-ppl-increase", "0", "--held-out", str(folder / "other.txt")]
    assert main(arguments(folder, *more, "--out", str(out))) == 0
    said = capsys.readouterr().out
    assert "every layer stays exact" in said
    assert "held out" not in said
    assert Policy.load(out).rules == ()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--max-ppl-increase", "-1%"], "--max-ppl-increase -1: must be a finite number"),
        (["--max-ppl-increase", "much"], "--max-ppl-increase much: is no number"),
        (["--max-ppl-increase", "nan"], "--max-ppl-increase nan: must be"),
        (["--max-ppl-increase", "5"], "write 5% to mean percent"),
        (["--max-ppl-increase", "1%", "--speed-target", "2x"], "and not both"),
        (["--speed-target", "fast"], "--speed-target fast: is no number"),
        (["--speed-target", "0.5x"], "--speed-target 0.5: must be"),
        (["--spec", "sort_lhs"], "Did you mean 'sort_lsh'"),
        (["--cost", "joules"], "cost='joules'"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--length", "180"], "has 500 tokens, fewer than the 540 of 1 + 2 sequences"),
        (["--length", "201"], "has 200 positions"),
        (["--held-out", "short.txt"], "has 1 windows of 128 tokens, not 2"),
        (["--held-out", "no.txt"], "cannot be read (No such file or directory)"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_1(
    more: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [str(folder / x) if x.endswith(".txt") else x for x in more]
    assert main(arguments(folder, *more, "--out", str(tmp_path / "policy.json"))) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("hyperframe: ")
    assert said in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_encoder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, name="bert")) == 1
    assert "does not attend causally" in capsys.readouterr().err


def test_no_text_is_refused_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", str(folder / "absent"), "--device", "cpu"]) == 1
    assert "--text: name a file" in capsys.readouterr().err


def test_interrupt_leaves_the_old_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "tune", interrupt)
    out = tmp_path / "policy.json"
    out.write_bytes(b"old")
    code = main(arguments(folder, "--out", str(out)))
    assert code == 130
    assert code in EXIT_CODES
    assert "nothing was written" in capsys.readouterr().err
    assert out.read_bytes() == b"old"


def test_no_model_and_unknown_options_are_exit_code_2() -> None:
    assert main(["tune"]) == 2
    assert main(["tune", "a", "--no-such-option"]) == 2


def test_help_has_examples_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["tune", "--help"])
    assert result.exit_code == 0
    assert "hyperframe tune ./my-llama --text book.txt --max-ppl-increase 1%" in result.output
    assert "130: interrupted" in " ".join(result.output.split())
