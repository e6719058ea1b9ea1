"""What the figures are measured from: the heads, exact attention, approximations of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..attention import HyperAttention
from ..benchmarking.frontier import Problem, has_budget, with_budget
from ..benchmarking.frontier.measure import Remembered
from ..diagnostics.columns import column_squares
from ..diagnostics.scores import Scores
from ..errors import UnsupportedError
from ..integrations.capture import CapturedHeads
from ..masks import HeavyMask
from ..trace import tracing
from .rows import Row, make_row
from .settings import ReportSettings

__all__ = ["Source"]


class Source:
    """Errors and masses of one file, each measured once.

    Args:
        problem: the heads.
        settings: what is measured.
        head_names: numbers of the heads in their model; None counts them.
        about: what is known of the heads, see `hyperframe.integrations.capture.load_about`.

    Cost: exact attention once for each layer, in float32 at least and without a matrix of scores;
    one attention call for each error and each mass. The mask of the last detector and layer is
    kept; outputs of exact attention are kept for all layers.
    """

    def __init__(
        self, problem: Problem, settings: ReportSettings,
        head_names: Sequence[int] | None = None, about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.problem = problem
        self.settings = settings
        self.about = dict(about or {})
        heads = problem.layers[0].query.shape[1]
        self.head_names = list(range(heads)) if head_names is None else list(head_names)
        self._errors: dict[tuple[Any, ...], list[float]] = {}
        self._held: dict[tuple[Any, ...], tuple[list[float], float]] = {}
        self._alphas: dict[tuple[int, int], dict[int, list[float]]] = {}
        self._last: tuple[Any, HyperAttention] | None = None

    def layer(self, number: int) -> CapturedHeads:
        """Return the layer of that number in the file."""
        return self.problem.layers[number]

    def row(self, figure: str, quantity: str, **fields: Any) -> Row:
        """Return a row of this file; a `number` becomes the layer, a `place` the head."""
        if "number" in fields:
            fields["layer"] = self.layer(fields.pop("number")).layer_idx
        if "place" in fields:
            fields["head"] = self.head_names[fields.pop("place")]
        common = {
            "file": self.problem.file, "digest": self.problem.digest, "n": self.problem.length,
            "seed": self.settings.seed,
        }  # fmt: skip
        return make_row(figure=figure, quantity=quantity, **(common | fields))

    def head_rows(
        self, figure: str, quantity: str, values: Sequence[float], **fields: Any
    ) -> list[Row]:
        """Return one row for each head of a layer."""
        return [
            self.row(figure, quantity, statistic="head", place=place, value=value, **fields)
            for place, value in enumerate(values)
        ]

    def takes_budget(self, spec: str) -> bool:
        """Whether the detector of a spec has a rule for budgets."""
        return has_budget(self.settings.attention(spec).detector)

    def errors(
        self, spec: str, number: int, *, num_samples: int, budget: int | None = None
    ) -> list[float]:
        """Return the relative Frobenius error of each head's output, mean over batch items.

        Args:
            spec: of the detector.
            number: of the layer.
            num_samples: sampled keys.
            budget: of the detector; None takes it as it is.

        Raises:
            ArithmeticError: an output is not finite.
        """
        key = (spec, budget, number, num_samples)
        if key not in self._errors:
            layer, exact = self.layer(number), self._exact(number).out
            attention = self._attention(spec, number, budget).replace(num_samples=num_samples)
            with torch.no_grad():
                out = attention(
                    layer.query, layer.key, layer.value, scale=layer.scale,
                    is_causal=layer.is_causal,
                )  # fmt: skip
            difference = (out.to(exact.dtype) - exact).flatten(2).norm(dim=-1)
            error = (difference / exact.flatten(2).norm(dim=-1)).mean(dim=0)
            if not bool(torch.isfinite(error).all()):
                raise ArithmeticError(f"the output of layer {layer.layer_idx} is not finite")
            self._errors[key] = error.tolist()
        return self._errors[key]

    def held(
        self, spec: str, number: int, *, budget: int | None = None
    ) -> tuple[list[float], float]:
        """Return what the mask holds of the softmax mass, and of the keys.

        Args:
            spec: of the detector.
            number: of the layer.
            budget: of the detector; None takes it as it is.

        Returns:
            The mass of each head: mean over rows that see a key, and over batch items. The keys
            of a row, mean over rows, heads and batch items.
        """
        key = (spec, budget, number)
        if key not in self._held:
            layer, exact = self.layer(number), self._exact(number).lse
            attention = self._attention(spec, number, budget).replace(num_samples=0)
            with torch.no_grad(), tracing() as trace:
                _, lse = attention(
                    layer.query, layer.key, layer.value, scale=layer.scale,
                    is_causal=layer.is_causal, return_lse=True,
                )  # fmt: skip
            # the heavy entries' share of the row sum, without a matrix of them
            sees = torch.isfinite(exact)
            share = torch.where(sees, (lse - exact).double().exp().clamp(max=1), 0.0)
            mass = share.sum(dim=(0, 2)) / sees.sum(dim=(0, 2)).clamp(min=1)
            self._held[key] = mass.tolist(), trace.keys_per_query
        return self._held[key]

    def alpha_over_n(self, number: int, length: int) -> dict[int, list[float]]:
        """Return alpha / n of each head of a prefix, mean over batch items.

        Args:
            number: of the layer.
            length: of the prefix.

        Returns:
            The numbers of the heads, by how many leading columns are left out: none, and the
            settings' `skip_first`. As `hyperframe.diagnostics.alpha`, in one pass for both.
        """
        key = (number, length)
        if key not in self._alphas:
            layer = self.layer(number)
            query = layer.query if length == layer.key.shape[2] else layer.query[:, :, :length]
            scores = Scores.of(
                query, layer.key[:, :, :length], scale=layer.scale, is_causal=layer.is_causal,
                dtype=None,
            )  # fmt: skip
            squares = column_squares(scores)
            self._alphas[key] = {
                skipped: squares[..., skipped:].amax(dim=-1).mean(dim=0).tolist()
                for skipped in sorted({0, self.settings.skip_first})
            }
        return self._alphas[key]

    def mask(self, spec: str, number: int) -> HeavyMask:
        """Return the mask that a detector found in a layer, the one its errors are of.

        Raises:
            UnsupportedError: the call was answered without looking for one.
        """
        detector = self._attention(spec, number, None).detector
        if not detector.found:  # the call finds it
            self._held.pop((spec, None, number), None)
            self.held(spec, number)
        if not detector.found:
            raise UnsupportedError(
                f"report: {spec} was answered by exact attention in layer "
                f"{self.layer(number).layer_idx}, which has no mask; capture more than one query"
            )
        found: HeavyMask = detector.found[0][0]
        return found

    def _exact(self, number: int) -> Any:
        return self.problem.reference(number, is_causal=self.layer(number).is_causal)

    def _attention(self, spec: str, number: int, budget: int | None) -> HyperAttention:
        """Return the attention of a spec, whose detector looks once for a layer."""
        key = (spec, number, budget)
        if self._last is None or self._last[0] != key:
            attention = self.settings.attention(spec)
            detector = attention.detector
            if budget is not None:
                detector = with_budget(detector, budget)
            remembered = Remembered(inner=detector)
            # by name: the sampler that goes with the wrapped detector is this one's
            chosen = attention.replace(detector=remembered, sampler=attention.sampler)
            self._last = key, chosen
        return self._last[1]
