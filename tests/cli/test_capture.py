"""`hyperframe capture` writes what the attention of a model got, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from hyperframe.cli import EXIT_CODES, main
from hyperframe.cli.app import app
from hyperframe.errors import UnsupportedError
from hyperframe.integrations import capture_model as library
from hyperframe.integrations._capture_inputs import kind_of
from hyperframe.integrations.capture import capture, load, load_about
from hyperframe_attention.__main__ import main as program
from tests.cli.tiny_gguf import save_tiny_gguf
from tests.cli.word_tokenizer import save_word_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
WORDS = [f"w{number}" for number in range(60)]
TEXT = " ".join(WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models, each with what it reads."""
    found = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    positions = {"vocab_size": 70, "max_position_embeddings": 50}
    llama = LlamaConfig(num_key_value_heads=2, **positions, **SIZES)
    LlamaForCausalLM(llama).save_pretrained(found / "llama")
    BertModel(BertConfig(**positions, **SIZES)).save_pretrained(found / "bert")
    # two of its positions are for padding, which its configuration does not say
    RobertaModel(RobertaConfig(**positions, **SIZES)).save_pretrained(found / "roberta")
    ViTModel(ViTConfig(image_size=32, patch_size=8, **SIZES)).save_pretrained(found / "vit")
    t5 = T5Config(vocab_size=70, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5Model(t5).save_pretrained(found / "t5")
    for name in ("llama", "bert", "roberta", "t5"):
        save_word_tokenizer(WORDS, found / name)
    (found / "text.txt").write_text(TEXT, encoding="utf-8")
    (found / "short.txt").write_text("w1 w2 w3", encoding="utf-8")
    (found / "empty.txt").write_text("", encoding="utf-8")
    (found / "latin.txt").write_bytes("ü".encode("latin-1"))
    return found


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    reads = ["--image", "random"] if name == "vit" else ["--text", str(folder / "text.txt")]
    return ["capture", str(folder / name), *reads, "--device", "cpu", *more]


def same(found: Any, expected: Any) -> None:
    assert (found.scale, found.is_causal) == (expected.scale, expected.is_causal)
    for name in ("query", "key", "value"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_a_decoder_is_captured_without_its_head(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "heads.safetensors"
    more = ["--layers", "0,-1", "--length", "40", "--out", str(out), "--json"]
    assert program(arguments(folder, "llama", *more)) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["out"] == str(out)
    assert (written["model_class"], written["length"]) == ("LlamaModel", 40)
    assert written["input"] == "text.txt"
    assert [layer["layer"] for layer in written["layers"]] == [0, 2]
    assert written["layers"][1]["key"] == [1, 2, 40, 8]
    model = LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    expected = capture(model, [0, 2], input_ids=torch.arange(1, 41)[None])
    found = load(out)
    assert list(found) == [0, 2]
    for layer, of_layer in found.items():
        assert of_layer.is_causal
        same(of_layer, expected[layer])
    about = load_about(out)
    assert about["heads"] == [0, 1, 2, 3]
    assert [path.name for path in out.parent.iterdir()] == ["heads.safetensors"]


def test_an_encoder_reads_up_to_its_positions(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "heads.safetensors"
    result = CliRunner().invoke(app, arguments(folder, "bert", "--out", str(out)))
    assert result.exit_code == 0, result.output
    assert "layer 2: query 1 x 4 x 50 x 8, key and value 1 x 4 x 50 x 8, no mask" in result.stdout
    found = load(out)
    expected = capture(
        BertModel.from_pretrained(folder / "bert").eval(), input_ids=torch.arange(1, 51)[None]
    )
    for layer in (0, 1, 2):
        assert not found[layer].is_causal
        same(found[layer], expected[layer])


def test_a_vision_transformer_sees_random_pixels_or_a_file(folder: Path, tmp_path: Path) -> None:
    outs = []
    for seed in ("0", "1", "0"):
        outs.append(tmp_path / f"{len(outs)}.safetensors")
        more = ["--layers", "last:1", "--seed", seed, "--out", str(outs[-1])]
        assert main(arguments(folder, "vit", *more)) == 0
    first, second, again = (load(out)[2] for out in outs)
    assert first.query.shape == (1, 4, 17, 8)
    assert not first.is_causal
    assert torch.equal(first.query, again.query)
    assert not torch.equal(first.query, second.query)


def test_a_file_is_seen_as_the_processor_prepares_it(folder: Path, tmp_path: Path) -> None:
    image_library = pytest.importorskip("PIL.Image")
    (folder / "vit" / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTImageProcessor", "do_resize": True,
                "size": {"height": 32, "width": 32}, "do_rescale": True,
                "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            }
        )
    )  # fmt: skip
    image = tmp_path / "grey.png"
    image_library.new("RGB", (40, 30), (255, 255, 255)).save(image)
    out = tmp_path / "heads.safetensors"
    more = ["--device", "cpu", "--image", str(image), "--out", str(out)]
    assert main(["capture", str(folder / "vit"), *more]) == 0
    model = ViTModel.from_pretrained(folder / "vit").eval()
    expected = capture(model, pixel_values=torch.ones(1, 3, 32, 32))
    for layer, of_layer in load(out).items():
        same(of_layer, expected[layer])


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    save_tiny_gguf(path)
    letters = "the quick brown fox jumps over the lazy dog and sleeps"
    path.with_name("letters.txt").write_text(letters, encoding="utf-8")
    return path


def test_a_gguf_file_is_captured_by_its_path_or_in_its_folder(gguf: Path, tmp_path: Path) -> None:
    more = ["--text", str(gguf.with_name("letters.txt")), "--length", "40", "--device", "cpu"]
    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).eval()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = gguf.with_name("letters.txt").read_text()
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :40]
    expected = capture(model, input_ids=tokens)
    for named in ([str(gguf)], [str(gguf.parent), "--gguf", gguf.name]):
        out = tmp_path / f"{len(named)}.safetensors"
        assert main(["capture", *named, *more, "--out", str(out)]) == 0
        found = load(out)
        assert list(found) == [0, 1]
        for layer, of_layer in found.items():
            assert of_layer.key.shape == (1, 2, 40, 8)
            assert of_layer.is_causal
            same(of_layer, expected[layer])
        about = load_about(out)
        assert (about["model"], about["model_class"]) == (named[0], "LlamaModel")


@pytest.mark.parametrize("share", [0.001, 0.05, 0.9])
def test_a_gguf_file_that_is_cut_short_is_one_sentence(
    gguf: Path, tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    content = gguf.read_bytes()
    part = tmp_path / "part.gguf"
    part.write_bytes(content[: int(share * len(content))])
    out = tmp_path / "heads.safetensors"
    arguments = ["--text", str(gguf.with_name("letters.txt")), "--length", "40", "--out", str(out)]
    assert main(["capture", str(part), *arguments, "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"hyperframe: {part}: transformers cannot read this model (")
    assert "A file may be damaged or cut short" in said
    assert said.count("\n") == 1
    assert not out.exists()
    assert main(["capture", str(tmp_path / "no.gguf"), *arguments, "--device", "cpu"]) == 1
    assert "no.gguf: there is no such file; name a GGUF file" in capsys.readouterr().err


def test_damaged_weights_and_an_absent_tokenizer_are_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file, said in (
        ("torn", "model.safetensors", "cannot read this model (SafetensorError"),
        ("mute", "tokenizer", "cannot read this tokenizer ("),
    ):
        shutil.copytree(folder / "llama", tmp_path / name)
        for path in (tmp_path / name).glob(f"{file}*"):
            if name == "torn":
                path.write_bytes(path.read_bytes()[:1000])
            else:
                path.unlink()
        out = tmp_path / "heads.safetensors"
        arguments = ["--text", str(folder / "text.txt"), "--out", str(out), "--device", "cpu"]
        assert main(["capture", str(tmp_path / name), *arguments]) == 1
        found = capsys.readouterr().err
        assert said in found
        assert found.count("\n") == 1


@pytest.mark.parametrize(
    "heads, key_shape, group", [("2,3", 1, [1]), ("3", 1, [1]), ("1,2", 2, [0, 1])]
)
def test_heads_keep_the_keys_they_use(
    folder: Path, tmp_path: Path, heads: str, key_shape: int, group: list[int]
) -> None:
    whole, part = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    assert main(arguments(folder, "llama", "--out", str(whole))) == 0
    assert main(arguments(folder, "llama", "--heads", heads, "--out", str(part))) == 0
    chosen = [int(head) for head in heads.split(",")]
    for layer, of_layer in load(part).items():
        every = load(whole)[layer]
        assert torch.equal(of_layer.query, every.query[:, chosen])
        assert of_layer.key.shape[1] == key_shape
        assert torch.equal(of_layer.key, every.key[:, group])
        assert torch.equal(of_layer.value, every.value[:, group])
    assert load_about(part)["heads"] == chosen


def test_mask_and_dtype_are_written_as_asked(folder: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "heads.safetensors", tmp_path / "plain.safetensors"
    more = ["--no-causal", "--dtype", "bfloat16", "--out", str(out)]
    assert main(arguments(folder, "llama", *more)) == 0
    assert main(arguments(folder, "llama", "--out", str(plain))) == 0
    for layer, of_layer in load(out).items():
        assert not of_layer.is_causal
        assert of_layer.query.dtype == torch.bfloat16
        # the model attended causally all the same
        torch.testing.assert_close(
            of_layer.query.float(), load(plain)[layer].query, rtol=0.1, atol=0.1
        )


@pytest.mark.parametrize(
    "name, more, said",
    [
        ("t5", [], "T5Config is made of several models (encoder, decoder)"),
        ("roberta", [], "RobertaModel cannot run on inputs of shape (1, 50)"),
        ("absent", [], "there is no such folder"),
        ("llama", ["--layers", "7"], "layers holds 7"),
        ("llama", ["--layers", "last"], "layers='last' is not understood"),
        ("llama", ["--layers", "none"], "names no layer"),
        ("llama", ["--layers", "1;2"], "--layers 1;2: is no list of integers"),
        ("llama", ["--heads", "4"], "has the 4 query heads 0 to 3"),
        ("llama", ["--heads", "1,1"], "each once"),
        ("llama", ["--length", "51"], "LlamaConfig has 50 positions"),
        ("llama", ["--length", "0"], "length=0"),
        ("llama", ["--text", "short.txt", "--length", "4"], "has 3 tokens, fewer than 4"),
        ("llama", ["--text", "empty.txt"], "has 0 tokens"),
        ("llama", ["--text", "latin.txt"], "is not UTF-8"),
        ("llama", ["--text", "no.txt"], "cannot be read (No such file or directory)"),
        ("llama", ["--image", "random"], "reads text; pass --text and nothing else"),
        ("llama", ["--gguf", "x.gguf"], "--gguf x.gguf: there is no such file"),
        ("llama", ["--dtype", "int8"], "dtype='int8'"),
        ("vit", ["--text", "text.txt"], "reads image; pass --image and nothing else"),
        ("vit", ["--length", "9"], "the number of patches of ViTConfig follows"),
        ("vit", ["--image", "text.txt"], "is no image file"),
        ("vit", ["--image", "no.png"], "is no image file"),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_1(
    name: str, more: list[str], said: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = [str(folder / x) if x.endswith((".txt", ".png")) else x for x in more]
    out = tmp_path / "heads.safetensors"
    assert main([*arguments(folder, name, *more), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("hyperframe: ")
    assert said in captured.err
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_a_configuration_that_reads_nothing_known_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    assert main(["capture", str(tmp_path), "--image", "random", "--device", "cpu"]) == 1
    assert "transformers cannot read this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config, said",
    [
        (CLIPConfig(), r"CLIPConfig is made of several models \(text_config, vision_config\)"),
        (SimpleNamespace(hidden_size=8), "SimpleNamespace reads neither tokens"),
    ],
    ids=["several", "neither"],
)
def test_models_of_other_kinds_are_refused_by_name(config: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        kind_of(config)


def test_interrupt_leaves_the_old_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def interrupt(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "capture", interrupt)
    out = tmp_path / "heads.safetensors"
    out.write_bytes(b"old")
    code = main(arguments(folder, "llama", "--out", str(out)))
    assert code == 130
    assert code in EXIT_CODES
    assert "nothing was written" in capsys.readouterr().err
    assert out.read_bytes() == b"old"


def test_no_model_and_unknown_options_are_exit_code_2() -> None:
    assert main(["capture"]) == 2
    assert main(["capture", "a", "--no-such-option"]) == 2


def test_help_has_examples_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["capture", "--help"])
    assert result.exit_code == 0
    assert "hyperframe capture ./my-llama --text book.txt" in result.output
    assert "130: interrupted" in result.output
