"""The numba decoder of an ExpanderSketch: the same rows as torch's, whatever the threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperframe.detectors.expander_sketch import ExpanderSketch as Detector
from hyperframe.errors import UnsupportedError
from hyperframe.sketching.clusters import GRAPH
from hyperframe.sketching.codes import CellCode
from hyperframe.sketching.expander_decoding import expander_rows, torch_rows
from hyperframe.sketching.expander_sketch import ExpanderSketch

pytest.importorskip("numba")

from hyperframe.sketching import numba_expander
from hyperframe.sketching.numba_expander import numba_rows

CPU = torch.device("cpu")


def whole_columns(
    num_rows: int, tau: float, *, columns: int = 24, heads: int = 2, heavy: int = 4, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[ExpanderSketch, torch.Tensor, torch.Tensor]:  # fmt: skip
    """A map, a sketch and keys of whole numbers, whose products are exact in every order.

    A column is one of 16 sums with `heavy` rows that have about the size 32 amid small ones; a few
    columns add two of them, so that clusters meet.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (heads, num_rows, 16), generator=g).to(dtype)
    x *= torch.rand(x.shape, generator=g) < 300 / num_rows
    for head in range(heads):
        for j in range(16):
            at = torch.randperm(num_rows, generator=g)[:heavy]
            x[head, at, j] = torch.randint(28, 36, at.shape, generator=g).to(dtype)
    one = ExpanderSketch.draw(heads, num_rows=num_rows, tau=tau, device=CPU, generator=g)
    key = torch.eye(16, dtype=dtype)[torch.randint(16, (heads, columns), generator=g)]
    key += (torch.rand(key.shape, generator=g) < 0.03).to(dtype)
    return one, one.apply(x), key


def arguments(
    one: ExpanderSketch, *, capacity: int, spectral: bool
) -> tuple[torch.Tensor, int, float, int, int, bool]:
    return one.bucket_order, one.layout.code.message, 1 / 32, capacity, one.num_rows, spectral


@settings(max_examples=max(25, settings.default.max_examples))
@given(
    num_rows=st.integers(1, 900), tau=st.sampled_from([1.0, 2.5, 6.0]), heavy=st.integers(0, 12),
    capacity=st.sampled_from([1, 5, 40]), spectral=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_numba_finds_what_torch_finds_in_the_same_order(
    num_rows: int, tau: float, heavy: int, capacity: int, spectral: bool, seed: int
) -> None:
    one, sketch, key = whole_columns(num_rows, tau, heavy=heavy, seed=seed)
    rest = arguments(one, capacity=capacity, spectral=spectral)
    expected = torch_rows(key, sketch, *rest)
    assert torch.equal(numba_rows(key, sketch, *rest), expected)


def crowded_sketch(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Sketches `[1, 1, 13, 64, count]` of columns where two words of the code meet in two layers.

    The names of these layers are a mixture of both, so that most of the clusters are joined.
    """
    g = torch.Generator().manual_seed(seed)
    code = CellCode(message=4)
    cells = torch.from_numpy(code.cells(4096))
    meets = ((cells == 0).sum(dim=-1) == 2).nonzero().squeeze(-1)
    sketch = torch.zeros(1, 1, 13, 64, count, dtype=dtype)
    for column in range(count):
        first = int(torch.randint(4096, (), generator=g))
        other = first ^ int(meets[torch.randint(len(meets), (), generator=g)])
        for layer in range(8):
            for place in (first, other):
                name = 0
                is_shared = cells[first, layer] == cells[other, layer]
                for s, near in enumerate(GRAPH.neighbours[layer]):
                    coin = int(torch.randint(2, (), generator=g))
                    who = (first, other)[coin] if is_shared else place
                    name |= int(cells[who, near]) << (3 * s)
                bits = torch.tensor([0, *(name >> b & 1 for b in range(11, -1, -1))])
                vertex = 8 * layer + int(cells[place, layer])
                sketch[0, 0, :, vertex, column] = (1 - 2 * bits).to(dtype)
    return sketch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuts_agree_and_find_rows_that_joined_clusters_hide(dtype: torch.dtype) -> None:
    sketch = crowded_sketch(150, dtype)
    key = torch.eye(150, dtype=dtype)[None]
    found = []
    for spectral in (False, True):
        rest = (torch.arange(4096)[None], 4, 1.0, 8, 4096, spectral)
        found.append(torch_rows(key, sketch, *rest))
        assert torch.equal(numba_rows(key, sketch, *rest), found[-1])
    without, cut = ((rows >= 0).sum() for rows in found)
    assert without < 150 < 250 < cut


def test_codes_of_all_sizes_agree() -> None:
    for num_rows, message in ((9_000, 5), (4_000, 4)):
        one, sketch, key = whole_columns(num_rows, 1.0, columns=6, heads=1, heavy=2)
        assert one.layout.code.message == message
        rest = arguments(one, capacity=9, spectral=True)
        expected = torch_rows(key, sketch, *rest)
        assert (expected >= 0).any()
        assert torch.equal(numba_rows(key, sketch, *rest), expected)


def test_threads_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, sketch, key = whole_columns(700, 3.0, columns=70)
    rest = arguments(one, capacity=12, spectral=True)
    expected = numba_rows(key, sketch, *rest)
    monkeypatch.setattr(numba_expander, "num_threads", lambda: 3)
    monkeypatch.setattr(numba_expander, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(numba_expander, "_LEAST_COLUMNS", 11)
    assert torch.equal(numba_rows(key, sketch, *rest), expected)


def test_no_columns_give_no_rows() -> None:
    one, sketch, key = whole_columns(100, 2.0)
    found = expander_rows(one, sketch, key[:, :0], tau=2, capacity=5, decoder="numba")
    assert found.shape == (2, 0, 5)


def test_the_detector_finds_the_same_with_both_decoders() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 500, 16, generator=g), torch.randn(1, 2, 60, 16, generator=g)
    query[:, :, ::50] *= 8
    found = []
    for decoder in ("torch", "numba"):
        detector = Detector(tau=6, search="sketch", decoder=decoder)
        mask = detector.find(query, key, generator=torch.Generator().manual_seed(1))
        found.append(mask.to_dense())
    assert found[0].any()
    # the products of many columns at once differ by roundings from those of few
    assert (found[0] ^ found[1]).sum() <= 1e-3 * found[0].sum()


def test_numba_where_it_does_not_run_is_an_error() -> None:
    query = torch.empty(1, 1, 300, 8, device="meta")
    with pytest.raises(UnsupportedError, match=r"decoder='numba' runs on a CPU"):
        Detector(tau=2, search="sketch", decoder="numba").find(query, query)
