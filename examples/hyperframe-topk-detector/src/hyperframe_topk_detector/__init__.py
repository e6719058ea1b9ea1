"""tile_topk, a detector for hyperframe."""

from .detector import tile_topk

__all__ = ["tile_topk"]
