"""Corollary 1: on random rows of the sphere sortLSH finds the pairs at a small angle.

Two steps: pairs with one code are in one block, but for those at the border of two blocks (of any
codes whatever); and pairs at an angle theta have one code with probability (1 - theta / pi)^r
(Definition 1, tested in tests/detectors/test_sort_lsh.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors import SortLSH
from hyperframe.kernels.hashing import hamming_sorted_codes
from hyperframe.masks import BlockMask, HeavyMask
from hyperframe.randomness import Stream, normal
from tests.theory.problems import FALSE_ALARM, generator


def sphere(*shape: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def planted(
    n: int, *, heads: int, angle: float, seed: int, dim: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys on the sphere, queries at the angle from one key each, and which key: `[n]`."""
    key = sphere(1, heads, n, dim, seed=seed)
    order = torch.randperm(n, generator=generator(seed))
    across = torch.randn(1, heads, n, dim, generator=generator(seed + 1))
    near = key[:, :, order]
    across = across - (across * near).sum(dim=-1, keepdim=True) * near
    across = torch.nn.functional.normalize(across, dim=-1)
    return math.cos(angle) * near + math.sin(angle) * across, key, order


def lost_at_borders(code_q: torch.Tensor, code_k: torch.Tensor, bits: int, block: int):
    """At most so many pairs of one code are in two blocks: `[...]`, of codes `[..., n]`.

    At a border between blocks either pairs of one bucket are parted, or pairs of the buckets
    between the two lists' places in the code: at most the largest bucket and the largest
    difference between how many queries and how many keys have a code up to c.
    """
    every = torch.arange(2**bits)
    counts = [(x.unsqueeze(-1) == every).sum(dim=-2) for x in (code_q, code_k)]
    largest = torch.maximum(counts[0].amax(dim=-1), counts[1].amax(dim=-1))
    apart = (counts[0] - counts[1]).cumsum(dim=-1).abs().amax(dim=-1)
    return (code_q.shape[-1] // block - 1) * (largest + apart)


def shared(mask: HeavyMask, order: torch.Tensor, block: int) -> torch.Tensor:
    """Whether the query and its key are in one block of equal rank: bool `[heads, n]`."""
    assert isinstance(mask, BlockMask)
    rank_q, rank_k = mask.query_order.argsort(dim=-1), mask.key_order.argsort(dim=-1)
    return (rank_q // block == rank_k[:, :, order] // block)[0]


@given(
    blocks=st.integers(1, 4), block=st.integers(1, 200), bits=st.integers(1, 6),
    angle=st.floats(0.0, 0.8), seed=st.integers(0, 999),
)  # fmt: skip
def test_pairs_of_one_code_share_a_block_but_at_borders(
    blocks: int, block: int, bits: int, angle: float, seed: int
) -> None:
    n = blocks * block
    query, key, order = planted(n, heads=3, angle=angle, seed=seed)
    detector = SortLSH(block_size=block, num_projections=bits)
    mask = detector.find(query, key, generator=Stream(seed))
    together = shared(mask, order, block)
    assert torch.equal(together, mask.to_dense()[0, :, torch.arange(n), order])
    planes = normal((1, 1, 3, 16, bits), key.device, Stream(seed))[0]
    code_q, code_k = hamming_sorted_codes(query, planes), hamming_sorted_codes(key, planes)
    same = code_q == code_k[:, :, order]
    parted = same & ~together
    assert (parted.sum(dim=-1) <= lost_at_borders(code_q, code_k, bits, block)).all()
    if blocks == 1:
        assert together.all()


@pytest.mark.statistical
@pytest.mark.parametrize("angle", [0.05, 0.1, 0.15])
def test_planted_pairs_are_found_with_the_probability_of_definition_1(angle: float) -> None:
    """At least `(1 - theta / pi)^r` less the share that is lost at borders.

    Heads have hyperplanes and keys of their own. What is compared are means over heads of
    numbers in [0, 1]: found and lost are each off by more than their radius with a probability
    below 1e-6 / 6 (Maurer and Pontil's bound by the variance, one side; two of them, three angles).
    Chance is one in four.
    """
    n, heads, bits, block = 1024, 800, 4, 256
    query, key, order = planted(n, heads=heads, angle=angle, seed=7)
    detector = SortLSH(block_size=block, num_projections=bits)
    mask = detector.find(query, key, generator=generator(8))
    found = shared(mask, order, block).double().mean(dim=-1)
    # how much is lost at borders, of draws of its own
    planes = normal((1, heads, 16, bits), key.device, generator(9))
    codes = [hamming_sorted_codes(x, planes) for x in (query, key)]
    borders = (lost_at_borders(*codes, bits, block) / n).clamp(max=1)[0].double()
    bound = (1 - angle / math.pi) ** bits - borders.mean() - radius(borders)
    assert found.mean() >= bound - radius(found)
    # which says something
    assert bound - radius(found) > block / n


def radius(values: torch.Tensor) -> float:
    """How far the mean of independent values in [0, 1] is off, one side, but for 1e-6 / 6."""
    log_term, count = math.log(2 * 6 / FALSE_ALARM), len(values)
    return math.sqrt(2 * values.var().item() * log_term / count) + 7 * log_term / (3 * (count - 1))
