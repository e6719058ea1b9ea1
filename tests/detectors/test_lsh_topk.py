"""LSHTopK: what is written down, planted pairs that means hide, and nothing from the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create, lsh_topk
from hyperframe.detectors.lsh_topk import LSHTopK
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.kernels import bucket_votes, buckets
from hyperframe.masks import ListMask
from hyperframe.randomness import Stream
from hyperframe.testing import masked_attention
from hyperframe.testing.strategies import AttentionInputs, attention_inputs

SIZES = st.integers(1, 60)
JOINED = [6, 4]  # two hashes of 24 buckets, for heads of 6
SMALL = {"num_rounds": 2, "keep": 2, "num_keys": 5, "num_buckets": 4, "reach": 6, "tile_size": 8}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    seed: int = 0, *, num_queries: int = 40, num_keys: int = 40, dim: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(seed)
    query = torch.randn(2, 4, num_queries, dim, generator=g, dtype=torch.float64)
    key = torch.randn(2, 2, num_keys, dim, generator=g, dtype=torch.float64)
    return query + 2 * torch.randn(dim, generator=g), key + 3


def by_hand(
    detector: LSHTopK, query: torch.Tensor, key: torch.Tensor, seed: int, *, scale: float,
    is_causal: bool, strict: bool, earlier: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The dense mask by the definition, row by row, in float64."""
    batch, heads, num_queries, dim = query.shape
    key_heads, num_keys = key.shape[1:3]
    group, offset = heads // key_heads, num_keys - num_queries
    sizes = [detector.num_buckets] if detector.num_buckets <= 2 * dim else JOINED
    shape = (detector.num_rounds, batch, key_heads, dim, sum(sizes) // 2)
    rotations = torch.randn(shape, generator=generator(seed)).double()
    size = min(detector.tile_size, num_queries)
    unit = detector.tile_size if detector.tile_size > 1 else 64  # centred together
    steps = [1 if n <= lsh_topk._ALL_ROWS else 8 for n in (num_queries, num_keys)]
    runs = [min(step * unit, n) for step, n in zip(steps, (num_queries, num_keys), strict=True)]
    run = runs[0]
    dense = torch.zeros(batch, heads, num_queries, num_keys, dtype=torch.bool)

    def bucket(x: torch.Tensor, rotation: torch.Tensor) -> tuple[int, ...]:
        parts = (x @ rotation).split([size // 2 for size in sizes])
        return tuple(int(torch.cat([part, -part]).argmax()) for part in parts)

    def mean(rows: torch.Tensor, step: int = 1, run: int = 1 << 20) -> torch.Tensor:
        rows = torch.cat([torch.empty(0, dim), *(part[::step] for part in rows.split(run))])
        return rows.mean(dim=0) if len(rows) else torch.zeros(dim, dtype=torch.float64)

    for b in range(batch):
        for h in range(heads):
            q, k = query[b, h], key[b, h // group]
            early = q[:0] if earlier is None else earlier[b, h]
            logits = scale * (torch.cat([early, q]) @ k.T)
            shift = len(early)
            centred = []
            for j in range(num_keys):
                past = k[: j // runs[1] * runs[1]]
                centred.append(k[j] - mean(past if is_causal else k, steps[1], runs[1]))
            hashed = [
                [bucket(x, rotation) for x in centred] for rotation in rotations[:, b, h // group]
            ]
            for start in range(0, num_queries, size):
                begin = start + offset
                # what the tile's rows found, and what they saw
                weight: dict[int, float] = {}
                if strict:
                    voters = list(range(start - size + 1, start + 1))
                else:
                    voters = list(range(start, min(start + size, num_queries)))
                for voter in voters:
                    row = max(voter, -shift)
                    position = voter + offset
                    if row < 0:
                        y = early[row] - mean(early)
                    elif is_causal or strict:
                        known = [*q[: row // run * run].split(run), early]
                        known = torch.cat([rows[:: steps[0]] for rows in known])
                        y = q[row] - mean(known)
                    else:
                        y = q[row] - mean(q, steps[0])
                    kept = set()
                    for rotation, key_buckets in zip(
                        rotations[:, b, h // group], hashed, strict=True
                    ):
                        own = bucket(y, rotation)
                        members = [j for j in range(num_keys) if key_buckets[j] == own]
                        if is_causal:
                            last = (position if strict else begin) - detector.min_offset
                            seen = [j for j in members if j < last][-detector.reach :]
                        else:
                            middle = sum(j < position for j in members)
                            first = min(middle - detector.reach // 2, len(members) - detector.reach)
                            seen = members[max(0, first) :][: detector.reach]
                        seen.sort(key=lambda j: -float(logits[row + shift, j]))
                        kept |= set(seen[: detector.keep])
                    before = max(0, begin) if is_causal else num_keys
                    look = [(j, 0.0) for j in range(before)]
                    if before > 64:
                        share = float(torch.tensor(before / 64, dtype=torch.float64).log())
                        look = [((2 * s + 1) * before // 128, share) for s in range(64)]
                    look += [(j, 0.0) for j in range(min(4, before))] + [(j, 0.0) for j in kept]
                    if not kept:
                        continue
                    terms = torch.stack([logits[row + shift, j] + extra for j, extra in look])
                    if detector.votes is not None and detector.tile_size > 1:
                        ordered = sorted(kept, key=lambda j: -float(logits[row + shift, j]))
                        kept = set(ordered[: detector.votes])
                    for j in kept:
                        share = float((logits[row + shift, j] - terms.logsumexp(dim=0)).exp())
                        weight[j] = weight.get(j, 0.0) + share
                best = sorted(weight, key=lambda j: -weight[j])[: detector.num_keys]
                for row in range(start, min(start + size, num_queries)):
                    dense[b, h, row, best] = True
                    if is_causal:
                        dense[b, h, row, max(0, begin) : max(0, begin + size)] = True
                        dense[b, h, row, max(0, row + offset + 1) :] = False
    return dense


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "num_queries, num_keys, changes",
    [(40, 40, {}), (29, 45, {}), (45, 29, {"reach": 3, "keep": 4}), (5, 30, {"num_keys": 2}),
     (12, 90, {"num_rounds": 3, "reach": 70, "keep": 1}), (29, 45, {"min_offset": 9}),
     (40, 90, {"num_buckets": 24, "num_rounds": 5, "votes": 1}), (29, 45, {"votes": 3}),
     (30, 45, {"tile_size": 1, "num_keys": 3, "votes": 1}),
     (70, 72, {"tile_size": 1, "min_offset": 20})],
)  # fmt: skip
def test_the_keys_of_a_tile_are_those_of_the_definition(
    num_queries: int, num_keys: int, changes: dict[str, int], is_causal: bool, strict: bool
) -> None:
    query, key = tensors(num_queries=num_queries, num_keys=num_keys)
    detector = LSHTopK(**(SMALL | changes))
    find = detector.find_strict if strict else detector.find
    found = find(query, key, scale=0.6, is_causal=is_causal, generator=generator(3)).to_dense()
    expected = by_hand(
        detector, query, key, 3, scale=0.6, is_causal=is_causal, strict=strict
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_means_of_many_rows_are_of_every_eighth_one_of_longer_runs(
    monkeypatch: pytest.MonkeyPatch, is_causal: bool, strict: bool
) -> None:
    monkeypatch.setattr(lsh_topk, "_ALL_ROWS", 39)
    query, key = tensors(num_queries=38, num_keys=61)
    detector = LSHTopK(**(SMALL | {"tile_size": 3}))
    find = detector.find_strict if strict else detector.find
    options: dict[str, Any] = {"scale": 0.6, "is_causal": is_causal}
    found = find(query, key, generator=generator(3), **options).to_dense()
    assert torch.equal(found, by_hand(detector, query, key, 3, **options, strict=strict))
    monkeypatch.setattr(lsh_topk, "_ALL_ROWS", 61)
    assert not torch.equal(found, find(query, key, generator=generator(3), **options).to_dense())


@pytest.mark.parametrize("num_earlier", [0, 3, 7, 25])
def test_queries_before_a_rectangle_vote_in_the_strict_form(num_earlier: int) -> None:
    query, key = tensors(num_queries=21, num_keys=33)
    earlier = tensors(5, num_queries=max(1, num_earlier))[0][:, :, :num_earlier]
    detector = LSHTopK(**SMALL)
    found = detector.find_rectangle(
        query, key, scale=0.6, strict=True, generator=generator(3), earlier_query=earlier
    )
    expected = by_hand(
        detector, query, key, 3, scale=0.6, is_causal=False, strict=True, earlier=earlier
    )
    assert torch.equal(found.to_dense(), expected)


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = tensors()
    detector = LSHTopK(**SMALL)
    expected = detector.find(query, key, is_causal=True, generator=generator()).to_dense()
    for module in (bucket_votes, buckets):
        monkeypatch.setattr(module, "_CHUNK_BYTES", 1 << 14)
    found = detector.find(query, key, is_causal=True, generator=generator()).to_dense()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_planted_pairs_are_found_where_long_means_hide_them(strict: bool) -> None:
    g = generator(1)
    num_keys, dim = 2048, 64
    noise, key, other = torch.randn(3, 1, 4, num_keys, dim, generator=g).unbind()
    position = torch.arange(num_keys)
    rows = position[1100:]
    if strict:
        # rows that a tile before can help: 256 of them have one partner
        position, rows = position // 256 * 256, rows[rows % 256 >= 128]
    partner = (position - 1000).clamp(min=0)
    # means that rank no keys: neither varies along them
    means = torch.linalg.qr(other[:, :, :2].transpose(-1, -2)).Q.transpose(-1, -2)
    key, noise = (x - x @ means.transpose(-1, -2) @ means for x in (key, noise))
    # the angle of a query to its key has a cosine of 0.6, as on heads of models
    query = 3 * (0.6 * key[:, :, partner] + 0.8 * noise) + 60 * means[:, :, :1]
    key = key + 60 * means[:, :, 1:]

    def recall(spec: str) -> float:
        detector = create(spec)
        find = detector.find_strict if strict else detector.find
        dense = find(query, key, is_causal=True, generator=generator(2)).to_dense()
        return float(dense[:, :, rows, partner[rows]].double().mean())

    logits = 0.125 * query @ key.transpose(-1, -2)
    heaviest = logits.masked_fill(torch.ones(num_keys, num_keys).triu(1) > 0, -torch.inf)
    assert (heaviest.argmax(dim=-1)[:, :, rows] == partner[rows]).double().mean() > 0.9
    assert recall("lsh_topk") > 0.6
    assert recall("reformer_lsh(block_size=64, num_rounds=4)") < 0.05
    assert recall("sort_lsh(block_size=64, num_rounds=4)") < 0.05


def test_lists_ascend_without_repeats_and_hold_what_was_found_and_the_tile() -> None:
    query, key = tensors(num_queries=200, num_keys=230)
    mask = LSHTopK(num_keys=40).find(query, key, is_causal=True, generator=generator())
    assert isinstance(mask, ListMask)
    assert mask.tile_size == 64
    for tile, begin in enumerate((30, 94, 158, 222)):
        lists, counts = mask.key_index[:, :, tile].flatten(0, 1), mask.key_count[:, :, tile]
        for index, count in zip(lists, counts.flatten(), strict=True):
            keys = index[:count].tolist()
            assert keys == sorted(set(keys))
            assert keys[-min(64, 230 - begin) :] == list(range(begin, min(begin + 64, 230)))
            assert 0 < len([key for key in keys if key < begin]) <= 40


@given(
    num_queries=SIZES, num_keys=SIZES, cut=st.integers(0, 59), strict=st.booleans(),
    seed=st.integers(0, 1000), tile_size=st.sampled_from([1, 8]),
)  # fmt: skip
@example(num_queries=60, num_keys=60, cut=33, strict=False, seed=0, tile_size=8)
@example(num_queries=40, num_keys=60, cut=21, strict=True, seed=0, tile_size=8)
@example(num_queries=60, num_keys=40, cut=41, strict=True, seed=0, tile_size=1)
def test_no_later_key_moves_a_row_nor_a_later_query_in_the_strict_form(
    num_queries: int, num_keys: int, cut: int, strict: bool, seed: int, tile_size: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = LSHTopK(**(SMALL | {"tile_size": tile_size}))
    # a row by itself is strict as it is
    find = detector.find_strict if strict else detector.find
    strict = strict or tile_size == 1
    cut = min(cut, num_queries)
    before = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    if strict:
        query[:, :, cut:] = query[:, :, cut:].flip(-1) * -5
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -5
    after = find(query, key, is_causal=True, generator=generator(seed)).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@given(seed=st.integers(0, 1000), cut=st.integers(1, 20), num_earlier=st.integers(0, 12))
def test_in_the_strict_rectangle_a_row_depends_on_no_later_query(
    seed: int, cut: int, num_earlier: int
) -> None:
    query, key = tensors(seed, num_queries=20)
    earlier = tensors(seed + 1, num_queries=12)[0][:, :, :num_earlier]
    detector = LSHTopK(**SMALL)

    def dense() -> torch.Tensor:
        find = detector.find_rectangle
        return find(
            query, key, strict=True, generator=generator(seed), earlier_query=earlier
        ).to_dense()

    before = dense()
    query[:, :, cut:] = query[:, :, cut:].flip(-1) * -5
    assert torch.equal(dense()[:, :, :cut], before[:, :, :cut])


@given(inputs=attention_inputs(), is_causal=st.booleans(), strict=st.booleans())
def test_any_input_gives_lists_of_at_most_num_keys_beside_the_tile(
    inputs: AttentionInputs, is_causal: bool, strict: bool
) -> None:
    query, key, _ = inputs
    detector = LSHTopK(**SMALL)
    find = detector.find_strict if strict else detector.find
    mask = find(query, key, is_causal=is_causal, generator=generator())
    mask.validate()
    held = mask.to_dense().sum(dim=-1)
    assert held.max() <= SMALL["num_keys"] + (SMALL["tile_size"] if is_causal else 0)
    if is_causal:
        own = torch.arange(query.shape[2]) + key.shape[2] - query.shape[2]
        assert (held[..., own >= 0] >= 1).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_means_do_not_matter_without_a_mask_and_batch_items_are_apart(is_causal: bool) -> None:
    query, key = tensors()
    detector = LSHTopK(**SMALL)

    def dense(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return detector.find(q, k, is_causal=is_causal, generator=generator()).to_dense()

    found = dense(query, key)
    if not is_causal:
        # a shift of keys moves no softmax, and buckets do not see it
        assert torch.equal(dense(query, key + 100), found)
    query[1], key[1] = -3 * query[1].flip(-1), key[1].flip(-2)
    assert torch.equal(dense(query, key)[0], found[0])


def test_heads_of_a_group_share_rotations_and_rounds_have_their_own() -> None:
    query, key = tensors()
    query = query[:, :1].expand(-1, 4, -1, -1)
    key = key[:, :1].expand(-1, 2, -1, -1)
    detector = LSHTopK(**SMALL)
    _, code, key_code = detector._hashed(
        query, key, generator(), None, is_causal=True, strict=False
    )
    assert torch.equal(code[:, :, 0], code[:, :, 1])
    assert not torch.equal(code[:, :, 1], code[:, :, 2])
    assert not torch.equal(key_code[0], key_code[1])
    assert not torch.equal(key_code[:, :, 0], key_code[:, :, 1])


def test_default_buckets_go_by_the_number_of_keys_and_the_width_of_heads() -> None:
    def number(num_keys: int, dim: int) -> int:
        return LSHTopK()._buckets(torch.empty(1, 1, num_keys, dim, device="meta"))

    assert [number(n, 64) for n in (1, 1024, 1025, 4096, 131072)] == [16, 16, 32, 64, 128]
    assert number(1024, 4) == 8
    assert LSHTopK(num_buckets=10)._buckets(torch.empty(1, 1, 5, 4)) == 10


@pytest.mark.parametrize(
    "number, halves",
    [(128, (64, 0)), (130, (65, 0)), (256, (8, 8)), (512, (16, 8)), (516, (129, 1)),
     (2048, (32, 16))],
)  # fmt: skip
def test_more_buckets_than_twice_the_width_are_those_of_two_hashes(
    number: int, halves: tuple[int, int]
) -> None:
    assert lsh_topk._directions(number, 64) == halves
    assert 2 * halves[0] * max(1, 2 * halves[1]) == number


@pytest.mark.parametrize(
    "spec",
    [
        "lsh_topk(num_keys=20, tile_size=16)",
        "refined(candidates='lsh_topk(tile_size=16)', num_keys=9)",
    ],
)
@pytest.mark.parametrize("causal", ["full", "single_pass", "recursive", "strict"])
def test_attention_takes_it_alone_and_as_a_first_stage(spec: str, causal: str) -> None:
    query, key = tensors(num_queries=70, num_keys=70)
    value = torch.randn(2, 2, 70, 3, generator=generator(5), dtype=torch.float64)
    attention = HyperAttention(
        detector=spec, num_samples=0, min_seq_len=16, strict_causal=causal == "strict",
        causal="single_pass" if causal in ("full", "strict") else causal,
    )  # fmt: skip
    is_causal = causal != "full"
    found = attention(query, key, value, is_causal=is_causal, generator=Stream(3))
    assert torch.isfinite(found).all()
    if causal not in ("full", "single_pass"):
        return
    dense = create(spec).find(query, key, is_causal=is_causal, generator=Stream(3)).to_dense()
    expected = masked_attention(query, key, value, dense, scale=6**-0.5)
    if attention.detector.name == "lsh_topk":
        torch.testing.assert_close(found, expected.out)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(130, 130), (100, 150), (150, 100), (3, 5)])
def test_no_value_is_read_while_entries_are_found(
    strict: bool, is_causal: bool, shape: tuple[int, int]
) -> None:
    """Tensors without values: reading one, or a size that depends on one, is an error."""
    query = torch.empty(2, 4, shape[0], 8, device="meta")
    key = torch.empty(2, 2, shape[1], 8, device="meta")
    find = LSHTopK().find_strict if strict else LSHTopK().find
    assert find(query, key, is_causal=is_causal).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_finds_what_single_precision_finds(dtype: torch.dtype) -> None:
    query, key = (x.to(dtype) for x in tensors(num_queries=150, num_keys=150))
    options: dict[str, Any] = {"is_causal": True}
    found = LSHTopK().find(query, key, generator=generator(), **options).to_dense()
    # the rotation is rounded to the dtype of the inputs, which moves some buckets
    expected = LSHTopK().find(query.float(), key.float(), generator=generator(), **options)
    assert (found ^ expected.to_dense()).double().mean() < 0.05


def test_single_rows_past_the_first_run_are_centred_and_strict_as_they_are() -> None:
    query, key = tensors(num_queries=200, num_keys=200)
    detector = LSHTopK(tile_size=1, num_keys=6, reach=20, num_rounds=3)
    found = [
        find(query, key, is_causal=True, generator=generator(1)).to_dense()
        for find in (detector.find, detector.find_strict)
    ]
    assert torch.equal(*found)
    # means of whole runs of 64, as in tiles of 64
    wide = LSHTopK(tile_size=64, num_rounds=3)
    codes = [
        x._hashed(query, key, generator(1), None, is_causal=True, strict=False)[1:]
        for x in (detector, wide)
    ]
    for mine, its in zip(*codes, strict=True):
        assert torch.equal(mine, its)


def test_bad_options_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"lsh_topk: min_offset=-1"):
        LSHTopK(min_offset=-1)
    for option in ("num_rounds", "keep", "num_keys", "num_buckets", "reach", "tile_size", "votes"):
        with pytest.raises(ArgumentError, match=rf"lsh_topk: {option}=0 is too small"):
            LSHTopK(**{option: 0})
        with pytest.raises(ArgumentTypeError, match=rf"lsh_topk: {option}=True has type bool"):
            LSHTopK(**{option: True})
    with pytest.raises(ArgumentError, match=r"lsh_topk: num_buckets=7 is odd.*even number"):
        LSHTopK(num_buckets=7)
