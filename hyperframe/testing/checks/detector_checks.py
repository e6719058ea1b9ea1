"""Checks of detectors: what is asked and answered, and what a mask may depend on."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from ...detectors import AbstractDetector
from ...errors import ArgumentError, UnsupportedError
from ...randomness import Stream
from .problem import (
    DTYPES,
    LENGTHS,
    CheckSkippedError,
    Inputs,
    as_one_graph,
    changed,
    fail,
    generator,
    global_seed,
    has_own_generator,
    inputs,
    same_bits,
    strided,
)

__all__ = [
    "causal_forms",
    "check_batch_items_are_independent",
    "check_compiles_to_one_graph",
    "check_degenerate_inputs_have_masks",
    "check_empty_inputs_are_refused",
    "check_every_dtype_is_taken",
    "check_every_length_has_a_mask",
    "check_generator_decides",
    "check_groups_of_heads_are_independent",
    "check_heads_are_independent",
    "check_inputs_and_component_stay_as_they_are",
    "check_scale_has_its_default",
    "check_strides_do_not_matter",
    "find",
]

_KEEP = "use only the tensors of the same batch item and of the key head h // (Hq // Hkv)"


def find(
    detector: AbstractDetector, x: Inputs, *, is_causal: bool = False, seed: int = 1,
    **options: Any,
) -> torch.Tensor:  # fmt: skip
    """Return the dense mask of a call with a fresh generator."""
    mask = detector.find(x.query, x.key, is_causal=is_causal, generator=generator(seed), **options)
    return mask.to_dense()


def causal_forms(detector: AbstractDetector) -> tuple[bool, ...]:
    """Return the values of `is_causal` that the detector does not refuse by name."""
    x, found = inputs(num_queries=4, num_keys=4), []
    for is_causal in (False, True):
        with contextlib.suppress(UnsupportedError):
            find(detector, x, is_causal=is_causal)
            found.append(is_causal)
    return tuple(found)


def check_every_length_has_a_mask(detector: AbstractDetector) -> None:
    """For any lengths the mask is over the asked problem, bool, where the inputs are."""
    answered = 0
    for is_causal in (False, True):
        for num_queries, num_keys in LENGTHS:
            x = inputs(num_queries=num_queries, num_keys=num_keys)
            asked = f"n_q={num_queries}, n_k={num_keys}, is_causal={is_causal}"
            try:
                mask = detector.find(x.query, x.key, is_causal=is_causal, generator=generator())
            except UnsupportedError:
                continue  # a refusal by name is an answer, as long as something is answered
            answered += 1
            mask.validate()
            dense, shape = mask.to_dense(), (2, 4, num_queries, num_keys)
            if dense.shape != shape or dense.dtype != torch.bool:
                found = f"{dense.dtype} {tuple(dense.shape)}"
                fail(detector, f"{asked} for bool {shape}", found, "hand the sizes to the mask")
            if dense.device != x.key.device or mask.device != x.key.device:
                remedy = "make tensors with device=key.device"
                fail(detector, f"{asked} on {x.key.device}", f"a mask on {mask.device}", remedy)
            later = torch.arange(num_keys) > torch.arange(num_queries)[:, None] + (
                num_keys - num_queries
            )
            if is_causal and bool(dense[..., later.to(dense.device)].any()):
                remedy = "hand is_causal to the mask, and leave query_offset alone"
                fail(detector, asked, "entries above the diagonal", remedy)
    if not answered:
        fail(detector, "any lengths", "a refusal of all of them", "answer some")


def check_empty_inputs_are_refused(detector: AbstractDetector) -> None:
    """Attention over nothing is refused by name."""
    x = inputs()
    for empty, query, key in (
        ("no queries", x.query[:, :, :0], x.key), ("no keys", x.query, x.key[:, :, :0]),
        ("no batch items", x.query[:0], x.key[:0]),
    ):  # fmt: skip
        try:
            detector.find(query, key, generator=generator())
        except ArgumentError:
            continue
        remedy = "leave the checks of AbstractDetector.__init_subclass__ in place"
        fail(detector, f"with {empty}", "a mask", remedy)


def check_every_dtype_is_taken(detector: AbstractDetector) -> None:
    """float64, float32, bfloat16 and float16 all have valid masks."""
    for dtype in DTYPES:
        x = inputs(dtype=dtype)
        mask = detector.find(x.query, x.key, generator=generator())
        mask.validate()
        if mask.to_dense().dtype != torch.bool:
            found = str(mask.to_dense().dtype)
            fail(detector, f"a bool mask of {dtype}", found, "return one of hyperframe.masks")


def check_strides_do_not_matter(detector: AbstractDetector) -> None:
    """Transposed, strided and gradient-carrying inputs give the mask of contiguous ones."""
    x = inputs(dtype=torch.float64)  # where no rounding decides between two keys
    other = Inputs(*(strided(t).requires_grad_() for t in x))
    for is_causal in causal_forms(detector):
        want, got = (find(detector, y, is_causal=is_causal) for y in (x, other))
        if not same_bits(want, got):
            found = f"{int((want != got).sum())} entries that differ"
            remedy = "use reshape instead of view, and no raw storage"
            fail(detector, "with equal numbers in another layout", found, remedy)


def check_batch_items_are_independent(detector: AbstractDetector) -> None:
    """Other numbers in one batch item change nothing in another."""
    _check_isolation(detector, inputs(batch=3), slice(1, None), slice(None), slice(None))


def check_heads_are_independent(detector: AbstractDetector) -> None:
    """Other numbers in one head change nothing in another, without groups."""
    x = inputs(query_heads=3, key_heads=3)
    _check_isolation(detector, x, slice(None), slice(1, None), slice(1, None))


def check_groups_of_heads_are_independent(detector: AbstractDetector) -> None:
    """Query head h goes with key head h // (Hq // Hkv); a group may share its choice."""
    _check_isolation(detector, inputs(), slice(None), slice(2, None), slice(1, None))


def _check_isolation(
    detector: AbstractDetector, x: Inputs, items: slice, heads: slice, key_heads: slice
) -> None:
    """Check that what is disturbed shows nowhere else."""
    untouched = (slice(0, items.start), slice(0, heads.start))
    other = Inputs(changed(x.query, (items, heads)), changed(x.key, (items, key_heads)), x.value)
    for is_causal in causal_forms(detector):
        want, got = (find(detector, y, is_causal=is_causal)[untouched] for y in (x, other))
        if not same_bits(want, got):
            asked = f"with other numbers elsewhere ({x.query.shape[1]} heads, "
            asked += f"{x.key.shape[1]} key heads, is_causal={is_causal})"
            found = f"{int((want != got).sum())} entries that changed"
            fail(detector, asked, found, _KEEP)


def check_generator_decides(detector: AbstractDetector) -> None:
    """The generator is the only source of randomness: the same seed gives the same mask."""
    x = inputs()
    for is_causal in causal_forms(detector):
        masks = []
        for seed in (3, 4):
            with global_seed(seed) as was_drawn_from:
                masks.append(find(detector, x, is_causal=is_causal))
                used = was_drawn_from()
            if used:
                remedy = "draw by hyperframe.randomness.uniform and normal with the generator"
                fail(detector, "with a generator", "draws from torch's global one", remedy)
        if not same_bits(*masks):
            found = f"{int((masks[0] != masks[1]).sum())} entries that differ"
            remedy = "take all randomness from generator, none from Python, NumPy or the clock"
            fail(detector, "twice with the same seed", found, remedy)
        ask = functools.partial(detector.find, x.query, x.key, is_causal=is_causal)
        if has_own_generator(detector, lambda given, ask=ask: ask(generator=given)):  # type: ignore[misc]
            remedy = "draw by the one that is given: heads, layers and steps draw anew by it"
            fail(detector, "with a generator", "draws by another one alone", remedy)
    if detector.takes_stream:
        streams: list[Any] = [Stream(5), Stream(5)]
        first, again = (
            detector.find(x.query, x.key, generator=stream).to_dense() for stream in streams
        )
        if not same_bits(first, again):
            remedy = "draw by hyperframe.randomness, or set takes_stream = False"
            fail(detector, "twice with the same Stream", "two masks", remedy)


def check_inputs_and_component_stay_as_they_are(detector: AbstractDetector) -> None:
    """A call changes neither its inputs nor the detector."""
    detector = detector.replace()  # one that was never called
    for is_causal in causal_forms(detector):
        x, state = inputs(), dict(vars(detector))
        before = [t.clone() for t in x]
        find(detector, x, is_causal=is_causal)
        for name, old, new in zip(x._fields, before, x, strict=True):
            if not same_bits(old, new):
                remedy = "clone it first, and use no method that ends in _ on what was given"
                fail(detector, f"for a mask, is_causal={is_causal}", f"another {name}", remedy)
        if vars(detector).keys() != state.keys() or any(
            vars(detector)[name] is not state[name] for name in state
        ):
            remedy = "compute it anew in every call: a component holds its parameters only"
            fail(detector, "for a mask", "attributes that changed", remedy)


def check_scale_has_its_default(detector: AbstractDetector) -> None:
    """`scale=None` is `1 / sqrt(d)`."""
    x = inputs()
    want, got = find(detector, x), find(detector, x, scale=x.query.shape[-1] ** -0.5)
    if not same_bits(want, got):
        remedy = "begin with scale = default_scale(query, scale)"
        fail(detector, "scale=None and scale=1/sqrt(d)", "two masks", remedy)


def check_degenerate_inputs_have_masks(detector: AbstractDetector) -> None:
    """Zeros, equal vectors, huge and tiny numbers give valid masks."""
    x = inputs()
    cases = {
        "zeros": [torch.zeros_like(t) for t in x],
        "equal vectors": [t[:, :, :1].expand_as(t) for t in x],
        "norms of 1e4": [1e4 * t for t in x],
        "norms of 1e-20": [1e-20 * t for t in x],
        "keys that are multiples of one": [x.query, x.key[:, :, :1] * x.key[..., :1], x.value],
        "queries of zeros": [torch.zeros_like(x.query), x.key, x.value],
    }
    for name, case in cases.items():
        for is_causal in causal_forms(detector):
            y = Inputs(*case)
            mask = detector.find(y.query, y.key, is_causal=is_causal, generator=generator())
            try:
                mask.validate()
            except ArgumentError as error:
                remedy = "look for NaN in the scores, and for ties"
                fail(detector, f"{name}, is_causal={is_causal}", str(error), remedy)


def check_compiles_to_one_graph(detector: AbstractDetector) -> None:
    """Where `takes_stream` says so, `find` compiles to one graph and finds the same."""
    if not detector.takes_stream:
        raise CheckSkippedError("takes_stream is False: a torch.Generator cannot be compiled")

    def called(query: torch.Tensor, key: torch.Tensor, seed: torch.Tensor) -> Any:
        stream: Any = Stream(seed)
        return (detector.find(query, key, generator=stream).to_dense(),)

    x = inputs(dtype=torch.float64)
    as_one_graph(detector, called, x.query, x.key, torch.tensor(5, device=x.key.device))
