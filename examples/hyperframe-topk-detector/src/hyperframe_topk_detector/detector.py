"""tile_topk: the single keys that the mean queries of a tile attend to most."""

import torch

from hyperframe.detectors.simple import from_scores

__all__ = ["tile_topk"]


@from_scores
def tile_topk(
    tiles: torch.Tensor,
    keys: torch.Tensor,
    *,
    scale: float,
    block_size: int = 1,
    num_means: int = 4,
) -> torch.Tensor:
    """Keys with most softmax mass of a tile's mean queries.

    Every key is scored, so finding costs `num_means / tile_size` of exact attention.

    Args:
        tile_size: rows of a tile.
        num_keys: keys held by a tile; a float is a fraction of all keys.
        block_size: keys that are chosen together, by their mean.
        num_means: runs of a tile's rows, each of which votes by its mean query.
    """
    runs = tiles.chunk(min(num_means, tiles.shape[3]), dim=3)
    means = torch.stack([run.mean(dim=3) for run in runs], dim=3)
    # logits of voters: [batch, heads, tiles, voters, blocks]. the softmax is taken for us, over
    # the keys before the tile only
    return scale * means @ keys.mean(dim=3).transpose(-1, -2).unsqueeze(2)
