"""Reports on captured heads: which entries detectors hold, and what that costs in accuracy.

`hyperframe report` is the command line of this package. In Python:

    >>> import tempfile, torch
    >>> from hyperframe.integrations.capture import CapturedHeads
    >>> q, k, v = torch.randn(3, 1, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    >>> heads = CapturedHeads(layer_idx=0, query=q, key=k, value=v, scale=0.4, is_causal=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = report({0: heads}, out=folder, specs=["heavy_columns(num_columns=64)"],
    ...                   figures=["heads"])
    ...     [file.name for file in made.files]
    ['index.html', 'heads.png', 'rows.jsonl']
    >>> errors = [row["value"] for row in made.rows if row["quantity"] == "error"]
    >>> max(errors) < 1e-5  # all 64 columns are held
    True

Every number of a figure is a row (`ROW_KEYS`), and figures are drawn from the rows alone.
"""

from .rows import ROW_KEYS
from .run import Progress, Report, measure, report, source_of, write
from .settings import DEFAULT_SPECS, FIGURES, ReportSettings

__all__ = [
    "DEFAULT_SPECS",
    "FIGURES",
    "ROW_KEYS",
    "Progress",
    "Report",
    "ReportSettings",
    "measure",
    "report",
    "source_of",
    "write",
]
