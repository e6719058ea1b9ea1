"""Error against cost: every detector x sampler x budget, measured on captured heads.

`hyperframe frontier` is the command line of this package. In Python:

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from hyperframe.integrations.capture import CapturedHeads, save
    >>> q, k, v = torch.randn(3, 1, 2, 256, 16, generator=torch.Generator().manual_seed(0))
    >>> heads = CapturedHeads(layer_idx=0, query=q, key=k, value=v, scale=0.25, is_causal=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "heads.safetensors"
    ...     save(file, {0: heads})
    ...     settings = FrontierSettings(
    ...         files=[file], detectors=["heavy_columns", "strided"], budgets=[64, 256],
    ...         num_samples=32, window=16, sinks=4, repeats=0)
    ...     rows = list(run(settings))
    >>> [(row["detector"], row["budget"]) for row in rows]
    [('heavy_columns', 64), ('heavy_columns', 256), ('strided', 64), ('strided', 256)]
    >>> rows[1]["error"]["median"] < 1e-5  # a budget of all keys
    True
"""

from .budgets import BUDGET_RULES, has_budget, with_budget
from .configurations import (
    CAUSAL,
    NO_DETECTOR,
    ORACLE,
    YARDSTICKS,
    Configuration,
    configurations,
    default_detectors,
    oracle_of,
)
from .measure import Cache, measure
from .oracle import TileOracle
from .problem import Problem, load_problem
from .report import check_plotting, pareto_front, plot_frontier, print_frontier
from .rows import FRONTIER_KEYS, KEY_FIELDS, known_rows
from .run import FrontierSettings, run

__all__ = [
    "BUDGET_RULES",
    "CAUSAL",
    "FRONTIER_KEYS",
    "KEY_FIELDS",
    "NO_DETECTOR",
    "ORACLE",
    "YARDSTICKS",
    "Cache",
    "Configuration",
    "FrontierSettings",
    "Problem",
    "TileOracle",
    "check_plotting",
    "configurations",
    "default_detectors",
    "has_budget",
    "known_rows",
    "load_problem",
    "measure",
    "oracle_of",
    "pareto_front",
    "plot_frontier",
    "print_frontier",
    "run",
    "with_budget",
]
