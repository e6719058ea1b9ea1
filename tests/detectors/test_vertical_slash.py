"""Vertical and slash lines: both are found where planted, as defined, and never from the future."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe.detectors import vertical_slash
from hyperframe.detectors.vertical_slash import VerticalSlash
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.kernels import votes as votes_module
from hyperframe.kernels.slashes import caught_mass
from hyperframe.kernels.votes import diagonal_mass
from hyperframe.testing.strategies import AttentionInputs, attention_inputs
from tests import finding_laws
from tests.finding_laws import SIZES
from tests.finding_laws import random_heads as tensors

SMALL = VerticalSlash(
    num_columns=6, num_diagonals=8, num_queries=3, num_segments=4, tile_size=4
)  # fmt: skip
MODES = pytest.mark.parametrize(
    "is_causal, strict", [(False, False), (False, True), (True, False), (True, True)]
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def find(
    detector: VerticalSlash, query: torch.Tensor, key: torch.Tensor, *, strict: bool, **options: Any
) -> torch.Tensor:
    method = detector.find_strict if strict else detector.find
    return method(query, key, **options).to_dense()


def test_mass_of_a_diagonal_is_the_sum_at_its_offset() -> None:
    g = generator()
    mass = torch.rand(2, 3, 2, 4, 11, generator=g, dtype=torch.float64)
    position = torch.tensor([[-2, 0, 5, 5], [9, 10, 11, 30]])
    found = diagonal_mass(mass, position, first_offset=-12, num_offsets=40)
    expected = torch.zeros_like(found)
    for segment in range(2):
        for row in range(4):
            for key in range(11):
                offset = int(position[segment, row]) - key + 12
                if 0 <= offset < 40:
                    expected[:, :, segment, offset] += mass[:, :, segment, row, key]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("run, tile_size", [(1, 1), (1, 5), (2, 6), (4, 4), (3, 12)])
def test_a_run_catches_what_its_keys_see_in_the_rows_of_a_tile(run: int, tile_size: int) -> None:
    blocks = torch.rand(2, 10, generator=generator(), dtype=torch.float64)
    diagonals = blocks.repeat_interleave(run, dim=-1)  # even inside of a run
    expected = torch.zeros(2, 10, dtype=torch.float64)
    for number in range(10):
        for offset in range(number * run, (number + 1) * run):
            for row in range(tile_size):
                if offset + row < 10 * run:
                    expected[:, number] += diagonals[:, offset + row]
    torch.testing.assert_close(caught_mass(run * blocks, run, tile_size), expected)


def voters(
    detector: VerticalSlash, query: torch.Tensor, earlier: torch.Tensor, size: int, number: int,
    *, strict: bool, count: int | None = None,
) -> list[tuple[int, torch.Tensor]]:  # fmt: skip
    """Rows and queries that vote in a run of rows; one head, `[n, d]`."""
    first, length = number * size, min(size, len(query) - number * size)
    if strict:
        first, length = first - (size - 1), size
    rows, count = [], detector.num_queries if count is None else count
    for vote in range(count):
        row = first + int((vote + 0.5) * length / count)
        row = max(row, -len(earlier))
        rows.append((row, query[row] if row >= 0 else earlier[row]))
    return rows


def best(mass: torch.Tensor, visible: range, count: int) -> list[int]:
    return sorted(visible, key=lambda key: -float(mass[key]))[:count]


def definition(
    detector: VerticalSlash, query: torch.Tensor, key: torch.Tensor, earlier: torch.Tensor, *,
    is_causal: bool, strict: bool,
) -> torch.Tensor:  # fmt: skip
    """The dense mask of one head, `[n, d]` each, step by step."""
    num_queries, num_keys, size = len(query), len(key), detector.tile_size
    shift, num_tiles = num_keys - num_queries, -(-num_queries // size)
    tiles_each = max(-(-num_tiles // detector.num_segments), -(-detector.min_segment // size))
    tiles_each = min(tiles_each, num_tiles)

    def votes(row: torch.Tensor, keys: range) -> torch.Tensor:
        mass = torch.zeros(num_keys, dtype=torch.float64)
        if len(keys):
            mass[list(keys)] = (0.5 * key[list(keys)] @ row).softmax(-1)
        return mass

    columns, diagonals = [], []
    for segment in range(-(-num_tiles // tiles_each)):
        seen = max(0, segment * tiles_each * size + shift) if is_causal else num_keys
        voting = voters(detector, query, earlier, tiles_each * size, segment, strict=strict)
        mass = torch.stack([votes(row, range(seen)) for _, row in voting]).sum(0)
        columns.append(best(mass, range(seen), detector.num_columns))
        lines: dict[int, float] = {}
        for row, vector in voting:
            keys = range(max(0, row + shift + 1)) if is_causal else range(num_keys)
            for at, share in enumerate(votes(vector, keys).tolist()):
                if at not in columns[max(0, segment - 1)] and at in keys:
                    lines[row + shift - at] = lines.get(row + shift - at, 0.0) + share
        diagonals.append(lines)

    run = min(size, 4)
    low = 1 if is_causal else 1 - num_queries
    dense = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for tile in range(num_tiles):
        segment, start = tile // tiles_each, tile * size + shift
        rows = slice(tile * size, tile * size + size)
        share = 0
        if is_causal:
            dense[rows, max(0, start) : max(0, start + size)] = True
        if is_causal and tiles_each > 1:
            near = range(
                max(0, segment * tiles_each * size + shift),
                start - max(0, detector.min_offset - size),
            )
            voting = voters(
                detector, query, earlier, size, tile, strict=strict, count=detector.near_queries
            )
            mass = torch.stack([votes(row, near) for _, row in voting]).sum(0)
            wanted, is_shared = detector.num_near, detector.num_near is None
            wanted = max(1, detector.num_columns // 4) if wanted is None else wanted
            chosen = best(mass, near, min(wanted, (tiles_each - 1) * size, num_keys))
            dense[rows, chosen] = True
            share = len(chosen) if is_shared else 0
        dense[rows, columns[segment][: min(detector.num_columns, num_keys) - share]] = True
        counted = diagonals
        if is_causal or strict:
            counted = diagonals[: segment + strict]
        total = [0.0] * (num_keys + num_queries + 99)
        for lines in counted:
            for offset, weight in lines.items():
                if low <= offset:
                    number = (offset - low) // run
                    for each in range(number * run, number * run + run):
                        total[each] += weight / run
        caught = torch.tensor(
            [
                sum(sum(total[each : each + size]) for each in range(first, first + run))
                for first in range(0, num_keys - low, run)
            ]
        )
        for number, first in enumerate(range(low, low + run * len(caught), run)):
            farthest = first + run - 1 + size - 1
            if -detector.min_offset < first and farthest < detector.min_offset:
                caught[number] = 0
        for number in best(caught, range(len(caught)), detector.num_diagonals // run):
            keys = [start - low - number * run - each for each in range(run)]
            if caught[number] > 0:
                dense[rows, [at for at in keys if 0 <= at < num_keys]] = True
    return dense.tril(shift) if is_causal else dense


@MODES
@given(
    num_queries=SIZES, num_keys=SIZES, num_earlier=st.sampled_from([0, 2, 30]),
    seed=st.integers(0, 999), segments=st.integers(1, 6), min_offset=st.sampled_from([0, 7]),
    near=st.sampled_from([{}, {"num_near": 5}, {"num_near": 0, "near_queries": 1}]),
    min_segment=st.sampled_from([1, 20]),
)  # fmt: skip
@example(
    num_queries=53, num_keys=53, num_earlier=0, seed=0, segments=4, min_offset=0, near={},
    min_segment=1,
)  # fmt: skip
@example(
    num_queries=53, num_keys=60, num_earlier=0, seed=0, segments=2, min_offset=7,
    near={"num_near": 6, "near_queries": 5}, min_segment=30,
)  # fmt: skip
def test_the_mask_is_the_definition(
    is_causal: bool, strict: bool, num_queries: int, num_keys: int, num_earlier: int, seed: int,
    segments: int, min_offset: int, near: dict[str, int], min_segment: int,
) -> None:  # fmt: skip
    query, key = (
        x[:1, :2].double() for x in tensors(seed, num_queries=num_queries, num_keys=num_keys)
    )
    earlier = tensors(seed + 1, num_queries=num_earlier)[0][:1, :2].double()
    options: dict[str, Any] = {"is_causal": is_causal, "scale": 0.5}
    if strict and num_earlier:
        options["earlier_query"] = earlier
    detector = SMALL.replace(
        num_segments=segments, min_offset=min_offset, min_segment=min_segment, **near
    )
    found = find(detector, query, key, strict=strict, **options)
    for head in range(2):
        expected = definition(
            detector, query[0, head], key[0, head], earlier[0, head], is_causal=is_causal,
            strict=strict,
        )  # fmt: skip
        assert torch.equal(found[0, head], expected)


@MODES
def test_planted_columns_are_held_by_every_row(is_causal: bool, strict: bool) -> None:
    query, key = tensors(num_queries=256, num_keys=256)
    columns = [3, 77, 150]
    query[..., 0] += 5.0
    key[:, :, columns, 0] += 8.0
    detector = VerticalSlash(num_columns=16, num_diagonals=8, num_segments=8, tile_size=16)
    dense = find(detector, query, key, strict=strict, is_causal=is_causal, generator=generator())
    for column in columns:
        assert dense[:, :, column if is_causal else 0 :, column].all()


@MODES
@pytest.mark.parametrize("offset", [0, 37, 90])
def test_a_planted_diagonal_is_held(is_causal: bool, strict: bool, offset: int) -> None:
    number = torch.arange(256)
    direction = torch.randn(256, 64, generator=generator())
    direction = 8 * torch.nn.functional.normalize(direction, dim=-1)
    key = direction.expand(1, 1, -1, -1)
    query = key[:, :, (number - offset).clamp(min=0)]
    detector = VerticalSlash(num_columns=4, num_diagonals=32, num_segments=8, tile_size=16)
    dense = find(detector, query, key, strict=strict, is_causal=is_causal, scale=0.5)[0, 0]
    # votes come from earlier segments, and reach as far back as those do
    first = 64 + offset if is_causal or strict else offset
    assert dense[number[first:], number[first:] - offset].all()
    assert dense.sum() <= (4 + 32 + 16) * 256


def test_a_diagonal_of_later_keys_is_held_without_a_causal_mask() -> None:
    direction = torch.randn(128, 64, generator=generator())
    direction = 8 * torch.nn.functional.normalize(direction, dim=-1)
    query, key = direction[32:].expand(1, 1, -1, -1), direction.expand(1, 1, -1, -1)
    detector = VerticalSlash(num_columns=4, num_diagonals=32, num_segments=8, tile_size=16)
    dense = detector.find(query, key, scale=0.5).to_dense()[0, 0]
    assert dense.diagonal(offset=32).all()


@MODES
def test_near_diagonals_are_left_to_others_on_request(is_causal: bool, strict: bool) -> None:
    query, key = tensors(num_queries=64, num_keys=64)
    held, far, columns = (
        find(
            SMALL.replace(min_offset=least, num_segments=16), query, key, strict=strict,
            is_causal=is_causal,
        )
        for least in (0, 12, 200)
    )  # fmt: skip
    row, place = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    is_near = (row // 4 * 4 - place).abs() < 8  # in runs of 4 keys that are near as a whole
    assert (held & ~columns & is_near).any()
    assert not (far & ~columns & is_near).any()
    assert (far & ~columns).any()


@finding_laws.at_any_cut
def test_no_later_key_moves_a_causal_row(
    num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    finding_laws.no_later_token_moves_a_row(
        lambda q, k: SMALL.find(q, k, is_causal=True, generator=generator(seed)),
        num_queries, num_keys, cut, seed, keys_only=True,
    )  # fmt: skip


@finding_laws.at_any_cut
def test_no_later_key_or_query_moves_a_strictly_causal_row(
    num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    finding_laws.no_later_token_moves_a_row(
        lambda q, k: SMALL.find_strict(q, k, is_causal=True, generator=generator(seed)),
        num_queries, num_keys, cut, seed, keys_only=False,
    )  # fmt: skip


@pytest.mark.parametrize("num_keys", [41, 48, 55])
def test_no_later_key_or_query_moves_a_row_wherever_they_begin(num_keys: int) -> None:
    """All rows vote, the first ones of tiles and segments too."""
    query, key = tensors(num_queries=48, num_keys=num_keys)
    detector = SMALL.replace(num_queries=12, num_columns=2, num_diagonals=20)
    before = find(detector, query, key, strict=True, is_causal=True)
    for cut in range(1, 48):
        changed = [query.clone(), key.clone()]
        changed[0][:, :, cut:] *= -50
        changed[1][:, :, max(0, cut + num_keys - 48) :] *= -50
        after = find(detector, *changed, strict=True, is_causal=True)
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])


def test_a_vote_of_a_first_row_counts_no_later_key() -> None:
    query, key = torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 8, 2)
    query[..., 4, 0], key[..., 1, 0] = 1.0, 20.0
    detector = VerticalSlash(
        num_columns=1, num_diagonals=1, num_queries=4, num_segments=2, tile_size=1
    )
    before = find(detector, query, key, strict=True, is_causal=True, scale=1.0)
    key[..., 5, 0] = 40.0
    after = find(detector, query, key, strict=True, is_causal=True, scale=1.0)
    assert torch.equal(before[:, :, :5], after[:, :, :5])


@pytest.mark.parametrize("num_earlier", [0, 3, 20])
def test_in_a_strict_rectangle_no_later_query_moves_a_row(num_earlier: int) -> None:
    finding_laws.no_later_query_moves_a_row_of_a_strict_rectangle(SMALL, num_earlier)


def test_what_is_near_in_a_rectangle_follows_its_place() -> None:
    query, key = tensors(num_queries=24, num_keys=32)
    detector = SMALL.replace(num_columns=1, num_diagonals=40, num_segments=1, min_offset=16)
    for begin in (32, 33, 40, 60):
        mask = detector.find_rectangle(query, key, query_start=begin + 7, key_start=7)
        row, place = mask.to_dense().any(dim=(0, 1)).nonzero().unbind(dim=-1)
        farthest = begin + row // 4 * 4 + 3 - place  # of the tile's rows from the key
        columns = detector.replace(min_offset=500).find(query, key).to_dense().any(dim=(0, 1))
        is_line = ~columns[row, place]
        # a run of 4 keys is left out where all of it is near
        assert farthest[is_line].min() >= 16 - 3
    everything = detector.replace(min_offset=0).find(query, key).to_dense()
    assert torch.equal(mask.to_dense(), everything)  # from 60 on nothing is near


@given(attention_inputs(), st.booleans(), st.booleans())
def test_any_input_gives_a_mask_and_shared_key_heads_are_as_repeated_ones(
    inputs: AttentionInputs, is_causal: bool, strict: bool
) -> None:
    finding_laws.shared_key_heads_are_as_repeated_ones(
        SMALL, inputs, is_causal=is_causal, strict=strict
    )


@given(num_queries=SIZES, num_keys=SIZES, seed=st.integers(0, 999), is_causal=st.booleans())
def test_a_row_holds_at_most_its_budget(
    num_queries: int, num_keys: int, seed: int, is_causal: bool
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    mask = SMALL.find(query, key, is_causal=is_causal, generator=generator(seed))
    own = SMALL.tile_size if is_causal else 0
    assert mask.to_dense().sum(-1).max() <= SMALL.num_columns + SMALL.num_diagonals + own
    for part in mask.parts():  # no key twice in a list
        index, count = part.key_index, part.key_count  # type: ignore[attr-defined]
        is_used = torch.arange(index.shape[-1]) < count.unsqueeze(-1)
        alone = torch.where(is_used, index, -1 - torch.arange(index.shape[-1])).sort().values
        assert (alone.diff() != 0).all()


def test_rows_that_do_not_vote_change_nothing_without_a_mask() -> None:
    query, key = tensors(num_queries=40)
    detector = SMALL.replace(num_segments=2, num_queries=2)
    voting = torch.tensor([5, 15, 25, 35])  # the middle of each half of each segment
    others = torch.tensor([row for row in range(40) if row not in voting])
    changed = query.clone()
    changed[:, :, others] = 7.0
    found = detector.find(query, key).to_dense()
    assert torch.equal(detector.find(changed, key).to_dense(), found)
    changed[:, :, 15] = 7.0
    assert not torch.equal(detector.find(changed, key).to_dense(), found)
    drawn = [detector.find(query, key, generator=generator(seed)).to_dense() for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@MODES
def test_segments_scored_one_by_one_are_the_same(
    is_causal: bool, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = tensors(num_queries=61, num_keys=75)
    whole = find(SMALL, query, key, strict=strict, is_causal=is_causal)
    for module in (votes_module, vertical_slash):
        monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    assert torch.equal(whole, find(SMALL, query, key, strict=strict, is_causal=is_causal))


def without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the implementations themselves, so that what they make is seen."""
    for name in ("column_votes", "line_votes"):
        monkeypatch.setattr(vertical_slash, name, getattr(votes_module, f"torch_{name}"))


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_intermediate_grows_with_the_square_of_the_length(
    is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (votes_module, vertical_slash):
        monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 15)
    without_operators(monkeypatch)
    detector = VerticalSlash(
        num_columns=16, num_diagonals=16, num_queries=4, num_segments=8, tile_size=16
    )
    finding_laws.no_intermediate_grows_with_the_square_of_the_length(
        partial(detector.find, is_causal=is_causal)
    )


@MODES
def test_no_value_is_read(is_causal: bool, strict: bool) -> None:
    """On the meta device there are none: a size that depends on one would raise."""
    query, key = (x.to("meta") for x in tensors(num_queries=50))
    method = SMALL.find_strict if strict else SMALL.find
    assert method(query, key, is_causal=is_causal).device.type == "meta"


# torch's own: its compiler makes an instance of the function to trace it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_finding_compiles_to_one_graph() -> None:
    finding_laws.finds_in_one_graph(partial(SMALL.find, is_causal=True))


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("strict", [False, True])
def test_with_all_columns_attention_is_exact(causal: str, strict: bool) -> None:
    detector = SMALL.replace(num_columns=4 * 45, num_segments=2)
    finding_laws.with_every_key_attention_is_exact(detector, causal, strict=strict)


def test_bad_options_are_refused_by_name() -> None:
    for name in (
        "num_columns", "num_diagonals", "num_queries", "num_segments", "tile_size", "near_queries",
        "min_segment",
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=f"vertical_slash: {name}=0"):
            VerticalSlash(**{name: 0})
        with pytest.raises(ArgumentTypeError, match=f"vertical_slash: {name}=2.5"):
            VerticalSlash(**{name: 2.5})
    for name in ("min_offset", "num_near"):
        with pytest.raises(ArgumentError, match=f"vertical_slash: {name}=-1"):
            VerticalSlash(**{name: -1})
