"""The kernels of hash buckets give what torch does; on a GPU, else interpreted."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperframe.detectors import lsh_topk
from hyperframe.detectors.lsh_topk import LSHTopK
from hyperframe.kernels import buckets as plain
from hyperframe.kernels.bucket_votes import bucket_votes, torch_bucket_votes
from hyperframe.kernels.buckets import bucket_codes, bucket_order, bucket_ranges, bucket_topk
from hyperframe.randomness import Stream

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from hyperframe.kernels.triton import bucket_votes as vote_kernels  # noqa: E402
from hyperframe.kernels.triton import buckets as kernels  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# the interpreter computes no products of bfloat16
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


def codes_of(*shape: int, buckets: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Buckets of unequal size, and empty ones where `spread` is large."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (drawn**spread * buckets).int().clamp(max=buckets - 1).to(DEVICE)


# ------------------------------------------------------------------------------ codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("second", [0, 5])
@pytest.mark.parametrize(
    "num_rows, dim, half, run", [(130, 16, 8, 64), (100, 40, 20, 9), (65, 64, 6, 1), (7, 5, 33, 7)]
)
def test_codes_are_the_largest_coordinates_of_shifted_products(
    dtype: torch.dtype, num_rows: int, dim: int, half: int, run: int, second: int
) -> None:
    x = normal(2, 4, num_rows, dim, dtype=dtype)
    rotation = normal(3, 2, 2, dim, half, seed=1, dtype=dtype).float()
    shift = 3 * normal(3, 2, 4, -(-num_rows // run), half, seed=2)
    found = kernels.triton_bucket_codes(x, rotation, shift, run, second)
    # where the two largest are apart, nothing is left to rounding
    product = x.double() @ rotation.double().repeat_interleave(2, dim=2)
    product = product - shift.double().repeat_interleave(run, dim=3)[:, :, :, :num_rows]
    is_clear, expected = torch.ones_like(found, dtype=torch.bool), torch.zeros_like(found)
    for part in product.split([half - second, second], dim=-1)[: 2 if second else 1]:
        both = torch.cat([part, -part], dim=-1)
        ordered = both.sort(dim=-1, descending=True).values
        # of half precision the last bits are not looked at
        least = 1e-4 + (0 if dtype == torch.float32 else 1e-4) * ordered[..., 0]
        is_clear &= ordered[..., 0] - ordered[..., 1] > least
        expected = expected * both.shape[-1] + both.argmax(dim=-1)
    assert is_clear.double().mean() > 0.99
    assert torch.equal(found[is_clear].long(), expected[is_clear])
    plainly = plain.torch_bucket_codes(x, rotation, shift, run, second)
    assert plainly.dtype == found.dtype == torch.int32
    assert torch.equal(plainly[is_clear], found[is_clear])


def test_codes_of_zero_rows_and_of_rows_with_strides() -> None:
    x = torch.zeros(1, 2, 50, 16, device=DEVICE)
    rotation, shift = normal(1, 1, 1, 16, 8), torch.zeros(1, 1, 2, 1, 8, device=DEVICE)
    assert (kernels.triton_bucket_codes(x, rotation, shift, 50) == 0).all()
    x = normal(1, 50, 2, 32)[..., ::2].transpose(1, 2)
    found = kernels.triton_bucket_codes(x, rotation, shift, 50)
    assert torch.equal(found, kernels.triton_bucket_codes(x.contiguous(), rotation, shift, 50))


# ------------------------------------------------------------------------------ orders


# a sort in registers is slow to interpret
@settings(max_examples=max(8, settings.default.max_examples // 5))
@given(
    num_rows=st.sampled_from([1, 63, 64, 100, 300]), buckets=st.integers(1, 140),
    seed=st.integers(0, 99), spread=st.sampled_from([0.2, 1.0, 6.0]),
)  # fmt: skip
def test_orders_are_stable_sorts(num_rows: int, buckets: int, seed: int, spread: float) -> None:
    code, chunk = codes_of(1, num_rows, buckets=buckets, seed=seed, spread=spread), 64
    order, bounds, counts = kernels.triton_bucket_order(code, buckets, chunk)
    assert torch.equal(order, code.sort(dim=-1, stable=True).indices.int())
    for number in range(counts.shape[1]):
        first = code[:, : (number + 1) * chunk]
        of_bucket = [(first == bucket).sum(dim=-1) for bucket in range(buckets)]
        assert torch.equal(counts[:, number].long(), torch.stack(of_bucket, dim=-1))
    count = torch.stack([(code == bucket).sum(dim=-1) for bucket in range(buckets)], dim=-1)
    assert torch.equal(bounds[:, 1:].long(), count.cumsum(dim=-1))
    assert (bounds[:, 0] == 0).all()
    for one, other in zip(
        (order, bounds, counts), plain.torch_bucket_order(code, buckets, chunk), strict=True
    ):  # fmt: skip
        assert one.dtype == other.dtype == torch.int32
        assert torch.equal(one, other)


def test_orders_of_many_buckets() -> None:
    code = codes_of(1, 600, buckets=512)
    order, _, _ = kernels.triton_bucket_order(code, 512, 512)
    assert torch.equal(order, code.sort(dim=-1, stable=True).indices.int())
    assert not kernels.supports_order(code, 514)


# ------------------------------------------------------------------------------ ranges


def orders(
    *, num_rows: int = 150, num_keys: int = 170, heads: int = 4, key_heads: int = 2,
    buckets: int = 6, rounds: int = 2, seed: int = 0, spread: float = 1.0,
) -> dict[str, torch.Tensor]:  # fmt: skip
    code = codes_of(rounds, 2, heads, num_rows, buckets=buckets, seed=seed, spread=spread)
    key_code = codes_of(rounds, 2, key_heads, num_keys, buckets=buckets, seed=seed + 1)
    key_order, bounds, counts = bucket_order(key_code, buckets=buckets)
    return {
        "code": code, "key_code": key_code, "key_order": key_order, "bounds": bounds,
        "counts": counts, "query_order": bucket_order(code, buckets=buckets)[0],
    }  # fmt: skip


@given(
    num_rows=st.integers(1, 300), num_keys=st.integers(1, 200), buckets=st.integers(1, 9),
    reach=st.integers(1, 80), is_causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_ranges_are_those_of_the_definition(
    num_rows: int, num_keys: int, buckets: int, reach: int, is_causal: bool, seed: int
) -> None:
    made = orders(num_rows=num_rows, num_keys=num_keys, buckets=buckets, rounds=1, seed=seed)
    edge = (torch.arange(num_rows) * num_keys // num_rows).int().to(DEVICE)
    counts = plain.torch_bucket_order(made["key_code"], buckets, 64)[2]
    orders_of_keys = (made["bounds"], counts, made["key_order"])
    found = kernels.triton_bucket_ranges(
        made["code"], edge, *orders_of_keys, 64, reach, is_causal
    )  # fmt: skip
    orders_of_keys = (made["bounds"], made["key_order"])
    expected = plain.torch_bucket_ranges(made["code"], edge, *orders_of_keys, reach, is_causal)
    assert found.dtype == expected.dtype == torch.int32
    assert torch.equal(found, expected)
    for row in range(0, num_rows, 7):
        own = made["code"][0, 1, 3, row]
        members = (made["key_code"][0, 1, 1] == own).nonzero().squeeze(1).tolist()
        if is_causal:
            seen = [key for key in members if key < edge[row]][-reach:]
        else:
            middle = len([key for key in members if key < edge[row]])
            start = max(0, min(middle - reach // 2, len(members) - reach))
            seen = members[start : start + reach]
        low, high = found[0, 1, 3, row].tolist()
        assert made["key_order"][0, 1, 1, low:high].tolist() == seen


# ------------------------------------------------------------------------------ the best keys


def topk_problem(
    *, dim: int = 16, dtype: torch.dtype = torch.float32, reach: int = 40, seed: int = 0,
    is_causal: bool = True, **sizes: Any,
) -> dict[str, Any]:  # fmt: skip
    made = orders(seed=seed, **sizes)
    num_rows, num_keys = made["code"].shape[-1], made["key_order"].shape[-1]
    edge = (torch.arange(num_rows) * num_keys // num_rows).int().to(DEVICE)
    ranges = plain.torch_bucket_ranges(
        made["code"], edge, made["bounds"], made["key_order"], reach, is_causal
    )
    return {
        "query": normal(*made["code"].shape[1:], dim, seed=seed, dtype=dtype),
        "query_order": made["query_order"],
        "key": normal(*made["key_order"].shape[1:], dim, seed=seed + 1, dtype=dtype),
        "key_order": made["key_order"], "ranges": ranges,
    }  # fmt: skip


def compare_topk(given_: dict[str, Any], keep: int, reach: int = 40) -> None:
    index, score = kernels.triton_bucket_topk(**given_, keep=keep, scale=0.3)
    exact = {
        name: x.double() if x.is_floating_point() else x
        for name, x in given_.items() if name != "query_order"
    }  # fmt: skip
    expected_index, expected = plain.torch_bucket_topk(
        **exact, reach=reach, keep=keep, scale=0.3
    )  # fmt: skip
    assert index.dtype == torch.int32
    assert score.dtype == torch.float32
    assert torch.equal(index < 0, expected_index < 0)
    tolerance = TOLERANCE[given_["key"].dtype]
    torch.testing.assert_close(score.double(), expected, rtol=tolerance, atol=tolerance)
    # the keys are those of the scores, even where two of them are close
    heads, key_heads = given_["query"].shape[1], given_["key"].shape[1]
    keys = exact["key"].repeat_interleave(heads // key_heads, dim=1)
    logits = 0.3 * exact["query"] @ keys.transpose(-1, -2)
    own = logits.gather(-1, index.clamp(min=0).long()).masked_fill(index < 0, float("-inf"))
    torch.testing.assert_close(score.double(), own, rtol=tolerance, atol=tolerance)
    if given_["key"].dtype == torch.float32:
        assert torch.equal(index, expected_index)


@given(
    num_rows=st.integers(1, 200), num_keys=st.integers(1, 200), buckets=st.integers(1, 9),
    reach=st.integers(1, 90), keep=st.sampled_from([1, 2, 3, 4, 8]), is_causal=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 8.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_best_keys_of_any_ranges(
    num_rows: int, num_keys: int, buckets: int, reach: int, keep: int, is_causal: bool,
    spread: float, seed: int,
) -> None:  # fmt: skip
    given_ = topk_problem(
        num_rows=num_rows, num_keys=num_keys, buckets=buckets, reach=reach, is_causal=is_causal,
        spread=spread, seed=seed, rounds=1, heads=2, key_heads=1,
    )  # fmt: skip
    compare_topk(given_, keep, reach)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, heads, key_heads", [(16, 1, 1), (40, 6, 2), (128, 2, 2)])
def test_head_sizes_groups_and_dtypes_of_the_best_keys(
    dtype: torch.dtype, dim: int, heads: int, key_heads: int
) -> None:
    compare_topk(topk_problem(dim=dim, heads=heads, key_heads=key_heads, dtype=dtype), 2)


def test_any_order_of_the_rows_gives_the_same_and_rows_may_look_nowhere() -> None:
    given_ = topk_problem(num_rows=130, num_keys=300, buckets=3, rounds=1)
    expected = kernels.triton_bucket_topk(**given_, keep=2, scale=0.3)
    shuffled = given_ | {"query_order": given_["query_order"].flip(-1).roll(29, -1).contiguous()}
    found = kernels.triton_bucket_topk(**shuffled, keep=2, scale=0.3)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    given_["ranges"][..., 1] = given_["ranges"][..., 0] - 3
    index, score = kernels.triton_bucket_topk(**given_, keep=2, scale=0.3)
    assert (index == -1).all()
    assert (score == float("-inf")).all()


# ------------------------------------------------------------------------------ votes


def votes_problem(
    *, size: int = 16, num_rows: int = 45, num_keys: int = 300, found: int = 6, heads: int = 4,
    dim: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0, votes: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    tiles = -(-num_rows // size)
    index = torch.randint(-2, min(9, num_keys), (2, heads, num_rows, found), generator=g)
    voters = normal(2, heads, num_rows, dim, seed=seed, dtype=dtype)
    key = normal(2, heads // 2, num_keys, dim, seed=seed + 1, dtype=dtype)
    score = normal(2, heads, num_rows, found, seed=seed + 2)
    index = index.clamp(min=-1).int().to(DEVICE)
    return {
        "voters": voters, "key": key, "index": index,
        "score": score.masked_fill(index < 0, float("-inf")),
        "before": (torch.linspace(-5, num_keys, tiles).long()).to(DEVICE), "size": size,
        "votes": found if votes is None else votes,
    }  # fmt: skip


def compare_votes(given_: dict[str, Any]) -> None:
    voted, found = vote_kernels.triton_bucket_votes(**given_, scale=0.4)
    exact = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in given_.items()
    }
    expected_votes, expected = torch_bucket_votes(**exact, scale=0.4)
    assert voted.dtype == torch.int32
    if given_["key"].dtype == torch.float32:
        # keys without a share may be any that the row found
        is_one = expected > 1e-6
        assert torch.equal(voted[is_one], expected_votes[is_one])
    tolerance = TOLERANCE[given_["key"].dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@given(
    size=st.integers(7, 40), num_rows=st.integers(1, 70), num_keys=st.integers(1, 200),
    found=st.integers(1, 9), votes=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
def test_weights_of_votes(
    size: int, num_rows: int, num_keys: int, found: int, votes: int, seed: int
) -> None:
    compare_votes(
        votes_problem(
            size=size, num_rows=num_rows, num_keys=num_keys, found=found, heads=2, seed=seed,
            votes=min(votes, found),
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, size", [(40, 64), (128, 100)])
def test_head_sizes_and_dtypes_of_votes(dtype: torch.dtype, dim: int, size: int) -> None:
    compare_votes(votes_problem(dim=dim, size=size, num_rows=130, num_keys=150, dtype=dtype))


def test_weights_are_shares_and_a_repeated_key_counts_once() -> None:
    key = torch.zeros(1, 1, 80, 16, device=DEVICE)
    voters = torch.zeros(1, 1, 2, 16, device=DEVICE)
    index = torch.tensor([[[[3, 5, 3], [-1, 7, 7]]]], dtype=torch.int32, device=DEVICE)
    score = torch.zeros(1, 1, 2, 3, device=DEVICE).masked_fill(index < 0, float("-inf"))
    before = torch.tensor([80], device=DEVICE)
    for run in (torch_bucket_votes, vote_kernels.triton_bucket_votes):
        voted, weight = run(voters, key, index, score, before, 2, 3, 1.0)
        # all keys weigh the same: 64 that stand for 80, the first 4, and what was found
        expected = [[1 / 86, 1 / 86, 0], [0, 1 / 85, 0]]
        torch.testing.assert_close(weight[0, 0].cpu(), torch.tensor(expected))
        assert torch.equal(voted, index)
        voted, weight = run(voters, key, index, score, before, 2, 1, 1.0)
        torch.testing.assert_close(weight[0, 0].cpu(), torch.tensor([[1 / 86], [1 / 85]]))
        assert voted.flatten().tolist() == [3, 7]


# ------------------------------------------------------------------------------ rules


def test_the_operators_keep_the_rules_of_torch() -> None:
    x, rotation = normal(2, 4, 70, 16), normal(3, 2, 2, 16, 4)
    shift = torch.zeros(3, 2, 4, 2, 4, device=DEVICE)
    ops = torch.ops.hyperframe
    torch.library.opcheck(ops.bucket_codes.default, (x, rotation, shift, 64, 1))
    code = bucket_codes(x, rotation, shift, run=64)
    torch.library.opcheck(ops.bucket_order.default, (code, 8, 512))
    order, bounds, counts = bucket_order(code[:, :, :2], buckets=8)
    edge = torch.arange(70, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(
        ops.bucket_ranges.default, (code, edge, bounds, counts, order, 512, 5, True)
    )
    ranges = bucket_ranges(code, edge, bounds, counts, order, reach=5, is_causal=True)
    rows, key = bucket_order(code, buckets=8)[0], normal(2, 2, 70, 16)
    given_ = (x, rows, key, order, ranges)
    torch.library.opcheck(ops.bucket_topk.default, (*given_, 5, 2, 0.3))
    index, score = bucket_topk(*given_, reach=5, keep=2, scale=0.3)
    before = torch.arange(5, device=DEVICE) * 16
    torch.library.opcheck(ops.bucket_votes.default, (x, key, index, score, before, 16, 3, 0.3))
    voted, weight = bucket_votes(x, key, index, score, before, size=16, votes=3, scale=0.3)
    assert voted.shape == weight.shape == (*index.shape[:3], 3)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_detector_holds_the_same_keys_by_the_kernels(
    monkeypatch: pytest.MonkeyPatch, is_causal: bool, strict: bool
) -> None:
    query, key = normal(1, 2, 150, 16), normal(1, 1, 170, 16, seed=1)
    detector = LSHTopK(num_rounds=1, keep=4, num_keys=12, reach=20, tile_size=32, votes=3)

    def without_counts(*given_: Any) -> torch.Tensor:
        return plain.torch_bucket_ranges(*given_[:3], *given_[4:])

    def in_chunks(*given_: Any) -> torch.Tensor:
        return kernels.triton_bucket_ranges(*given_[:5], 64, *given_[5:])

    def held() -> torch.Tensor:
        find = detector.find_strict if strict else detector.find
        return find(query, key, is_causal=is_causal, generator=Stream(3)).to_dense()

    expected = []
    for codes, order, ranges, topk, votes in (
        (plain.torch_bucket_codes, partial(plain.torch_bucket_order, chunk=64), without_counts,
         plain.torch_bucket_topk, torch_bucket_votes),
        (kernels.triton_bucket_codes, partial(kernels.triton_bucket_order, chunk=64), in_chunks,
         kernels.triton_bucket_topk, vote_kernels.triton_bucket_votes),
    ):  # fmt: skip
        parts: dict[str, Any] = {"bucket_codes": codes, "bucket_order": order,
                                 "bucket_ranges": ranges, "bucket_votes": votes}  # fmt: skip
        for name, part in parts.items():
            monkeypatch.setattr(
                lsh_topk, name, lambda *a, _part=part, **k: _part(*a, *k.values())
            )  # fmt: skip

        def best(
            query: torch.Tensor, rows: torch.Tensor, *given_: Any, reach: int, keep: int,
            scale: float, _topk: Any = topk,
        ) -> Any:  # fmt: skip
            if _topk is plain.torch_bucket_topk:
                return _topk(query, *given_, reach, keep, scale)
            return _topk(query, rows, *given_, keep, scale)

        monkeypatch.setattr(lsh_topk, "bucket_topk", best)
        expected.append(held())
    assert expected[0].any()
    assert torch.equal(*expected)


def test_what_the_kernels_do_not_take_is_said() -> None:
    x, low = normal(1, 2, 9, 16), torch.zeros(1, 1, 2, 9, 2, dtype=torch.int32, device=DEVICE)
    wide, rotation = normal(1, 2, 9, 300), normal(1, 1, 1, 16, 8)
    assert kernels.supports_codes(x, rotation)
    assert not kernels.supports_codes(x.double(), rotation.double())
    assert not kernels.supports_codes(wide, normal(1, 1, 1, 300, 8))
    assert not kernels.supports_codes(x, normal(1, 1, 1, 16, 257))
    assert not kernels.supports_codes(wide[..., :256], normal(1, 1, 1, 256, 256))
    assert kernels.supports_codes(wide[..., :256].half(), normal(1, 1, 1, 256, 256))
    assert kernels.supports_topk(x, x, low, 8)
    assert not kernels.supports_topk(x, x, low, 9)
    assert not kernels.supports_topk(x.double(), x.double(), low, 2)
    assert not kernels.supports_topk(wide, wide, low, 2)
    index = torch.zeros(1, 2, 9, 8, dtype=torch.int32, device=DEVICE)
    assert vote_kernels.supports(x, x, index, 128)
    assert not vote_kernels.supports(x, x, index, 129)
    assert not vote_kernels.supports(x.double(), x.double(), index, 64)
