"""The command `hyperframe bench`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer

from ..attention import HyperAttention
from ..benchmarking import (
    ERROR_BOUNDS,
    SUITES,
    AbstractMethod,
    Settings,
    SpecMethod,
    append_rows,
    check_plotting,
    custom_suite,
    failed_gates,
    plot_rows,
    print_report,
    run_suite,
    suite,
)
from ..component import check_choice
from ..errors import ArgumentError
from .codes import ExitCode
from .output import echo_json
from .parsing import check_out, check_plot, device_of, integers
from .progress import shown_progress

__all__ = ["EXAMPLES", "bench"]

EXAMPLES = """Examples:

hyperframe bench --device cpu --lengths 1024,2048

hyperframe bench --spec 'heavy_columns(num_columns=256)' --causal recursive --inputs normal

hyperframe bench --suite sort_lsh --suite tiles --out rows.jsonl --plot bench.png

hyperframe bench --suite short --forward-only --json"""

_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "float64": torch.float64,
}  # fmt: skip


# Optional[...] and not `| None`: typer reads these annotations on Python 3.10 too
def bench(
    suites: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        "--suite", help=f"What to measure, may be repeated: {', '.join(SUITES)}.")] = None,
    specs: Annotated[Optional[list[str]], typer.Option(  # noqa: UP045
        "--spec", help="Measure this detector instead, for example 'sort_lsh(block_size=128)'; "
        "may be repeated.")] = None,
    causal: Annotated[str, typer.Option(
        help="With --spec: none, single_pass or recursive.")] = "none",
    num_samples: Annotated[int, typer.Option(help="With --spec: sampled keys.")] = 256,
    sampler: Annotated[str, typer.Option(help="With --spec: the sampler.")] = "uniform",
    estimator: Annotated[str, typer.Option(help="With --spec: the estimator.")] = "uniform",
    min_seq_len: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="With --spec: longest exact leaf of the recursion, 512 unless given; in the other "
        "forms the length up to which exact attention answers, 0 unless given.")] = None,
    lengths: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Lengths n, separated by commas.")] = None,
    head_dim: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Head dimensions, separated by commas.")] = None,
    heads: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="Query heads; 12 on a GPU, 4 elsewhere.")] = None,
    kv_heads: Annotated[Optional[int], typer.Option(  # noqa: UP045
        help="Key heads; as many as query heads unless given.")] = None,
    batch: Annotated[int, typer.Option(help="Batch items.")] = 1,
    dtype: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help=f"{', '.join(_DTYPES)}; bfloat16 on a GPU, float32 elsewhere.")] = None,
    device: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help="Where to run; a GPU if there is one.")] = None,
    backend: Annotated[str, typer.Option(help="Backend of the approximation.")] = "auto",
    inputs: Annotated[Optional[str], typer.Option(  # noqa: UP045
        help=f"Kind of inputs: {', '.join(ERROR_BOUNDS)}.")] = None,
    max_error: Annotated[Optional[float], typer.Option(  # noqa: UP045
        help="Relative error above which no speed-up is reported; 0.5 on planted inputs.")] = None,
    seed: Annotated[int, typer.Option(help="Of inputs and draws.")] = 0,
    forward_only: Annotated[bool, typer.Option(
        "--forward-only", help="Leave out forward + backward.")] = False,
    graphs: Annotated[Optional[bool], typer.Option(  # noqa: UP045
        "--graphs/--no-graphs", help="Also time replays of CUDA graphs.")] = None,
    stages: Annotated[Optional[bool], typer.Option(  # noqa: UP045
        "--stages/--no-stages", help="Also time the stages of a forward.")] = None,
    flush: Annotated[bool, typer.Option(
        "--flush-l2", help="Start every repeat with a cold L2 cache.")] = False,
    seconds: Annotated[Optional[float], typer.Option(  # noqa: UP045
        "--budget-seconds", help="For the repeats of each timed function; 0.5 on a GPU, 0.2 "
        "elsewhere.")] = None,
    out: Annotated[Optional[Path], typer.Option(  # noqa: UP045
        help="Append the rows to this JSON-lines file.")] = None,
    plot: Annotated[Optional[Path], typer.Option(  # noqa: UP045
        help="Draw ms against n into this file.")] = None,
    as_json: Annotated[bool, typer.Option(
        "--json", help="Print a JSON array of the rows instead of a table.")] = False,
) -> None:  # fmt: skip
    """Time attention beside the exact kernels, with the error beside every time.

    No speed-up is reported where the accuracy gate of the same run fails. Ctrl-C keeps what was
    measured.
    """
    where = device_of(device)
    on_gpu = where.type == "cuda"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    check_choice("bench", "dtype", dtype, tuple(_DTYPES))
    settings = Settings(
        device=where, dtype=_DTYPES[dtype], lengths=integers("--lengths", lengths),
        head_dims=integers("--head-dim", head_dim), batch=batch,
        heads=heads or (12 if on_gpu else 4), kv_heads=kv_heads, backend=backend, seed=seed,
        inputs=inputs, max_error=max_error, forward_only=forward_only, graphs=graphs,
        stages=stages, flush=flush,
        seconds=(0.5 if on_gpu else 0.2) if seconds is None else seconds,
    )  # fmt: skip
    if specs and suites:
        raise ArgumentError("--spec and --suite: give one of them; a suite names its own specs")
    if specs:
        methods = tuple(
            _method(spec, causal, num_samples, sampler, estimator, min_seq_len) for spec in specs
        )
        chosen = [custom_suite(methods)]
    else:
        chosen = [suite(name) for name in suites or ["overview"]]
    if out is not None:
        check_out(out)
    if plot is not None:
        check_plot(plot)
        check_plotting()
    everything: list[dict[str, Any]] = []
    is_whole = False
    with contextlib.suppress(KeyboardInterrupt):
        for each in chosen:
            rows: list[dict[str, Any]] = []
            try:
                with shown_progress(is_shown=sys.stderr.isatty()) as progress:
                    progress(0, None, each.name)
                    for row in run_suite(each, settings):
                        rows.append(row)
                        everything.append(row)
                        if out is not None:
                            append_rows(out, [row])
                        progress(len(rows), None, f"{each.name}: n = {row['n']}, {row['label']}")
            finally:  # also what is there when Ctrl-C comes
                if rows and not as_json:
                    print_report(rows)
        is_whole = True
    if as_json:
        echo_json(everything)
    if plot is not None and everything:
        plot_rows(plot, everything)
    if not is_whole:
        typer.echo(f"interrupted after {len(everything)} rows", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED)
    if failed_gates(everything):
        raise typer.Exit(ExitCode.GATE_FAILED)


def _method(
    spec: str, causal: str, num_samples: int, sampler: str, estimator: str, min_seq_len: int | None
) -> AbstractMethod:
    check_choice("bench", "causal", causal, ("none", "single_pass", "recursive"))
    if min_seq_len is None:
        min_seq_len = 512 if causal == "recursive" else 0
    attention = HyperAttention(
        detector=spec, sampler=sampler, estimator=estimator, num_samples=num_samples,
        causal="single_pass" if causal == "none" else causal, min_seq_len=min_seq_len,
    )  # fmt: skip
    label = spec if causal == "none" else f"{spec}, {causal}"
    return SpecMethod(label=label, is_causal=causal != "none", attention=attention)
