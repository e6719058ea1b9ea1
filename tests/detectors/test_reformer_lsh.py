"""ReformerLSH: the buckets of rotations, blocks of equal rank, rounds, and its causal forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors.reformer_lsh import ReformerLSH, rotation_codes
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.testing import masked_attention
from hyperframe.testing.strategies import AttentionInputs, attention_inputs
from tests.finding_laws import SIZES, random_heads

tensors = partial(random_heads, dim=6, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(
    detector: ReformerLSH, query: torch.Tensor, key: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buckets of queries and keys, both for query heads (the first round)."""
    query_code, key_code = detector._codes(query, key, generator(seed))[0]
    return query_code, key_code.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


@pytest.mark.parametrize("half", [1, 2, 5, 32])
def test_the_bucket_is_the_largest_coordinate_of_the_rotation_and_its_opposite(half: int) -> None:
    x, rotation = torch.randn(50, 6, generator=generator()), torch.randn(6, half)
    expected = torch.cat([x @ rotation, -(x @ rotation)], dim=-1).argmax(dim=-1)
    assert torch.equal(rotation_codes(x, rotation), expected)
    assert torch.equal(rotation_codes(1e-3 * x, rotation), expected)
    assert torch.equal(rotation_codes(-x, rotation), (expected + half) % (2 * half))
    assert expected.unique().numel() == min(2 * half, expected.unique().numel()) > 1


@pytest.mark.parametrize("num_queries", [40, 37, 12, 3])
@pytest.mark.parametrize("block_size", [1, 7, 8, 40])
def test_a_row_holds_the_keys_of_its_share_of_ranks(num_queries: int, block_size: int) -> None:
    query, key = tensors(num_queries=num_queries)
    detector = ReformerLSH(block_size=block_size, num_buckets=6, num_rounds=1)
    dense = detector.find(query, key, generator=generator(5)).to_dense()
    query_code, key_code = codes(detector, query, key, 5)
    blocks = -(-40 // block_size)
    expected = torch.zeros_like(dense)
    for b in range(2):
        for head in range(4):
            rows = query_code[b, head].argsort(stable=True).tolist()
            columns = key_code[b, head].argsort(stable=True).tolist()
            for n in range(blocks):
                own = columns[n * 40 // blocks : (n + 1) * 40 // blocks]
                for row in rows[n * num_queries // blocks : (n + 1) * num_queries // blocks]:
                    expected[b, head, row, own] = True
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("shape", [(40, 40), (25, 40), (40, 25)])
@pytest.mark.parametrize("num_buckets", [2, 6, 64])
def test_a_causal_row_holds_its_key_and_earlier_ones_of_its_bucket(
    shape: tuple[int, int], num_buckets: int
) -> None:
    num_queries, num_keys = shape
    query, key = tensors(num_queries=num_queries, num_keys=num_keys)
    detector = ReformerLSH(block_size=7, num_buckets=num_buckets, num_rounds=1)
    dense = detector.find(query, key, is_causal=True, generator=generator(5)).to_dense()
    query_code, key_code = codes(detector, query, key, 5)
    bits = (num_buckets - 1).bit_length()
    kept = min(bits, (-(-num_keys // 7)).bit_length() - 1)  # no more buckets than blocks
    query_code, key_code = query_code >> bits - kept, key_code >> bits - kept
    expected = torch.zeros_like(dense)
    for b in range(2):
        for head in range(4):
            for row in range(num_queries):
                position = row + num_keys - num_queries
                seen = [
                    j
                    for j in range(max(0, position + 1))
                    if key_code[b, head, j] == query_code[b, head, row]
                ]
                first = max(0, (len(seen) - 1) // 3 - 1) * 3
                expected[b, head, row, seen[first:]] = True
                if position >= 0:
                    expected[b, head, row, position] = True
    assert torch.equal(dense, expected)


def test_planted_neighbours_are_found_far_more_often_than_by_chance() -> None:
    g = generator(1)
    key = torch.randn(1, 4, 256, 32, generator=g)
    order = torch.randperm(256, generator=g)
    query = key[:, :, order] + 0.2 * torch.randn(1, 4, 256, 32, generator=g)

    def recall(rounds: int, **options: bool) -> float:
        detector = ReformerLSH(block_size=16, num_buckets=16, num_rounds=rounds)
        dense = detector.find(query, key, generator=generator(2), **options).to_dense()
        hit = dense[:, :, torch.arange(256), order].double()
        return float(hit[:, :, torch.arange(256) >= order].mean() if options else hit.mean())

    # one of 16 blocks by chance, and 4 rounds hold a quarter of all entries at most
    assert recall(1) > 0.35
    assert recall(4) > max(0.75, recall(1))
    assert recall(4, is_causal=True) > 0.6


def test_rounds_are_the_union_of_independent_blocks_and_an_entry_is_held_once() -> None:
    query, key = tensors(num_queries=64, num_keys=64)
    detector = ReformerLSH(block_size=8, num_rounds=3, num_buckets=8)
    mask = detector.find(query, key, generator=generator())
    members = [part.to_dense() for part in mask.parts()]
    assert len(members) == 3
    assert torch.equal(mask.to_dense(), members[0] | members[1] | members[2])
    assert not torch.equal(members[0], members[1])
    assert members[0].sum() < mask.nnz().sum() < sum(int(m.sum()) for m in members)
    # nothing counts twice: attention by the mask is that of its dense form
    value = torch.randn(2, 2, 64, 3, generator=generator(5), dtype=torch.float64)
    for is_causal in (False, True):
        attention = HyperAttention(detector=detector, num_samples=0, min_seq_len=0,
                                   backend="torch")  # fmt: skip
        found = attention(query, key, value, is_causal=is_causal, generator=generator(3))
        dense = detector.find(query, key, is_causal=is_causal, generator=generator(3)).to_dense()
        expected = masked_attention(query, key, value, dense, scale=6**-0.5)
        torch.testing.assert_close(found, expected.out)


@given(
    num_queries=SIZES, num_keys=SIZES, cut=st.integers(0, 59), strict=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
@example(num_queries=60, num_keys=60, cut=33, strict=False, seed=0)
@example(num_queries=40, num_keys=60, cut=21, strict=True, seed=0)
@example(num_queries=60, num_keys=40, cut=41, strict=True, seed=0)
def test_no_later_key_or_query_moves_a_causal_row(
    num_queries: int, num_keys: int, cut: int, strict: bool, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = ReformerLSH(block_size=6, num_buckets=8, num_rounds=2)
    find = detector.find_strict if strict else detector.find
    cut = min(cut, num_queries)
    before = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    query[:, :, cut:] = query[:, :, cut:].flip(-1) * -5
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -5
    after = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@given(seed=st.integers(0, 1000), block_size=st.integers(1, 50), row=st.integers(0, 19))
def test_in_the_strict_rectangle_a_row_depends_on_its_own_query_alone(
    seed: int, block_size: int, row: int
) -> None:
    query, key = tensors(seed, num_queries=20)
    detector = ReformerLSH(block_size=block_size, num_buckets=6, num_rounds=2)

    def dense(q: torch.Tensor) -> torch.Tensor:
        find = detector.find_rectangle
        return find(q, key, strict=True, generator=generator(seed)).to_dense()

    before = dense(query)
    assert 1 <= before.sum(dim=-1).min() <= before.sum(dim=-1).max() <= 2 * block_size
    other = torch.randn(query.shape, generator=generator(seed + 1), dtype=query.dtype)
    other[:, :, row] = query[:, :, row]
    assert torch.equal(dense(other)[:, :, row], before[:, :, row])


@given(inputs=attention_inputs(), is_causal=st.booleans(), strict=st.booleans())
def test_any_input_gives_blocks_of_at_most_block_size_keys_a_round(
    inputs: AttentionInputs, is_causal: bool, strict: bool
) -> None:
    query, key, _ = inputs
    detector = ReformerLSH(block_size=3, num_buckets=4, num_rounds=2)
    find = detector.find_strict if strict else detector.find
    mask = find(query, key, is_causal=is_causal, generator=generator())
    mask.validate()
    for part in mask.parts():
        assert (part.to_dense()).sum(dim=-1).max() <= 3
    held = mask.to_dense().sum(dim=-1)
    assert held.max() <= 6
    if is_causal:
        own = torch.arange(query.shape[2]) + key.shape[2] - query.shape[2]
        assert (held[..., own >= 0] >= 1).all()
    else:
        assert held.min() >= 1


def test_heads_and_rounds_have_rotations_of_their_own_and_groups_share_them() -> None:
    query, key = tensors()
    query, key = query[:, :1].expand(-1, 4, -1, -1), key[:, :1].expand(-1, 2, -1, -1)
    rounds = ReformerLSH(num_buckets=8, num_rounds=2)._codes(query, key, generator())
    seen = [code[0, h] for _, code in rounds for h in range(2)]
    for number, one in enumerate(seen):
        for two in seen[:number]:
            assert not torch.equal(one, two)
    for query_code, _ in rounds:
        assert torch.equal(query_code[:, 0], query_code[:, 1])
        assert not torch.equal(query_code[:, 1], query_code[:, 2])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(130, 130), (100, 150), (150, 100), (3, 5)])
def test_no_value_is_read_while_entries_are_found(
    strict: bool, is_causal: bool, shape: tuple[int, int]
) -> None:
    """Tensors without values: reading one, or a size that depends on one, is an error."""
    query = torch.empty(2, 4, shape[0], 8, device="meta")
    key = torch.empty(2, 2, shape[1], 8, device="meta")
    detector = ReformerLSH(block_size=16, num_buckets=8, num_rounds=2)
    find = detector.find_strict if strict else detector.find
    assert find(query, key, is_causal=is_causal).device.type == "meta"


def test_bad_options_are_refused_by_name() -> None:
    for option in ("block_size", "num_buckets", "num_rounds"):
        with pytest.raises(ArgumentError, match=rf"reformer_lsh: {option}=0 is too small"):
            ReformerLSH(**{option: 0})
        with pytest.raises(ArgumentTypeError, match=rf"reformer_lsh: {option}=True has type bool"):
            ReformerLSH(**{option: True})
    with pytest.raises(ArgumentError, match=r"reformer_lsh: num_buckets=7 is odd.*even number"):
        ReformerLSH(num_buckets=7)
