"""HyperAttention: detector, sampler, estimator and kernel composed into attention."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar, Literal, TypeAlias, overload

import torch

from . import detectors, estimators, samplers
from .assembly import no_columns
from .component import AbstractComponent, check_bool, check_choice, check_non_negative_int
from .detectors.auto import spec_of_preset
from .errors import ArgumentError, ArgumentTypeError, SpecError, UnsupportedError, did_you_mean
from .kernels import resolve_backend
from .kernels.backends import BACKENDS
from .padding import Part, solve_padded
from .pipeline import Pipeline
from .randomness import Stream, check_generator
from .trace import active_trace
from .validation import check_inputs, check_padding_mask, check_scale

__all__ = ["Draws", "HyperAttention", "check_options", "hyper_attention"]

Draws: TypeAlias = "torch.Generator | torch.Tensor | Stream"
"""What may be the source of a call's draws; a tensor is a seed."""


@dataclass(frozen=True, kw_only=True)
class HyperAttention:
    """Near-linear attention: heavy entries exactly, the rest by weighted samples.

    Args:
        detector: which entries are heavy: a name, a spec string such as
            `"sort_lsh(block_size=256)"` or `"sliding_window | heavy_columns"`, or an instance; or
            a preset of the detector `auto`: `"fast"`, `"balanced"` (what `"auto"` is) or
            `"accurate"`.
        sampler: which columns stand for the rest; the same three forms. `"auto"` is the sampler
            that goes with the detector: its `residual`, which is uniform for all but `auto`; or
            the `columns` of an estimator that has some (`kde`); in `assembly="paper"` it is
            `row_norm`.
        estimator: how the row sums are estimated; the same three forms.
        assembly: `"residual"`: heavy entries count exactly in the output and in the row sums, and
            the sampled columns stand for the rest of both. `"paper"` is Algorithm 3 to the letter,
            `D~^-1 A S^T S V`: the row sums `D~` are the estimator's, by `num_samples` uniform
            columns of its own beside the exact heavy entries, and S are `num_samples` columns that
            the sampler draws from all of them, so that heavy entries are sampled in the output like
            all others (see `hyperframe.assembly`). Its error is that of Lemma 2; no detector makes
            it smaller. With the estimator `approx_d(cap_attention=True)`, `D~` has the caps of
            Algorithm 2 as well as its floors.
        num_samples: sampled keys or groups for a row (in the recursion: of each rectangle); 0
            drops everything that is not heavy. Where no more keys than this exist, all of them
            are taken once.
        causal: how causal attention is computed: `"single_pass"` (an elementwise test inside the
            tiles, samples from each tile's prefix) or `"recursive"` (Algorithm 4).
        strict_causal: True lets only queries before a row's tile or rectangle help to choose its
            entries, so that row i depends on positions <= i alone. False uses all queries, as
            block selection everywhere does. Keys and values never leak, either way.
        min_seq_len: a call with `n_k <= min_seq_len` is answered by exact attention, and leaves of
            the recursion up to this length are exact; 0 never falls back. None takes the measured
            `BREAK_EVEN` of device and backend for the call, and `DEFAULT_LEAF` for the leaves;
            both are in `hyperframe.pipeline`.
        backend: `"auto"`, `"reference"`, `"torch"`, `"triton"` or `"numba"`; one that was asked
            for runs or raises, it is never replaced.
        seed: seed of the draws. The same inputs and seed give the same bits: the object has no
            state. To draw anew in every step, pass a `generator` to the call, or set `seed=None`:
            then each call takes one seed from torch's global CPU generator, which activation
            checkpointing restores (a captured CUDA graph keeps the one of its capture).
        check_finite: look for NaN and infinities first (reads the device).

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 4, 512, 32).unbind()
        >>> attn = HyperAttention(detector="heavy_columns(num_columns=64)", min_seq_len=0)
        >>> attn(q, k, v, is_causal=True).shape
        torch.Size([1, 4, 512, 32])

    Cost: O(n (heavy + num_samples) d) plus the detector's, times `log2(n / min_seq_len)` in the
    recursion. Differentiable in query, key and value: the exact gradient of the forward with the
    chosen indices and weights held constant. One query is always exact. Source: HyperAttention
    (arXiv 2310.05869), Algorithms 1-4.
    """

    takes_stream: ClassVar[bool] = True
    _goes_with_detector: ClassVar[bool]

    detector: Any = "auto"
    sampler: Any = "auto"
    estimator: Any = "uniform"
    assembly: str = "residual"
    num_samples: int = 256
    causal: str = "single_pass"
    strict_causal: bool = False
    min_seq_len: int | None = None
    backend: str = "auto"
    seed: int | None = 0
    check_finite: bool = False

    def __new__(cls, *arguments: Any, **options: Any) -> HyperAttention:
        """Refuse unknown options by name before the generated `__init__` sees them."""
        if arguments:
            raise ArgumentTypeError(
                f"HyperAttention: {arguments[0]!r} was given without a name; options have names, "
                "for example detector='sort_lsh'"
            )
        check_options(options, owner="HyperAttention")
        return super().__new__(cls)

    def __repr__(self) -> str:
        """Return code that makes the object again, components as spec strings."""
        return f"HyperAttention({', '.join(self._arguments())})"

    def _arguments(self) -> Iterator[str]:
        registries = {"detector": detectors, "sampler": samplers, "estimator": estimators}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in registries:
                # an unregistered component has no spec: its own repr has to do
                with contextlib.suppress(SpecError):
                    value = registries[field.name].to_spec(value)
            yield f"{field.name}={value!r}"

    def replace(self, **changes: Any) -> HyperAttention:
        """Return a copy with some options changed, checked like a new one."""
        check_options(changes, owner="HyperAttention.replace")
        chosen_by = {"detector", "estimator", "strict_causal", "assembly"}
        if chosen_by & changes.keys() and self._goes_with_detector:
            changes.setdefault("sampler", "auto")
        return dataclasses.replace(self, **changes)

    def __post_init__(self) -> None:
        """Create the components and check the parameters."""
        object.__setattr__(self, "detector", detectors.create(spec_of_preset(self.detector)))
        # no field: whether the sampler has to change with the detector
        is_auto = isinstance(self.sampler, str) and self.sampler.strip() == "auto"
        object.__setattr__(self, "_goes_with_detector", is_auto)
        check_choice("HyperAttention", "assembly", self.assembly, ("residual", "paper"))
        object.__setattr__(self, "estimator", estimators.create(self.estimator))
        residual = self.estimator.columns or self.detector.residual
        if self.assembly == "paper":
            residual = "row_norm"
        sampler = residual if is_auto else self.sampler
        if sampler == "auto" and self.strict_causal is True:
            sampler = "auto(metric='key')"
        object.__setattr__(self, "sampler", samplers.create(sampler))
        owner = "HyperAttention"
        check_non_negative_int(owner, "num_samples", self.num_samples)
        check_choice(owner, "causal", self.causal, ("single_pass", "recursive"))
        check_bool(owner, "strict_causal", self.strict_causal)
        check_bool(owner, "check_finite", self.check_finite)
        check_choice(owner, "backend", self.backend, BACKENDS)
        if self.min_seq_len is not None:
            check_non_negative_int(owner, "min_seq_len", self.min_seq_len)
        if self.seed is not None and (isinstance(self.seed, bool) or type(self.seed) is not int):
            raise ArgumentTypeError(
                f"HyperAttention: seed={self.seed!r} has type {type(self.seed).__name__}; pass an "
                "int, or None to draw one from torch's global generator in every call"
            )

        if self.assembly == "paper":
            if self.num_samples == 0:
                raise ArgumentError(
                    "HyperAttention: num_samples=0 with assembly='paper' leaves nothing to make "
                    "the output of, whose every entry is sampled; pass at least 1, or "
                    "assembly='residual'"
                )
            if not self.sampler.draws_keys:
                raise UnsupportedError(no_columns(self.sampler.name))
        for part in (self.sampler, self.estimator):
            if self.strict_causal and getattr(part, "uses_queries", False):
                raise UnsupportedError(
                    f"strict_causal=True: the {part.kind} {part.name} looks at queries, later ones "
                    "included, and has no strictly causal form; use strict_causal=False, or "
                    "another one"
                )

    @overload
    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        is_causal: bool = ..., scale: float | None = ...,
        key_padding_mask: torch.Tensor | None = ..., return_lse: Literal[False] = ...,
        generator: Draws | None = ...,
    ) -> torch.Tensor: ...  # fmt: skip

    @overload
    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        is_causal: bool = ..., scale: float | None = ...,
        key_padding_mask: torch.Tensor | None = ..., return_lse: Literal[True],
        generator: Draws | None = ...,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        is_causal: bool = False, scale: float | None = None,
        key_padding_mask: torch.Tensor | None = None, return_lse: bool = False,
        generator: Draws | None = None, **unsupported: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Attend.

        Args:
            query: `[batch, query_heads, n_q, d]`; float32, bfloat16, float16 or float64.
            key: `[batch, key_heads, n_k, d]`, `query_heads % key_heads == 0`.
            value: `[batch, key_heads, n_k, d_v]`.
            is_causal: `key position <= query position`; the last query is aligned with the last
                key when `n_q != n_k`.
            scale: factor of the logits; None is `1 / sqrt(d)`.
            key_padding_mask: bool `[batch, n_k]`, True for real keys. Padding is cut out before
                anything else sees the keys; positions are counted with it. Detectors that go by
                positions need real keys without gaps between them. Reads the device.
            return_lse: also return the log normaliser.
            generator: source of the draws; replaces `seed`. A `torch.Generator` or a
                `hyperframe.randomness.Stream`, which move on; or a seed, an int64 tensor with one
                element on the device of the query: it is read there when the draws are made, so
                that a replayed CUDA graph draws anew once the tensor is filled anew, and compiled
                code takes another seed without compiling anew. Equal seeds draw alike.
            **unsupported: refused by name, with what to do instead.

        Returns:
            `out` `[batch, query_heads, n_q, d_v]`, and with `return_lse` the natural logarithm of
            the (estimated) row sums, float32 `[batch, query_heads, n_q]` (float64 for float64).
            A row without keys returns 0 and `-inf`.

        Raises:
            ArgumentError, ArgumentTypeError: arguments that do not fit.
            UnsupportedError: a component that cannot do what was asked, by name.
            BackendUnavailableError: the backend cannot run here.

        `torch.compile` traces a call into one graph (`fullgraph=True`), except with
        `key_padding_mask` and `check_finite`, where values decide what runs, and with components
        that take no `Stream`. Lengths, heads and options decide the geometry and are constants of
        that graph: each new length compiles anew. `hyperframe.trace` does not count compiled calls.
        """
        _refuse(unsupported)
        query, key, value = check_inputs(query, key, value, check_finite=self.check_finite)
        options = self
        if torch.compiler.is_compiling():
            options = _constant(self)
            query, key, value = _constant_sizes(query), _constant_sizes(key), _constant_sizes(value)
        scale = check_scale(scale, query.shape[-1])
        check_bool("HyperAttention", "is_causal", is_causal)
        check_bool("HyperAttention", "return_lse", return_lse)
        check_generator(generator, seed_on=query.device)
        resolve_backend(options.backend, query.device, query=query, value=value)
        if generator is None:
            generator = Stream.of(options.seed, query.device)
        elif isinstance(generator, torch.Tensor):
            generator = Stream(generator)
        call = Pipeline(
            detector=options.detector, sampler=options.sampler, estimator=options.estimator,
            num_samples=options.num_samples, causal=options.causal,
            strict_causal=options.strict_causal, assembly=options.assembly,
            min_seq_len=options.min_seq_len,
            backend=options.backend, scale=scale, generator=generator, need_lse=return_lse,
        )  # fmt: skip
        if key_padding_mask is None:
            state = call.solve(Part(query=query, key=key, value=value, is_causal=is_causal))
        else:
            mask = check_padding_mask(key_padding_mask, key)
            state = solve_padded(call.solve, query, key, value, mask, is_causal=is_causal)
        trace = active_trace()
        if trace is not None:
            trace.queries += query.shape[0] * query.shape[1] * query.shape[2]
        return (state.out, state.lse) if return_lse else state.out


# Sizes and parameters decide the geometry: how many tiles, levels and slots there are. Where
# `torch.compile` holds them as symbols, `index` asks for the value, and others compile anew.


def _constant_sizes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor with all sizes but the first, the batch size, constant."""
    return tensor.expand(-1, *[index(size) for size in tensor.shape[1:]])


def _constant(value: Any) -> Any:
    """Return an equal value made of constants."""
    if isinstance(value, (HyperAttention, AbstractComponent)):
        # not through __init__: what it checked and made need not be checked and made again
        copy = object.__new__(type(value))
        for field in dataclasses.fields(value):
            object.__setattr__(copy, field.name, _constant(getattr(value, field.name)))
        return copy
    if isinstance(value, tuple):
        return tuple(_constant(entry) for entry in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return index(value)
    return value


_REMEDIES = {
    "attn_mask": "use key_padding_mask for padding and is_causal for causality, or the detector "
    "block_list for a fixed pattern",
    "dropout_p": "set it to 0 in the model; sampled attention has no dropout",
    "dropout": "set it to 0 in the model; sampled attention has no dropout",
    "enable_gqa": "leave it out",
    "softcap": "use exact attention for layers with capped logits",
    "bias": "use exact attention for layers with a bias",
    "attn_bias": "use exact attention for layers with a bias",
    "s_aux": "use exact attention for layers with a sink logit of their own",
}


def check_options(options: Mapping[str, Any], *, owner: str) -> None:
    """Refuse names that are no option of `HyperAttention`, with the nearest one.

    Args:
        options: what was given.
        owner: who was called, for the message.

    Raises:
        UnsupportedError: attention features that there are not (dropout, a mask of entries, ...).
        ArgumentTypeError: any other unknown name.
    """
    known = [field.name for field in dataclasses.fields(HyperAttention)]
    unknown = {name: value for name, value in options.items() if name not in known}
    _refuse({name: value for name, value in unknown.items() if name in _REMEDIES})
    for name, value in unknown.items():
        raise ArgumentTypeError(
            f"{owner}: there is no option {name}={value!r}; the options are {', '.join(known)}."
            f"{did_you_mean(name, known)}"
        )


def _refuse(unsupported: Mapping[str, Any]) -> None:
    for name, value in unsupported.items():
        # what SDPA's arguments are when they are not used changes nothing here either
        is_unused = value is None or (not isinstance(value, torch.Tensor) and value == 0)
        if name == "enable_gqa" or (name in _REMEDIES and is_unused):
            continue
        remedy = _REMEDIES.get(name, "leave it out")
        shown = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
        raise UnsupportedError(
            f"{name}: got {shown}, but HyperAttention has no such argument in a call; {remedy}"
        )


def hyper_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool = False,
    scale: float | None = None, key_padding_mask: torch.Tensor | None = None,
    return_lse: bool = False, generator: Draws | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Attend once: `HyperAttention(**options)(query, key, value, ...)`.

    Args:
        query: as in `HyperAttention.__call__`, like all that follow.
        key: the keys.
        value: the values.
        is_causal: whether to attend causally.
        scale: factor of the logits.
        key_padding_mask: True for real keys.
        return_lse: also return the log normaliser.
        generator: source of the draws, or a seed tensor.
        **options: fields of `HyperAttention`.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 256, 16).unbind()
        >>> hyper_attention(q, k, v, detector="sliding_window(width=32)", min_seq_len=0).shape
        torch.Size([1, 2, 256, 16])
    """
    check_options(options, owner="hyper_attention")
    attention = HyperAttention(**options)
    result: Any = attention(
        query, key, value, is_causal=is_causal, scale=scale, key_padding_mask=key_padding_mask,
        return_lse=return_lse, generator=generator,
    )  # type: ignore[call-overload]  # fmt: skip
    return result
