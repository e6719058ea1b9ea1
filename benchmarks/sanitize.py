"""Call every family of kernels once, forward and backward, for `compute-sanitizer` to watch.

    compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py --spec tiles --spec sort_lsh

Prints a line for each call, with the error of its output against the torch backend where both make
the same choice. Lengths are ragged and short: the tools take a hundred times the time.
"""

from __future__ import annotations

import argparse

import torch

from hyperframe import HyperAttention
from hyperframe.benchmarking.inputs import Shape, make_inputs
from hyperframe.benchmarking.methods import GivenTiles

CALLS = {
    "sort_lsh": (HyperAttention(detector="sort_lsh", min_seq_len=0), False),
    "recursion": (
        HyperAttention(detector="sort_lsh", causal="recursive", min_seq_len=256), True,
    ),
    "window": (HyperAttention(detector="sliding_window(width=96)", min_seq_len=0), True),
    "columns": (
        HyperAttention(detector="sliding_window | heavy_columns(num_columns=64)", min_seq_len=0),
        True,
    ),
    "balanced": (HyperAttention(detector="balanced", min_seq_len=0), True),
    "fast": (HyperAttention(detector="fast", min_seq_len=0), True),
}  # fmt: skip


def check(name: str, length: int, head_dim: int) -> None:
    shape = Shape(batch=1, heads=2, kv_heads=1, length=length, head_dim=head_dim)
    q, k, v = make_inputs("planted", shape, dtype=torch.bfloat16, device="cuda", seed=0)
    outputs = []
    for backend in ("triton", "torch"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        if name == "tiles":
            out = GivenTiles().prepare(q, k, backend=backend, seed=0)(*leaves)
        else:
            attention, is_causal = CALLS[name]
            out = attention.replace(backend=backend)(*leaves, is_causal=is_causal)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        outputs.append([x.detach().float() for x in (out, *gradients)])
    torch.cuda.synchronize()
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*outputs, strict=True)]
    print(f"{name:10s} n={length} d={head_dim} out, dq, dk, dv:", *(f"{x:.4f}" for x in errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["tiles", *CALLS]
    parser.add_argument("--spec", action="append", choices=names, help="default: all of them")
    parser.add_argument("--length", type=int, nargs="+", default=[1337])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    arguments = parser.parse_args()
    for name in arguments.spec or names:
        for length in arguments.length:
            for head_dim in arguments.head_dim:
                check(name, length, head_dim)


if __name__ == "__main__":
    main()
