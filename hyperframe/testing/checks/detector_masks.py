"""Checks of the masks that detectors return: one set of entries, however it is looked at."""

from __future__ import annotations

import torch

from ...budget import resolve_budget
from ...builder import build_plans
from ...detectors import AbstractDetector
from ...kernels import attend_all, available_backends
from ...masks import BandMask, EntryMask, HeavyMask
from ..oracles import masked_attention
from .detector_checks import causal_forms, find
from .problem import CheckSkippedError, Inputs, device, fail, generator, inputs, same_bits

__all__ = [
    "check_budget_is_kept",
    "check_dense_rows_and_nnz_agree",
    "check_plan_means_the_mask",
    "check_unions_obey_their_laws",
]


def check_dense_rows_and_nnz_agree(detector: AbstractDetector) -> None:
    """Chunks of rows, the dense mask and the number of entries are of one mask."""
    for is_causal in causal_forms(detector):
        mask = _mask(detector, is_causal)
        dense = mask.to_dense()
        chunks = [mask.rows(start, min(start + 7, 40)) for start in range(0, 40, 7)]
        if not same_bits(torch.cat(chunks, dim=2), dense):
            remedy = "let rows(start, stop) be rows of the whole mask"
            fail(detector, "rows in chunks", "other entries than to_dense()", remedy)
        nnz, want = mask.nnz(), dense.sum(dim=(-2, -1))
        if nnz.dtype != torch.int64 or not same_bits(nnz, want):
            found = f"{nnz.dtype} {nnz.tolist()}, where the dense mask holds {want.tolist()}"
            fail(detector, "nnz()", found, "count each entry once, without unused slots")


def check_unions_obey_their_laws(detector: AbstractDetector) -> None:
    """A union with itself is itself; with another mask it commutes and holds what either holds."""
    for is_causal in causal_forms(detector):
        mask = _mask(detector, is_causal)
        dense = mask.to_dense()
        if not same_bits((mask | mask).to_dense(), dense):
            fail(detector, "mask | mask", "another mask", "return one of hyperframe.masks")
        band = BandMask(
            batch_size=2, num_query_heads=4, num_queries=40, num_keys=40, is_causal=is_causal,
            left=2, right=1, num_sinks=1, on_device=mask.device,
        )  # fmt: skip
        want = dense | band.to_dense()
        for union in (mask | band, band | mask):
            same_count = same_bits(union.nnz(), want.sum(dim=(-2, -1)))
            if not same_bits(union.to_dense(), want) or not same_count:
                remedy = "hold an entry for the row and key it names, and nothing else"
                fail(detector, "a union with a band", "other entries than either's", remedy)


def check_plan_means_the_mask(detector: AbstractDetector) -> None:
    """Plans of the mask hold its entries, in the dense oracle and in every backend of the device.

    The kernels of a GPU compute in float32: they may be twice as far from the oracle as the torch
    backend in that precision is.
    """
    for is_causal in causal_forms(detector):
        x, mask = inputs(dtype=torch.float64), _mask(detector, is_causal, torch.float64)
        dense = mask.to_dense()
        # single entries share their tile's keys in a plan, which holds more
        parts = [p.to_lists() if isinstance(p, EntryMask) else p for p in mask.parts()]
        held = torch.stack([part.to_dense() for part in parts]).any(dim=0)
        plans = build_plans(mask, key_heads=2)
        weight = torch.stack([plan.to_dense() for plan in plans]).sum(dim=0)
        if not same_bits(weight, held.double()) or bool((dense & (weight == 0)).any()):
            found = f"{int((weight != held).sum())} entries with another weight"
            remedy = "let the keys of a list be distinct, and mark unused slots by the count"
            fail(detector, f"plans of its mask, is_causal={is_causal}", found, remedy)
        want = masked_attention(*x, held)
        single = Inputs(*(t.float() for t in x))
        for backend in _backends():
            y, allowed = (x, 1e-6) if backend in ("reference", "torch") else (single, 0.0)
            got = attend_all(*y, plans, scale=8**-0.5, backend=backend)
            plain = got if y is x else attend_all(*y, plans, scale=8**-0.5, backend="torch")
            for name in ("out", "lse"):
                a, b, c = (getattr(state, name).double() for state in (got, want, plain))
                if not allowed:
                    allowed = max(1e-5, 2 * float((c - b).nan_to_num().abs().max()))
                if not torch.allclose(a, b, rtol=allowed, atol=allowed):
                    found = f"{name} off by {float((a - b).nan_to_num().abs().max()):.2g}"
                    remedy = "compare mask.to_dense() with what you meant"
                    fail(detector, f"attention by its mask on {backend}", found, remedy)


def _backends() -> tuple[str, ...]:
    """Return the backends that run where the checks ask; none in an interpreter, which is slow."""
    on_cpu = device().type == "cpu"
    return tuple(name for name in available_backends(device()) if not (on_cpu and name == "triton"))


def check_budget_is_kept(detector: AbstractDetector) -> None:
    """Without a causal mask no row holds more keys than the parameter `row_budget` says."""
    if detector.row_budget is None:
        raise CheckSkippedError("row_budget is None: no parameter bounds the keys of a row")
    most = int(find(detector, inputs()).sum(dim=-1).max())
    allowed = resolve_budget(getattr(detector, detector.row_budget), 40)
    if most > allowed:
        remedy = "hold fewer, or set row_budget = None"
        fail(detector, f"{detector.row_budget}: at most {allowed} keys", f"{most}", remedy)


def _mask(
    detector: AbstractDetector, is_causal: bool, dtype: torch.dtype = torch.float32
) -> HeavyMask:
    x = inputs(dtype=dtype)
    return detector.find(x.query, x.key, is_causal=is_causal, generator=generator(1))
