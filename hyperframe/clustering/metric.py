"""Second moments of queries and keys, their square roots, and what makes two of them agree.

All small matrices are float64, and all steps are matrix products: nothing waits for a GPU, and a
graph can capture it (an eigenvalue decomposition could do neither).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..precision import without_autocast

__all__ = ["balancing", "in_metric_of", "prefix_moments", "second_moment", "square_root"]

_FLOOR = 1e-6  # least eigenvalue, relative to the mean one
# and above what the rounding of float32 products leaves below 0, a few 1e-8 of the norm: from a
# negative eigenvalue the iteration would diverge
_ROUNDING = 2e-7
_STEPS = 32  # enough for that floor: small eigenvalues grow by 9/4 in each


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """Return `E x x^T` over the rows of `[..., n, d]`: float64 `[..., d, d]`.

    Products are in float32 at least. Zero for no rows. Cost O(n d^2).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with without_autocast(x):
        return (x.transpose(-1, -2) @ x).double() / max(1, x.shape[-2])


def prefix_moments(x: torch.Tensor, ends: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means and covariances of prefixes of the rows.

    Args:
        x: `[..., n, d]`.
        ends: the lengths of the prefixes, ascending, from 1 to n.

    Returns:
        Float64 means `[prefixes, ..., d]` and covariances `[prefixes, ..., d, d]`, taken about the
        first row, so that a shift of all rows moves the means alone. Nothing depends on rows behind
        a prefix. Products are in float32 at least. Cost O(n d^2).
    """
    first = x[..., :1, :].to(torch.promote_types(x.dtype, torch.float32))
    sums, products, start = [], [], 0
    for end in ends:
        piece = x[..., start:end, :] - first
        sums.append(piece.sum(dim=-2).double())
        products.append(second_moment(piece) * max(1, end - start))
        start = end
    mean, moment = torch.stack(sums).cumsum(dim=0), torch.stack(products).cumsum(dim=0)
    for number, end in enumerate(ends):
        mean[number] /= end
        moment[number] /= end
    moment = moment - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    return mean + first.squeeze(-2).double(), moment


def square_root(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symmetric square root of a second moment, and its inverse.

    Eigenvalues are raised by a millionth of their mean and a fifth of a millionth of the Frobenius
    norm, so that the inverse exists; a moment of zero counts as the identity.

    Args:
        moment: float64 `[..., d, d]`, symmetric and positive semidefinite.

    Returns:
        Two float64 tensors of that shape. Deterministic, no host synchronisation.
        Cost O(d^3), 96 batched products.
    Source: the Newton-Schulz form of the Denman-Beavers iteration (Higham, Functions of Matrices,
        6.3).

    Example:
        >>> roots = square_root(torch.diag(torch.tensor([4.0, 9.0]).double()))
        >>> [root.diagonal().round(decimals=2).tolist() for root in roots]
        [[2.0, 3.0], [0.5, 0.33]]
    """
    shape, dim = moment.shape, moment.shape[-1]
    moment = moment.reshape(-1, dim, dim)
    eye = torch.eye(dim, dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(dim=-1).view(-1, 1, 1)
    scaled = torch.where(mean > 0, moment / torch.where(mean > 0, mean, 1), eye)
    mean = torch.where(mean > 0, mean, 1)
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    scaled = scaled + (_FLOOR + _ROUNDING * norm) * eye
    norm = torch.linalg.vector_norm(scaled, dim=(-2, -1), keepdim=True)
    root, inverse = scaled / norm, eye.expand_as(scaled)
    with without_autocast(moment):
        for _ in range(_STEPS):
            step = torch.baddbmm(1.5 * eye, inverse, root, alpha=-0.5)
            root, inverse = root @ step, step @ inverse
    size = (norm * mean).sqrt()
    return (root * size).view(shape), (inverse / size).view(shape)


def in_metric_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the points `(E q q^T)^(1/2) k`, whose distances are those of logits.

    `|p - p'|^2` is the mean of `(q . k - q . k')^2` over the queries.

    Args:
        query: `[batch, query_heads, n_q, d]`; without rows, the points are the keys themselves.
        key: `[batch, key_heads, n_k, d]`.

    Returns:
        `[batch, key_heads, n_k, d]`, in float32 at least. Cost O((n_q + n_k) d^2).
    """
    batch, key_heads, _, dim = key.shape
    root, _ = square_root(second_moment(query.reshape(batch, key_heads, -1, dim)))
    dtype = torch.promote_types(key.dtype, torch.float32)
    with without_autocast(key):
        return key.to(dtype) @ root.to(dtype)


def balancing(
    query_moment: torch.Tensor, key_moment: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a symmetric `A` and its inverse, so that `A q` and `A^-1 k` have one second moment.

    `(A q) . (A^-1 k) = q . k`. `A^2` is the geometric mean of `key_moment` and the inverse of
    `query_moment`.

    Args:
        query_moment: float64 `[..., d, d]`.
        key_moment: float64 `[..., d, d]`.

    Returns:
        Two float64 tensors of that shape. Moments agree up to the floor of `square_root`.
        Cost O(d^3), three square roots.

    Example:
        >>> four, nine = 4 * torch.eye(1).double(), 9 * torch.eye(1).double()
        >>> round(balancing(four, nine)[0].item() ** 2, 3)  # 4 * 1.5 is 9 / 1.5
        1.5
    """
    root, inverse = square_root(query_moment)
    with without_autocast(root):
        middle, _ = square_root(root @ key_moment @ root)
        squared = inverse @ middle @ inverse
    return square_root((squared + squared.transpose(-1, -2)) / 2)
