"""What there is to run on: versions, extras, GPUs, and backends that are tried, not believed."""

from __future__ import annotations

import ctypes
import importlib
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from . import _DISTRIBUTION

__all__ = ["CORE", "EXTRAS", "extras", "gpus", "plugins", "try_backends", "version", "versions"]

CORE = {"torch": "2.11", "numpy": "2.0"}
"""Packages that are always needed -> the oldest version known to work."""

EXTRAS: dict[str, dict[str, str]] = {
    "triton": {"triton": "3.6"},
    "numba": {"numba": "0.61"},
    "sklearn": {"scikit-learn": "1.6"},
    "hf": {"transformers": "5", "accelerate": "1.1", "gguf": "0.17", "safetensors": "0.5"},
    "cli": {"typer": "0.15", "rich": "13"},
    "plot": {"matplotlib": "3.9"},
    "eval": {"rouge": "1.0.1"},
}
"""Extra of our distribution -> its packages, each with the oldest version known to work."""

_USES = {
    "triton": "fused kernels on NVIDIA GPUs",
    "numba": "the decoder of expander sketches on a CPU",
    "sklearn": "learned sketches",
    "hf": "models of transformers; hyperframe capture, eval and tune",
    "cli": "all commands but doctor",
    "plot": "pictures: hyperframe report, --plot",
    "eval": "summaries scored by hyperframe eval",
}

# float32 on 64 tokens is off by 1e-6, products in TF32 by 1e-3; a kernel that is wrong by far more
_LARGEST_ERROR = 1e-2


def version(name: str) -> str | None:
    """Return the version of a distribution, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of every package that matters, core and extras."""
    names = [*CORE, *(name for packages in EXTRAS.values() for name in packages)]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def extras() -> list[dict[str, Any]]:
    """Return the extras, each with what it lacks and the line that installs it.

    `missing` are packages that are not installed, `too_old` those below the oldest version known
    to work; `install` is None where neither is.
    """
    found = []
    for extra, packages in EXTRAS.items():
        if extra == "triton" and platform.system() != "Linux":
            continue
        missing = [name for name in packages if version(name) is None]
        too_old = old_ones(packages)
        line = f"pip install '{_DISTRIBUTION}[{extra}]'" if missing or too_old else None
        found.append(
            {
                "extra": extra, "for": _USES[extra], "missing": missing, "too_old": too_old,
                "install": line,
            }
        )  # fmt: skip
    return found


def old_ones(packages: dict[str, str]) -> list[str]:
    """Return which of some installed packages are below their floor, in words."""
    found = {name: version(name) for name in packages}
    return [
        f"{name} {installed} (at least {packages[name]})"
        for name, installed in found.items()
        if installed is not None and _numbers(installed) < _numbers(packages[name])
    ]


def _numbers(text: str) -> tuple[int, ...]:
    """Return the release of a version; without packaging, which need not be there."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def gpus() -> tuple[str, list[dict[str, Any]]]:
    """Return one line about the GPU, or why there is none; and every GPU that torch sees."""
    try:
        torch: Any = importlib.import_module("torch")
        if not torch.cuda.is_available():
            cuda = torch.version.cuda
            return f"no GPU (torch is {'a CPU build' if cuda is None else f'built for {cuda}'})", []
        driver = _driver_version()
        found = []
        for number in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(number)
            memory = torch.cuda.get_device_properties(number).total_memory
            found.append(
                {
                    "name": torch.cuda.get_device_name(number), "capability": f"{major}.{minor}",
                    "memory_gib": round(memory / 2**30, 1), "driver": driver,
                    "cuda": torch.version.cuda,
                }
            )  # fmt: skip
        first = found[0]
        line = (
            f"{first['name']} (compute capability {first['capability']}, {first['memory_gib']} "
            f"GiB, driver {driver or 'unknown'}, CUDA {first['cuda']})"
        )
        return (line if len(found) == 1 else f"{len(found)} GPUs, the first is {line}"), found
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})", []


def _driver_version() -> str | None:
    """Ask NVML, which comes with the driver, for its version."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        buffer = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() != 0:
            return None
        try:
            code = library.nvmlSystemGetDriverVersion(buffer, ctypes.c_uint(len(buffer)))
        finally:
            library.nvmlShutdown()
    except (OSError, AttributeError):
        return None
    return buffer.value.decode() if code == 0 else None


def try_backends() -> list[dict[str, Any]]:
    """Attend to 64 tokens with every backend, on every kind of device there is.

    Returns:
        Of each: `backend`, `device`, `status` ("usable", "unavailable": it says itself why it
        cannot run here, or "broken"), `reason` (empty where usable), and `error`, the largest
        difference from the reference backend, or None. Raises nothing.
    """
    torch: Any = importlib.import_module("torch")
    names: Any = importlib.import_module("hyperframe.kernels.backends").BACKENDS
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [row for device in devices for row in _on_device(device, names)]


def _on_device(device: str, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    refusal: Any = importlib.import_module("hyperframe.errors").BackendUnavailableError
    want = None
    for name in sorted((name for name in names if name != "auto"), key=lambda x: x != "reference"):
        row: dict[str, Any] = {
            "backend": name, "device": device, "status": "usable", "reason": "", "error": None,
        }  # fmt: skip
        try:
            got = _attended(name, device)
            want = got if name == "reference" else want
            if want is None:
                row.update(status="broken", reason="there is no reference to compare it with")
            else:
                row["error"] = error = float((got - want).abs().max())
                if not error <= _LARGEST_ERROR:  # also for NaN
                    row.update(status="broken", reason=f"is off the reference by {error:.2g}")
                    row["error"] = error if error == error else None
        except refusal as caught:
            row.update(status="unavailable", reason=str(caught))
        except Exception as caught:
            row.update(status="broken", reason=f"{type(caught).__name__}: {caught}")
        yield row


def _attended(backend: str, device: str) -> Any:
    """Return the output for 64 tokens, on the CPU in float64."""
    torch: Any = importlib.import_module("torch")
    attention: Any = importlib.import_module("hyperframe.attention")
    query, key, value = torch.randn(3, 1, 2, 64, 32, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    out = attention.hyper_attention(
        query, key, value, is_causal=True, detector="sliding_window(width=8)", num_samples=16,
        min_seq_len=0, backend=backend,
    )  # fmt: skip
    return out.double().cpu()


def plugins() -> list[dict[str, Any]]:
    """Load every plug-in, and return of each what `Registry.entries` says; raises nothing."""
    fields = ("kind", "name", "target", "distribution", "version", "status", "reason")
    registries: list[Any] = [
        importlib.import_module(f"hyperframe.{kind}").registry
        for kind in ("detectors", "samplers", "estimators")
    ]
    return [
        {field: getattr(entry, field) for field in fields}
        for registry in registries
        for entry in registry.entries(load=True)
        if entry.origin == "plugin"
    ]
