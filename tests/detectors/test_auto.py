"""The library's choice: presets, what goes with them, and that they do what their parts do."""

from __future__ import annotations

import pytest
import torch

from hyperframe import HyperAttention, detectors
from hyperframe.detectors import AbstractDetector
from hyperframe.detectors.auto import LONG, LONGER, PRESETS, Auto
from hyperframe.errors import ArgumentError
from hyperframe.samplers.auto import Auto as AutoSampler
from hyperframe.samplers.centroid import Centroid
from hyperframe.samplers.uniform import Uniform
from hyperframe.testing import dense_attention


def tensors(length: int, heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, heads, length, 16, generator=g).unbind()
    return query, key, value


def test_no_arguments_mean_auto() -> None:
    attention = HyperAttention()
    assert attention.detector == Auto(preset="balanced")
    assert attention.sampler == AutoSampler()
    assert HyperAttention(detector="auto") == attention


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_goes_by_its_name_alone(preset: str) -> None:
    attention = HyperAttention(detector=preset)
    assert attention.detector == Auto(preset=preset)
    again = eval(repr(attention), {"HyperAttention": HyperAttention})
    assert again == attention


def test_the_sampler_follows_the_detector_until_one_is_named() -> None:
    assert HyperAttention(detector="sort_lsh").sampler == Uniform()
    assert HyperAttention().replace(detector="sort_lsh").sampler == Uniform()
    assert HyperAttention(detector="sort_lsh").replace(detector="fast").sampler == AutoSampler()
    named = HyperAttention(sampler="stratified").replace(detector="sort_lsh")
    assert named.sampler.name == "stratified"
    assert HyperAttention(strict_causal=True).sampler == AutoSampler(metric="key")
    assert HyperAttention().replace(strict_causal=True).sampler == AutoSampler(metric="key")


def test_centroids_up_to_a_length_and_uniform_draws_beyond() -> None:
    sampler = AutoSampler(longest=100, metric="key")
    assert sampler.chosen(100) == Centroid(metric="key")
    assert sampler.chosen(101) == Uniform()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_it_finds_what_its_part_finds(preset: str, is_causal: bool, strict: bool) -> None:
    query, key, _ = tensors(300)
    auto = Auto(preset=preset)
    chosen = PRESETS[preset]
    spec = chosen.causal if is_causal else chosen.dense
    if strict and is_causal:
        spec = f"{spec} | {chosen.rows}"
    masks = []
    for detector in (auto, detectors.create(spec)):
        find = detector.find_strict if strict else detector.find
        masks.append(
            find(query, key, is_causal=is_causal, generator=torch.Generator().manual_seed(1))
        )
    assert torch.equal(masks[0].to_dense(), masks[1].to_dense())


def test_long_inputs_are_found_at_a_lower_price() -> None:
    key = torch.zeros(1, 1, LONGER + 1, 1)
    for preset in PRESETS:
        auto = Auto(preset=preset)
        assert auto._part(key, False) is auto.parts["dense"]
        for length, name in (
            (LONG, "causal"), (LONG + 1, "middle"), (LONGER, "middle"), (LONGER + 1, "long"),
        ):  # fmt: skip
            assert auto._part(key[:, :, :length], True) is auto.parts[name]
            assert auto._part(key[:, :, :length], True, strict=True) is auto.parts[f"strict {name}"]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["middle", "long"])
@pytest.mark.parametrize("strict", [False, True])
def test_in_long_inputs_no_later_key_moves_an_earlier_row(
    preset: str, name: str, strict: bool
) -> None:
    detector = Auto(preset=preset).parts[f"strict {name}" if strict else name]
    find = detector.find_strict if strict else detector.find
    query, key, _ = tensors(2700, heads=1)

    def found(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        g = torch.Generator().manual_seed(1)
        return find(query, key, is_causal=True, generator=g).to_dense()

    before = found(query, key)
    for cut in (1000, 2500):
        other_query, other_key = query.clone(), key.clone()
        other_key[:, :, cut:] *= -3
        if strict:  # later rows have no vote either
            other_query[:, :, cut:] *= -2
        after = found(other_query, other_key)
        assert torch.equal(after[:, :, :cut], before[:, :, :cut])
        assert not torch.equal(after, before)


@pytest.mark.parametrize("preset", ["fast", "balanced"])
@pytest.mark.parametrize("name", ["middle", "long"])
def test_a_row_of_a_long_input_has_at_most_the_budget(preset: str, name: str) -> None:
    query, key, _ = tensors(2700)
    mask = Auto(preset=preset).parts[name].find(query, key, is_causal=True).to_dense()
    assert mask.sum(dim=-1).max() <= 512


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", [{}, {"causal": "recursive"}, {"strict_causal": True}], ids=str)
def test_presets_attend_better_than_the_window_alone(
    preset: str, options: dict[str, object]
) -> None:
    # each row attends to one far key, the same for 32 neighbours, and to little else
    g = torch.Generator().manual_seed(0)
    length = 1024
    target = torch.randint(0, 400, (length // 32,), generator=g).repeat_interleave(32)
    key = torch.randn(1, 1, length, 32, generator=g)
    query = 4 * key[:, :, target] / key[:, :, target].norm(dim=-1, keepdim=True)
    value = torch.randn(1, 1, length, 32, generator=g)
    expected = dense_attention(query, key, value, is_causal=True)[0][:, :, 512:]

    def error(detector: str, **rest: object) -> float:
        attention = HyperAttention(detector=detector, num_samples=32, min_seq_len=64, **rest)  # type: ignore[arg-type]
        out = attention(query, key, value, is_causal=True)[:, :, 512:]
        return float((out - expected).norm() / expected.norm())

    window = error("sliding_window(width=128, num_sinks=64)", sampler="uniform")
    assert error(preset, **options) < 0.5 * window


def far_copies(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that copy, each from a far key of its own, unlike its neighbours; and those keys."""
    g = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 1, length, 32, generator=g)
    target = torch.randint(0, length // 2, (length,), generator=g)
    query = 5 * key[:, :, target] / key[:, :, target].norm(dim=-1, keepdim=True) + 3
    return query, key + 2, value, target


def test_in_the_strict_form_rows_find_by_themselves_what_earlier_rows_cannot_know() -> None:
    query, key, _, target = far_copies(1024)
    rows = torch.arange(768, 1024)

    def found(auto: AbstractDetector) -> float:
        g = torch.Generator().manual_seed(0)
        mask = auto.find_strict(query, key, is_causal=True, generator=g)
        return float(mask.to_dense()[0, 0, rows, target[rows]].double().mean())

    assert found(detectors.create(PRESETS["fast"].causal)) < 0.5
    # a row looks at the last `reach` keys of its bucket, and not all copies lie there
    assert found(Auto(preset="fast")) > 0.75
    assert found(Auto(preset="balanced")) > 0.75


@pytest.mark.parametrize("options", [{}, {"causal": "recursive"}], ids=str)
@pytest.mark.parametrize("cut", [301])
def test_the_strict_form_never_looks_ahead(cut: int, options: dict[str, object]) -> None:
    inputs = [x.double() for x in far_copies(450)[:3]]
    attention = HyperAttention(
        detector="fast", strict_causal=True, num_samples=24, min_seq_len=64, seed=3, **options
    )
    before = attention(*inputs, is_causal=True)[:, :, :cut]
    for x in inputs:
        x[:, :, cut:] = x[:, :, cut:].flip(-1) * -3
    after = attention(*inputs, is_causal=True)
    assert torch.equal(after[:, :, :cut], before)
    assert torch.isfinite(after).all()


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(ArgumentError, match=r"preset='quick'.*'fast'"):
        detectors.create("auto(preset='quick')")
