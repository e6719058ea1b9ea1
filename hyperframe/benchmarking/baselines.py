"""What approximate attention is compared with: exact kernels, and FlexAttention on a fixed mask."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..detectors import AbstractDetector
from ..detectors.block_list import BlockList
from ..detectors.sliding_window import SlidingWindow
from ..detectors.union import Union
from ..errors import UnsupportedError
from .inputs import Shape
from .timing import Failure

__all__ = ["exact_candidates", "flex_candidate", "mask_function"]

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
MaskFunction = Callable[[Any, Any, Any, Any], Any]

_KERNELS = {
    "cuda": {
        "sdpa-flash": SDPBackend.FLASH_ATTENTION,
        "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-math": SDPBackend.MATH},
}
_MATH_BYTES = 1 << 30  # of scores; the math kernel writes all of them
_LONGEST_FLEX = 131072


def exact_candidates(
    shape: Shape, *, is_causal: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Call, Callable[[], Any]] | Failure]:
    """Return the exact kernels of PyTorch that run here, each forced by name.

    Args:
        shape: the problem.
        is_causal: whether it is causal.
        dtype: of the inputs.
        device: where they are.

    Returns:
        By name, the function of query, key, value and the context that forces its kernel, or why
        there is none. `sdpa` (PyTorch's own choice) is there only if no forced kernel is; the
        memory-efficient one on a GPU only if the two faster ones refuse the dtype.
    """
    kernels = _KERNELS.get(device.type, {"sdpa-math": SDPBackend.MATH})
    call = functools.partial(
        F.scaled_dot_product_attention, is_causal=is_causal,
        enable_gqa=shape.heads != shape.kv_heads,
    )  # fmt: skip
    found: dict[str, tuple[Call, Callable[[], Any]] | Failure] = {}
    for name, kernel in kernels.items():
        runs = any(not isinstance(entry, Failure) for entry in found.values())
        if name == "sdpa-efficient" and runs:
            continue
        scores = 4 * shape.batch * shape.heads * shape.length**2
        if kernel == SDPBackend.MATH and scores > _MATH_BYTES:
            found[name] = Failure(f"its scores would take {scores / 2**30:.1f} GiB", True)
            continue
        context = functools.partial(sdpa_kernel, kernel)
        refusal = _probe(call, context, shape, dtype, device)
        found[name] = (call, context) if refusal is None else refusal
    if all(isinstance(entry, Failure) for entry in found.values()):
        found["sdpa"] = (call, nullcontext)
    return found


def _probe(
    call: Call, context: Callable[[], Any], shape: Shape, dtype: torch.dtype, device: torch.device
) -> Failure | None:
    """Why a forced kernel does not take such inputs, from a call with few of them."""

    def small(heads: int) -> torch.Tensor:
        return torch.zeros(1, heads, 128, shape.head_dim, dtype=dtype, device=device)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with torch.no_grad(), context():
                call(small(shape.heads), small(shape.kv_heads), small(shape.kv_heads))
        except Exception as error:
            # what was wrong is in the warnings; the error only says that nothing ran
            reasons = [str(warning.message).splitlines()[0] for warning in said]
            why = "; ".join(reasons[:3]) or Failure.of(error).reason
            return Failure(f"PyTorch refuses this kernel: {why}", True)
    return None


def mask_function(detector: AbstractDetector, *, is_causal: bool) -> MaskFunction:
    """Return a detector's fixed mask as FlexAttention takes it: `f(batch, head, i, j) -> bool`.

    Args:
        detector: `sliding_window`, `block_list`, or a union of these.
        is_causal: as in `find`; queries and keys are equally many.

    Raises:
        UnsupportedError: the mask depends on the content of queries and keys.
    """
    if isinstance(detector, SlidingWindow):
        window = detector
        left = window.width - 1 if is_causal else window.width // 2
        right = window.width - 1 - left

        def in_window(batch: Any, head: Any, i: Any, j: Any) -> Any:
            held = ((i - j <= left) & (j - i <= right)) | (j < window.num_sinks)
            return held & (j <= i) if is_causal else held

        return in_window
    if isinstance(detector, BlockList) and all(len(pair) == 2 for pair in detector.blocks):
        size = detector.block_size
        blocks = 1 + max((max(pair) for pair in detector.blocks), default=0)
        table = torch.zeros(blocks + 1, blocks + 1, dtype=torch.bool)
        for row, column in detector.blocks:
            table[row, column] = True

        def in_blocks(batch: Any, head: Any, i: Any, j: Any) -> Any:
            known = table.to(i.device)
            held = known[(i // size).clamp(max=blocks), (j // size).clamp(max=blocks)]
            return held & (j <= i) if is_causal else held

        return in_blocks
    if isinstance(detector, Union):
        members = [mask_function(member, is_causal=is_causal) for member in detector.detectors]

        def in_any(batch: Any, head: Any, i: Any, j: Any) -> Any:
            held = members[0](batch, head, i, j)
            for member in members[1:]:
                held = held | member(batch, head, i, j)
            return held

        return in_any
    raise UnsupportedError(
        f"flex: the mask of the detector {detector.name} depends on queries and keys, so there is "
        "no fixed one to give to FlexAttention"
    )


def flex_candidate(
    detector: AbstractDetector, shape: Shape, *, is_causal: bool, device: torch.device
) -> Call | Failure:
    """Return FlexAttention on the fixed mask of a detector, compiled; or why there is none.

    It computes the heavy entries only: no sample stands for the rest.
    """
    if device.type != "cuda":
        return Failure("FlexAttention is timed on CUDA devices only", True)
    if shape.length > _LONGEST_FLEX:
        return Failure(f"its mask is made for up to {_LONGEST_FLEX} keys here", True)
    try:
        mask = mask_function(detector, is_causal=is_causal)
        # imported here: it loads torch's compiler
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # compiled, so that the dense mask is never written out
        make = torch.compile(create_block_mask)
        blocks = make(mask, None, None, shape.length, shape.length, device=device)
    except Exception as error:
        return Failure.of(error)
    # every shape is compiled anew, and there is a limit to that for one function
    torch.compiler.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return functools.partial(compiled, block_mask=blocks, enable_gqa=shape.heads != shape.kv_heads)
