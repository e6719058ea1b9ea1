"""Measuring attention: times and errors side by side with the exact kernels.

`hyperframe bench` is the command line of this package; `hyperframe frontier` is that of
`hyperframe.benchmarking.frontier`, errors on captured heads. In Python:

    >>> import torch
    >>> from hyperframe.benchmarking import Settings, run_suite, suite
    >>> settings = Settings(
    ...     device=torch.device("cpu"), dtype=torch.float32, lengths=(512,), heads=1,
    ...     forward_only=True, stages=False, seconds=0.01)
    >>> rows = list(run_suite(suite("sort_lsh"), settings))
    >>> sorted({row["kind"] for row in rows})
    ['approximate', 'exact', 'masked']
"""

from .accuracy import exact_rows, kernel_error, sampled_error
from .inputs import ERROR_BOUNDS, Shape, make_inputs
from .methods import AbstractMethod, GivenTiles, SpecMethod, tile_plan
from .report import (
    append_rows,
    break_even,
    check_plotting,
    failed_gates,
    plot_rows,
    print_report,
)
from .rows import MODES, ROW_KEYS
from .run import run_suite
from .settings import Settings
from .suites import SUITES, Suite, custom_suite, suite
from .timing import Candidate, Timing, measure

__all__ = [
    "ERROR_BOUNDS",
    "MODES",
    "ROW_KEYS",
    "SUITES",
    "AbstractMethod",
    "Candidate",
    "GivenTiles",
    "Settings",
    "Shape",
    "SpecMethod",
    "Suite",
    "Timing",
    "append_rows",
    "break_even",
    "check_plotting",
    "custom_suite",
    "exact_rows",
    "failed_gates",
    "kernel_error",
    "make_inputs",
    "measure",
    "plot_rows",
    "print_report",
    "run_suite",
    "sampled_error",
    "suite",
    "tile_plan",
]
