"""Which of PyTorch's exact kernels is the fastest: cuDNN, flash or SDPA's own choice.

Prints milliseconds of forward and backward for the shapes that leaves of the causal recursion
make (runs of 512 to 4,096 rows of one sequence of 12 heads x 131,072 rows) and for the whole
sequence, with the largest error of `out` and `lse` against float64 on some rows. The order in
`hyperframe.kernels.fused_kernels.choose` follows this table.

    python benchmarks/exact.py --out benchmarks/results/exact-h100.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperframe.benchmarking.report import append_rows
from hyperframe.kernels import fused_kernels

LEAVES = (512, 1024, 2048, 4096)
KERNELS = ("cudnn", "flash", "chosen", "sdpa", "sdpa cudnn", "sdpa flash")
FORCED = {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}
Pair = tuple[Callable[[], Any], Callable[[], Any]]


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the median time on the device of some calls after two to warm up."""
    times = []
    for call in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        if call >= 2:
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def by_name(name: str, tensors: list[torch.Tensor], options: dict[str, Any]) -> Pair:
    """Return forward and backward of a kernel as functions without arguments."""
    if name.startswith("sdpa"):
        order = [FORCED[name]] if name in FORCED else None
        inputs = [x.detach().requires_grad_() for x in tensors]

        def attend() -> torch.Tensor:
            if order is None:
                return F.scaled_dot_product_attention(*inputs, **options)
            with sdpa_kernel(order):
                return F.scaled_dot_product_attention(*inputs, **options)

        out = attend()
        grad_out = torch.randn_like(out)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return attend()

        return forward, lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)
    kernels = None if name == "chosen" else (name,)
    out, lse = fused_kernels.forward(*tensors, **options, kernels=kernels)
    grad_out = torch.randn_like(out)
    return (
        lambda: fused_kernels.forward(*tensors, **options, kernels=kernels),
        lambda: fused_kernels.backward(grad_out, *tensors, out, lse, **options, kernels=kernels),
    )


def largest_errors(
    tensors: list[torch.Tensor], out: torch.Tensor, lse: torch.Tensor, options: dict[str, Any]
) -> tuple[float, float]:
    """Compare some rows of two heads with float64."""
    rows = torch.linspace(0, out.shape[2] - 1, 33, device=out.device).long()
    q, k, v = (x[:1, :2].double() for x in tensors)
    logits = options["scale"] * q[:, :, rows] @ k.mT
    if options["is_causal"]:
        places = torch.arange(k.shape[2], device=out.device)
        logits = logits.masked_fill(places > rows[:, None], float("-inf"))
    exact_out, exact_lse = logits.softmax(-1) @ v, logits.logsumexp(-1)
    return (
        float((out[:1, :2, rows] - exact_out).abs().max()),
        float((lse[:1, :2, rows] - exact_lse).abs().max()),
    )


def problems(length: int, heads: int) -> list[tuple[int, int, bool]]:
    """Return batch * heads, rows and causality of every problem."""
    leaves = [(heads * length // leaf, leaf, True) for leaf in LEAVES if leaf <= length]
    return [*leaves, (heads, length, True), (heads, length, False)]


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    print(
        f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, "
        f"{torch.cuda.get_device_name()}, SDPA's order {torch._C._get_sdp_priority_order()}"
    )
    print(
        f"{'b*h':>6} {'n':>7} {'d':>4} causal  {'kernel':<11} {'fwd ms':>8} {'bwd ms':>8}  errors"
    )
    results = []
    for head_dim in options.head_dims:
        for entries, rows, is_causal in problems(options.length, options.heads):
            shape = (entries // options.heads, options.heads, rows, head_dim)
            dtype = getattr(torch, options.dtype)
            tensors = [torch.randn(shape, device="cuda").to(dtype) for _ in range(3)]
            call = {"scale": head_dim**-0.5, "is_causal": is_causal}
            for name in KERNELS:
                row = {
                    "kernel": name, "entries": entries, "n": rows, "head_dim": head_dim,
                    "is_causal": is_causal, "dtype": options.dtype, "torch": torch.__version__,
                    "cudnn": torch.backends.cudnn.version(),
                    "device": torch.cuda.get_device_name(),
                }  # fmt: skip
                label = f"{entries:>6} {rows:>7} {head_dim:>4} {is_causal!s:<6}  {name:<11}"
                try:
                    forward, backward = by_name(name, tensors, call)
                    row["forward_ms"] = milliseconds(forward, options.repeats)
                    row["backward_ms"] = milliseconds(backward, options.repeats)
                    errors = ""
                    if not name.startswith("sdpa"):
                        found = largest_errors(tensors, *forward(), call)
                        row["out_error"], row["lse_error"] = found
                        errors = "{:.1e} {:.1e}".format(*found)
                except RuntimeError as error:  # a kernel that refuses is a result too
                    print(f"{label} refused: {str(error).splitlines()[0][:80]}", flush=True)
                    continue
                print(
                    f"{label} {row['forward_ms']:>8.3f} {row['backward_ms']:>8.3f}  {errors}",
                    flush=True,
                )
                results.append(row)
    if options.out:
        append_rows(options.out, results)


if __name__ == "__main__":
    main()
