"""Which rows of queries will hold heavy entries: a score for each row, before any is looked at.

Two scores need no training and depend on the queries alone. The third, `RowOracle`, has learned
from captured queries and keys which directions of queries meet much energy, head by head: keys of
another text differ, but their second moment hardly does. None of them reads the keys of the call,
so that under a causal mask no later key can move what an earlier row holds.

Training needs scikit-learn. What it leaves behind are two arrays, and a few lines of torch.

Source: Hsu, Indyk, Katabi and Vakilian, Learning-based frequency estimation algorithms (2019): an
oracle names the heavy items, which then get buckets of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ArgumentError, MissingDependencyError
from ..precision import without_autocast
from .columns import ColumnProblem

__all__ = ["FEATURES", "RowOracle", "centred_norms", "leverages"]

FEATURES = ("share", "norm", "leverage", "position")
"""What a row is judged by; see `RowOracle`."""

_RIDGE = 1e-5  # of the mean energy of a direction, in leverages
_LEAST = 1e-6  # times the mean, in logarithms
_PENALTY = 1e-3  # of squared weights, in training


def centred_norms(query: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of every row from the mean of its head.

    Args:
        query: `[heads, n_q, d]`.

    Returns:
        `[heads, n_q]`.
    Cost: O(n_q d) for a head.
    """
    return (query - query.mean(dim=1, keepdim=True)).square().sum(dim=-1)


def leverages(query: torch.Tensor) -> torch.Tensor:
    """Return the leverage of every row, `q (Q^T Q)^-1 q^T`, up to a small ridge.

    It is the largest share of the energy of a column `Q k` that the row can hold, over all `k`: a
    row whose leverage is below `1 / tau` has no heavy entry whatever the keys, and at most `tau d`
    rows have any.

    Args:
        query: `[heads, n_q, d]`.

    Returns:
        `[heads, n_q]`, from 0 to 1.
    Cost: O(n_q d^2) for a head; no host synchronisation.
    """
    with without_autocast(query):
        q = query.double()
        gram = q.transpose(-1, -2) @ q
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
        ridge = torch.where(mean > 0, _RIDGE * mean, 1)
        gram = gram + ridge * torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        factor = torch.linalg.cholesky_ex(gram).L
        solved = torch.linalg.solve_triangular(factor, q.transpose(-1, -2), upper=False)
        found: torch.Tensor = solved.square().sum(dim=-2).to(query.dtype)
        return found


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RowOracle:
    """A linear score of the rows of every head, learned from captured queries and keys.

    The features of a row are logarithms, relative to the mean of its head, of

    - share: the energy it has on average with a captured key, `q M q^T`, where `M` is the second
      moment of the keys, each scaled to a column of energy 1;
    - norm: its squared distance from the mean query, see `centred_norms`;
    - leverage: see `leverages`;
    - position: its number, from 1.

    Args:
        moment: `M`, float32 `[query_heads, d, d]`.
        weight: of the features, float32 `[query_heads, 4]`.
        tau: the bound that it was trained for; another one may be asked of it.
    """

    moment: torch.Tensor
    weight: torch.Tensor
    tau: float

    def __post_init__(self) -> None:
        """Check the shapes and values."""
        heads, dim = self.moment.shape[0], self.moment.shape[-1]
        wanted = {"moment": (heads, dim, dim), "weight": (heads, len(FEATURES))}
        for name, shape in wanted.items():
            found = getattr(self, name)
            if found.dtype != torch.float32 or tuple(found.shape) != shape or 0 in shape:
                raise ArgumentError(
                    f"row oracle: {name} is {found.dtype} of shape {tuple(found.shape)}, but with "
                    f"moment of shape {tuple(self.moment.shape)} it has to be torch.float32 of "
                    f"{shape}; train it again with RowOracle.fit"
                )
            if not bool(found.isfinite().all()):
                raise ArgumentError(
                    f"row oracle: {name} holds NaN or infinity; train it again with RowOracle.fit"
                )
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ArgumentError(f"row oracle: tau={self.tau!r} is no finite number above 0")

    def __repr__(self) -> str:
        heads, dim = self.moment.shape[:2]
        return f"<RowOracle of {heads} query heads, head_dim {dim}, trained for tau={self.tau:g}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowOracle):
            return NotImplemented
        return self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[object, ...]:
        arrays = (self.moment.cpu(), self.weight.cpu())
        return self.tau, *((tuple(x.shape), x.numpy().tobytes()) for x in arrays)

    def check(self, query_heads: int, head_dim: int) -> None:
        """Refuse queries of other sizes than those of the training.

        Raises:
            ArgumentError: the heads or their dimensions differ.
        """
        if self.moment.shape[:2] != (query_heads, head_dim):
            heads, dim = self.moment.shape[:2]
            raise ArgumentError(
                f"row oracle: it was trained on {heads} query heads with head_dim={dim}, but the "
                f"queries have {query_heads} with head_dim={head_dim}; pass those of the layer it "
                "was trained on, or train one for this layer"
            )

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """Return the scores of rows, to be compared within a head; higher is heavier.

        Args:
            query: `[batch * query_heads, n_q, d]`, finite, of any scale.

        Returns:
            `[batch * query_heads, n_q]`, finite.
        Cost: O(n_q d^2) for a head. Deterministic.
        """
        features = _features(query, self.moment.to(query))
        weight = self.weight.to(query).repeat(query.shape[0] // self.weight.shape[0], 1)
        return (features * weight.unsqueeze(1)).sum(dim=-1)

    @classmethod
    def fit(
        cls, problems: Sequence[ColumnProblem], *, query_heads: int, tau: float,
        is_causal: bool = False, num_columns: int = 1024,
    ) -> RowOracle:  # fmt: skip
        """Train on captured queries and keys.

        What a row is worth is how close its entries come to being heavy: the mean over columns of
        `min(1, tau x^2)^2`, where `x` is the entry of a column of energy 1. A Poisson regression
        with a logarithmic link predicts it, for each head by itself.

        Args:
            problems: captured queries and keys, one or more texts of the same layer.
            query_heads: heads of the layer; `problem.query` is `[batch * query_heads, n_q, d]`.
            tau: the bound.
            is_causal: only entries on and below the diagonal (bottom-right aligned) count.
            num_columns: columns of each text that are looked at, at most.

        Raises:
            MissingDependencyError: scikit-learn is not installed.
            ArgumentError: a head has no energy to learn from.
        Cost: O(num_columns n_q d) for a head of a text. Deterministic.
        """
        regressor = _regressor()
        moments, weights = [], []
        for head in range(query_heads):
            parts = [
                ColumnProblem(*(x[head::query_heads] for x in problem)) for problem in problems
            ]
            total = sum(part.key.double().transpose(-1, -2) @ part.key.double() for part in parts)
            moment = torch.as_tensor(total).sum(dim=0)
            trace = moment.diagonal().sum()
            worth = [_worth(part, tau, is_causal, num_columns).flatten() for part in parts]
            target = torch.cat(worth).double().cpu()
            if not (float(trace) > 0 and float(target.sum()) > 0):
                raise ArgumentError(
                    f"row oracle: the captured queries and keys of head {head} have no energy, so "
                    "there is nothing to learn from; capture another text"
                )
            moment = (moment / trace).float()
            found = [_features(part.query, moment.to(part.query)[None]) for part in parts]
            inputs = torch.cat([x.flatten(0, 1) for x in found]).double().cpu()
            mean, spread = inputs.mean(dim=0), inputs.std(dim=0, correction=0)
            # what is constant says nothing
            unit = torch.where(spread > 1e-9, 1 / spread, 0)
            model = regressor(alpha=_PENALTY, max_iter=1000)
            model.fit(((inputs - mean) * unit).numpy(), (target / target.mean()).numpy())
            moments.append(moment.cpu())
            weights.append((torch.as_tensor(model.coef_) * unit).float())
        return cls(moment=torch.stack(moments), weight=torch.stack(weights), tau=float(tau))


def _features(query: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """Return `[heads, n_q, 4]` of queries `[heads, n_q, d]` and moments, one for each few heads."""
    moment = moment.repeat(query.shape[0] // moment.shape[0], 1, 1)
    with without_autocast(query):
        share = ((query @ moment) * query).sum(dim=-1)
    position = torch.arange(1, query.shape[1] + 1, dtype=query.dtype, device=query.device)
    found = (share, centred_norms(query), leverages(query), position.expand(query.shape[:2]))
    return torch.stack([_relative(x) for x in found], dim=-1)


def _relative(x: torch.Tensor) -> torch.Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    ratio = torch.where(mean > 0, x / mean, 1)
    return ratio.clamp(min=_LEAST).log()


def _worth(part: ColumnProblem, tau: float, is_causal: bool, num_columns: int) -> torch.Tensor:
    """Return the target of the training for `[batch, n_q]` rows."""
    num_queries, num_keys = part.query.shape[1], part.key.shape[1]
    column = torch.arange(0, num_keys, max(1, -(-num_keys // num_columns)), device=part.key.device)
    with without_autocast(part.query):
        product = part.query @ part.key[:, column].transpose(-1, -2)
    worth = (tau * product.square()).clamp(max=1).square()
    if is_causal:
        row = torch.arange(num_queries, device=column.device) + num_keys - num_queries
        worth = worth * (column <= row.unsqueeze(-1))
    return worth.mean(dim=-1)


def _regressor() -> type:
    try:
        from sklearn.linear_model import PoissonRegressor
    except ImportError as error:
        raise MissingDependencyError(
            "row oracle: training needs scikit-learn, which is not installed; "
            "pip install 'hyperframe-attention[sklearn]' (a trained oracle works without)"
        ) from error
    found: type = PoissonRegressor
    return found
