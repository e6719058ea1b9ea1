"""Checks that the weights of a sampler are true: a sample stands for all keys.

Seeds are fixed, so a check gives the same answer every time. The bounds say how likely a sampler
that is right would be to fail under another seed: at most `FALSE_ALARM` for one call of a check.
"""

from __future__ import annotations

import math

import torch

from ...samplers import AbstractSampler
from .problem import Inputs, device, fail, generator, inputs

__all__ = [
    "FALSE_ALARM",
    "check_weights_are_true",
    "check_weights_of_prefixes_are_true",
]

FALSE_ALARM = 1e-6
"""How likely one check fails for a sampler that is right, were its seed drawn anew."""

_COPIES, _KEYS, _SAMPLES = 5000, 24, 4


def _copies() -> Inputs:
    """Return many batch items with two key heads, all equal: each draws on its own."""
    x = inputs(6, batch=1, query_heads=2, key_heads=1, num_queries=_KEYS, num_keys=_KEYS,
               head_dim=3, value_dim=4)  # fmt: skip
    return Inputs(*(t.repeat(1, 2, 1, 1).expand(_COPIES, -1, -1, -1) for t in x))


def check_weights_are_true(sampler: AbstractSampler) -> None:
    """`E[sum_s exp(log_weight_s) f(index_s)] = sum_j f(j)` for samples of all keys.

    See `check_estimates`, whose false-alarm rate holds.
    """
    sample = sampler.sample(*_copies(), num_samples=_SAMPLES, generator=generator(2))
    check_estimates(sampler, sample.index, sample.log_weight, _KEYS, FALSE_ALARM)


def check_weights_of_prefixes_are_true(sampler: AbstractSampler) -> None:
    """The same for samples of prefixes: each stands for the keys of its prefix."""
    lengths = [11, 17, _KEYS]
    sample = sampler.sample_prefixes(
        *_copies(), num_samples=_SAMPLES, generator=generator(3),
        prefixes=torch.tensor(lengths, device=device()),
    )  # fmt: skip
    for t, length in enumerate(lengths):
        tail = FALSE_ALARM / len(lengths)
        check_estimates(sampler, sample.index[:, :, t], sample.log_weight[:, :, t], length, tail)


def check_estimates(
    sampler: AbstractSampler, index: torch.Tensor, log_weight: torch.Tensor, num_keys: int,
    false_alarm: float,
) -> None:  # fmt: skip
    """Check that independent samples estimate sums over keys without bias.

    Let `X` be how often a sample of `m` draws holds key `j`. Where a key has one weight `w_j`, a
    true weight means `E[X] = 1 / w_j`. `X / m` is in [0, 1], so by Hoeffding's inequality in its
    first form the mean `p` over `R` samples has `KL(p, 1 / (m w_j)) >= L / R` with probability at
    most `2 exp(-L)`. A union bound over the keys makes `L = log(2 (n + 1) / false_alarm)`. The sum
    of `1 / w_j` over the keys that were drawn must be `m`, but for keys so rare that none of the
    `R` samples drew one: a share `q` of the draws stays unseen with probability `exp(-q R)` at
    most, and `q R <= L` is allowed.

    Where a key has several weights, the sums of three functions are compared instead, by the
    empirical Bernstein bound (Maurer and Pontil 2009, theorem 4); there no sum may exceed twice
    the largest that was seen, which is an assumption.

    Args:
        sampler: for the message.
        index: int64 `[copies, heads, m]`, samples of equal problems.
        log_weight: the same shape.
        num_keys: keys that each sample stands for.
        false_alarm: how likely a failure is for true weights.
    """
    index, weight = index.flatten(0, 1), log_weight.flatten(0, 1).double().exp()
    num_samples, copies = index.shape[-1], len(index)
    limit = math.log(2 * (num_keys + 1) / false_alarm)
    hit = (index.unsqueeze(-1) == torch.arange(num_keys, device=index.device)) & (
        weight > 0
    ).unsqueeze(-1)  # [copies, m, n]
    spread = torch.where(hit, weight.unsqueeze(-1), torch.nan)
    low = spread.nan_to_num(nan=torch.inf).amin(dim=(0, 1))
    high = spread.nan_to_num(nan=0.0).amax(dim=(0, 1))
    seen = high > 0
    if bool((high[seen] > low[seen] * (1 + 1e-4)).any()):
        _check_sums(sampler, index, weight, num_keys, limit)
        return
    share = torch.where(seen, 1 / (num_samples * high.clamp(min=1e-300)), 0.0)
    total = float(share.sum())
    if not 1 - limit / copies - 1e-4 <= total <= 1 + 1e-4:
        found = f"weights whose inverses sum to {total * num_samples:.4g}"
        remedy = "weigh draw s by 1 / (m p_j), natural logarithm"
        fail(sampler, f"{num_samples} samples of {num_keys} keys", found, remedy)
    mean = hit.double().sum(dim=1).mean(dim=0) / num_samples
    wrong = seen & (_divergence(mean, share) > limit / copies)
    if bool(wrong.any()):
        j = int(wrong.nonzero()[0])
        found = (
            f"a share of {float(mean[j]):.4f} for key {j}, its weight says {float(share[j]):.4f}"
        )
        remedy = "weigh by the probability with which a key is really drawn"
        fail(sampler, f"{copies} samples of {num_samples} draws", found, remedy)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of Bernoulli distributions."""
    q = q.clamp(1e-12, 1 - 1e-12)
    return torch.xlogy(p, p / q) + torch.xlogy(1 - p, (1 - p) / (1 - q))


def _check_sums(
    sampler: AbstractSampler, index: torch.Tensor, weight: torch.Tensor, num_keys: int, limit: float
) -> None:
    """Compare sums over the samples with sums over the keys; see `check_estimates`."""
    key = torch.arange(num_keys, device=index.device, dtype=torch.float64)
    for name, f in (
        ("1", torch.ones_like(key)), ("j", 1 + key), ("a wave", 1.1 + (0.7 * key).sin()),
    ):  # fmt: skip
        sums, copies = (weight * f[index]).sum(dim=-1), len(index)
        radius = (2 * sums.var() * limit / copies).sqrt() + 7 * 2 * sums.max() * limit / (
            3 * (copies - 1)
        )
        off = (sums.mean() - f.sum()).abs()
        if bool(off > radius):
            found = (
                f"{float(sums.mean()):.4g} in the mean, where the keys sum to {float(f.sum()):.4g}"
            )
            remedy = "weigh draw s by 1 / (m p_j), natural logarithm"
            fail(sampler, f"sums of f(j) = {name} over {copies} samples", found, remedy)
