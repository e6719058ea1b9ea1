"""Row oracles: scores against their definitions, what training learns, and files that are none."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.errors import ArgumentError, MissingDependencyError
from hyperframe.sketching.columns import ColumnProblem
from hyperframe.sketching.row_oracle import FEATURES, RowOracle, centred_norms, leverages
from hyperframe.sketching.row_oracle_file import load_oracle, save_oracle


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle(seed: int = 0, *, heads: int = 3, dim: int = 5) -> RowOracle:
    x = torch.randn(heads, 9, dim, generator=generator(seed))
    weight = torch.randn(heads, len(FEATURES), generator=generator(seed + 1))
    return RowOracle(moment=x.transpose(-1, -2) @ x, weight=weight, tau=32.0)


def aligned(seed: int, *, n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of norm 1, of which every tenth lies in the direction of most of the keys."""
    query = torch.randn(2, 4, n, 8, generator=generator(seed))
    query[..., 0] = 0.05
    query[:, :, ::10, 0] = 8
    query = torch.nn.functional.normalize(query, dim=-1)
    key = torch.randn(2, 2, n, 8, generator=generator(seed + 1))
    key[..., 0] += 6
    return query, key


@given(n=st.integers(1, 40), dim=st.integers(1, 8), seed=st.integers(0, 999))
def test_leverage_is_the_largest_share_of_a_column_and_no_key_gives_more(
    n: int, dim: int, seed: int
) -> None:
    query = torch.randn(2, n, dim, generator=generator(seed), dtype=torch.float64)
    found = leverages(query)
    # the ridge lets leverages only shrink, and the key (Q^T Q)^-1 q attains them
    best = torch.linalg.pinv(query)
    for key in (best, torch.randn(2, dim, 20, generator=generator(seed), dtype=torch.float64)):
        product = query @ key
        share = product.square() / product.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
        if key is best:
            expected = share.diagonal(dim1=1, dim2=2)
            assert (found <= expected + 1e-9).all()
            # 1 / (1 + ridge / s^2) of each direction: by its smallest singular value
            smallest = torch.linalg.svdvals(query)[..., -1]
            mean = query.square().sum(dim=(1, 2)) / dim
            loss = 1e-5 * mean / smallest.square().clamp(min=1e-12)
            assert (found >= expected - loss.unsqueeze(-1) - 1e-9).all()
        elif n >= dim:
            slack = 1e-5 * mean / smallest.square().clamp(min=1e-12)
            assert (share.amax(dim=-1) <= found + slack.unsqueeze(-1) + 1e-9).all()
    assert (found.sum(dim=-1) <= min(n, dim) + 1e-9).all()


def test_centred_norms_are_distances_from_the_mean() -> None:
    query = torch.randn(2, 30, 5, generator=generator(), dtype=torch.float64) + 4
    mean = query.mean(dim=1, keepdim=True).expand_as(query)
    expected = torch.cdist(query, mean)[..., 0].square()
    torch.testing.assert_close(centred_norms(query), expected)


def test_scores_are_the_formula_of_the_docstring() -> None:
    learned, query = oracle(), torch.randn(6, 20, 5, generator=generator(4)).double()
    found = learned.scores(query)
    for head in range(6):
        q, moment = query[head], learned.moment[head % 3].double()
        rows = torch.stack([
            torch.einsum("nd,de,ne->n", q, moment, q), (q - q.mean(dim=0)).norm(dim=1) ** 2,
            leverages(q[None])[0], torch.arange(1, 21).double(),
        ])  # fmt: skip
        logs = (rows / rows.mean(dim=1, keepdim=True)).log()
        torch.testing.assert_close(found[head], learned.weight[head % 3].double() @ logs)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_scale_of_queries_changes_no_score(factor: float) -> None:
    learned, query = oracle(), torch.randn(3, 20, 5, generator=generator(4)).double()
    torch.testing.assert_close(learned.scores(query * factor), learned.scores(query))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_scores_of_zeros_and_of_single_rows_are_finite(n: int) -> None:
    for query in (torch.zeros(3, n, 5), torch.ones(3, n, 5), torch.eye(n, 5).expand(3, n, 5)):
        assert oracle().scores(query).isfinite().all()
        assert leverages(query).isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_training_learns_directions_that_norms_do_not_show(is_causal: bool) -> None:
    pytest.importorskip("sklearn")
    problem = ColumnProblem.of(*aligned(0))
    learned = RowOracle.fit([problem], query_heads=4, tau=32, is_causal=is_causal)
    query = ColumnProblem.of(*aligned(7)).query
    best = learned.scores(query).topk(30, dim=-1).indices.sort(dim=-1).values
    share = (best % 10 == 0).double().mean()
    # under a causal mask late rows are worth more, and early heavy ones less
    assert share >= (0.9 if is_causal else 1.0)
    blind = centred_norms(query).topk(30, dim=-1).indices
    assert (blind % 10 == 0).double().mean() < 1


def test_training_is_deterministic_and_takes_several_texts() -> None:
    pytest.importorskip("sklearn")
    texts = [ColumnProblem.of(*aligned(seed, n=n)) for seed, n in ((0, 90), (3, 64))]
    options: dict[str, Any] = {"query_heads": 4, "tau": 16.0, "num_columns": 20}
    first, second = (RowOracle.fit(texts, **options) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != RowOracle.fit(texts[:1], **options)
    assert first.moment.shape == (4, 8, 8)
    torch.testing.assert_close(first.moment.diagonal(dim1=1, dim2=2).sum(-1), torch.ones(4))


def test_nothing_is_learned_from_nothing() -> None:
    pytest.importorskip("sklearn")
    problem = ColumnProblem.of(torch.zeros(1, 2, 9, 4), torch.ones(1, 2, 9, 4))
    with pytest.raises(ArgumentError, match=r"head 0 have no energy.*another text"):
        RowOracle.fit([problem], query_heads=2, tau=8)


def test_training_without_scikit_learn_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    problem = ColumnProblem.of(*aligned(0, n=20))
    with pytest.raises(MissingDependencyError, match=r"pip install 'hyperframe-attention\[sk"):
        RowOracle.fit([problem], query_heads=4, tau=8)


def test_a_file_gives_back_the_oracle_under_exactly_its_name(tmp_path: Path) -> None:
    learned, path = oracle(), tmp_path / "heads.oracle"
    save_oracle(path, learned)
    assert [file.name for file in tmp_path.iterdir()] == ["heads.oracle"]
    again = load_oracle(str(path))
    assert again == learned
    assert pickle.loads(pickle.dumps(again)) == learned
    assert torch.equal(again.scores(torch.ones(3, 4, 5)), learned.scores(torch.ones(3, 4, 5)))
    assert repr(again) == "<RowOracle of 3 query heads, head_dim 5, trained for tau=32>"
    assert again != 3


class Trap:
    """Fails the test if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was run",)


def arrays(**changes: Any) -> dict[str, Any]:
    learned = oracle()
    found = {
        "format": np.array("hyperframe row oracle"), "version": np.array(1),
        "features": np.array(FEATURES), "moment": learned.moment.numpy(),
        "weight": learned.weight.numpy(), "tau": np.array(learned.tau), **changes,
    }  # fmt: skip
    return {name: x for name, x in found.items() if x is not None}


def archive(**changes: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays(**changes))
    return file.getvalue()


def single(x: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


BAD_VALUE = oracle().weight.numpy().copy()
BAD_VALUE[1, 2] = np.nan


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "no .npz archive"),
        (b"not an archive", "no .npz archive"),
        (pickle.dumps(Trap()), "no .npz archive"),
        (single(np.ones(3)), "no .npz archive"),
        (archive(moment=np.array([Trap()], dtype=object)), "damaged or holds pickles"),
        (archive()[:-40], "no .npz archive|damaged"),
        (archive(format=None), "holds no row oracle .it has version, features"),
        (archive(format=np.array("another")), "holds no row oracle"),
        (archive(format=np.ones(2)), "holds no row oracle"),
        (archive(version=np.array(2)), "of version 2, this hyperframe reads version 1"),
        (archive(version=None), "of version None"),
        (archive(features=np.array(["share", "age"])), "of the features .'share', 'age'."),
        (archive(features=np.array(3)), "of the features"),
        (archive(tau=None), "without tau"),
        (archive(moment=np.ones((3, 5, 5))), "with arrays .*float64"),
        (archive(weight=np.ones(4, dtype=np.float32)), "with arrays"),
        (archive(weight=np.ones((2, 4), dtype=np.float32)), r"weight .* of shape \(2, 4\)"),
        (archive(moment=np.ones((3, 5, 4), dtype=np.float32)), r"moment .*\(3, 5, 4\)"),
        (archive(moment=np.ones((0, 5, 5), dtype=np.float32)), r"moment .*\(0, 5, 5\)"),
        (archive(weight=BAD_VALUE), "weight holds NaN or infinity"),
        (archive(tau=np.array(-1.0)), "tau=-1.0"),
    ],
)  # fmt: skip
def test_files_that_hold_no_oracle_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "heads.npz"
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=f"heads.npz: .*(?:{words})"):
        load_oracle(path)


def test_a_damaged_array_is_noticed(tmp_path: Path) -> None:
    content, path = bytearray(archive()), tmp_path / "heads.npz"
    where = content.find(oracle().moment.numpy().tobytes())
    content[where + 8] ^= 255
    path.write_bytes(bytes(content))
    with pytest.raises(ArgumentError, match="damaged"):
        load_oracle(path)


def test_a_file_that_is_not_there_or_a_folder_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"none.npz: cannot be read"):
        load_oracle(tmp_path / "none.npz")
    with pytest.raises(ArgumentError, match="cannot be read"):
        load_oracle(tmp_path)


@pytest.mark.parametrize("heads, dim", [(4, 5), (3, 6)])
def test_queries_of_another_layer_are_refused(heads: int, dim: int) -> None:
    with pytest.raises(ArgumentError, match=f"trained on 3 .* queries have {heads} .*={dim}"):
        oracle().check(heads, dim)
