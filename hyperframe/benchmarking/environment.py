"""What a measurement was made with: device, driver, versions."""

from __future__ import annotations

import ctypes
import os
import platform
from importlib import metadata
from typing import Any

import torch

__all__ = ["describe_environment"]


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return the machine and the versions that belong to a row; values are JSON's own.

    `hyperframe` is the version of the installed distribution, `driver` that of the GPU's driver
    (None where there is none).
    """
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "device_type": device.type,
        "driver": _driver_version() if is_cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "hyperframe": _version("hyperframe-attention"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        lines = []
    return lines[0] if lines else platform.processor() or platform.machine()


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
