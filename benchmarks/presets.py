"""Times of attentions as CUDA graphs, beside SDPA's cuDNN kernel: shorter than `hyperframe bench`.

For each length and head size one row for every spec: milliseconds of a causal forward, and of
forward and backward (`--backward`), finding included, replayed in turn with the exact kernel; and
the relative error of the output in 512 random rows of each head. No gate: the suite `presets` of
`hyperframe bench` has the gates and eager times, and takes minutes to compile. `--profile` prints
what the kernels of a forward take.

    python benchmarks/presets.py --spec fast --spec balanced --length 32768 131072 \
        --head-dim 64 128 --out rows.jsonl
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from hyperframe import HyperAttention
from hyperframe.benchmarking.accuracy import sampled_error
from hyperframe.benchmarking.baselines import exact_candidates
from hyperframe.benchmarking.environment import describe_environment
from hyperframe.benchmarking.inputs import Shape, make_inputs
from hyperframe.benchmarking.report import append_rows
from hyperframe.benchmarking.timing import Candidate, Failure, capture, measure

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def calls(attend: Any, context: Any, inputs: Tensors, *, backward: bool) -> dict[str, Candidate]:
    """Return what is timed of one attention: a forward, and forward with backward."""
    found = {"forward": Candidate(lambda: attend(*inputs), context)}
    if backward:
        leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
        gradient = torch.randn_like(inputs[0])
        found["forward + backward"] = Candidate(
            lambda: torch.autograd.grad(attend(*leaves), leaves, gradient), context
        )
    return found


def kernels_of(call: Candidate) -> dict[str, float]:
    """Return the milliseconds of the kernels of a call, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda row: -row.device_time_total)
    return {
        f"{row.key.partition('(')[0][-40:]} ({row.count})": row.device_time_total / 1000
        for row in kernels[:24] if row.device_time_total > 8
    }  # fmt: skip


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--spec", action="append", required=True, help="a detector or a preset")
    parser.add_argument("--length", nargs="+", type=int, default=[131072])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, help="as many as --heads")
    parser.add_argument("--inputs", default="planted", choices=("planted", "normal"))
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.3, help="for the repeats of each call")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda")
    for length in options.length:
        for head_dim in options.head_dim:
            for row in rows(length, head_dim, options, device):
                if options.out:
                    append_rows(options.out, [row])


def rows(
    length: int, head_dim: int, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Measure everything at one length and head size."""
    shape = Shape(
        batch=1, heads=options.heads, kv_heads=options.kv_heads or options.heads, length=length,
        head_dim=head_dim,
    )  # fmt: skip
    dtype = torch.bfloat16
    inputs = make_inputs(options.inputs, shape, dtype=dtype, device=device, seed=0)
    exact = exact_candidates(shape, is_causal=True, dtype=dtype, device=device)["sdpa-cudnn"]
    if isinstance(exact, Failure):
        raise SystemExit(exact.reason)
    attentions: dict[str, tuple[Any, Any]] = {"cudnn": exact}
    for spec in options.spec:
        attention = HyperAttention(detector=spec, num_samples=options.num_samples, min_seq_len=0)
        attentions[spec] = (
            lambda *x, attention=attention: attention(*x, is_causal=True), nullcontext
        )  # fmt: skip
    captured, errors = {}, {}
    for name, (attend, context) in attentions.items():
        timed = calls(attend, context, inputs, backward=options.backward)
        out = timed["forward"]()
        errors[name] = sampled_error(*inputs, out, is_causal=True, seed=0)
        for what, call in timed.items():
            captured[f"{name}: {what}"] = capture(call)
    times = measure(captured, device=device, seconds=options.seconds)
    found = []
    for name in attentions:
        row: dict[str, Any] = {
            "what": "CUDA graphs", "spec": name, "is_causal": True, "n": length, "batch": 1,
            "heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": head_dim,
            "dtype": "bfloat16", "inputs": options.inputs, "num_samples": options.num_samples,
            "error_median": errors[name].median, "error_worst": errors[name].worst,
            "is_finite": errors[name].is_finite, **describe_environment(device),
        }  # fmt: skip
        line = f"n={length} d={head_dim} {name[:60]}: error {errors[name].median:.4f}"
        for what in ("forward", "forward + backward"):
            time, base = times.get(f"{name}: {what}"), times.get(f"cudnn: {what}")
            if time is None:
                continue
            if isinstance(time, Failure) or isinstance(base, Failure) or base is None:
                raise SystemExit(f"{name}, {what}: {time}, exact {base}")
            row[what] = time.as_dict() | {"speedup": base.median_ms / time.median_ms}
            line += f"; {what} {time.median_ms:.3f} ms ({base.median_ms / time.median_ms:.1f}x)"
        print(line, flush=True)
        if options.profile:
            row["kernels"] = kernels_of(captured[f"{name}: forward"])
            print("   ", "; ".join(f"{k} {ms:.3f}" for k, ms in row["kernels"].items()), flush=True)
        found.append(row)
    return found


if __name__ == "__main__":
    main()
