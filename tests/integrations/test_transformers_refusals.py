"""What is not supported is refused by name, and a refused `apply` leaves no trace."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.0")
from hyperframe.errors import (  # noqa: E402
    ArgumentError,
    ArgumentTypeError,
    UnsupportedError,
)
from hyperframe.integrations.transformers import apply, remove  # noqa: E402


def call(module: nn.Module, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    function = transformers.AttentionInterface()["hyperframe"]
    return function(module, query, key, key, mask, **kwargs)[0]


@pytest.fixture
def module(llama: Any, dense: Any) -> Any:
    apply(llama, attention=dense)
    return llama.model.layers[1].self_attn


@pytest.mark.parametrize(
    "name,value,remedy",
    [
        ("dropout", 0.1, r"dropout=0\.1.*model\.eval\(\)"),
        ("softcap", 30.0, r"softcap \(30\.0\).*set_attn_implementation"),
        ("s_aux", torch.zeros(4), r"s_aux.*set_attn_implementation"),
        ("position_bias", torch.zeros(1, 4, 6, 6), r"position_bias"),
        ("cache", object(), r"cache.*paged"),
        ("head_mask", torch.ones(4), r"head_mask"),
        ("output_attentions", True, r"output_attentions=True"),
        ("sliding_window", 5, r"sliding_window=5, shorter than its 6 keys"),
        ("cu_seq_lens_q", torch.tensor([0, 6]), r"cu_seq_lens_q.*position_ids"),
    ],
)
def test_unsupported_arguments_are_named(module: Any, name: str, value: Any, remedy: str) -> None:
    with pytest.raises(UnsupportedError, match=f"(?s)layer 1 .*{remedy}"):
        call(module, **{name: value})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"softcap": None, "s_aux": None, "position_bias": None, "cache": None, "head_mask": None},
        {"sliding_window": None},
        {"sliding_window": 6},
        {"output_attentions": False},
    ],
)
def test_absent_features_are_accepted(module: Any, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = call(module)
    torch.manual_seed(0)
    assert call(module, **kwargs).equal(plain)
    assert plain.shape == (1, 6, 4, 8)


@torch.no_grad()
def test_masks_of_four_dimensions_are_refused_where_approximated(
    llama: Any, tokens: Tensor, dense: Any
) -> None:
    banded = torch.ones(24, 24, dtype=torch.bool).tril().triu(-5).expand(2, 1, 24, 24)
    additive = torch.zeros(2, 1, 24, 24).masked_fill(~banded, torch.finfo(torch.float32).min)
    expected = llama(tokens, attention_mask=additive).logits
    refusal = r"layer 2 .*\(2, 1, 24, 24\).*2-D padding mask"
    with apply(llama, "last:1", attention=dense), pytest.raises(UnsupportedError, match=refusal):
        llama(tokens, attention_mask=additive)
    with apply(llama, "none"):
        for mask in (banded, additive):
            actual = llama(tokens, attention_mask=mask).logits
            torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def test_float_masks_of_two_dimensions_are_refused(module: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"layer 1 .*dtype torch\.float32"):
        call(module, mask=torch.zeros(1, 6))
    with pytest.raises(UnsupportedError, match=r"width 9 for 6 keys"):
        call(module, mask=torch.ones(1, 9, dtype=torch.bool))


@torch.no_grad()
def test_attention_weights_are_refused_through_the_model(
    llama: Any, tokens: Tensor, dense: Any
) -> None:
    apply(llama, attention=dense)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        llama(tokens, output_attentions=True)


def test_dropout_is_refused_in_training_only(tokens: Tensor, dense: Any, make_llama: Any) -> None:
    model = make_llama(attention_dropout=0.25)
    apply(model, attention=dense)
    model(tokens)
    model.train()
    with pytest.raises(UnsupportedError, match=r"layer 0 asks for dropout=0\.25"):
        model(tokens)


@torch.no_grad()
def test_restarts_inside_a_later_chunk_are_refused(llama: Any, tokens: Tensor, dense: Any) -> None:
    apply(llama, attention=dense)
    past = llama(tokens[:, :10]).past_key_values
    positions = torch.cat([torch.arange(10, 14), torch.arange(10)])[None]
    with pytest.raises(UnsupportedError, match=r"position_ids start again.*cache of 10"):
        llama(tokens[:, 10:], position_ids=positions, past_key_values=past)


@torch.no_grad()
def test_softcap_of_a_model_is_refused(dense: Any) -> None:
    config = transformers.Gemma2Config(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_hidden_layers=2, vocab_size=60, query_pre_attn_scalar=8,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config).eval()
    with apply(model, "none"), pytest.raises(UnsupportedError, match=r"layer 0 .*softcap"):
        model(torch.arange(2, 12)[None])


@pytest.mark.parametrize(
    "layers,error,message",
    [
        ("last:4", ArgumentError, "layers='last:4' asks for 4 layers, but the model has 3"),
        ("middle", ArgumentError, "layers='middle' is not understood.*'first:N'"),
        ([0, 3], ArgumentError, r"layers holds 3, but the model has 3 .*\[0, 1, 2\]"),
        ([-4], ArgumentError, "layers holds -4"),
        (range(4), ArgumentError, "layers holds 3"),
        ([1.0], ArgumentTypeError, "1.0 of type float"),
        ([True], ArgumentTypeError, "True of type bool"),
        (3, ArgumentError, r"layers=3, but the model has 3 .*\[0, 1, 2\]"),
        (2.5, ArgumentTypeError, "layers=2.5 of type float names no layers"),
        ("1", ArgumentError, "layers='1' is not understood"),
        ("2:1:0", ArgumentError, "layers='2:1:0' is not understood"),
        ("*.5.*", ArgumentError, r"layers='\*\.5\.\*' matches none.*'model\.layers\.0\.self_attn'"),
    ],
)
def test_wrong_layers_are_refused_and_nothing_changes(
    llama: Any, dense: Any, layers: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        apply(llama, layers, attention=dense)
    assert llama.config._attn_implementation == "eager"
    assert not hasattr(llama.model.layers[0].self_attn, "_hyperframe_route")


@pytest.mark.parametrize(
    "layers,expected",
    [
        ("all", (0, 1, 2)),
        ("none", ()),
        ([], ()),
        ("first:2", (0, 1)),
        ("last:2", (1, 2)),
        ("last:0", ()),
        ([-1, 0, 2], (0, 2)),
        (range(1, 3), (1, 2)),
        (-1, (2,)),
        ("1:", (1, 2)),
        ("::2", (0, 2)),
        (slice(-2, None), (1, 2)),
        ("*.1.self_attn", (1,)),
        ("model.layers.[02].*", (0, 2)),
        (["*.0.*", "last:1"], (0, 2)),
        (lambda index, module: index == 1 and module.head_dim == 16, (1,)),
        (lambda index, module: False, ()),
    ],
)
def test_layers_may_be_written_in_several_ways(
    llama: Any, dense: Any, layers: Any, expected: tuple[int, ...]
) -> None:
    with apply(llama, layers, attention=dense) as applied:
        assert applied.layers == expected
        assert str(list(expected)) in repr(applied)


def test_wrong_attention_arguments_are_refused(llama: Any, dense: Any) -> None:
    with pytest.raises(ArgumentError, match=r"\['num_samples'\]"):
        apply(llama, attention=dense, num_samples=4)
    with pytest.raises(ArgumentTypeError, match="attention must be callable, got str"):
        apply(llama, attention="sort_lsh")
    with pytest.raises(ArgumentTypeError, match=r"apply.*detectr.*Did you mean 'detector'\?"):
        apply(llama, detectr="sort_lsh")
    with pytest.raises(ArgumentTypeError, match="observer must be callable"):
        apply(llama, attention=dense, observer=3)
    assert llama.config._attn_implementation == "eager"


def test_models_of_other_libraries_are_refused(dense: Any) -> None:
    with pytest.raises(UnsupportedError, match="model is a Linear"):
        apply(nn.Linear(2, 2), attention=dense)


def test_several_stacks_are_refused_with_the_way_out(dense: Any) -> None:
    config = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20,
    )  # fmt: skip
    model = transformers.BartModel(config)
    with pytest.raises(UnsupportedError, match=r"several stacks.*decoder.*apply\(model\.decoder"):
        apply(model, attention=dense)


def test_models_outside_the_interface_are_refused(dense: Any) -> None:
    config = transformers.XLNetConfig(d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=20)
    model = transformers.XLNetModel(config)
    with pytest.raises(UnsupportedError, match="XLNetModel has no attention module"):
        apply(model, attention=dense)


@pytest.mark.parametrize(
    "name,settings",
    [
        ("Bloom", {"hidden_size": 16, "n_head": 2, "n_layer": 1, "vocab_size": 20}),
        ("Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 20}),
        (
            "Falcon",
            {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1,
             "vocab_size": 20, "alibi": True},
        ),
    ],
)  # fmt: skip
def test_models_with_alibi_are_refused_by_name(name: str, settings: dict[str, Any]) -> None:
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**settings)
    )
    with pytest.raises(UnsupportedError, match=rf"{name}Model has no attention .*ALiBi"):
        apply(model, min_seq_len=0)
    assert model.config._attn_implementation != "hyperframe"


@pytest.mark.parametrize("layers", ["all", "none"])
@torch.no_grad()
def test_sinks_and_position_biases_of_models_are_refused(layers: str) -> None:
    ids = torch.arange(2, 12)[None]
    sinks = transformers.GptOssConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
        head_dim=8, intermediate_size=16, vocab_size=20, num_local_experts=2, bos_token_id=1,
        num_experts_per_tok=1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    biased = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20
    )
    for model, name in (
        (transformers.GptOssForCausalLM(sinks), "s_aux"),
        (transformers.T5EncoderModel(biased), "position_bias"),
    ):
        with (
            apply(model.eval(), layers),
            pytest.raises(UnsupportedError, match=f"layer 0 asks for {name}"),
        ):
            model(ids)
        assert model.config._attn_implementation != "hyperframe"


def test_a_model_that_only_warns_is_refused_and_restored(
    llama: Any, tokens: Tensor, dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = apply(llama, "first:1", attention=dense)
    monkeypatch.setattr(
        type(llama), "set_attn_implementation", lambda self, name: setattr_impl(self, "sdpa")
    )
    with pytest.raises(UnsupportedError, match="did not accept the attention implementation"):
        apply(llama, "all", attention=dense)
    # the former choice still stands
    assert llama.config._attn_implementation == "hyperframe"
    llama(tokens)
    assert len(dense.calls) == 1
    former.remove()
    assert llama.config._attn_implementation == "eager"


def setattr_impl(model: Any, name: str) -> None:
    model.config._attn_implementation_internal = name


def test_an_error_inside_transformers_is_explained_and_undone(
    llama: Any, dense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, name: str) -> None:
        setattr_impl(self, "sdpa")
        raise ValueError("not this one")

    monkeypatch.setattr(type(llama), "set_attn_implementation", refuse)
    with pytest.raises(UnsupportedError, match=r"not this one.*Nothing was changed"):
        apply(llama, attention=dense)
    assert llama.config._attn_implementation == "eager"
    remove(llama)


def test_without_transformers_the_install_command_is_shown() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from hyperframe.errors import MissingDependencyError\n"
        "import hyperframe.integrations\n"
        "try:\n    import hyperframe.integrations.transformers\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'hyperframe-attention[hf]'" in done.stdout, done.stderr


def test_the_package_imports_nothing() -> None:
    program = "import sys, hyperframe.integrations; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
