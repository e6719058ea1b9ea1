"""All levels of the recursion at once, on a GPU: nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hyperframe.attention import HyperAttention
from hyperframe.detectors.sort_lsh import SortLSH
from hyperframe.testing import dense_attention

pytestmark = pytest.mark.gpu


@pytest.fixture
def waiting_restored() -> Iterator[None]:
    """Whatever a test sets, operations may wait again after it."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("length", [2048, 1999])
def test_masks_plans_and_draws_of_all_levels_wait_for_nothing(
    length: int, waiting_restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperframe import pipeline

    plans: list[object] = []

    def keep(query, key, value, made, **options):  # type: ignore[no-untyped-def]
        plans.append(made)
        return options  # what attends is tested by itself

    monkeypatch.setattr(pipeline, "attend_all", keep)
    query, key, value = (
        torch.randn(2, heads, length, 64, device="cuda", dtype=torch.bfloat16)
        for heads in (4, 2, 2)
    )
    call = HyperAttention(
        detector="sort_lsh(block_size=64)", num_samples=64, min_seq_len=256, causal="recursive"
    )

    def build() -> None:
        # what follows the plans fails on the stand-in: the plans are there by then
        with pytest.raises(AttributeError):
            call(query, key, value, is_causal=True)
        with pytest.raises(AttributeError):
            call(query, key, value)

    build()  # tables are made, kernels compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    build()
    torch.cuda.set_sync_debug_mode("default")
    assert len(plans) == 4
    for made in plans:
        for plan in made:  # type: ignore[attr-defined]
            plan.validate()


@pytest.mark.parametrize("shape", [(300, 300), (257, 300), (300, 257)])
def test_levels_that_hold_everything_are_exact_attention(shape: tuple[int, int]) -> None:
    query = torch.randn(2, 4, shape[0], 32, device="cuda")
    key, value = torch.randn(2, 2, 2, shape[1], 32, device="cuda").unbind()
    call = HyperAttention(
        detector=SortLSH(block_size=512), min_seq_len=32, causal="recursive", backend="torch"
    )
    out, lse = call(query, key, value, is_causal=True, return_lse=True)
    expected = dense_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out.double(), expected.out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-4, atol=1e-4)
