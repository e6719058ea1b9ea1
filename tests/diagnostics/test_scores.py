"""Logits in chunks: what every diagnostic stands on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe import diagnostics
from hyperframe.detectors import create
from hyperframe.diagnostics import scores as module
from hyperframe.diagnostics.scores import Scores, exponentials, log_sums, mask_rows
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.masks import HeavyMask, ListMask
from hyperframe.testing.strategies import AttentionInputs, attention_inputs, masks
from tests.diagnostics import dense


def tensors(
    num_queries: int = 30, num_keys: int = 37, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, num_queries, 5, generator=g).to(dtype)
    key = torch.randn(2, 2, num_keys, 5, generator=g).to(dtype)
    return query, key, torch.randn(2, 2, num_keys, 3, generator=g).to(dtype)


def everything(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool):
    """Every diagnostic that goes over the logits, as one flat list of tensors."""
    options = {"scale": 0.7, "is_causal": is_causal}
    mask = create("oracle(budget=5)").find(query, key, **options)
    quality = diagnostics.mask_quality(query, key, mask, budget=7, scale=0.7)
    out = value.new_ones((*query.shape[:3], value.shape[-1]))
    log_sum = query.new_zeros(query.shape[:3])
    g = torch.Generator
    sampled = [
        diagnostics.sampled_alpha(query, key, num_rows=9, generator=g().manual_seed(1), **options),
        diagnostics.sampled_entropy(
            query, key, num_rows=9, generator=g().manual_seed(1), **options
        ),
        diagnostics.sampled_log_kappa(
            query, key, mask, num_rows=9, generator=g().manual_seed(1), scale=0.7
        ),
        diagnostics.sampled_mass(
            query, key, mask, num_rows=9, generator=g().manual_seed(1), scale=0.7
        ),
    ]
    return [
        diagnostics.alpha(query, key, skip_first=2, **options),
        diagnostics.log_kappa(query, key, mask, scale=0.7),
        diagnostics.log_kappa(query, key, mask, scale=0.7, centred=True),
        diagnostics.entropy(query, key, **options),
        diagnostics.softmax_norm(query, key, **options).lower,
        diagnostics.softmax_norm(query, key, **options).upper,
        diagnostics.spectral_error(query, key, value, out, **options),
        diagnostics.normaliser_error(query, key, log_sum, **options),
        diagnostics.softmax_stable_rank(query, key, **options),
        *(quality.density, quality.mass, quality.precision, quality.recall),
        *(part for found in sampled for part in (found.value, found.low, found.high)),
    ]


def together(found: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.double().flatten() for part in found])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_queries, num_keys", [(30, 37), (37, 30)])
def test_the_size_of_the_chunks_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, num_queries: int, num_keys: int, is_causal: bool
) -> None:
    inputs = tensors(num_queries, num_keys)
    whole = together(everything(*inputs, is_causal))
    for fewest in (1, 7):
        monkeypatch.setattr(module, "_CHUNK_ENTRIES", 1)
        monkeypatch.setattr(module, "_FEWEST_ROWS", fewest)
        torch.testing.assert_close(
            together(everything(*inputs, is_causal)), whole, rtol=1e-9, atol=1e-9
        )


def test_no_more_logits_are_held_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    original = Scores._logits

    def spied(self: Scores, rows: torch.Tensor) -> torch.Tensor:
        made = original(self, rows)
        held.append(made.numel())
        return made

    monkeypatch.setattr(Scores, "_logits", spied)
    monkeypatch.setattr(module, "_CHUNK_ENTRIES", 8 * 37 * 2)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 1)
    everything(*tensors(), False)
    # 2 batch items of 4 heads, rows of 37 keys, two at once
    assert max(held) == 8 * 37 * 2


@given(attention_inputs(), st.booleans(), st.integers(-3, 20))
def test_chunks_are_the_logits_of_the_centred_keys(
    inputs: AttentionInputs, is_causal: bool, offset: int
) -> None:
    query, key, _ = inputs
    scores = Scores.of(query, key, scale=0.5, is_causal=is_causal, dtype=None, offset=offset)
    expected = dense.logits(query, key, scale=0.5, is_causal=is_causal, offset=offset)
    limit = 1e-12 * (1 + expected.abs().nan_to_num(0.0, posinf=0.0).max().item())
    rows = torch.arange(query.shape[2])
    for chunk in (*scores.chunks(), *scores.chunks(rows[::2]), *scores.chunks(rows[-1:])):
        shift = scores.shift(chunk.rows).unsqueeze(-1)
        seen = chunk.logits.shape[-1]
        torch.testing.assert_close(
            chunk.logits + shift, expected[:, :, chunk.rows, :seen], rtol=1e-12, atol=limit
        )
        assert (expected[:, :, chunk.rows, seen:] == -torch.inf).all()
    visible = dense.visible(*expected.shape[-2:], is_causal=is_causal, offset=offset)
    assert torch.equal(scores.num_visible(), visible.sum(dim=-1))


def test_sums_and_their_logarithms_know_rows_without_keys() -> None:
    rows = torch.tensor([[0.0, 800.0], [-torch.inf, -torch.inf], [-900.0, -torch.inf]]).double()
    terms, total, top = exponentials(rows.clone())
    assert terms.tolist() == [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    assert total.flatten().tolist() == [1.0, 0.0, 1.0]
    assert top.flatten().tolist() == [800.0, 0.0, -900.0]
    assert log_sums(rows).tolist() == [800.0, -torch.inf, -900.0]


@given(masks(), st.data())
def test_rows_of_a_mask_come_in_any_choice(mask: HeavyMask, data: st.DataObject) -> None:
    rows = data.draw(st.sets(st.integers(0, mask.num_queries - 1), min_size=1).map(sorted))
    seen = data.draw(st.integers(1, mask.num_keys))
    found = mask_rows(mask, torch.tensor(rows), seen)
    assert torch.equal(found, mask.to_dense()[:, :, rows, :seen])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_first(dtype: torch.dtype) -> None:
    inputs = tensors(dtype=dtype)
    low = together(everything(*inputs, True))
    same = together(everything(*(x.float() for x in inputs), True))
    torch.testing.assert_close(low, same)


def test_autocast_changes_nothing() -> None:
    inputs = tensors(dtype=torch.float32)
    plain = together(everything(*inputs, True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(together(everything(*inputs, True)), plain)


def test_float32_holds_five_digits_and_float64_can_be_asked_for() -> None:
    # logits of standard deviation 10 after a common shift of 400: what real heads have
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 200, 16, generator=g)
    key = torch.randn(1, 2, 200, 16, generator=g)
    query[..., 0], key[..., 0] = 8.0, key[..., 0] + 50.0
    mask = create("sliding_window(width=20)").find(query, key)
    exact = dense.alpha(query, key, scale=1.0)
    assert (diagnostics.alpha(query, key, scale=1.0) / exact - 1).abs().max() < 1e-5
    found = diagnostics.log_kappa(query, key, mask, scale=1.0)
    assert (found - dense.log_kappa(query, key, mask, 1.0)).abs().max() < 1e-4
    double = diagnostics.alpha(query, key, scale=1.0, dtype=torch.float64)
    assert (double / exact - 1).abs().max() < 1e-12


def test_there_is_no_gradient() -> None:
    query, key, value = (x.requires_grad_() for x in tensors())
    assert not any(found.requires_grad for found in everything(query, key, value, True))


def test_a_single_query_and_key() -> None:
    query = key = torch.ones(1, 1, 1, 1)
    nothing = ListMask.from_dense(torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    quality = diagnostics.mask_quality(query, key, nothing)
    assert diagnostics.alpha(query, key).item() == 1.0
    assert diagnostics.kappa(query, key, nothing).item() == 1.0
    assert diagnostics.entropy(query, key).item() == 0.0
    assert diagnostics.softmax_norm(query, key).lower.item() == 1.0
    assert diagnostics.spectral_error(query, key, key, key).item() == 0.0
    assert quality.mass.item() == quality.density.item() == quality.recall.item() == 0.0
    assert diagnostics.sampled_entropy(query, key, num_rows=1).high.item() == 0.0
    assert diagnostics.sampled_alpha(query, key, num_rows=2).high.item() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    query, key, value = tensors()
    mask = create("oracle(budget=5)").find(query, key)
    key = key.clone()
    key[0, 0, 0, 0] = bad
    calls = [
        lambda: diagnostics.alpha(query, key),
        lambda: diagnostics.kappa(query, key, mask),
        lambda: diagnostics.entropy(query, key),
        lambda: diagnostics.softmax_norm(query, key),
        lambda: diagnostics.spectral_error(query, key, value, query[..., :3]),
        lambda: diagnostics.normaliser_error(query, key, query[..., 0]),
        lambda: diagnostics.mask_quality(query, key, mask),
        lambda: diagnostics.sampled_alpha(query, key, num_rows=3),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="key: 1 of its 740 values are NaN or infinite"):
            call()


def test_masks_of_other_problems_are_refused() -> None:
    query, key, _ = tensors()
    mask = create("oracle(budget=5)").find(query, key)
    for call in (
        diagnostics.kappa,
        diagnostics.log_kappa,
        diagnostics.mask_quality,
        lambda *inputs: diagnostics.sampled_log_kappa(*inputs, num_rows=3),
        lambda *inputs: diagnostics.sampled_mass(*inputs, num_rows=3),
    ):
        with pytest.raises(ArgumentError, match=r"n_k\] = \(2, 4, 30, 37\), but .*29, 37\)"):
            call(query[:, :, 1:], key, mask)
        with pytest.raises(ArgumentTypeError, match="expected a HeavyMask, got Tensor"):
            call(query, key, mask.to_dense())
        with pytest.raises(ArgumentError, match="head dimension"):
            call(query, key[..., 1:], mask)


def test_a_dtype_that_is_no_arithmetic_for_this_is_refused() -> None:
    query, key, _ = tensors()
    with pytest.raises(ArgumentTypeError, match=r"dtype=torch.bfloat16: .*float32 or float64"):
        diagnostics.alpha(query, key, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_gpu_finds_the_same(is_causal: bool) -> None:
    inputs = tensors()
    here = together(everything(*inputs, is_causal))
    there = together(everything(*(x.cuda() for x in inputs), is_causal))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-9)
