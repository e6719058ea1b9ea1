"""Refined candidates: the exact choice, nothing but candidates, and never from the future."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import AbstractDetector, create, to_spec
from hyperframe.detectors.heavy_columns import HeavyColumns
from hyperframe.detectors.refined import Refined
from hyperframe.detectors.sliding_window import SlidingWindow
from hyperframe.detectors.union import Union
from hyperframe.errors import ArgumentError, UnsupportedError
from hyperframe.kernels import mass
from hyperframe.masks import BandMask, HeavyMask, ListMask
from hyperframe.testing import masked_attention

SIZES = st.integers(1, 60)


def tensors(
    seed: int = 0, *, num_queries: int = 40, num_keys: int = 40, dim: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, dim, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, dim, generator=g, dtype=torch.float64)
    return query * 2, key


def found(detector: AbstractDetector, mode: str, query: torch.Tensor, key: torch.Tensor,
          **options: Any) -> HeavyMask:  # fmt: skip
    find = detector.find_strict if "strict" in mode else detector.find
    return find(query, key, is_causal="causal" in mode, **options)


def chosen_by_hand(
    query: torch.Tensor, key: torch.Tensor, *, size: int, num_keys: int, left: int, sinks: int,
    strict: bool, scale: float, step: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Entries kept of all keys: the definition, row by row. No band where `left < 0`."""
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    offset = keys - rows
    spread = key.repeat_interleave(heads // key.shape[1], dim=1)
    dense = torch.zeros(batch, heads, rows, keys, dtype=torch.bool)
    place = torch.arange(keys)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        begin = start + offset
        held = torch.stack([
            ((place - row >= -left) & (place <= row)) | (place < sinks) if left >= 0
            else place < 0 for row in range(begin, begin + size)
        ])  # fmt: skip
        is_candidate = (place < begin) & ~held.all(dim=0)
        mass = torch.zeros(batch, heads, keys, dtype=torch.float64)
        voters = range(start, start - size, -step) if strict else range(start, stop, step)
        for row in voters:
            q = query[:, :, max(row, 0)]
            at = row + offset
            by_band = (
                ((place - at >= -left) & (place <= at)) | (place < sinks) if left >= 0
                else place < 0
            )  # fmt: skip
            votes = is_candidate & ~by_band & (place <= at)
            seen = votes | (by_band & (place < begin) & (place <= at))
            if not votes.any():
                continue
            logits = scale * torch.einsum("bhd,bhkd->bhk", q, spread)
            share = torch.softmax(logits.masked_fill(~seen, -torch.inf), dim=-1)
            mass += share.masked_fill(~votes, 0.0)
        mass = mass.masked_fill(~is_candidate, -1.0)
        # stable: of ties the first ones
        most, best = mass.sort(dim=-1, descending=True, stable=True)
        tile = torch.zeros(batch, heads, keys, dtype=torch.bool)
        tile.scatter_(-1, best[..., :num_keys], most[..., :num_keys] >= 0)
        own = (place >= begin) & (place < begin + size)
        for row in range(start, stop):
            at = row + offset
            by_band = held[row - start] if left >= 0 else place < 0
            dense[:, :, row] = (tile | own | by_band) & (place <= at)
    return dense


@dataclass(frozen=True, kw_only=True)
class Everything(AbstractDetector):
    """Every key, for every tile of 8 rows: the candidates that lack nothing."""

    is_row_local: ClassVar[bool] = True

    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        tiles = -(-query.shape[2] // 8)
        index = torch.arange(key.shape[2], device=key.device).expand(1, 1, tiles, -1)
        shape = (query.shape[0], query.shape[1], tiles)
        return ListMask(
            batch_size=query.shape[0], num_query_heads=query.shape[1], num_queries=query.shape[2],
            num_keys=key.shape[2], is_causal=is_causal, key_index=index.expand(*shape, -1),
            key_count=torch.full((1, 1, 1), key.shape[2], device=key.device).expand(shape),
            tile_size=8,
        )  # fmt: skip


def with_window(candidates: Any, left: int, sinks: int) -> Any:
    if left < 0:
        return candidates
    return Union(detectors=(SlidingWindow(width=left + 1, num_sinks=sinks), candidates))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("left, sinks", [(-1, 0), (5, 3), (12, 0)])
@pytest.mark.parametrize("num_queries, num_keys", [(40, 40), (37, 45)])
@pytest.mark.parametrize("vote_step", [1, 4])
def test_the_choice_is_the_one_that_is_written_down(
    strict: bool, left: int, sinks: int, num_queries: int, num_keys: int, vote_step: int
) -> None:
    query, key = tensors(num_queries=num_queries, num_keys=num_keys)
    candidates = with_window(Everything(), left, sinks)
    detector = Refined(candidates=candidates, num_keys=6, tile_size=8, vote_step=vote_step)
    mask = found(detector, "strict causal" if strict else "causal", query, key, scale=0.7)
    expected = chosen_by_hand(
        query, key, size=8, num_keys=6, left=left, sinks=sinks, strict=strict, scale=0.7,
        step=vote_step,
    )  # fmt: skip
    assert torch.equal(mask.to_dense(), expected)


def test_without_a_mask_a_tile_keeps_its_heaviest_columns() -> None:
    query, key = tensors(num_queries=20, num_keys=33)
    dense = found(Refined(candidates=Everything(), num_keys=5, tile_size=8), "full", query, key)
    shares = torch.softmax(0.5 * query @ key.repeat_interleave(2, 1).transpose(-1, -2), dim=-1)
    for start in range(0, 20, 8):
        best = shares[:, :, start : start + 8].sum(dim=2).topk(5, dim=-1).indices
        expected = torch.zeros(2, 4, 33, dtype=torch.bool).scatter_(-1, best, True)
        assert torch.equal(dense.to_dense()[:, :, start], expected)


@given(num_queries=SIZES, num_keys=SIZES, num_keep=st.integers(1, 20), width=st.integers(1, 20))
def test_nothing_but_candidates_is_kept_and_no_more_than_asked(
    num_queries: int, num_keys: int, num_keep: int, width: int
) -> None:
    query, key = tensors(num_queries=num_queries, num_keys=num_keys)
    first = with_window(HeavyColumns(num_columns=9, num_queries=3, tile_size=8), width - 1, 2)
    for mode in ("full", "causal", "strict causal"):
        if "strict" in mode and num_keys > num_queries:
            continue  # nobody could vote for the first keys
        detector = Refined(candidates=first, num_keys=num_keep, tile_size=8)
        mask = found(detector, mode, query, key)
        proposed = found(first, mode, query, key).to_dense()
        kept = mask.to_dense()
        offset = num_keys - num_queries
        place, row = torch.arange(num_keys), torch.arange(num_queries).unsqueeze(-1)
        own = (place >= row // 8 * 8 + offset) & (place <= row + offset)
        assert not (kept & ~proposed & ~(own if "causal" in mode else own & False)).any()
        (band,) = (part for part in mask.parts() if isinstance(part, BandMask))
        lists = [part for part in mask.parts() if isinstance(part, ListMask)]
        assert torch.equal(band.to_dense(), found(first.detectors[0], mode, query, key).to_dense())
        assert int(lists[0].key_count.max()) <= num_keep


@pytest.mark.parametrize("mode", ["causal", "strict causal"])
def test_no_later_key_moves_an_earlier_row(mode: str) -> None:
    query, key = tensors()
    first = with_window(HeavyColumns(num_columns=12, num_queries=5, tile_size=8), 4, 2)
    detector = Refined(candidates=first, num_keys=4, tile_size=8)
    before = found(detector, mode, query, key).to_dense()
    differs = False
    for cut in (1, 7, 8, 21, 39):
        later_key, later_query = key.clone(), query.clone()
        later_key[:, :, cut:] = 7 * torch.randn(key[:, :, cut:].shape, dtype=key.dtype)
        if "strict" in mode:
            later_query[:, :, cut:] = 7 * torch.randn(query[:, :, cut:].shape, dtype=key.dtype)
        after = found(detector, mode, later_query, later_key).to_dense()
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
        differs = differs or not torch.equal(before, after)
    assert differs


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_attention_by_all_candidates_is_exact(causal: str) -> None:
    query, key = tensors(num_queries=70, num_keys=70)
    value = torch.randn(2, 2, 70, 4, dtype=torch.float64)
    attention = HyperAttention(
        detector=Refined(candidates=Everything(), num_keys=70, tile_size=8), num_samples=0,
        causal=causal, min_seq_len=16,
    )  # fmt: skip
    out = attention(query, key, value, is_causal=True)
    everything = torch.ones(2, 4, 70, 70, dtype=torch.bool).tril()
    expected = masked_attention(query, key, value, everything, scale=0.5)
    torch.testing.assert_close(out, expected[0] if isinstance(expected, tuple) else expected)


def test_padding_leaves_the_window_in_place() -> None:
    query, key = tensors(num_queries=40, num_keys=40)
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :5] = False
    padding[1, 31:] = False
    detector = Refined(candidates="sliding_window(width=8) | heavy_columns(num_columns=16)")
    attention = HyperAttention(
        detector=detector, num_samples=0, min_seq_len=0, causal="single_pass"
    )
    value = torch.randn(2, 2, 40, 4, dtype=torch.float64)
    out = attention(query, key, value, is_causal=True, key_padding_mask=padding)
    alone = attention(query[:1, :, 5:], key[:1, :, 5:], value[:1, :, 5:], is_causal=True)
    torch.testing.assert_close(out[:1, :, 5:], alone)


def test_chunks_of_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = tensors()
    detector = Refined(candidates=with_window(Everything(), 5, 1), num_keys=5, tile_size=8)
    whole = found(detector, "causal", query, key).to_dense()
    monkeypatch.setattr(mass, "_CHUNK_BYTES", 1)
    assert torch.equal(found(detector, "causal", query, key).to_dense(), whole)


def test_a_spec_names_the_first_stage() -> None:
    detector = create("refined(candidates='heavy_columns(num_columns=12)', num_keys=3)")
    assert isinstance(detector, Refined)
    assert detector.candidates == HeavyColumns(num_columns=12)
    assert create(to_spec(detector)) == detector
    assert not detector.is_positional
    assert create("refined(candidates='sliding_window | heavy_columns')").is_positional


def test_wrong_parameters_are_refused_by_name() -> None:
    query, key = tensors()
    with pytest.raises(ArgumentError, match="num_keys"):
        Refined(num_keys=0)
    with pytest.raises(ArgumentError, match="vote_step"):
        Refined(vote_step=0)
    with pytest.raises(ArgumentError, match="heavy_colums"):
        Refined(candidates="heavy_colums")
    with pytest.raises(UnsupportedError, match="candidates=sort_lsh holds hash blocks"):
        Refined(candidates="sort_lsh(block_size=8)").find(query, key)


def test_no_value_is_read_on_the_way() -> None:
    """On the meta device there is none; what waits for a GPU would fail."""
    query, key = (x.to("meta") for x in tensors(num_queries=70, num_keys=70))
    detector = Refined(candidates=with_window(Everything(), 5, 2), num_keys=5, tile_size=8)
    for mode in ("full", "causal", "strict causal"):
        mask = found(detector, mode, query, key)
        assert mask.device.type == "meta"


@pytest.mark.parametrize("strict", [False, True])
def test_each_tile_keeps_the_planted_key_that_is_its_own(strict: bool) -> None:
    """One far key for every tile, among 32 that are candidates of all: one slot is enough."""
    g = torch.Generator().manual_seed(0)
    size, tiles = 32, 8
    direction = torch.eye(16, dtype=torch.float64)
    query = 0.1 * torch.randn(1, 1, size * tiles, 16, generator=g, dtype=torch.float64)
    key = 0.1 * torch.randn(1, 1, size * tiles, 16, generator=g, dtype=torch.float64)
    planted = torch.randperm(size, generator=g)[:tiles]  # in the first tile, before all others
    for tile, place in enumerate(planted):
        # the strict form goes by the rows before a tile and its first one
        rows = slice(max(0, (tile - 1) * size + 1), tile * size + 1) if strict else slice(
            tile * size, (tile + 1) * size
        )  # fmt: skip
        query[0, 0, rows] += 6 * direction[tile]
        key[0, 0, place] += 6 * direction[tile]
    columns = ", ".join(f"({block}, 0)" for block in range(tiles))
    detector = Refined(
        candidates=f"block_list(blocks=({columns}), block_size={size})", num_keys=1, tile_size=size
    )
    dense = found(detector, "causal strict" if strict else "causal", query, key).to_dense()[0, 0]
    for tile, place in list(enumerate(planted))[1:]:
        own = dense[tile * size : (tile + 1) * size, :size]
        assert own[:, place].all()
        assert int(own.sum()) == size  # nothing else of the candidates before the tile


@pytest.mark.parametrize("mode", ["", "causal", "causal strict"])
@pytest.mark.parametrize("width", [1, 9])
def test_a_window_alone_leaves_nothing_to_choose(mode: str, width: int) -> None:
    query, key = tensors()
    window = SlidingWindow(width=width, num_sinks=3)
    dense = found(Refined(candidates=window, tile_size=8), mode, query, key).to_dense()
    held = found(window, mode, query, key).to_dense()
    if mode:  # and the keys of the own tile
        row, column = torch.arange(40).unsqueeze(-1), torch.arange(40)
        held = held | ((row // 8 == column // 8) & (column <= row))
    assert torch.equal(dense, held.expand_as(dense))
