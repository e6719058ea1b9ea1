"""Times of the sketching detectors by stage, their recall and memory, and attention with them.

For each length one row for every detector and kind of inputs: milliseconds of `find` (median of a
few calls), of its stages (of one more call: columns of energy 1, the sketch, rows of the exact
test, candidates, the exact test, lists), peak memory on top of the inputs, and the share of the
heavy entries of some columns, by float64, that a search of these columns finds. Then one row for
the whole attention with that detector: milliseconds of a forward, not causal, whether the output is
finite, and its relative error on some rows against exact attention. On a GPU exact attention
(SDPA's cuDNN, not causal) stands beside: measured up to 262,144 rows, beyond that extrapolated by
`n^2`, which its row says.

Inputs: `planted` (see `hyperframe.benchmarking.inputs`), whose columns spread their energy over 512
rows and more, so that nothing is heavy; and `uneven`, normal ones whose queries have Pareto norms.

    python benchmarks/sketch_times.py --device cuda --out benchmarks/results/sketch-times-h100.jsonl
    python benchmarks/sketch_times.py --device cpu --lengths 300 --heads 2 --tau 2
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperframe.attention import HyperAttention
from hyperframe.benchmarking.environment import describe_environment
from hyperframe.benchmarking.inputs import Shape, make_inputs
from hyperframe.benchmarking.report import append_rows
from hyperframe.detectors import create
from hyperframe.detectors.entry_detector import AbstractEntryDetector
from hyperframe.kernels.sketch import runs_kernels
from hyperframe.sketching.columns import ColumnProblem, exact_rows
from hyperframe.sketching.entries import entry_mask, verified

LENGTHS = (131_072, 524_288, 1_048_576)
EXACT_LENGTHS = (131_072, 262_144)
DETECTORS = ("count_sketch", "expander_sketch")
PRINTED = {
    "peak_mib": "{:.0f} MiB", "recall": "recall {:.4f}", "heavy_entries": "of {}",
    "wrong_entries": "wrong {}", "error": "error {:.3f}", "faster_than_exact": "{:.2f}x exact",
}  # fmt: skip
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Clock:
    """Milliseconds of calls: events of the device, read at the end; on a CPU the time."""

    def __init__(self, device: torch.device) -> None:
        """Begin with no calls."""
        self.device = device
        self.marks: list[tuple[str, Any, Any]] = []

    def __call__(self, name: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what the call returns."""
        start, stop = self._now(), None
        out = call(*args, **options)
        stop = self._now()
        self.marks.append((name, start, stop))
        return out

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def totals(self) -> dict[str, float]:
        """Return the sum of each name."""
        found: dict[str, float] = {}
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for name, start, stop in self.marks:
            is_event = self.device.type == "cuda"
            spent = start.elapsed_time(stop) if is_event else 1e3 * (stop - start)
            found[name] = found.get(name, 0.0) + spent
        return found


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Return the median of some calls, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        clock = Clock(device)
        clock("call", call)
        times.append(clock.totals()["call"])
    return statistics.median(times)


def inputs_of(kind: str, length: int, options: argparse.Namespace) -> Tensors:
    """Return query, key and value."""
    shape = Shape(batch=1, heads=options.heads, kv_heads=options.heads, length=length, head_dim=64)
    device = torch.device(options.device)
    name = "planted" if kind == "planted" else "normal"
    query, key, value = make_inputs(name, shape, dtype=options.dtype, device=device, seed=0)
    if kind == "uneven":
        g = torch.Generator(device).manual_seed(1)
        norm = torch.rand((length, 1), generator=g, device=device) ** -0.6
        query = (query * norm).to(query.dtype)
    return query, key, value


def stages_of(
    detector: AbstractEntryDetector, query: torch.Tensor, key: torch.Tensor
) -> dict[str, float]:
    """Return the milliseconds of the stages of `find`, which is written out here."""
    clock, num_queries, num_keys = Clock(query.device), query.shape[2], key.shape[2]
    tau = detector._tau(num_queries)
    generator = torch.Generator(query.device).manual_seed(0)
    with torch.no_grad():
        problem = clock("columns", ColumnProblem.of, query, key)
        search, size = clock("sketch", detector._search, problem, tau, generator)
        exact, factor = problem.query, torch.ones((), device=query.device)
        if runs_kernels(problem.key):
            exact, factor = clock("exact rows", exact_rows, query)
        limit = max(1, int(min(num_queries, tau * 1.001)))
        heads = problem.query.shape[0]
        step = max(1, detector._bytes(query.device) // (heads * (size + 120 * limit)))
        found = []
        for part in problem.key.split(step, dim=1):
            rows = clock("candidates", search, part)
            found.append(clock("exact test", verified, exact, part * factor, rows, tau=tau,
                               limit=limit))  # fmt: skip
        row = torch.cat([entries.row.int() for entries in found], dim=1)
        logit = torch.cat([entries.logit.float() for entries in found], dim=1)
        clock("lists", entry_mask, row, logit, batch_size=query.shape[0], num_queries=num_queries,
              is_causal=False, tile_size=detector.tile_size,
              max_keys=detector._max_keys(num_queries, num_keys))  # fmt: skip
    return clock.totals()


def recall_of(
    detector: AbstractEntryDetector, query: torch.Tensor, key: torch.Tensor, tau: float
) -> dict[str, Any]:
    """Return how many of the heavy entries of 64 columns of each head a search of these finds.

    Entries within 1e-4 of the bound are not counted.
    """
    count = min(64, key.shape[2])
    column = torch.linspace(0, key.shape[2] - 1, count, device=key.device).long()
    part = key[:, :, column]
    generator = torch.Generator(query.device).manual_seed(0)
    mask = detector.find(query, part, generator=generator).to_dense()
    heavy = held = wrong = 0
    for head in range(query.shape[1]):
        square = (query[0, head].double() @ part[0, head].double().T).square()
        share = tau * square / square.sum(dim=0, keepdim=True)
        is_heavy = share >= 1 + 1e-4
        heavy += int(is_heavy.sum())
        held += int((is_heavy & mask[0, head]).sum())
        wrong += int((mask[0, head] & (share < 1 - 1e-4)).sum())
    return {
        "columns": count * query.shape[1], "heavy_entries": heavy,
        "recall": held / heavy if heavy else None, "wrong_entries": wrong,
    }  # fmt: skip


def error_of(out: torch.Tensor, tensors: Tensors) -> float:
    """Return the relative error of 32 rows of each head, exact ones computed in float32."""
    query, key, value = tensors
    row = torch.linspace(0, query.shape[2] - 1, min(32, query.shape[2]), device=out.device).long()
    error = norm = 0.0
    for head in range(query.shape[1]):
        logit = query[0, head, row].float() @ key[0, head].float().T / query.shape[-1] ** 0.5
        exact = logit.softmax(dim=-1) @ value[0, head].float()
        error += float((out[0, head, row].float() - exact).square().sum())
        norm += float(exact.square().sum())
    return (error / norm) ** 0.5


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """Return the most memory that is held while a call runs, on top of what was held before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def find_row(name: str, tensors: Tensors, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of a detector."""
    query, key, _ = tensors
    detector = create(f"{name}(tau={options.tau}, search='sketch')")
    assert isinstance(detector, AbstractEntryDetector)

    def find() -> Any:
        return detector.find(query, key, generator=torch.Generator(query.device).manual_seed(0))

    repeats = options.repeats if query.shape[2] < 1_000_000 else 1
    return {
        "what": "find", "ms": milliseconds(find, query.device, repeats), "repeats": repeats,
        "peak_mib": peak_mib(find, query.device),
        "stages_ms": stages_of(detector, query, key),
        **recall_of(detector, query, key, float(options.tau)),
    }  # fmt: skip


def attention_row(name: str, tensors: Tensors, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of attention with a detector, which chooses how to search."""
    spec = f"{name}(tau={options.tau})"
    attention = HyperAttention(detector=spec, min_seq_len=0, seed=0)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attention(*tensors)

    device = tensors[0].device
    repeats = options.repeats if tensors[0].shape[2] < 1_000_000 else 1
    ms = milliseconds(forward, device, repeats)
    peak = peak_mib(forward, device)
    out = forward()
    return {
        "what": "attention", "ms": ms, "repeats": repeats, "peak_mib": peak,
        "is_finite": bool(torch.isfinite(out).all()), "error": error_of(out, tensors),
    }  # fmt: skip


def exact_row(tensors: Tensors) -> dict[str, Any]:
    """Return the row of exact attention."""

    def attend() -> torch.Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return F.scaled_dot_product_attention(*tensors)

    return {"what": "exact", "ms": milliseconds(attend, tensors[0].device, 2), "repeats": 2,
            "is_extrapolated": False}  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """Return what is printed of a row."""
    found = f"{row['what']:>10} {row['n']:>8} {row['inputs']:>8} {row['method']:>16}"
    if "failed" in row:
        return f"{found} {row['failed']}"
    found += f" {row['ms']:>9.1f} ms"
    for field, text in PRINTED.items():
        if row.get(field) is not None:
            found += ", " + text.format(row[field])
    if row.get("is_extrapolated"):
        found += " (extrapolated)"
    if "stages_ms" in row:
        found += "\n" + " " * 20
        found += ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items())
    return found


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure everything, printing rows as they come; what fails is a row that says so."""
    device, begin, rows = torch.device(options.device), time.perf_counter(), []
    environment = describe_environment(device)
    exact: dict[int, float] = {}

    def add(what: str, method: str, kind: str, length: int, make: Callable[[], Any]) -> None:
        row = {"what": what, "method": method, "inputs": kind, "n": length,
               "heads": options.heads, "head_dim": 64, "tau": options.tau,
               "dtype": str(options.dtype).removeprefix("torch.")}  # fmt: skip
        spent = time.perf_counter() - begin
        if spent > options.limit:
            row["failed"] = f"not begun: {spent:.0f} s had passed"
        else:
            try:
                row |= make()
            except Exception as error:  # the other rows are still wanted
                traceback.print_exc(limit=4)
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if length in exact and "ms" in row and what != "exact":
                row["faster_than_exact"] = exact[length] / row["ms"]
        rows.append({**row, **environment})
        print(line(row), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    for length in EXACT_LENGTHS if device.type == "cuda" else ():
        tensors = inputs_of("planted", length, options)
        add("exact", "cudnn", "planted", length, functools.partial(exact_row, tensors))
        exact |= {length: rows[-1]["ms"]} if "ms" in rows[-1] else {}
        del tensors
    for length in options.lengths:
        if exact and length not in exact:
            base = max(exact)
            exact[length] = exact[base] * (length / base) ** 2
            made = {"ms": exact[length], "is_extrapolated": True, "measured_at": base}
            add("exact", "cudnn", "planted", length, made.copy)
        for kind in ("planted", "uneven"):
            tensors = inputs_of(kind, length, options)
            for name in options.detectors:
                find = functools.partial(find_row, name, tensors, options)
                add("find", name, kind, length, find)
                attention = functools.partial(attention_row, name, tensors, options)
                add("attention", name, kind, length, attention)
                del find, attention
            del tensors
    print(f"{time.perf_counter() - begin:.0f} s in all")
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tau", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=110, help="seconds; no row begins later")
    parser.add_argument("--out", type=Path, help="append the rows to this JSON-lines file")
    options = parser.parse_args(arguments)
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    rows = run(options)
    if options.out:
        append_rows(options.out, rows)


if __name__ == "__main__":
    main()
