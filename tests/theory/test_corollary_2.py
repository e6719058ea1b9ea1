"""Corollary 2: heavy entries by a linear sketch, `(Q K^T)_ij^2 >= ||Q K^T e_j||^2 / tau`.

That they are found, and nothing else, is in tests/detectors/test_count_sketch.py and
tests/detectors/test_expander_sketch.py. Here is what the theorem needs of them: the mask that a
sketch finds makes kappa small, and row sums good, on an instance of Alman and Song.
"""

from __future__ import annotations

import pytest
import torch

from hyperframe import diagnostics
from hyperframe.detectors import create as create_detector
from hyperframe.estimators import create as create_estimator
from tests.diagnostics import dense
from tests.theory.problems import FALSE_ALARM, alman_song, columns_for, generator

N, TAU = 512, 8


@pytest.mark.statistical
@pytest.mark.parametrize(
    "spec",
    [
        f"count_sketch(tau={TAU}, search='sketch', repetitions=64)",
        f"expander_sketch(tau={TAU}, search='sketch')",
    ],
)
def test_a_sketch_finds_what_lemma_1_needs_held(spec: str) -> None:
    """Row sums beside its mask keep Equation (2); a false alarm has a probability below 1e-6.

    That is of the samples (Proposition 2); that the sketch misses an entry is not seen on fixed
    seeds, and would be an error of the row.
    """
    epsilon, trials = 1.0, 4
    query, key, _, large = alman_song(N, heads=trials, every=2)
    logits = dense.logits(query, key, scale=1.0)[0]
    energy = logits.square().sum(dim=-2, keepdim=True)
    heavy = logits.square() >= energy / TAU
    # the large entries are what is heavy, far from the bound, in columns that have one
    assert torch.equal(heavy & (logits > 9), large.expand(trials, -1, -1))
    assert (logits.square()[:, large] > 2 * energy.expand_as(logits)[:, large] / TAU).all()
    mask = create_detector(spec).find(query, key, scale=1.0, generator=generator(1))
    held = mask.to_dense()[0]
    assert held[:, large].all()
    assert (heavy | ~held).all()  # and nothing that is not heavy
    beside, alone = (
        diagnostics.kappa(query, key, x, scale=1.0).max().item()
        for x in (mask, create_detector("count_sketch(tau=0.5)").find(query, key, scale=1.0))
    )
    assert beside < 2 < 10 < alone
    share = dense.softmax(query[:, :1], key[:, :1], scale=1.0)[0, 0]
    error = epsilon / (2 + epsilon)
    m = columns_for(share, held[0], error, failure=FALSE_ALARM, trials=trials)
    assert m < N // 2
    sums = create_estimator("uniform").row_sums(
        query, key, mask, scale=1.0, num_samples=m, generator=generator(2)
    )
    wrong = diagnostics.normaliser_error(query, key, sums.log_sum, scale=1.0, tolerance=1e-2)
    assert (wrong <= epsilon / 2).all()
    assert (wrong > 0).all()
