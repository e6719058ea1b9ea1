"""ExpanderSketch: what is summed, what names say, and which rows come back."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom

from hyperframe.detectors.expander_sketch import distinct
from hyperframe.sketching.clusters import GRAPH
from hyperframe.sketching.expander_decoding import NAMED, expander_rows, heavy_names
from hyperframe.sketching.expander_sketch import ExpanderSketch, Layout

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(heads: int, num_rows: int, tau: float, seed: int = 0) -> ExpanderSketch:
    return ExpanderSketch.draw(
        heads, num_rows=num_rows, tau=tau, device=CPU, generator=generator(seed)
    )


def columns(
    num_heavy: int, *, heads: int, num_rows: int, tau: float, count: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of energy 1 with `num_heavy` entries at the bound, the rest normal; and where."""
    g = generator(seed)
    place = torch.rand(heads, count, num_rows, generator=g).argsort(dim=-1)[..., :num_heavy]
    sign = 1 - 2 * torch.randint(0, 2, place.shape, generator=g)
    x = torch.randn(heads, count, num_rows, generator=g).scatter_(-1, place, 0.0)
    x = x / x.norm(dim=-1, keepdim=True) * max(0.0, 1 - num_heavy / tau) ** 0.5
    return x.scatter(-1, place, sign * tau**-0.5), place


def found(one: ExpanderSketch, x: torch.Tensor, tau: float, **options: bool) -> torch.Tensor:
    """Candidates of columns `[heads, columns, n]`: the sketch of the columns, and unit keys."""
    key = torch.eye(x.shape[1], dtype=x.dtype).expand(x.shape[0], -1, -1)
    sketch = one.apply(x.transpose(1, 2))
    return expander_rows(one, sketch, key, tau=tau, capacity=int(3 * tau), **options)


def recall(rows: torch.Tensor, place: torch.Tensor) -> float:
    return float((rows.unsqueeze(-1) == place.unsqueeze(-2)).any(dim=-2).double().mean())


def names_by_hand(one: ExpanderSketch, head: int, row: int) -> list[tuple[int, int, list[int]]]:
    """For every layer the bucket of a row, its cell, and its cells in the neighbouring layers."""
    layout = one.layout
    position = one.bucket_order[head].tolist().index(row)
    bucket, place = divmod(position, layout.num_places)
    cell = layout.code.cells(place + 1)[place].tolist()
    return [(bucket, cell[k], [cell[other] for other in GRAPH.neighbours[k]]) for k in range(8)]


@pytest.mark.parametrize("num_rows, tau", [(1, 1), (20, 1), (65, 3), (300, 2.5)])
def test_counters_are_signed_sums_over_the_rows_of_a_cell(num_rows: int, tau: float) -> None:
    one = drawn(2, num_rows, tau)
    x = torch.randint(-9, 10, (2, num_rows, 3), generator=generator(1)).double()
    sums = torch.zeros(2, one.layout.num_buckets, 13, 8, 8, 3, dtype=torch.float64)
    for head in range(2):
        for row in range(num_rows):
            for k, (bucket, cell, near) in enumerate(names_by_hand(one, head, row)):
                bits = [other >> b & 1 for other in near for b in range(3)]
                sign = 1 - 2 * (int(one.sign_words[head, row]) >> k & 1)
                pattern = torch.tensor([sign, *(sign * (1 - 2 * bit) for bit in bits[::-1])])
                sums[head, bucket, :, k, cell] += pattern[:, None] * x[head, row]
    # small whole numbers: every sum is exact
    assert torch.equal(one.apply(x), sums.flatten(3, 4))


def test_the_sketch_is_linear_and_sketches_of_parts_add_up() -> None:
    one = drawn(3, 200, 4)
    x, y = torch.randint(-50, 51, (2, 3, 200, 5), generator=generator(1)).double().unbind()
    assert torch.equal(one.apply(2 * x + y), 2 * one.apply(x) + one.apply(y))
    first = torch.zeros_like(x)
    first[:, :77] = x[:, :77]
    assert torch.equal(one.apply(first) + one.apply(x - first), one.apply(x))


def test_few_heads_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = drawn(3, 100, 2), torch.randn(3, 100, 4, generator=generator())
    expected = one.apply(x)
    monkeypatch.setattr("hyperframe.sketching.expander_sketch._CHUNK_BYTES", 1)
    assert torch.equal(one.apply(x), expected)


def test_every_row_has_a_place_of_its_own_and_cells_are_filled_alike() -> None:
    for num_rows, tau in ((1, 1), (100, 1), (1000, 4), (5000, 64)):
        one = drawn(1, num_rows, tau)
        order = one.bucket_order[0]
        assert order[order < num_rows].sort().values.tolist() == list(range(num_rows))
        cells = torch.from_numpy(one.layout.code.cells(one.layout.num_places))
        for layer in range(8):
            assert cells[:, layer].bincount(minlength=8).unique().numel() == 1


def test_a_single_row_is_named_in_every_layer() -> None:
    one = drawn(1, 500, 4)
    sign = torch.tensor([1.0, -1.0]).repeat(7)
    x = torch.zeros(1, 500, 14)
    x[0, torch.arange(0, 500, 37), torch.arange(14)] = sign
    value = one.apply(x).permute(0, 4, 1, 2, 3)[0]  # [columns, buckets, 13, 64]
    said = heavy_names(value)
    for column, row in enumerate(range(0, 500, 37)):
        expected = torch.zeros_like(said[column])
        for k, (bucket, cell, near) in enumerate(names_by_hand(one, 0, row)):
            name = sum(other << (3 * place) for place, other in enumerate(near))
            expected[bucket, k * 8 + cell] = NAMED | name
        assert torch.equal(said[column], expected)


def test_two_rows_of_a_size_in_a_cell_say_nothing() -> None:
    """All but rows whose names differ in one bit or two: then one sum or two look as usual."""
    value = torch.ones(13, 64)
    bits = torch.randint(0, 2, (12, 64), generator=generator())
    value[1:] = 1.0 + (1 - 2.0 * bits)  # where names differ the sums are doubled or cancel
    differ = bits.sum(dim=0)
    said = heavy_names(2 * value / value.square().mean(dim=0).sqrt())
    assert (said[(differ > 2) & (differ < 10)] == 0).all()
    assert ((differ > 2) & (differ < 10)).sum() > 50


@pytest.mark.parametrize("num_rows, tau", [(1, 1), (9, 1), (100, 3), (257, 16), (700, 2)])
def test_rows_alone_in_their_column_always_come_back_alone(num_rows: int, tau: float) -> None:
    one = drawn(1, num_rows, tau, seed=2)
    rows = found(one, torch.eye(num_rows)[None] * tau**-0.5, tau)
    assert torch.equal(rows[0].amax(dim=-1), torch.arange(num_rows))
    assert ((rows >= 0).sum(dim=-1) == 1).all()


@pytest.mark.statistical
@pytest.mark.parametrize(
    "num_heavy, most",
    # what one map may miss: of one row at the bound in noise, and of tau rows that share all energy
    [(1, 0.01), (8, 0.01), (16, 0.03)],
)
def test_heavy_rows_come_back(num_heavy: int, most: float) -> None:
    """Over many maps 0.0, 0.15 and 0.63 % were missed; here at most `most` may be.

    If a map missed exactly that share, independently, the test would fail with a probability below
    1e-3: the bound is that quantile. (Rows of one column share their map, so the seeds are fixed.)
    """
    heads, count = 8, 64
    one = drawn(heads, 2048, 16, seed=5)
    x, place = columns(num_heavy, heads=heads, num_rows=2048, tau=16, count=count, seed=6)
    total = heads * count * num_heavy
    missed = round((1 - recall(found(one, x, 16), place)) * total)
    assert missed <= binom.isf(1e-3, total, most)


@pytest.mark.statistical
def test_cuts_find_half_of_what_is_missed_and_a_second_map_the_rest() -> None:
    """Fixed seeds; half of the energy is in 8 rows. Measured: 0.2, 0.1 and less than 0.002 %."""
    x, place = columns(8, heads=16, num_rows=2048, tau=16, count=64, seed=15)
    first, second = drawn(16, 2048, 16, seed=1), drawn(16, 2048, 16, seed=2)
    one = found(first, x, 16)
    both = distinct(torch.cat([one, found(second, x, 16)], dim=-1))
    whole, cut, twice = (
        round(place.numel() * (1 - recall(rows, place)))
        for rows in (found(first, x, 16, spectral=False), one, both)
    )
    # of 8192 rows
    assert whole > 1.4 * cut
    assert 0 < cut <= 0.004 * place.numel()
    # a share of 5e-5 gives 5 or more with a probability of 1e-4
    assert twice < 5


def test_candidates_are_distinct_and_of_too_many_the_first_buckets_stay() -> None:
    one = drawn(2, 512, 8)
    x, _ = columns(8, heads=2, num_rows=512, tau=8, count=20, seed=0)
    rows = found(one, x, 8)
    sketch, key = one.apply(x.transpose(1, 2)), torch.eye(20).expand(2, -1, -1)
    for row, order in zip(rows, one.bucket_order, strict=True):
        place = {int(i): p for p, i in enumerate(order)}
        for column in row.tolist():
            held = [i for i in column if i >= 0]
            assert len(held) == len(set(held))
            bucket = [place[i] // one.layout.num_places for i in held]
            assert bucket == sorted(bucket)
    few = expander_rows(one, sketch, key, tau=8, capacity=3)
    assert torch.equal(few, rows[..., :3])
    assert torch.equal(distinct(torch.tensor([3, -1, 3, 9])), torch.tensor([9, 3, -1, -1]))


def test_few_columns_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one = drawn(2, 300, 4)
    x, _ = columns(3, heads=2, num_rows=300, tau=4, count=30, seed=1)
    # whole numbers: products are the same however many columns there are
    x = (64 * x).round() / 64
    expected = found(one, x, 4)
    monkeypatch.setattr("hyperframe.sketching.expander_decoding._CHUNK_BYTES", 1)
    monkeypatch.setattr("hyperframe.sketching.expander_decoding._LEAST_COLUMNS", 7)
    assert torch.equal(found(one, x, 4), expected)


def test_columns_without_energy_have_no_candidates() -> None:
    assert (found(drawn(1, 300, 4), torch.zeros(1, 5, 300), 4) == -1).all()


@pytest.mark.parametrize("num_rows", [1, 2, 17, 4096, 65_536, 65_537, 1 << 20, 1 << 24])
@pytest.mark.parametrize("tau", [1, 16, 64])
def test_the_code_has_a_word_for_every_place(num_rows: int, tau: int) -> None:
    layout = Layout.of(num_rows, tau=tau, width=8)
    assert layout.num_buckets * layout.num_places >= num_rows
    assert layout.code.num_words >= layout.num_places
    # three missing symbols or one wrong one are put right
    assert layout.code.radius >= 3
    assert layout.num_buckets <= max(min(tau, -(-num_rows // 8)), -(-num_rows // 31_000))
    assert layout.num_outputs == 13 * 64 * layout.num_buckets
