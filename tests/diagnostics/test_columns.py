"""alpha: the largest column of the softmax matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.diagnostics import alpha
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.testing.strategies import AttentionInputs, attention_inputs
from tests.diagnostics import dense


@given(attention_inputs(), st.booleans(), st.sampled_from([None, 1.5, -0.5]), st.data())
def test_alpha_is_n_times_the_largest_squared_column(
    inputs: AttentionInputs, is_causal: bool, scale: float | None, data: st.DataObject
) -> None:
    query, key, _ = inputs
    skip_first = data.draw(st.integers(0, key.shape[2] - 1))
    found = alpha(query, key, scale=scale, is_causal=is_causal, skip_first=skip_first)
    expected = dense.alpha(query, key, skip_first, scale=scale, is_causal=is_causal)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_known_matrices_have_known_alphas(n: int) -> None:
    query = torch.eye(n).view(1, 1, n, n).double()
    same = torch.ones_like(query)
    # uniform attention; a key of its own for every query; one key for all
    assert alpha(query, same).item() == pytest.approx(1.0)
    assert alpha(query, 1000 * query, scale=1.0).item() == pytest.approx(n)
    sink = torch.zeros_like(query)
    sink[:, :, 0] = 1000.0
    assert alpha(same, sink, scale=1.0).item() == pytest.approx(n * n)
    # without the sink, all that is left is uniform and small
    if n > 1:
        assert alpha(same, sink, scale=1.0, skip_first=1).item() == pytest.approx(0.0)
    # uniform over prefixes: the first key has 1, 1/2, 1/3, ...
    prefixes = sum(1 / i**2 for i in range(1, n + 1))
    assert alpha(query, same, is_causal=True).item() == pytest.approx(n * prefixes)


@given(attention_inputs(structures=["plain", "duplicates"]), st.booleans())
def test_a_shift_of_all_keys_is_not_seen(inputs: AttentionInputs, is_causal: bool) -> None:
    query, key, _ = inputs
    shifted = key + 30 * torch.randn_like(key[:, :, :1])
    torch.testing.assert_close(
        alpha(query, shifted, is_causal=is_causal), alpha(query, key, is_causal=is_causal),
        rtol=1e-9, atol=0,
    )  # fmt: skip


@given(attention_inputs())
def test_alpha_bounds_the_frobenius_norm(inputs: AttentionInputs) -> None:
    query, key, _ = inputs
    total = dense.softmax(query, key).square().sum(dim=(-2, -1))
    assert (total <= alpha(query, key) * (1 + 1e-9)).all()


def test_rows_before_all_keys_count_nothing() -> None:
    query, key = torch.zeros(1, 1, 9, 2), torch.zeros(1, 1, 2, 2)
    # rows 7 and 8 see one and two keys
    assert alpha(query, key, is_causal=True).item() == 2 * (1 + 0.25)


def test_at_least_one_column_stays() -> None:
    x = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ArgumentError, match="skip_first=4: leaves none of the 4 columns"):
        alpha(x, x, skip_first=4)
    with pytest.raises(ArgumentError, match="skip_first=-1"):
        alpha(x, x, skip_first=-1)
    with pytest.raises(ArgumentTypeError, match="skip_first"):
        alpha(x, x, skip_first=1.0)
