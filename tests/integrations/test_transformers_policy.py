"""Policies in models: heads of one layer that attend differently, and files beside the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.0")
from hyperframe.errors import ArgumentError, UnsupportedError  # noqa: E402
from hyperframe.integrations._transformers_routes import HeadPart, by_heads  # noqa: E402
from hyperframe.integrations.policy import POLICY_FILE, Policy, Rule  # noqa: E402
from hyperframe.integrations.transformers import AttentionCall, apply, remove, save_policy  # noqa: E402

FEW = {"detector": "sort_lsh(block_size=4)", "num_samples": 4, "min_seq_len": 0}
ORACLE = {"detector": "oracle(budget=64)", "num_samples": 0, "min_seq_len": 0}


def mixed() -> Policy:
    """Layer 0 approximated, layer 1 in one key head of two, layer 2 in two ways."""
    return Policy(
        rules=[
            Rule(layers="all", attention=FEW),
            Rule(layers=1, attention="exact", key_heads=[0]),
            Rule(layers="*.2.self_attn", attention=FEW | {"num_samples": 8}, key_heads=[1]),
        ],
        info={"note": "made by hand"},
    )


@torch.no_grad()
def test_a_policy_comes_back_beside_the_weights(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    exact = llama(tokens).logits
    applied = apply(llama, policy=mixed())
    expected = llama(tokens).logits
    assert not expected.equal(exact)
    assert applied.layers == (0, 1, 2)
    llama.save_pretrained(tmp_path)
    assert save_policy(llama, tmp_path, info={"perplexity": 3.5}) == tmp_path / POLICY_FILE

    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    again.eval()
    torch.testing.assert_close(again(tokens).logits, exact)
    with apply(again, policy=tmp_path) as handle:
        assert again(tokens).logits.equal(expected)
        # Policy.load says what was saved
        assert handle.policy == Policy(
            rules=mixed().rules, model="LlamaForCausalLM",
            info={"note": "made by hand", "perplexity": 3.5},
        )  # fmt: skip
    for file in (tmp_path / POLICY_FILE, str(tmp_path / POLICY_FILE)):
        with apply(again, policy=file):
            assert again(tokens).logits.equal(expected)
    torch.testing.assert_close(again(tokens).logits, exact)


@torch.no_grad()
def test_what_was_applied_without_a_policy_is_saved_as_one(
    llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    apply(llama, lambda index, module: index != 1, **FEW)
    expected = llama(tokens).logits
    save_policy(llama, tmp_path / "new")
    assert Policy.load(tmp_path / "new").rules == (Rule(layers=[0, 2], attention=FEW),)
    handle = apply(llama, policy=tmp_path / "new")
    assert handle.layers == (0, 2)
    assert llama(tokens).logits.equal(expected)
    apply(llama, policy=Policy(rules=[Rule(layers=lambda i, m: m.layer_idx > 0, attention=FEW)]))
    save_policy(llama, tmp_path / "new")
    assert Policy.load(tmp_path / "new").rules[0].layers == (1, 2)
    apply(llama, "none")
    save_policy(llama, tmp_path / "new")
    assert apply(llama, policy=tmp_path / "new").layers == ()


def test_what_no_file_can_hold_is_refused(llama: Any, dense: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="nothing is applied to it; call apply first"):
        save_policy(llama, tmp_path)
    apply(llama, attention=dense)
    with pytest.raises(ArgumentError, match=r"layers \[0, 1, 2\] are served by .*DenseAttention"):
        save_policy(llama, tmp_path)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_split_heads_with_every_key_agree_with_eager(llama: Any, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    positions = torch.cat([torch.arange(9), torch.arange(15)])[None]

    def run() -> Tensor:
        padded = llama(tokens, attention_mask=mask).logits[mask.bool()]
        packed = llama(tokens, position_ids=positions, use_cache=False).logits.flatten(0, 1)
        return torch.cat([padded, packed])

    expected = run()
    policy = Policy(
        rules=[
            Rule(layers="all", attention=ORACLE, key_heads=[1]),
            Rule(layers=0, attention=ORACLE | {"seed": 1}, key_heads=[0]),
        ]
    )
    calls: list[AttentionCall] = []
    with apply(llama, policy=policy, observer=calls.append) as applied:
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
        generated = llama.generate(tokens, max_new_tokens=3, do_sample=False, attention_mask=mask)
    assert applied.attention is None
    assert {call.exact for call in calls if call.n_q > 1} == {False}
    plain = llama.generate(tokens, max_new_tokens=3, do_sample=False, attention_mask=mask)
    assert generated.equal(plain)


@torch.no_grad()
def test_only_the_named_heads_change(llama: Any, tokens: Tensor) -> None:
    outs: list[Tensor] = []
    hook = llama.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: outs.append(args[0].unflatten(-1, (4, -1)).transpose(1, 2))
    )
    for policy in (None, [0], [1], None):
        rules = [Rule(layers=0, attention=FEW, key_heads=policy)] if policy else []
        with apply(llama, policy=Policy(rules=rules)):
            llama(tokens)
    hook.remove()
    exact, first, second, _ = outs
    # two query heads stand with each key head
    assert first[:, 2:].equal(exact[:, 2:])
    assert second[:, :2].equal(exact[:, :2])
    assert (first[:, :2] - exact[:, :2]).abs().amax((0, 2, 3)).min() > 1e-3
    assert (second[:, 2:] - exact[:, 2:]).abs().amax((0, 2, 3)).min() > 1e-3


def test_parts_of_one_layer_draw_their_own_numbers(llama: Any, tokens: Tensor) -> None:
    from hyperframe.attention import HyperAttention

    drawn: list[Any] = []
    original = HyperAttention.__call__

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(kwargs["generator"].seed)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(HyperAttention, "__call__", record)
        rules = [
            Rule(layers="all", attention=FEW, key_heads=[0]),
            Rule(layers="all", attention=FEW | {"num_samples": 5}, key_heads=[1]),
        ]
        apply(llama, policy=Policy(rules=rules))
        llama(tokens)
        once = list(drawn)
        llama(tokens)
    assert len(set(once)) == len(once) == 6
    assert drawn == once * 2


def test_parts_are_put_together_in_the_order_of_the_heads() -> None:
    query = torch.arange(8.0).reshape(1, 8, 1, 1).expand(2, 8, 5, 4)
    key = torch.arange(4.0).reshape(1, 4, 1, 1).expand(2, 4, 7, 4)
    # a permutation that is not its own inverse
    parts = tuple(HeadPart(key_heads=heads, attention=None) for heads in ((0, 3), (1, 2)))
    seen: list[tuple[Any, ...]] = []

    def attend(part: HeadPart, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((part.key_heads, q[0, :, 0, 0].tolist(), k[0, :, 0, 0].tolist()))
        assert v[:, :, :, 0].equal(k[:, :, :, 0] + 1)
        return q + 10

    assert by_heads(attend, parts, query, key, key + 1).equal(query + 10)
    assert seen == [
        ((0, 3), [0.0, 1.0, 6.0, 7.0], [0.0, 3.0]),
        ((1, 2), [2.0, 3.0, 4.0, 5.0], [1.0, 2.0]),
    ]
    with pytest.raises(UnsupportedError, match=r"the parts hold 4 key heads, but .* with 2"):
        by_heads(attend, parts, query, key[:, :2], key[:, :2])


def test_copies_keep_the_policy(llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    apply(llama, policy=mixed())
    twin = copy.deepcopy(llama)
    with torch.no_grad():
        assert twin(tokens).logits.equal(llama(tokens).logits)
    save_policy(twin, tmp_path)
    assert Policy.load(tmp_path).rules == mixed().rules


def test_a_policy_beside_other_choices_is_refused(llama: Any, dense: Any) -> None:
    for extra, names in (
        ({"layers": "all"}, r"\['layers'\]"),
        ({"attention": dense}, r"\['attention'\]"),
        ({"num_samples": 4, "min_seq_len": None}, r"\['num_samples', 'min_seq_len'\]"),
    ):
        with pytest.raises(ArgumentError, match=f"policy= was given together with {names}"):
            apply(llama, policy=mixed(), **extra)
    assert llama.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "rule,message",
    [
        ({"layers": 3}, r"rules\[0\]\.layers=3, but the model has 3 attention layers"),
        ({"layers": "*.encoder.*"}, r"rules\[0\].*matches none of .*'model\.layers\.0\.self_attn'"),
        ({"layers": 0, "key_heads": [2]}, r"rules\[0\]\.key_heads holds 2, but there are 2 key"),
    ],
)
def test_a_policy_for_another_model_is_refused_by_file_and_place(
    llama: Any, tmp_path: Path, rule: dict[str, Any], message: str
) -> None:
    Policy(rules=[Rule(attention=FEW, **rule)]).save(tmp_path)
    with pytest.raises(ArgumentError, match=f"hyperframe_policy\\.json: {message}"):
        apply(llama, policy=tmp_path)
    assert llama.config._attn_implementation == "eager"


def test_a_corrupt_policy_file_is_refused_and_nothing_changes(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no such file; .*save_policy make one"):
        apply(llama, policy=tmp_path)
    (tmp_path / POLICY_FILE).write_text('{"format": "hyperframe-policy", "version": 1')
    with pytest.raises(ArgumentError, match=r"hyperframe_policy\.json: is not JSON: .* at line 1"):
        apply(llama, policy=tmp_path)
    assert llama.config._attn_implementation == "eager"


def test_remove_undoes_what_was_applied_to_parts(dense: Any) -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BartModel(config)
    apply(model.encoder, attention=dense)
    apply(model.decoder, attention=dense)
    with pytest.raises(ArgumentError, match="2 parts of it are routed"):
        save_policy(model, "unused")
    remove(model)
    assert model.config._attn_implementation == "eager"
    assert not any("hyperframe" in name for m in model.modules() for name in vars(m))
