"""Schemas and shapes of the operators that count votes; `kernels/votes.py` implements them."""

from __future__ import annotations

import torch

__all__ = ["LINE_SCHEMA", "SCHEMA"]

SCHEMA = (
    "(Tensor voters, Tensor key, Tensor begin, Tensor stop, float scale, SymInt width) -> Tensor"
)
"""Softmax mass of keys; see `kernels.votes.column_votes`."""

LINE_SCHEMA = (
    "(Tensor voters, Tensor row, Tensor key, float scale, bool is_causal, SymInt[] cut,"
    " SymInt[] lines) -> (Tensor, Tensor)"
)
"""Columns and runs of diagonals of segments; see `kernels.votes.line_votes`."""

_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("hyperframe::column_votes", SCHEMA, tags=_TAGS)
torch.library.define("hyperframe::line_votes", LINE_SCHEMA, tags=_TAGS)


@torch.library.register_fake("hyperframe::column_votes")
def _votes(
    voters: torch.Tensor, key: torch.Tensor, begin: torch.Tensor, stop: torch.Tensor,
    scale: float, width: int,
) -> torch.Tensor:  # fmt: skip
    dtype = torch.promote_types(key.dtype, torch.float32)
    return torch.empty((*voters.shape[:4], width), dtype=dtype, device=key.device)


@torch.library.register_fake("hyperframe::line_votes")
def _lines(
    voters: torch.Tensor, row: torch.Tensor, key: torch.Tensor, scale: float, is_causal: bool,
    cut: list[int], lines: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dtype = torch.promote_types(key.dtype, torch.float32)
    shape, device = voters.shape[:3], key.device
    columns = torch.empty((*shape, lines[0]), dtype=torch.int32, device=device)
    return columns, torch.empty((*shape, lines[3]), dtype=dtype, device=device)
