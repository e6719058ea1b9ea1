"""Detectors that choose leaves: what is found, what is held, and never from the future."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import leaf_detector
from hyperframe.detectors.kmeans import KMeans
from hyperframe.detectors.leaf_detector import AbstractLeafDetector
from hyperframe.detectors.pca_tree import PCATree
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.kernels import leaves as leaves_module
from hyperframe.testing import masked_attention
from hyperframe.testing.strategies import AttentionInputs, attention_inputs
from tests import finding_laws
from tests.finding_laws import SIZES, random_heads

FORMS = pytest.mark.parametrize("form", ["tree", "kmeans"])
NAMES = st.sampled_from(["tree", "kmeans"])
tensors = partial(random_heads, dtype=torch.float64)


def detector_of(form: str, leaf: int = 4, leaves: int = 2, **options: Any) -> AbstractLeafDetector:
    options = {"tile_size": 8, "chunk_size": 16, "num_means": 3} | options
    if form == "tree":
        return PCATree(leaf_size=leaf, num_leaves=leaves, **options)
    return KMeans(block_size=leaf, num_blocks=leaves, num_steps=2, batch_size=9, **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(
    num_keys: int, num_clusters: int, *, dim: int = 16, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys of clusters spread over all positions; the queries of a tile of 32 like one cluster."""
    g = generator(seed)
    centres = torch.randn(num_clusters, dim, generator=g)
    label = torch.randint(num_clusters, (num_keys,), generator=g)
    key = centres[label] + 0.1 * torch.randn(1, 2, num_keys, dim, generator=g)
    liked = torch.arange(num_keys) // 32 % num_clusters
    query = 2 * centres[liked] + 0.1 * torch.randn(1, 4, num_keys, dim, generator=g)
    return query, key, label == liked.unsqueeze(-1)


@FORMS
@pytest.mark.parametrize("mode", ["full", "strict", "causal", "strict causal"])
def test_planted_clusters_are_found_far_more_often_than_by_chance(form: str, mode: str) -> None:
    query, key, wanted = planted(512, 8)
    detector = detector_of(form, 16, 5, tile_size=32, chunk_size=256, num_means=2)
    find = detector.find_strict if "strict" in mode else detector.find
    is_causal = "causal" in mode
    options: dict[str, Any] = {"earlier_query": query} if mode == "strict" else {}
    mask = find(query, key, is_causal=is_causal, generator=generator(), **options)
    dense = mask.to_dense()[:, :, 32:]
    wanted, keys = wanted[32:], torch.ones(512, 512, dtype=torch.bool)[32:]
    if is_causal:
        # keys of the row's own tile are held anyway
        keys = (torch.arange(512) < torch.arange(512).unsqueeze(-1) // 32 * 32)[32:]
    recall = float(dense[..., wanted & keys].double().mean())
    chance = float(dense[..., keys].double().mean())
    # the strict tile is shared by the liking of the rows before it and that of its first row
    assert recall > max(2.0 * chance, 0.4 if "strict" in mode else 0.8)
    # all rows of a tile hold the same, but for the diagonal
    assert (dense[:, :, 1, :32] == dense[:, :, 0, :32]).all()


@given(
    form=NAMES, num_queries=SIZES, num_keys=SIZES, leaf=st.integers(1, 20),
    leaves=st.integers(1, 9), tile=st.integers(1, 20), seed=st.integers(0, 1000),
)  # fmt: skip
@example(form="tree", num_queries=3, num_keys=60, leaf=7, leaves=9, tile=8, seed=0)
def test_a_row_holds_whole_leaves_and_the_same_as_its_tile(
    form: str, num_queries: int, num_keys: int, leaf: int, leaves: int, tile: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = detector_of(form, leaf, leaves, tile_size=tile, chunk_size=4 * tile)
    mask = detector.find(query, key, generator=generator(seed))
    dense = mask.to_dense()
    held = dense.sum(dim=-1)
    # k-means cuts keys into chunks first, and the rest into leaves of its own
    blocks = [num_keys]
    if form == "kmeans":
        whole, rest = divmod(num_keys, min(4 * tile, num_keys))
        blocks = [min(4 * tile, num_keys)] * whole + [rest] * (rest > 0)
    sizes = [size for block in blocks for size in _equal(block, leaf)]
    assert held.max() <= sum(sorted(sizes)[-leaves:]) <= leaf * leaves
    assert held.min() >= sum(sorted(sizes)[:leaves])
    for row in range(num_queries):
        assert torch.equal(dense[:, :, row], dense[:, :, row // tile * tile])


def _equal(length: int, longest: int) -> list[int]:
    count = -(-length // longest)
    return [(i + 1) * length // count - i * length // count for i in range(count)]


@given(
    form=NAMES, num_queries=SIZES, num_keys=SIZES, leaf=st.integers(1, 10),
    leaves=st.integers(1, 9), tile=st.integers(1, 12), times=st.integers(0, 3),
    strict=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@example(form="tree", num_queries=60, num_keys=60, leaf=4, leaves=3, tile=4, times=2,
         strict=False, seed=0)  # fmt: skip
@example(form="tree", num_queries=30, num_keys=57, leaf=3, leaves=3, tile=5, times=1,
         strict=True, seed=0)  # fmt: skip
def test_a_causal_row_holds_its_own_tile_and_its_budget_of_earlier_keys(
    form: str, num_queries: int, num_keys: int, leaf: int, leaves: int, tile: int, times: int,
    strict: bool, seed: int,
) -> None:  # fmt: skip
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = detector_of(form, leaf, leaves, tile_size=tile, chunk_size=tile << times)
    find = detector.find_strict if strict else detector.find
    dense = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    offset, size = num_keys - num_queries, min(tile, num_queries)
    first = offset % tile
    for row in range(num_queries):
        begin, position = row // size * size + offset, row + offset
        seen = dense[:, :, row, : max(0, position + 1)]
        assert seen[..., max(0, begin) :].all()
        if begin < 0:
            continue
        assert seen[..., :first].all()  # what no tile of keys covers
        chosen = seen[..., first:begin].sum(dim=-1)
        assert chosen.max() <= leaf * leaves
        # everything, where the budget suffices for leaves of any size
        if begin - first <= leaves:
            assert (chosen == begin - first).all()
        # leaves of at least half the size, or all there are
        assert chosen.min() >= min(begin - first, leaves * max(1, min(leaf, tile) // 2))


@given(
    form=NAMES, num_queries=SIZES, num_keys=SIZES, cut=st.integers(0, 59), strict=st.booleans(),
    times=st.integers(0, 2), seed=st.integers(0, 1000),
)  # fmt: skip
@example(form="tree", num_queries=60, num_keys=60, cut=31, strict=False, times=1, seed=0)
@example(form="kmeans", num_queries=60, num_keys=60, cut=40, strict=False, times=2, seed=0)
@example(form="tree", num_queries=40, num_keys=60, cut=21, strict=False, times=0, seed=0)
@example(form="tree", num_queries=60, num_keys=40, cut=41, strict=False, times=1, seed=0)
@example(form="tree", num_queries=60, num_keys=60, cut=31, strict=True, times=1, seed=0)
@example(form="tree", num_queries=60, num_keys=60, cut=18, strict=True, times=1, seed=0)
@example(form="kmeans", num_queries=60, num_keys=60, cut=45, strict=True, times=1, seed=0)
def test_no_later_key_moves_a_causal_row_and_no_later_query_a_strict_one(
    form: str, num_queries: int, num_keys: int, cut: int, strict: bool, times: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = detector_of(form, chunk_size=8 << times)
    find = detector.find_strict if strict else detector.find
    cut = min(cut, num_queries)
    before = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -5
    if strict:
        query[:, :, cut:] *= torch.arange(-9, 9, 5)  # other directions, too
    after = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@FORMS
def test_earlier_keys_and_queries_do_move_a_causal_row(form: str) -> None:
    # so that the law above is not kept by a choice that looks at nothing
    query, key = tensors(num_queries=60, num_keys=60)
    for find in (detector_of(form).find, detector_of(form).find_strict):
        before = find(query, key, is_causal=True, generator=generator()).to_dense()
        for moved in (query, key):
            changed = moved.clone()
            changed[:, :, :40] = changed[:, :, :40].flip(-1)
            pair = (changed, key) if moved is query else (query, changed)
            after = find(*pair, is_causal=True, generator=generator()).to_dense()
            assert not torch.equal(before[:, :, 40:48], after[:, :, 40:48])


@FORMS
def test_in_a_strict_rectangle_a_row_sees_its_own_and_earlier_queries(form: str) -> None:
    query, key = tensors(num_keys=50)
    earlier = torch.randn(2, 4, 50, 4, generator=generator(3), dtype=torch.float64)
    detector = detector_of(form)

    def dense(q: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        find = detector.find_rectangle
        return find(q, key, earlier_query=before, strict=True, generator=generator()).to_dense()

    for before in (earlier, earlier[:, :, :3], None):
        whole = dense(query, before)
        for cut in (1, 9, 24, 39):
            changed = query.clone()
            changed[:, :, cut:] *= -5
            assert torch.equal(dense(changed, before)[:, :, :cut], whole[:, :, :cut])
    assert not torch.equal(dense(query, earlier), dense(query, -earlier.flip(-1)))


@FORMS
def test_a_rectangle_is_found_like_any_problem_without_a_mask(form: str) -> None:
    query, key = tensors(num_queries=30, num_keys=50)
    detector = detector_of(form)
    part = detector.find_rectangle(
        query, key, generator=generator(), query_start=80, key_start=10, first_row=70
    )
    assert not part.is_causal
    whole = detector.find(query, key, generator=generator())
    assert torch.equal(part.to_dense(), whole.to_dense())


@FORMS
@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_and_batch_items_choose_for_themselves(form: str, is_causal: bool) -> None:
    query, key = tensors(num_queries=56, num_keys=56)
    detector = detector_of(form)

    def dense(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return detector.find(q, k, is_causal=is_causal, generator=generator()).to_dense()

    whole = dense(query, key)
    for b in range(2):
        for h in range(2):
            group = slice(2 * h, 2 * h + 2)
            alone = dense(query[b : b + 1, group], key[b : b + 1, h : h + 1])
            assert torch.equal(alone[0], whole[b, group])
    assert not torch.equal(whole[:, 0], whole[:, 1])


@FORMS
def test_more_leaves_than_there_are_hold_everything(form: str) -> None:
    query, key = tensors(num_queries=37, num_keys=53)
    detector = detector_of(form, 4, 1000)
    assert detector.find(query, key).to_dense().all()
    causal = detector.find(query, key, is_causal=True).to_dense()
    assert torch.equal(causal[0, 0], torch.ones(37, 53).tril(16).bool())
    assert (causal == causal[0, 0]).all()


@FORMS
def test_the_choice_scales_with_the_logits_and_follows_their_sign(form: str) -> None:
    query, key = tensors()
    detector = detector_of(form, 4, 3)
    mask = detector.find(query, key, scale=0.3)
    # 4 times the queries: a power of two changes no bit of any direction
    assert torch.equal(detector.find(4 * query, key, scale=0.075).to_dense(), mask.to_dense())
    assert torch.equal(detector.find(-query, key, scale=-0.3).to_dense(), mask.to_dense())
    assert not torch.equal(detector.find(query, key, scale=-0.3).to_dense(), mask.to_dense())


@FORMS
@given(inputs=attention_inputs(), is_causal=st.booleans(), strict=st.booleans())
def test_any_input_gives_a_mask_that_attention_can_use(
    form: str, inputs: AttentionInputs, is_causal: bool, strict: bool
) -> None:
    query, key, value = inputs
    detector = detector_of(form, 3, 2, tile_size=4, chunk_size=8)
    find = detector.find_strict if strict else detector.find
    mask = find(query, key, is_causal=is_causal, generator=generator())
    mask.validate()
    attention = HyperAttention(
        detector=detector, num_samples=0, min_seq_len=0, strict_causal=strict, backend="reference"
    )
    if query.shape[2] > 1 and not (strict and not is_causal):
        found = attention(query, key, value, is_causal=is_causal, scale=1.0)
        assert found.shape == (*query.shape[:3], value.shape[3])
        assert torch.isfinite(found).all()


@FORMS
@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_attention_by_a_generous_mask_is_exact(form: str, causal: str) -> None:
    query, key = (x.float() for x in tensors(num_queries=70, num_keys=70))
    value = torch.randn(2, 2, 70, 3, generator=generator(5))
    for strict in (False, True):
        attention = HyperAttention(
            detector=detector_of(form, 4, 1000), num_samples=0, min_seq_len=0, causal=causal,
            strict_causal=strict, backend="torch",
        )  # fmt: skip
        found = attention(query, key, value, is_causal=True)
        dense = torch.ones(70, 70).tril().bool().expand(2, 4, -1, -1)
        expected = masked_attention(query, key, value, dense, scale=0.5)
        torch.testing.assert_close(found.double(), expected.out.double(), rtol=1e-4, atol=1e-5)


@FORMS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(130, 130), (100, 150), (150, 100), (3, 5)])
def test_no_value_is_read_while_entries_are_found(
    form: str, strict: bool, is_causal: bool, shape: tuple[int, int]
) -> None:
    """Tensors without values: reading one, or a size that depends on one, is an error."""
    query = torch.empty(2, 4, shape[0], 8, device="meta")
    key = torch.empty(2, 2, shape[1], 8, device="meta")
    find = getattr(detector_of(form), "find_strict" if strict else "find")
    mask = find(query, key, is_causal=is_causal)
    assert mask.device.type == "meta"
    with pytest.raises(RuntimeError):
        next(mask.parts()).key_count.max().item()  # type: ignore[attr-defined]


@FORMS
@pytest.mark.parametrize("is_causal", [False, True])
def test_no_intermediate_grows_with_the_square_of_the_length(
    form: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # scores are made for some tiles at a time: here, for as many as fit into 64 KiB
    monkeypatch.setattr(leaves_module, "_CHUNK_BYTES", 1 << 16)
    # what the operators make is seen where their implementations are called
    monkeypatch.setattr(leaves_module, "best_leaves", leaves_module.torch_best_leaves)
    monkeypatch.setattr(leaf_detector, "leaf_means", leaves_module.torch_leaf_means)
    detector = detector_of(form, 16, 4, tile_size=32, chunk_size=128)
    finding_laws.no_intermediate_grows_with_the_square_of_the_length(
        partial(detector.find, is_causal=is_causal), width=64, growth=2.2
    )


@FORMS
def test_bad_options_are_refused_by_name(form: str) -> None:
    for option in ("tile_size", "num_means", "chunk_size"):
        with pytest.raises(ArgumentError, match=rf"{option}=0 is too small"):
            detector_of(form, **{option: 0})
        with pytest.raises(ArgumentTypeError, match=rf"{option}=2.0 has type float"):
            detector_of(form, **dict[str, Any]({option: 2.0}))
    for chunk in (7, 24, 12):
        message = rf"chunk_size={chunk} is not tile_size=8 times a power of two; .* example 128"
        with pytest.raises(ArgumentError, match=message):
            detector_of(form, chunk_size=chunk)
