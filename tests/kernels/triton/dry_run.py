"""Compile what calls would launch on an H100, on a machine without a GPU; a script of its own.

The interpreter runs kernels as Python, and takes things that the compiler does not. Here tensors
are on the CPU and say that they are on a GPU, a launch compiles down to machine code and does
nothing, and memory that a kernel would write holds zeros. One JSON line for each kernel that was
compiled (its name, seconds, bytes of shared memory), one for each case (its name, seconds and
error), then one with the names of all kernels that there are.

    python tests/kernels/triton/dry_run.py            # all cases
    python tests/kernels/triton/dry_run.py presets    # those whose name begins so
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoDriver:
    """The driver of an H100 that is not there."""

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the first one."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Return none."""
        return 0


compiled: dict[int, Any] = {}
launch = JITFunction.run


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    """Compile instead of a launch, and say how it went."""
    started = time.perf_counter()
    found = launch(self, *args, grid=grid, warmup=True, **options)
    if id(found) not in compiled:
        compiled[id(found)] = found  # held, so that no other gets its number
        seconds, shared = time.perf_counter() - started, found.metadata.shared
        line = {"kernel": self.fn.__name__, "seconds": seconds, "shared": shared}
        print(json.dumps(line), flush=True)
    return found


def zeros_instead_of_anything() -> None:
    """Make new tensors of zeros, where kernels would write into them."""

    def filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            out = make(*args, **options)
            return out.zero_() if out.device.type == "cpu" else out

        return made

    torch.empty, torch.empty_like = filled(torch.empty), filled(torch.empty_like)
    torch.Tensor.new_empty = filled(torch.Tensor.new_empty)  # type: ignore[method-assign]


class OnDevice(contextlib.nullcontext[None]):
    """The context of a device that is not there."""

    def __init__(self, device: Any = None) -> None:
        super().__init__()


def pretend() -> None:
    """Let everything take tensors on the CPU for tensors on an H100."""
    driver.set_active(NoDriver())  # type: ignore[arg-type]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    torch.cuda.device = OnDevice  # type: ignore[assignment,misc]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    zeros_instead_of_anything()
    implement = torch.library.impl
    torch.library.impl = lambda name, kind, *rest, **options: implement(
        name, "CPU" if kind == "CUDA" else kind, *rest, **options
    )
    from hyperframe import HyperAttention  # noqa: F401  (all modules of a call)
    from hyperframe.detectors import base
    from hyperframe.kernels import layout, triton_backend

    triton_backend.why_not = lambda device: None
    base.may_look_at = lambda device: False  # zeros are no answer of a detector
    known = layout.can_lay_out
    for module in list(sys.modules.values()):
        if getattr(module, "can_lay_out", None) is known:
            module.can_lay_out = lambda device: True


class NothingShared(TorchDispatchMode):
    """Refuse operators of which a result shares memory with another or with an argument.

    `torch.compile` does, where it sees one run.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and look at what it returned."""
        found = func(*args, **(kwargs or {}))
        if func.namespace == "hyperframe":
            given, results = (
                [id_of(x) for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.numel()]
                for tree in ((args, kwargs), found)
            )
            if len({*results}) < len(results) or {*results} & {*given}:
                raise AssertionError(f"{func}: a result shares memory")
        return found


def id_of(tensor: torch.Tensor) -> int:
    """Return what tells the memory of tensors apart."""
    return int(tensor.untyped_storage()._cdata)


def attend(
    detector: Any, *, length: int = 2048, dim: int = 64, heads: tuple[int, int] = (2, 2),
    dtype: torch.dtype = torch.bfloat16, is_causal: bool = True, **options: Any,
) -> None:  # fmt: skip
    """Run a forward and a backward of an attention."""
    from hyperframe import HyperAttention

    sizes = (heads[0], heads[1], heads[1])
    query, key, value = (
        torch.randn(1, count, length, dim, dtype=dtype, requires_grad=True) for count in sizes
    )
    attention = HyperAttention(detector=detector, backend="triton", min_seq_len=256, **options)
    attention(query, key, value, is_causal=is_causal).sum().backward()


def preset(name: str, form: str) -> str:
    """Return the spec of a form of a preset."""
    from hyperframe.detectors.auto import PRESETS

    return getattr(PRESETS[name], form).replace("min_segment=2048", "min_segment=512")


def select() -> None:
    """Select from rows that are too long for one program."""
    from hyperframe.kernels.select import select_top

    select_top(torch.rand(2, 20000), torch.tensor([9, 20000]), count=64)


SORT = "sort_lsh(block_size=256)"
CASES: dict[str, Callable[[], None]] = {
    "presets: balanced, long": lambda: attend(preset("balanced", "long"), sampler="uniform"),
    "presets: balanced, long, 128": lambda: attend(
        preset("balanced", "long"), sampler="uniform", dim=128, heads=(4, 2)
    ),
    "presets: balanced, middle": lambda: attend(preset("balanced", "middle"), sampler="uniform"),
    "presets: balanced": lambda: attend("balanced"),
    "presets: balanced, strict": lambda: attend("balanced", strict_causal=True),
    "presets: balanced, no mask": lambda: attend("balanced", is_causal=False),
    "sort_lsh: no mask": lambda: attend(SORT, is_causal=False),
    "sort_lsh: recursion": lambda: attend(SORT, causal="recursive"),
    "sort_lsh: float32": lambda: attend(SORT, causal="recursive", dtype=torch.float32, dim=40),
    "sketch: count": lambda: attend("count_sketch", is_causal=False),
    "sketch: expander": lambda: attend("expander_sketch", is_causal=False),
    "select: long rows": select,
    "refined: small tiles": lambda: attend(
        "refined(candidates='sliding_window(width=32) | heavy_columns(num_columns=64)', "
        "num_keys=32, tile_size=16)"
    ),
    "window: importance": lambda: attend("sliding_window(width=128)", sampler="importance"),
    "window: approx_d": lambda: attend("sliding_window(width=128)", estimator="approx_d"),
}


def main() -> None:
    """Run the cases, and name the kernels."""
    wanted = sys.argv[1:] or [""]
    pretend()
    import hyperframe.kernels.triton as package

    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
    ]
    for name, case in CASES.items():
        if any(name.startswith(prefix) for prefix in wanted):
            torch.manual_seed(0)
            started, error = time.perf_counter(), None
            try:
                with NothingShared():
                    case()
            except Exception:
                error = traceback.format_exc()
            seconds = time.perf_counter() - started
            print(json.dumps({"case": name, "seconds": seconds, "error": error}), flush=True)
    kernels = {
        value.fn.__name__ for module in modules for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel")
    }  # fmt: skip
    print(json.dumps({"kernels": sorted(kernels)}), flush=True)


if __name__ == "__main__":
    main()
