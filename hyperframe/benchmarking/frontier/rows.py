"""The rows of a frontier: their keys, how they are made, and which are already in a file."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..row_files import read_rows
from ..timing import Failure
from .configurations import Configuration
from .problem import Problem

__all__ = ["FRONTIER_KEYS", "KEY_FIELDS", "is_done", "key_of", "known_rows", "make_row"]

_KEYS = {
    "file": "name of the file with the captured heads",
    "digest": "of its content, the first 12 digits of SHA-256",
    "n": "keys",
    "heads": "query heads",
    "detector": "as it was asked for; none is the window alone, tile_oracle the tile oracle",
    "budget": "keys that the detector aims at; null where it was measured as it is",
    "sampler": "as it was asked for",
    "num_samples": "sampled keys of a row, as asked for",
    "causal": "single_pass, recursive or none",
    "strict": "whether only earlier queries helped to choose",
    "window": "keys of the sliding window beside the detector",
    "sinks": "leading keys that every row holds",
    "tile_size": "as asked for; null leaves that of the detector",
    "min_seq_len": "longest exact leaf of the recursion",
    "seed": "of all draws",
    "device": "cpu or cuda",
    "backend": "as asked for",
}

KEY_FIELDS = tuple(_KEYS)
"""What makes two rows the same measurement, all of it."""

FRONTIER_KEYS: dict[str, str] = {
    **_KEYS,
    "layers": "the captured layers",
    "batch": "batch items",
    "kv_heads": "key and value heads",
    "head_dim": "d",
    "dtype": "of the captured tensors",
    "spec": "code that makes the attention again",
    "detector_spec": "the detector at its budget, without the window; null for the window alone",
    "keys": "keys held exactly by a row, mean over rows, heads and layers",
    "sampled_keys": "sampled keys that count for a row beside those, mean",
    "density": "keys over the keys that a row sees, means",
    "mass": "share of exact attention's mass that the keys hold, mean",
    "recall": "share of the 256 keys with the largest logits that are held, mean over 64 rows of "
    "each head; null in the recursion, which has no one mask",
    "error": "relative Frobenius error of a head's output: median, mean, p90, worst over heads and "
    "layers; worst_layer, worst_head",
    "lse_error": "median over rows of the absolute error of the natural log of the row sum; null "
    "where it is infinite, since rows hold no key",
    "ms": "milliseconds of one layer, medians: detect, plan, attend, total, exact (attention by "
    "the fastest exact kernel), layer, repeats; null where not timed",
    "oracle_error": "median error of the tile oracle with the same budget, tiles and samples; null "
    "where not asked for",
    "oracle_ratio": "the median error over that",
    "failure": "why the configuration could not be measured, or null",
    "refused": "whether that was a refusal by name, which stays as it is",
    "environment": "device, driver and versions",
    "time": "when the row was made, UTC",
}
"""The keys of a row and what they hold. Values that were not measured are null, never absent."""


def make_row(
    problem: Problem, configuration: Configuration, found: Mapping[str, Any] | Failure, *,
    backend: str, environment: Mapping[str, Any], oracle_row: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the row of a configuration: plain JSON values under `FRONTIER_KEYS`.

    Args:
        problem: what it was measured on.
        configuration: what was measured.
        found: what `measure` returned, or why it did not.
        backend: as asked for.
        environment: see `describe_environment`.
        oracle_row: the row of the tile oracle to compare with.
    """
    layer = problem.layers[0]
    row: dict[str, Any] = dict.fromkeys(FRONTIER_KEYS)
    row |= dataclasses.asdict(configuration)
    row |= {
        "file": problem.file, "digest": problem.digest, "n": problem.length,
        "heads": layer.query.shape[1], "device": layer.query.device.type, "backend": backend,
        "layers": [each.layer_idx for each in problem.layers], "batch": layer.query.shape[0],
        "kv_heads": layer.key.shape[1], "head_dim": layer.query.shape[-1],
        "dtype": str(layer.query.dtype).removeprefix("torch."), "environment": dict(environment),
        "refused": False,
        "time": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    if isinstance(found, Failure):
        return row | {"failure": found.reason, "refused": found.is_refusal}
    row |= found
    if oracle_row is not None and oracle_row["error"] is not None:
        row["oracle_error"] = best = oracle_row["error"]["median"]
        row["oracle_ratio"] = row["error"]["median"] / best if best > 0 else None
    return row


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what makes two rows the same measurement."""
    return tuple(row[name] for name in KEY_FIELDS)


def is_done(row: Mapping[str, Any], *, oracle: bool, timed: bool) -> bool:
    """Whether a row need not be measured again.

    One that failed is tried again, unless it was a refusal by name; one without times or without
    the oracle's error is measured again where these are asked for.
    """
    if row["failure"] is not None:
        return bool(row["refused"])
    return (not timed or row["ms"] is not None) and (not oracle or row["oracle_error"] is not None)


def known_rows(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows of a JSON-lines file by `key_of`, the last of each; no file is no rows.

    Raises:
        ArgumentError: a line is no JSON object.
    """
    return {key_of(row): row for row in read_rows(path, FRONTIER_KEYS)}
