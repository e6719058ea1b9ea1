"""Every task's numbers against a plain computation from the logits of the model itself."""

from __future__ import annotations

import math
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from hyperframe.errors import ArgumentError
from hyperframe.evaluation import EvalSettings, LanguageModel, of_parts, run
from hyperframe.evaluation.induction import repeated
from hyperframe.evaluation.passkey import key_of, prompt
from hyperframe.evaluation.perplexity import by_position
from hyperframe.evaluation.prefill import peak_memory
from hyperframe.integrations.transformers import apply
from tests.evaluation.tiny_model import POSITIONS, letters, llama, prose

SPEC = "sliding_window(width=8, num_sinks=2); num_samples=4"
OPTIONS: dict[str, Any] = {
    "detector": "sliding_window(width=8, num_sinks=2)", "num_samples": 4, "min_seq_len": 0,
    "seed": 0,
}  # fmt: skip


def rows_of(model: LanguageModel, **options: Any) -> list[dict[str, Any]]:
    found = list(run(model, EvalSettings(**options)))
    assert [row["failure"] for row in found] == [None] * len(found)
    return found


@torch.no_grad()
def plain(model: LanguageModel, tokens: torch.Tensor, layers: str) -> torch.Tensor:
    """Log-probabilities of the next token, from one forward with all logits, float64."""
    with apply(model.model, layers, **({} if layers == "none" else OPTIONS)):
        logits = model.model(tokens[None], use_cache=False).logits[0]
    return logits.double().log_softmax(dim=-1)


def losses_of(model: LanguageModel, tokens: torch.Tensor, layers: str) -> torch.Tensor:
    found = plain(model, tokens, layers)[:-1]
    return -found[torch.arange(len(tokens) - 1), tokens[1:]]


def test_perplexity_is_that_of_all_logits(tiny: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    text = prose(400)
    file.write_text(text)
    found = rows_of(
        tiny, texts=[file], lengths=[160], windows=2, layers=[0, 2, "all"], specs=[SPEC],
        tasks=["perplexity"],
    )  # fmt: skip
    assert [(row["run"], row["layers"]) for row in found] == [
        ("exact", 0), (SPEC, 2), (SPEC, 3)
    ]  # fmt: skip
    windows = [
        torch.tensor([ord(letter) - 32 for letter in text[start : start + 160]])
        for start in (0, 160)
    ]
    means = []
    for row, layers in zip(found, ("none", "last:2", "all"), strict=True):
        losses = torch.stack([losses_of(tiny, window, layers) for window in windows])
        means.append(float(losses.mean()))
        assert row["value"] == pytest.approx(math.exp(means[-1]), rel=1e-5)
        assert row["details"]["loss"] == pytest.approx(means[-1], rel=1e-6)
        # 159 losses are 16 blocks of 9, without the first 15
        blocks = torch.cat([each[15:].view(16, 9).mean(dim=1) for each in losses])
        assert row["blocks"] == pytest.approx(blocks.tolist(), rel=1e-4)
        error = float(blocks.std()) / math.sqrt(32)
        assert row["standard_error"] == pytest.approx(row["value"] * error, rel=1e-4)
        assert row["exact"] == pytest.approx(math.exp(means[0]), rel=1e-5)
        curve = row["details"]["positions"]
        assert [entry["first"] for entry in curve] == [1, 2, 4, 8, 16, 32, 64, 128]
        assert curve[3]["loss"] == pytest.approx(float(losses[:, 7:15].mean()), rel=1e-5)
        assert (curve[-1]["last"], curve[-1]["first"]) == (159, 128)
    for row, mean in zip(found[1:], means[1:], strict=True):
        assert row["change"] == pytest.approx(100 * math.expm1(mean - means[0]), rel=1e-3)
        assert row["change"] != 0
        pairs = torch.tensor(row["blocks"]) - torch.tensor(found[0]["blocks"])
        expected = 100 * row["value"] / row["exact"] * float(pairs.std()) / math.sqrt(32)
        assert row["change_error"] == pytest.approx(expected, rel=1e-3)


def test_a_head_that_scales_its_logits_is_scored_as_it_is(tmp_path: Path) -> None:
    """Logits in pieces come from the model's own forward, whatever that does with them."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    config = CohereConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        vocab_size=100, logit_scale=3.0, max_position_embeddings=POSITIONS, initializer_range=0.4,
        eos_token_id=94, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = of_parts(CohereForCausalLM(config).eval(), letters(), name="cohere")
    tokens = torch.randint(0, 90, (600,), generator=torch.Generator().manual_seed(0))
    losses, hits = model.score(tokens)  # more than one piece
    torch.testing.assert_close(losses, losses_of(model, tokens, "none"), rtol=1e-4, atol=1e-4)
    expected = plain(model, tokens, "none")[:-1].argmax(dim=-1) == tokens[1:]
    assert torch.equal(hits, expected)
    assert "forward" not in vars(model.model.base_model)


def test_loss_by_position_is_a_mean_of_all_losses() -> None:
    losses = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curve = by_position(losses)
    total = sum(entry["loss"] * (entry["last"] - entry["first"] + 1) for entry in curve)
    assert total == pytest.approx(float(losses.sum()))
    ends = [(entry["first"], entry["last"]) for entry in curve]
    assert ends[0] == (1, 1)
    assert ends[-1] == (64, 100)
    assert all(before[1] + 1 == after[0] for before, after in pairwise(ends))


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("length", [250, 333, 500])
def test_a_passkey_stands_at_its_depth_in_a_text_of_the_length(
    tiny: LanguageModel, length: int, depth: float
) -> None:
    tokens, answer = prompt(tiny, length, depth, "54321")
    text = "".join("\n" if i == 95 else chr(i + 32) for i in tokens.tolist())
    assert len(text) == length
    assert answer == 5
    assert text.endswith("What is the pass key in this text? The pass key is 54321")
    assert text.count("54321") == 3
    head, hay = text.split("in this text.\n\n")
    assert head == "Remember the pass key "
    before, _, after = hay.partition(" The pass key is 54321. Remember it. 54321 is the pass key.")
    room = (
        len(before)
        + len(after)
        - len("\n\nWhat is the pass key in this text? The pass key is 54321")
    )
    assert len(before) / room == pytest.approx(depth, abs=0.5 * 86 / room)


def test_keys_differ_and_come_back() -> None:
    keys = {
        key_of(seed, n, depth, trial)
        for seed in (0, 1) for n in (64, 128) for depth in (0.0, 0.5) for trial in range(4)
    }  # fmt: skip
    assert len(keys) == 32
    assert all(len(key) == 5 and key.isdigit() for key in keys)
    assert key_of(0, 64, 0.5, 1) == key_of(0, 64, 0.5, 1)


def test_passkey_is_right_where_every_token_is_the_most_likely_one(tiny: LanguageModel) -> None:
    """The numbers of the random model, and the share where a rigged one knows some of the keys."""
    options = {"lengths": [260], "depths": [0.5], "trials": 4, "tasks": ["passkey"]}
    (exact, other) = rows_of(tiny, specs=[SPEC], **options)
    prompts = [prompt(tiny, 260, 0.5, key_of(0, 260, 0.5, trial)) for trial in range(4)]
    for row, layers in ((exact, "none"), (other, "all")):
        expected = [
            -float(losses_of(tiny, tokens, layers)[-answer:].sum()) for tokens, answer in prompts
        ]
        assert row["details"]["log_probability"] == pytest.approx(sum(expected) / 4, rel=1e-4)
        assert row["value"] == 0.0
    known = [tokens for tokens, _ in prompts[:3]]

    def score(self: Any, tokens: torch.Tensor, *, first: int) -> Any:
        assert first == len(tokens) - 5
        hits = torch.ones(5, dtype=torch.bool)
        hits[2] = any(torch.equal(tokens, each) for each in known)
        return torch.zeros(5), hits

    rigged = types.SimpleNamespace(
        **{name: getattr(tiny, name) for name in (
            "model", "tokenizer", "name", "weights", "depth", "positions", "device", "dtype",
            "tokens",
        )}
    )  # fmt: skip
    rigged.score = types.MethodType(score, rigged)
    (row,) = rows_of(rigged, specs=[], **options)  # type: ignore[arg-type]
    assert row["value"] == 0.75
    assert row["blocks"] == [1.0, 1.0, 1.0, 0.0]
    assert row["standard_error"] == pytest.approx(0.25)


def test_induction_counts_the_repetition_after_its_first_token(tiny: LanguageModel) -> None:
    found = rows_of(tiny, lengths=[101], trials=2, tasks=["induction"], specs=[SPEC])
    for row, layers in zip(found, ("none", "all"), strict=True):
        hits = []
        for trial in range(2):
            tokens = repeated(tiny, 101, seed=trial)
            assert torch.equal(tokens[1:51], tokens[51:])
            predicted = plain(tiny, tokens, layers).argmax(dim=-1)
            hits += (predicted[51:-1] == tokens[52:]).tolist()
        assert len(hits) == 98
        assert row["value"] == pytest.approx(sum(hits) / 98)
    assert found[1]["change"] == found[1]["value"] - found[0]["value"]


def test_repeated_tokens_are_ordinary_ones() -> None:
    model = of_parts(llama(1), letters(additional_special_tokens=["a", "b"]), name="x")
    drawn = torch.cat([repeated(model, 200, seed=seed) for seed in range(20)])
    special = {94, ord("a") - 32, ord("b") - 32}
    assert special == set(model.tokenizer.all_special_ids)
    assert not special & set(drawn.tolist())
    assert set(drawn.tolist()) == set(range(96)) - special
    assert not torch.equal(repeated(model, 60, seed=0), repeated(model, 60, seed=1))


def test_prefill_times_both_in_turn_and_attention_is_part_of_it(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    prefill = LanguageModel.prefill

    def watched(self: LanguageModel, tokens: torch.Tensor) -> None:
        handle = self.model.__dict__["_hyperframe_applied"]
        order.append(len(handle.layers))
        prefill(self, tokens)

    monkeypatch.setattr(LanguageModel, "prefill", watched)
    exact, other = rows_of(
        tiny, lengths=[256], repeats=3, tasks=["prefill"], specs=[SPEC], layers=[2]
    )
    assert order == [0, 0, 0, 0, 2, 0, 2, 0, 2]
    assert exact["change"] is None
    assert exact["exact"] == exact["value"]
    assert other["change"] == pytest.approx(other["exact"] / other["value"])
    for row in (exact, other):
        assert 0 < row["details"]["attention"] < row["value"] * 1.5
        assert row["details"]["fastest"] <= row["value"]
        assert row["standard_error"] is None
    assert 0 < other["details"]["exact_attention"] < other["exact"] * 1.5


def test_peak_memory_sees_what_is_held_and_given_back() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        held = torch.ones(16 << 20)  # 64 MiB
        held += 1
        import time

        time.sleep(0.05)
        del held
    assert peak[0] is not None
    assert 50 << 20 < peak[0] < 500 << 20


def test_texts_and_lengths_that_do_not_fit_are_refused(tiny: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(prose(100))
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "abc"}\n\n{"text": "abcdefgh abcdefgh"}\n')
    for options, said in (
        ({"texts": [file], "lengths": [128]}, "has 100 tokens, fewer than --length 128"),
        ({"texts": [file], "lengths": [64], "windows": 2}, "has 1 windows of 64 tokens, not 2"),
        ({"texts": [lines], "lengths": [32]}, "has 17 tokens in its longest document"),
        ({"texts": [file], "lengths": [1024]}, "LlamaForCausalLM has 512 positions"),
        ({"texts": [tmp_path / "no.txt"]}, "cannot be read (No such file"),
        ({"texts": [file], "lengths": [64], "layers": [4]}, "has 3 attention layers"),
        ({"texts": [file], "tasks": ["passkey"], "lengths": [128]}, "question alone takes 1"),
    ):
        with pytest.raises(ArgumentError) as raised:
            list(run(tiny, EvalSettings(**{"tasks": ["perplexity"], **options})))
        assert said in str(raised.value)


def test_documents_of_json_lines_are_windows_of_their_own(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    documents = [prose(50, 1), prose(70, 2), prose(20, 3), prose(40, 4)]
    lines.write_text("".join(f'{{"text": "{document}"}}\n' for document in documents))
    (row,) = rows_of(tiny, texts=[lines], lengths=[32], windows=4, tasks=["perplexity"], specs=[])
    pieces = [documents[0][:32], documents[1][:32], documents[1][32:64], documents[3][:32]]
    losses = [
        losses_of(tiny, torch.tensor([ord(letter) - 32 for letter in piece]), "none")
        for piece in pieces
    ]
    assert row["details"]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_a_tokenizer_without_digits_has_no_passkey(tiny: LanguageModel) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    model = of_parts(tiny.model, tokenizer, name="words")
    with pytest.raises(ArgumentError, match="words: its tokenizer has no digits"):
        list(run(model, EvalSettings(tasks=["passkey"], lengths=[300])))
