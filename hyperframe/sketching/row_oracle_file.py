"""Row oracles as files: plain arrays in NumPy's `.npz`, never pickles."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentError
from .row_oracle import FEATURES, RowOracle

__all__ = ["load_oracle", "save_oracle"]

_FORMAT = "hyperframe row oracle"
_VERSION = 1
_ARRAYS = ("moment", "weight", "tau")
_REMEDY = "make it with LearnedCountSketch.fit(query, key, path=...)"


def save_oracle(path: Path | str, oracle: RowOracle) -> None:
    """Write an oracle to a file.

    Args:
        path: the file, by convention `.npz`; overwritten, and named exactly so.
        oracle: the oracle.
    """
    import numpy as np

    # an open file: np.savez changes names that do not end in .npz
    with open(path, "wb") as file:
        np.savez(
            file, format=np.array(_FORMAT), version=np.array(_VERSION),
            features=np.array(FEATURES), moment=oracle.moment.cpu().numpy(),
            weight=oracle.weight.cpu().numpy(), tau=np.array(oracle.tau),
        )  # fmt: skip


def load_oracle(path: Path | str) -> RowOracle:
    """Read what `save_oracle` wrote.

    Args:
        path: the file.

    Raises:
        ArgumentError: there is no such file, or it holds something else, is damaged, or was made
            by a version with other features.
    """
    found = _arrays(path)
    if str(found.get("format")) != _FORMAT:
        names = ", ".join(found) or "nothing"
        raise ArgumentError(f"{path}: holds no row oracle (it has {names}); {_REMEDY}")
    version = str(found.get("version"))
    if version != str(_VERSION):
        raise ArgumentError(
            f"{path}: is a row oracle of version {version}, this hyperframe reads version "
            f"{_VERSION}; train it again, or install the hyperframe that made it"
        )
    features = tuple(map(str, found["features"].ravel())) if "features" in found else ()
    if features != FEATURES:
        raise ArgumentError(
            f"{path}: is a row oracle of the features {features}, this hyperframe has {FEATURES}; "
            "train it again"
        )
    missing = [name for name in _ARRAYS if name not in found]
    if missing:
        raise ArgumentError(f"{path}: is a row oracle without {', '.join(missing)}; {_REMEDY}")
    kinds = {name: found[name].dtype.str for name in _ARRAYS}
    sizes = tuple(found[name].ndim for name in _ARRAYS)
    if kinds != {"moment": "<f4", "weight": "<f4", "tau": "<f8"} or sizes != (3, 2, 0):
        shapes = {name: (str(found[name].dtype), found[name].shape) for name in _ARRAYS}
        raise ArgumentError(f"{path}: is a row oracle with arrays {shapes}; {_REMEDY}")
    try:
        return RowOracle(
            moment=torch.from_numpy(found["moment"]), weight=torch.from_numpy(found["weight"]),
            tau=float(found["tau"]),
        )  # fmt: skip
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from error


def _arrays(path: Path | str) -> dict[str, Any]:
    import numpy as np

    try:
        # np.load reads .npy and, if it may, pickles as well: only archives are opened
        with open(path, "rb") as file:
            is_archive = zipfile.is_zipfile(file)
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not is_archive:
        raise ArgumentError(f"{path}: is no .npz archive; {_REMEDY}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        # an array of objects is a pickle; or the archive is damaged
        raise ArgumentError(
            f"{path}: is damaged or holds pickles ({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
