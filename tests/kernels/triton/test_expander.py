"""The kernels of an ExpanderSketch against torch's operators; on a GPU, else interpreted."""

from __future__ import annotations

import os

import pytest
import torch

from hyperframe.kernels.ops import names as shapes
from hyperframe.sketching import clusters
from hyperframe.sketching.clusters import name_tables
from hyperframe.sketching.codes import CellCode
from hyperframe.sketching.expander_decoding import (
    EVEN,
    PLAIN,
    SHARE,
    heavy_names,
    torch_rows,
)
from hyperframe.sketching.expander_sketch import LAYERS, ExpanderSketch, name_bits

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import clusters as cluster_kernels  # noqa: E402
from hyperframe.kernels.triton import names as kernels  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
THRESHOLDS = (PLAIN, SHARE, EVEN)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole_columns(
    num_rows: int, tau: float, *, columns: int, heads: int = 1, heavy: int = 3, dim: int = 16,
    seed: int = 0,
) -> tuple[ExpanderSketch, torch.Tensor, torch.Tensor]:  # fmt: skip
    """A map, rows and keys of whole numbers, whose products are exact in every order."""
    g = generator(seed)
    x = torch.randint(-2, 3, (heads, num_rows, dim), generator=g).float()
    x *= torch.rand(x.shape, generator=g) < 300 / num_rows
    for head in range(heads):
        for j in range(dim):
            at = torch.randperm(num_rows, generator=g)[:heavy]
            x[head, at, j] = torch.randint(28, 36, at.shape, generator=g).float()
    one = ExpanderSketch.draw(
        heads, num_rows=num_rows, tau=tau, device=torch.device("cpu"), generator=g
    )
    key = torch.eye(dim)[torch.randint(dim, (heads, columns), generator=g)]
    return one, x, key + (torch.rand(key.shape, generator=g) < 0.03)


def rows_of_both(
    sketch: torch.Tensor, key: torch.Tensor, order: torch.Tensor, message: int, factor: float,
    capacity: int, num_rows: int, spectral: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rest = (message, factor, capacity, num_rows, spectral)
    found = cluster_kernels.triton_rows(
        key.to(DEVICE), sketch.to(DEVICE), order.to(DEVICE), *rest,
        CellCode(message=message).tables(DEVICE), name_tables(DEVICE), THRESHOLDS,
    )  # fmt: skip
    return found.cpu(), torch_rows(key, sketch, order, *rest)


def test_kernels_and_operators_agree_on_sizes() -> None:
    for name in ("LAYERS", "VERTICES", "NUM_OUTPUTS"):
        assert getattr(kernels, name) == getattr(shapes, name)
    for name in ("STEPS", "CUTS", "ITERATIONS", "LARGEST", "MOST"):
        assert getattr(cluster_kernels, name).value == getattr(clusters, name)


@pytest.mark.parametrize(
    "num_rows, tau, heads, dim", [(1, 1, 1, 3), (150, 2, 2, 16), (90, 9, 1, 40)]
)
def test_sums_are_those_of_torch(num_rows: int, tau: float, heads: int, dim: int) -> None:
    one, x, _ = whole_columns(num_rows, tau, columns=1, heads=heads, dim=dim, heavy=1)
    words = one.layout.code.words(one.layout.num_places, torch.device("cpu"))
    names = torch.stack([name_bits(words, layer) for layer in range(LAYERS)])
    strided = torch.nn.functional.pad(x, (2, 3)).to(DEVICE)[..., 2:-3]
    found = kernels.triton_name_sums(
        strided, one.sign_words.to(DEVICE), one.bucket_order.to(DEVICE), one.layout.num_buckets,
        words.to(DEVICE), names.to(DEVICE),
    )  # fmt: skip
    assert torch.equal(found.cpu(), one.apply(x))


def test_names_and_how_many_layers_hold_one() -> None:
    one, x, key = whole_columns(200, 2.0, columns=21)
    sketch = one.apply(x)
    word, count = kernels.triton_names(
        (key / 32).to(DEVICE), sketch.to(DEVICE), least=4, plain=PLAIN, share=SHARE, even=EVEN
    )
    value = torch.einsum("hjd,hbovd->hjbov", key / 32, sketch)
    expected = heavy_names(value)
    held = (expected > 0).unflatten(-1, (8, 8)).any(dim=-1).sum(dim=-1)
    assert torch.equal(count.cpu().long(), held)
    assert (held >= 4).any()
    is_kept = held >= 4
    assert torch.equal(word.cpu().long()[is_kept], expected[is_kept])


@pytest.mark.parametrize(
    "num_rows, tau, heads, columns, capacity",
    [(300, 2.0, 2, 4, 12), (70, 1.0, 1, 5, 1), (9_000, 1.0, 1, 3, 7), (1, 1.0, 1, 2, 1)],
)
def test_rows_are_those_of_torch_in_the_same_order(
    num_rows: int, tau: float, heads: int, columns: int, capacity: int
) -> None:
    heavy = 1 if num_rows == 1 else 4
    one, x, key = whole_columns(num_rows, tau, columns=columns, heads=heads, heavy=heavy)
    found, expected = rows_of_both(
        one.apply(x), key, one.bucket_order, one.layout.code.message, 1 / 32, capacity, num_rows,
        True,
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert (found >= 0).any()


@pytest.mark.parametrize("spectral", [False, True])
def test_joined_clusters_are_cut_alike(spectral: bool) -> None:
    """Vertices that say what pairs of words say, which meet in two layers, and mixtures there."""
    g, code, count = generator(1), CellCode(message=4), 7
    cells = torch.from_numpy(code.cells(4096))
    meets = ((cells == 0).sum(dim=-1) == 2).nonzero().squeeze(-1)
    sketch = torch.zeros(1, 1, 13, 64, count)
    for column in range(count):
        first = int(torch.randint(4096, (), generator=g))
        other = first ^ int(meets[torch.randint(len(meets), (), generator=g)])
        words = code.words(4096, torch.device("cpu"))[[first, other]]
        for layer in range(8):
            own, that = name_bits(words, layer).tolist()
            if cells[first, layer] == cells[other, layer]:
                mask = sum(7 << (3 * s) for s in range(4) if torch.rand((), generator=g) < 0.5)
                own = that = (own & mask) | (that & ~mask)
            for place, name in ((first, own), (other, that)):
                bits = torch.tensor([0, *(name >> b & 1 for b in range(11, -1, -1))])
                vertex = 8 * layer + int(cells[place, layer])
                sketch[0, 0, :, vertex, column] = 1.0 - 2 * bits
    key = torch.eye(count)[None]
    order = torch.arange(4096)[None]
    found, expected = rows_of_both(sketch, key, order, 4, 1.0, 8, 4096, spectral)
    assert torch.equal(found, expected)
    # the cuts, and they alone, find most of the two rows of each column
    assert ((found >= 0).sum() > 1.5 * count) == spectral


def test_no_columns_and_no_energy_give_no_rows() -> None:
    one, x, key = whole_columns(60, 2.0, columns=3)
    rest = (one.bucket_order, one.layout.code.message, 1 / 32, 5, 60, True)
    found, _ = rows_of_both(one.apply(x), key[:, :0], *rest)
    assert found.shape == (1, 0, 5)
    found, _ = rows_of_both(one.apply(x), 0 * key, *rest)
    assert (found == -1).all()
