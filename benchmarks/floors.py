"""What the memory of a GPU allows: the gathers and additions of a plan with nothing else.

Runs, for the causal plan of the suite `tiles` and for the blocks of sort_lsh (b = m = 256), kernels
that only read the rows of K and V that the lists name (what a forward has to read), or only add to
the gradients of those keys (what a backward by tiles has to add), in float32 and in float16. No
attention kernel that works tile by tile can be faster. The milliseconds stand beside those of the
attention kernels in docs/notes/triton.md.

    python benchmarks/floors.py --out benchmarks/results/floors-h100.jsonl
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from exact import milliseconds
from kernels import PLANS, plan_of

from hyperframe.benchmarking.report import append_rows
from hyperframe.kernels.triton.arguments import view_of


@triton.jit
def gather_kernel(
    k_ptr, v_ptr, index_ptr, count_ptr, out_ptr, num_keys, num_tiles, list_slots, count_step,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up all rows of K and V that a tile's list names: float32 `[heads, tiles, D]`."""
    program = tl.program_id(0).to(tl.int64)
    head = program // num_tiles
    dim = tl.arange(0, D)
    count = tl.load(count_ptr + program * count_step)
    total = tl.zeros([BLOCK_N, D], tl.float32)
    for start in range(0, count, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        key = tl.load(index_ptr + program * list_slots + slot, mask=slot < count, other=0)
        row = (head * num_keys + key)[:, None] * D + dim[None, :]
        total += tl.load(k_ptr + row).to(tl.float32) + tl.load(v_ptr + row).to(tl.float32)
    tl.store(out_ptr + program * D + dim, tl.sum(total, 0))


@triton.jit
def scatter_kernel(
    dk_ptr, dv_ptr, index_ptr, count_ptr, num_keys, num_tiles, list_slots, count_step,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add 1 to all rows of dK and dV that a tile's list names."""
    program = tl.program_id(0).to(tl.int64)
    head = program // num_tiles
    dim = tl.arange(0, D)
    count = tl.load(count_ptr + program * count_step)
    ones = tl.full([BLOCK_N, D], 1.0, dk_ptr.dtype.element_ty)
    for start in range(0, count, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        used = (slot < count)[:, None] & (dim >= 0)[None, :]
        key = tl.load(index_ptr + program * list_slots + slot, mask=slot < count, other=0)
        row = (head * num_keys + key)[:, None] * D + dim[None, :]
        tl.atomic_add(dk_ptr + row, ones, mask=used, sem="relaxed")
        tl.atomic_add(dv_ptr + row, ones, mask=used, sem="relaxed")


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for head_dim in options.head_dims:
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (1, options.heads, options.length, head_dim)
        query, key, value = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
            for _ in range(3)
        )
        sums = {
            width: [torch.zeros(shape, device="cuda", dtype=dtype) for _ in range(2)]
            for width, dtype in ((4, torch.float32), (2, torch.float16))
        }
        for plan_name in PLANS:
            plan = plan_of(plan_name, query, key)
            view = view_of(plan, query)
            index, counts = view.lists["index_ptr"].contiguous(), view.lists["counts_ptr"]
            programs = options.heads * view.num_tiles
            step = counts.numel() // programs
            out = torch.empty((programs, head_dim), device="cuda")
            listed = int(counts.reshape(programs, step)[:, 0].sum())
            sizes = (options.length, view.num_tiles, index.shape[-1], step)
            gathered = (key, value, index, counts, out, *sizes)
            scattered = {width: (*both, index, counts, *sizes) for width, both in sums.items()}
            calls: dict[str, tuple[Callable[[], object], int]] = {
                name: (functools.partial(
                    kernel[(programs,)], *arguments, D=head_dim, BLOCK_N=64, num_warps=4
                ), width)
                for name, kernel, arguments, width in (
                    ("gather", gather_kernel, gathered, 2),
                    ("scatter", scatter_kernel, scattered[4], 4),
                    ("scatter half", scatter_kernel, scattered[2], 2),
                )
            }  # fmt: skip
            for kernel, (call, width) in calls.items():
                taken = milliseconds(call, options.repeats)
                moved = 2 * width * head_dim * listed
                row = {
                    "plan": plan_name, "kernel": kernel, "n": options.length,
                    "heads": options.heads, "head_dim": head_dim, "ms": taken, "bytes": moved,
                    "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                    "triton": triton.__version__,
                }  # fmt: skip
                rows.append(row)
                rate = moved / taken / 1e9
                print(f"{head_dim:>4} {plan_name:<7}{kernel:<13}{taken:>7.3f} ms {rate:6.2f} TB/s")
    if options.out:
        append_rows(options.out, rows)


if __name__ == "__main__":
    main()
