"""What a detector is: a function from queries and keys to a `HeavyMask`."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from ..component import AbstractComponent
from ..errors import ArgumentError, ArgumentTypeError, UnsupportedError
from ..masks import BlockMask, HeavyMask, check_mask_type
from ..plugins import blame, described
from ..randomness import check_generator, with_generator
from ..rectangles import Level, level_rectangles
from ..validation import check_inputs, check_scale, may_look_at

__all__ = ["AbstractDetector", "default_scale"]

_Find = Callable[..., HeavyMask]


def _checked(find: _Find) -> _Find:
    """Check the arguments of a `find` method, and that its mask answers what was asked."""
    find = with_generator(find)

    @functools.wraps(find)
    def checked(
        self: AbstractDetector, query: torch.Tensor, key: torch.Tensor, **options: Any
    ) -> HeavyMask:
        check_inputs(query, key, key)
        check_scale(options.get("scale"), query.shape[-1])
        check_generator(options.get("generator"))
        try:
            mask = find(self, query, key, **options)
        except (ArgumentError, ArgumentTypeError) as error:
            blame(self, error)
            raise
        is_causal = bool(options.get("is_causal", False))
        _check_answer(self, mask, query, key, is_causal=is_causal)
        return mask

    return checked


def _checked_levels(find: Callable[..., list[BlockMask] | None]) -> Callable[..., Any]:
    """Check what a `find_levels` method returns: the rectangles, and orders that stay in them."""
    find = with_generator(find)

    @functools.wraps(find)
    def checked(
        self: AbstractDetector, query: torch.Tensor, key: torch.Tensor, **options: Any
    ) -> list[BlockMask] | None:
        masks = find(self, query, key, **options)
        if masks is None:
            return None
        length = query.shape[2]
        expected = [level_rectangles(level, length) for level in options["levels"]]
        if [getattr(mask, "rectangles", None) for mask in masks] != expected:
            raise ArgumentError(
                f"{described(self)} returned no masks of the levels' rectangles; return a "
                "BlockMask for each level, with the rectangles level_rectangles(level, n)"
            )
        for mask, level in zip(masks, options["levels"], strict=True):
            _check_answer(self, mask, query, key, is_causal=False)
            if may_look_at(mask.device):
                run = torch.arange(length) // level.size
                for order in (mask.query_order, mask.key_order):
                    if bool((order // level.size != run).any()):
                        raise ArgumentError(
                            f"{described(self)} moved rows between runs of {level.size}, "
                            "where a row would see later keys; sort inside the runs only"
                        )
        return masks

    return checked


def _check_answer(
    detector: AbstractDetector, mask: HeavyMask, query: torch.Tensor, key: torch.Tensor, *,
    is_causal: bool,
) -> None:  # fmt: skip
    """Check that a mask answers what a detector was asked."""
    given: Any = mask
    if not isinstance(given, HeavyMask):
        check_mask_type(f"{described(detector)} returned its mask", given)
    expected = {
        "batch_size": query.shape[0], "num_query_heads": query.shape[1],
        "num_queries": query.shape[2], "num_keys": key.shape[2], "is_causal": is_causal,
    }  # fmt: skip
    for field, value in expected.items():
        if getattr(mask, field) != value:
            raise ArgumentError(
                f"{described(detector)} returned a mask with {field}="
                f"{getattr(mask, field)!r}, but it was asked with {field}={value!r}; hand the "
                "sizes of query and key, and is_causal, on to the mask"
            )
    # elsewhere a look at the values would make the call wait, or break the graph
    if may_look_at(mask.device):
        try:
            mask.validate()
        except (ArgumentError, ArgumentTypeError) as error:
            blame(detector, error)
            raise


def default_scale(query: torch.Tensor, scale: float | None) -> float:
    """Return `scale`, or `1 / sqrt(head_dim)` for None."""
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


@dataclass(frozen=True, kw_only=True)
class AbstractDetector(AbstractComponent):
    """Base of every detector: a frozen dataclass with one method, `find`.

    A minimal detector (every row holds the first key):

        >>> from dataclasses import dataclass
        >>> import torch
        >>> from hyperframe.detectors import AbstractDetector
        >>> from hyperframe.masks import ListMask
        >>> @dataclass(frozen=True, kw_only=True)
        ... class FirstKey(AbstractDetector):
        ...     def find(self, query, key, *, scale=None, is_causal=False, generator=None):
        ...         index = torch.zeros(key.shape[0], key.shape[1], 1, dtype=torch.int64)
        ...         return ListMask.columns(
        ...             index, num_query_heads=query.shape[1], num_queries=query.shape[2],
        ...             num_keys=key.shape[2], is_causal=is_causal)

    Attributes:
        is_positional: the mask depends on positions and not on the content of queries and keys;
            such a detector is asked for every rectangle of the causal recursion by itself, and
            says in `find_within` what it holds where padding was cut out.
        is_row_local: a row's entries depend on no other query, so that `find` is strictly causal
            as it is.
        takes_stream: `generator` may be a `hyperframe.randomness.Stream`, because all draws go
            through `uniform` and `normal` of that module. Otherwise a `torch.Generator` seeded
            from the stream is made for every call; `torch.compile` and CUDA graphs cannot have
            that one. Not inherited by a class that finds entries in a way of its own.
        residual: the sampler that `sampler="auto"` takes beside this detector.
        break_even: keys up to which exact attention is faster, where this was measured for the
            detector: like `hyperframe.pipeline.BREAK_EVEN`, whose numbers hold for the others.
        row_budget: the parameter, a number or a fraction of the keys, that bounds how many keys a
            row holds without a causal mask; None where nothing does.
        finds: what of heavy entries is always found where the budget allows: "columns" (one key of
            all rows), "diagonals" (keys at one distance before the rows of a causal call),
            "entries" (any single ones), "neighbours" (keys at a small angle, most of them). The
            conformance suite plants what is named here.
    """

    kind: ClassVar[str] = "detector"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the methods that a subclass defines with checks of what goes in and comes out."""
        super().__init_subclass__(**kwargs)
        for name in ("find", "find_strict", "find_rectangle", "find_within"):
            method = cls.__dict__.get(name)
            if method is not None and not getattr(method, "__isabstractmethod__", False):
                setattr(cls, name, _checked(method))
                cls.takes_stream = cls.__dict__.get("takes_stream", False)
        if "find_levels" in cls.__dict__:
            setattr(cls, "find_levels", _checked_levels(cls.find_levels))  # noqa: B010
            cls.takes_stream = cls.__dict__.get("takes_stream", False)
        elif "find" in cls.__dict__ or "find_rectangle" in cls.__dict__:
            # what a parent finds for all levels is not what this class finds for a rectangle
            cls.find_levels = AbstractDetector.find_levels  # type: ignore[method-assign]

    is_positional: ClassVar[bool] = False
    is_row_local: ClassVar[bool] = False
    takes_stream: ClassVar[bool] = False
    residual: ClassVar[str] = "uniform"
    row_budget: ClassVar[str | None] = None
    finds: ClassVar[tuple[str, ...]] = ()
    break_even: ClassVar[Mapping[tuple[str, str, bool], int]] = MappingProxyType({})

    @abstractmethod
    def find(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return the heavy entries.

        Under `is_causal` no key may influence the entries of an earlier row, other than being in
        them or not; queries may (see `find_strict`).

        Args:
            query: `[batch, query_heads, n_q, d]`.
            key: `[batch, key_heads, n_k, d]`.
            scale: factor of the logits; None is `1 / sqrt(d)`.
            is_causal: whether rows hold only keys at or before their own position.
            generator: source of all randomness; see `takes_stream`.

        Returns:
            The mask.
        """

    def find_strict(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None,
        earlier_query: torch.Tensor | None = None,
    ) -> HeavyMask:  # fmt: skip
        """Return heavy entries in which a row depends on no later query.

        Args:
            query: as in `find`; under `is_causal=False` all keys come before all queries (a
                rectangle of the causal recursion).
            key: as in `find`.
            scale: as in `find`.
            is_causal: as in `find`.
            generator: as in `find`.
            earlier_query: queries that come before all of `query`, or None if there are none.

        Raises:
            UnsupportedError: the detector has no such form.
        """
        if self.is_row_local:
            return self.find(query, key, scale=scale, is_causal=is_causal, generator=generator)
        raise UnsupportedError(
            f"strict_causal=True: the detector {self.name} chooses entries with the help of later "
            "queries and has no strictly causal form; use strict_causal=False, or another detector"
        )

    def find_within(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        is_causal: bool = False, generator: torch.Generator | None = None, strict: bool = False,
        query_start: int, key_start: int, first_row: int, num_queries: int, num_keys: int,
    ) -> HeavyMask:  # fmt: skip
        """Return the heavy entries of what is left of a call when padded keys are cut out.

        Args:
            query: as in `find`: rows of the call that follow one another.
            key: as in `find`: keys of the call that follow one another.
            scale: as in `find`.
            is_causal: as in `find`.
            generator: as in `find`.
            strict: whether later queries may not help to choose; see `find_strict`.
            query_start: position of the first query; used by positional detectors.
            key_start: position of the first key.
            first_row: row of the first query in the whole call.
            num_queries: rows of the whole call.
            num_keys: keys of the whole call, padding included.

        Raises:
            UnsupportedError: the detector is positional and does not say what it holds here.
        """
        if self.is_positional and (query.shape[2], key.shape[2]) != (num_queries, num_keys):
            raise UnsupportedError(
                f"key_padding_mask: the detector {self.name} goes by positions and has no "
                "`find_within`, which must say what it holds where padding is cut out; give it "
                "one, or call without padding"
            )
        find = self.find_strict if strict else self.find
        return find(query, key, scale=scale, is_causal=is_causal, generator=generator)

    def find_rectangle(
        self, query: torch.Tensor, key: torch.Tensor, *, scale: float | None = None,
        generator: torch.Generator | None = None, query_start: int = 0, key_start: int = 0,
        first_row: int = 0, first_key: int = 0, earlier_query: torch.Tensor | None = None,
        strict: bool = False,
    ) -> HeavyMask:  # fmt: skip
        """Return the heavy entries of a rectangle below the diagonal: all keys before all queries.

        Args:
            query: as in `find`.
            key: as in `find`.
            scale: as in `find`.
            generator: as in `find`.
            query_start: position of the first query; used by positional detectors.
            key_start: position of the first key.
            first_row: row of the first query in the whole call (its position, less `n_k - n_q`).
            first_key: position of the first real key of the call (padding on the left).
            earlier_query: see `find_strict`.
            strict: whether later queries may not help to choose.
        """
        if strict:
            return self.find_strict(
                query, key, scale=scale, generator=generator, earlier_query=earlier_query
            )
        return self.find(query, key, scale=scale, generator=generator)

    def find_levels(
        self, query: torch.Tensor, key: torch.Tensor, *, leaf: int, levels: Sequence[Level],
        scale: float | None = None, generator: torch.Generator | None = None,
    ) -> list[BlockMask] | None:  # fmt: skip
        """Return the heavy entries of all rectangles of the causal recursion at once.

        None, as here, means that there is no such form: the rectangles are then found one stack
        after another, by `find_rectangle`.

        Args:
            query: `[batch, query_heads, n, d]`.
            key: `[batch, key_heads, n, d]`; as many as queries.
            leaf: length of the leaves on the diagonal.
            levels: `hyperframe.rectangles.causal_levels(n, leaf)`.
            scale: as in `find`.
            generator: as in `find`.

        Returns:
            A mask over the whole `n x n` problem for each level, whose rectangles are
            `level_rectangles(level, n)`, and whose orders move rows and keys only inside
            consecutive runs of `level.size`.
        """
        return None
