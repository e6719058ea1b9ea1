"""Checks of estimators: what row sums are, where they are exact, and what they may depend on."""

from __future__ import annotations

import functools

import torch

from ...attention import HyperAttention
from ...detectors import create as create_detector
from ...estimators import AbstractEstimator
from ...masks import HeavyMask, ListMask
from ..oracles import dense_attention, masked_attention
from .problem import (
    DTYPES,
    LENGTHS,
    CheckSkippedError,
    Inputs,
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
    "check_equal_scores_are_counted",
    "check_every_key_sampled_is_exact",
    "check_full_mask_is_exact",
    "check_generator_decides",
    "check_groups_of_heads_are_independent",
    "check_inputs_and_component_stay_as_they_are",
    "check_later_keys_move_no_earlier_row",
    "check_later_queries_count_only_where_declared",
    "check_row_sums_have_their_form",
    "check_rule_normalises_attention",
    "check_strides_do_not_matter",
    "check_sums_are_not_below_the_masked_part",
]

_MASKS = ("oracle(budget=4)", "sliding_window(width=5, num_sinks=1)", "sort_lsh(block_size=8)")


def _mask(x: Inputs, is_causal: bool, spec: str = _MASKS[0]) -> HeavyMask:
    return create_detector(spec).find(x.query, x.key, is_causal=is_causal, generator=generator(9))


def _full(x: Inputs, is_causal: bool) -> HeavyMask:
    shape = (*x.query.shape[:3], x.key.shape[2])
    dense = torch.ones(shape, dtype=torch.bool, device=x.key.device)
    return ListMask.from_dense(dense, is_causal=is_causal)


def _sums(
    estimator: AbstractEstimator, x: Inputs, mask: HeavyMask, *, seed: int = 1, num: int = 12
) -> torch.Tensor:
    return estimator.row_sums(
        x.query, x.key, mask, num_samples=num, generator=generator(seed)
    ).log_sum


def check_row_sums_have_their_form(estimator: AbstractEstimator) -> None:
    """`log_sum` is floating point `[B, Hq, n_q]` for any length, dtype and number of samples."""
    cases = [(lengths, torch.float32, 12) for lengths in LENGTHS]
    cases += [((40, 40), dtype, num) for dtype in DTYPES for num in (0, 1, 100)]
    for (num_queries, num_keys), dtype, num in cases:
        for is_causal in (False, True):
            x = inputs(num_queries=num_queries, num_keys=num_keys, dtype=dtype)
            got = _sums(estimator, x, _mask(x, is_causal), num=num)
            asked = f"n_q={num_queries}, n_k={num_keys}, {dtype}, num_samples={num}, {is_causal=}"
            if got.shape != x.query.shape[:3] or not got.is_floating_point():
                found = f"{got.dtype} {tuple(got.shape)}"
                fail(estimator, asked, found, "return one number for every query head and row")
            if bool(got.isnan().any()) or bool((got == torch.inf).any()):
                remedy = "compute in logarithms with the largest logit taken out"
                fail(estimator, asked, "NaN or infinite sums", remedy)


def check_full_mask_is_exact(estimator: AbstractEstimator) -> None:
    """Where the mask holds everything nothing is estimated."""
    for is_causal in (False, True):
        x = inputs(dtype=torch.float64)
        got = _sums(estimator, x, _full(x, is_causal)).double()
        want = dense_attention(*x, is_causal=is_causal).lse
        _check_close(estimator, got, want, f"a full mask, {is_causal=}", "count 1 - M_ij only")


def check_every_key_sampled_is_exact(estimator: AbstractEstimator) -> None:
    """With as many samples as keys nothing is left to estimate."""
    for is_causal in (False, True):
        x = inputs(dtype=torch.float64)
        for spec in _MASKS:
            got = _sums(estimator, x, _mask(x, is_causal, spec), num=40).double()
            want = dense_attention(*x, is_causal=is_causal).lse
            asked = f"40 samples of 40 keys beside {spec}, {is_causal=}"
            _check_close(estimator, got, want, asked, "count no key twice, and each once")


def _check_close(
    estimator: AbstractEstimator, got: torch.Tensor, want: torch.Tensor, asked: str, remedy: str
) -> None:
    if not torch.allclose(got, want, rtol=1e-4, atol=1e-4):
        found = f"log sums off by up to {float((got - want).abs().max()):.3g}"
        fail(estimator, f"exact sums of {asked}", found, remedy)


def check_equal_scores_are_counted(estimator: AbstractEstimator) -> None:
    """Where all entries are 1 the sum is the number of keys, within a factor of 2.

    All samples are alike there, but for how many of them the mask holds already.
    """
    x = inputs()
    x = x._replace(query=torch.zeros_like(x.query), key=torch.ones_like(x.key))
    dense = torch.zeros(2, 4, 40, 40, dtype=torch.bool, device=x.key.device)
    got = _sums(estimator, x, ListMask.from_dense(dense), num=16).exp()
    if not bool(((got > 20) & (got < 80)).all()):
        found = f"sums between {float(got.min()):.3g} and {float(got.max()):.3g}"
        remedy = "weigh m sampled keys by n / m"
        fail(estimator, "40 entries of 1, 16 samples and nothing held", found, remedy)


def check_sums_are_not_below_the_masked_part(estimator: AbstractEstimator) -> None:
    """No row sum is below the part that the mask holds: all entries of `A` are positive."""
    for is_causal in (False, True):
        for spec in _MASKS:
            x = inputs(dtype=torch.float64)
            mask = _mask(x, is_causal, spec)
            held = masked_attention(*x, mask.to_dense()).lse
            for num in (0, 3, 12):
                got = _sums(estimator, x, mask, num=num).double()
                gap = float((held - got).nan_to_num(nan=0.0).max())
                if gap > 1e-4:
                    found = f"a log sum {gap:.3g} below the masked part"
                    asked = f"{num} samples beside {spec}, {is_causal=}"
                    fail(estimator, asked, found, "add the estimate to the masked part")


def check_rule_normalises_attention(estimator: AbstractEstimator) -> None:
    """The rule has the shape of rows, says what `row_sums` says, and keeps a full mask exact."""
    for is_causal in (False, True):
        x = inputs(dtype=torch.float64)
        mask, full = _mask(x, is_causal), _full(x, is_causal)
        options = {"scale": x.query.shape[-1] ** -0.5, "num_samples": 12}
        rule = estimator.rule(x.query, x.key, mask, generator=generator(1), **options)
        for name, tensor in vars(rule).items():
            if tensor is not None and (
                tensor.shape != x.query.shape[:3] or bool(tensor.isnan().any())
            ):
                found = f"{name} {tuple(tensor.shape)}, NaN: {bool(tensor.isnan().any())}"
                fail(estimator, "a rule", found, "give one number for every row")
        if rule.log_sum is not None:
            want = _sums(estimator, x, mask).double()
            if not torch.allclose(rule.log_sum.double(), want, rtol=1e-5, atol=1e-5):
                remedy = "compute rule().log_sum by row_sums with the same generator"
                fail(estimator, f"rule().log_sum, {is_causal=}", "other row sums", remedy)
        rule = estimator.rule(x.query, x.key, full, generator=generator(1), **options)
        bound = rule.log_floor
        exact = dense_attention(*x, is_causal=is_causal).lse
        if bound is not None and bool((bound.double() > exact + 1e-4).any()):
            remedy = "have no floor where the mask holds all keys of a row"
            fail(estimator, "a rule for a full mask", "a floor above the sum", remedy)
        attention = HyperAttention(
            detector="oracle(budget=40)", estimator=estimator, num_samples=12, min_seq_len=0
        )
        out = attention(*x, is_causal=is_causal)
        want = dense_attention(*x, is_causal=is_causal).out
        if not torch.allclose(out, want, rtol=1e-4, atol=1e-4):
            found = f"an output off by {float((out - want).abs().max()):.3g}"
            fail(estimator, f"attention by a full mask, {is_causal=}", found, "see row_sums")


def check_generator_decides(estimator: AbstractEstimator) -> None:
    """The generator is the only source of draws."""
    x = inputs()
    for is_causal in (False, True):
        mask, sums = _mask(x, is_causal), []
        for seed in (3, 4):
            with global_seed(seed):
                sums.append(_sums(estimator, x, mask))
        if not same_bits(*sums):
            remedy = "draw by hyperframe.randomness.uniform and normal with the generator"
            fail(estimator, f"twice with one seed, {is_causal=}", "two results", remedy)
        ask = functools.partial(estimator.row_sums, x.query, x.key, mask, num_samples=12)
        if has_own_generator(estimator, lambda given, ask=ask: ask(generator=given)):  # type: ignore[misc]
            remedy = "draw by the one that is given: heads, layers and steps draw anew by it"
            fail(estimator, "with a generator", "draws by another one alone", remedy)


def check_inputs_and_component_stay_as_they_are(estimator: AbstractEstimator) -> None:
    """A call changes neither its inputs nor the mask nor the estimator."""
    estimator = estimator.replace()  # one that was never called
    x, state = inputs(), dict(vars(estimator))
    mask = _mask(x, False)
    before, dense = [t.clone() for t in x], mask.to_dense()
    _sums(estimator, x, mask)
    estimator.rule(x.query, x.key, mask, scale=0.3, num_samples=12, generator=generator(1))
    remedy = "clone it first, and use no method that ends in _ on what was given"
    for name, old, new in zip(x._fields, before, x, strict=True):
        if not same_bits(old, new):
            fail(estimator, "for row sums", f"another {name}", remedy)
    if not same_bits(dense, mask.to_dense()):
        fail(estimator, "for row sums", "another mask", remedy)
    if vars(estimator) != state:
        remedy = "compute it anew in every call: a component holds its parameters only"
        fail(estimator, "for row sums", "attributes that changed", remedy)


def check_strides_do_not_matter(estimator: AbstractEstimator) -> None:
    """Strided inputs have the sums of contiguous ones."""
    x = inputs(dtype=torch.float64)
    mask, other = _mask(x, False), Inputs(*map(strided, x))
    want, got = _sums(estimator, x, mask), _sums(estimator, other, mask)
    if not torch.allclose(want, got, rtol=1e-6, atol=1e-6):
        remedy = "use reshape instead of view, and no raw storage"
        fail(estimator, "with equal numbers in another layout", "other sums", remedy)


def check_groups_of_heads_are_independent(estimator: AbstractEstimator) -> None:
    """Other numbers in one group of heads, or one batch item, move no other one's sums."""
    x = inputs()
    for what, items, heads in (("group", 0, 1), ("batch item", 1, 0)):
        query = changed(x.query, (slice(items, None), slice(2 * heads, None)))
        key = changed(x.key, (slice(items, None), slice(heads, None)))
        y = x._replace(query=query, key=key)
        kept = (slice(0, items or None), slice(0, 2 * heads or None))
        for is_causal in (False, True):
            mask = _mask(x, is_causal)
            want, got = (_sums(estimator, z, mask)[kept] for z in (x, y))
            if not torch.allclose(want, got, rtol=1e-5, atol=1e-5):
                remedy = "let query head h go with key head h // (Hq // Hkv), and items alone"
                fail(estimator, f"other numbers in another {what}", "other sums", remedy)


def check_later_keys_move_no_earlier_row(estimator: AbstractEstimator) -> None:
    """Under a causal mask no key moves the sum of an earlier row."""
    _check_rows_before(estimator, queries_too=False)


def check_later_queries_count_only_where_declared(estimator: AbstractEstimator) -> None:
    """An estimator that does not say `uses_queries` has no row that depends on later ones."""
    if getattr(estimator, "uses_queries", False):
        raise CheckSkippedError("uses_queries is True: it is refused under strict_causal=True")
    _check_rows_before(estimator, queries_too=True)


def _check_rows_before(estimator: AbstractEstimator, *, queries_too: bool) -> None:
    for num_queries, num_keys in ((40, 40), (29, 40)):
        x, offset = inputs(num_queries=num_queries, num_keys=num_keys), num_keys - num_queries
        for spec in _MASKS[:2]:
            mask = _mask(x, True, spec)
            want = _sums(estimator, x, mask)
            for cut in (13, 20, 39):
                row = cut - offset
                y = x._replace(key=changed(x.key, (..., slice(cut, None), slice(None))))
                if queries_too:
                    where = (..., slice(row, None), slice(None))
                    y = y._replace(query=changed(x.query, where))
                got = _sums(estimator, y, mask)[:, :, :row]
                if not torch.allclose(want[:, :, :row], got, rtol=1e-5, atol=1e-5):
                    what = "keys and queries" if queries_too else "keys"
                    remedy = "let rows of a causal mask see what comes before them"
                    remedy += ", or set uses_queries = True" if queries_too else ""
                    asked = f"other {what} from position {cut} on (n_q={num_queries})"
                    fail(estimator, asked, "other sums of earlier rows", remedy)
