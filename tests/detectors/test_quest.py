"""Quest: the scores bound the logits, the best blocks are held, none from the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hyperframe.attention import HyperAttention
from hyperframe.detectors import blocks as blocks_module
from hyperframe.detectors.quest import Quest, block_extremes, logit_bounds
from hyperframe.errors import ArgumentError, ArgumentTypeError
from hyperframe.testing.strategies import AttentionInputs, attention_inputs

SIZES = st.integers(1, 60)
SMALL = Quest(block_size=4, num_blocks=2, num_queries=2, tile_size=8)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "max"])


def tensors(
    seed: int = 0, *, num_queries: int = 40, num_keys: int = 40, dim: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, num_queries, dim, generator=g)
    key = torch.randn(2, 2, num_keys, dim, generator=g)
    return query, key


@given(attention_inputs(), st.integers(1, 20), st.floats(-3, 3))
def test_the_bound_is_at_least_every_logit_of_the_block(
    inputs: AttentionInputs, block_size: int, scale: float
) -> None:
    query, key = inputs.query.double(), inputs.key.double()
    bounds = logit_bounds(query, block_extremes(key, block_size), scale=scale)
    logits = scale * query @ inputs.expanded_key().double().mT
    assert bounds.shape[-1] == -(-key.shape[2] // block_size)
    rounding = 1e-12 * (query.norm(dim=-1, keepdim=True) * key.norm(dim=-1).max() * abs(scale) + 1)
    for block in range(bounds.shape[-1]):
        largest = logits[..., block * block_size : (block + 1) * block_size].amax(dim=-1)
        assert (bounds[..., block] >= largest - rounding.squeeze(-1)).all()
    if block_size == 1:
        torch.testing.assert_close(bounds, logits, rtol=1e-9, atol=float(rounding.max()))


def test_bounds_are_the_best_corner_of_the_box_of_a_block() -> None:
    query, key = (x.double() for x in tensors(num_keys=18))
    bounds = logit_bounds(query, block_extremes(key, 4), scale=-0.7)
    assert bounds.dtype == torch.float64
    for head in range(4):
        for block in range(5):
            keys = key[1, head // 2, 4 * block : 4 * block + 4]
            ends = torch.stack([keys.amin(dim=0), keys.amax(dim=0)])
            corners = torch.cartesian_prod(*ends.unbind(dim=1))
            expected = (-0.7 * query[1, head] @ corners.mT).amax(dim=-1)
            torch.testing.assert_close(bounds[1, head, :, block], expected)


def chosen_blocks(
    detector: Quest, query: torch.Tensor, key: torch.Tensor, *, is_causal: bool
) -> torch.Tensor:
    """The dense mask, from the definition: pools, bounds and sorts for each tile."""
    size, width, num_queries, num_keys = (
        detector.tile_size, detector.block_size, query.shape[2], key.shape[2]
    )  # fmt: skip
    extremes = block_extremes(key.double(), width)
    dense = torch.zeros(*query.shape[:3], num_keys, dtype=torch.bool)
    for tile in range(-(-num_queries // size)):
        rows = torch.arange(tile * size, tile * size + size).clamp(max=num_queries - 1)
        pooled = query[:, :, rows].double().unflatten(2, (detector.num_queries, -1)).mean(dim=3)
        bounds = logit_bounds(pooled, extremes, scale=0.5)
        scores = bounds.amax(dim=2) if detector.reduction == "max" else bounds.mean(dim=2)
        start = tile * size + num_keys - num_queries
        total = max(0, start) // width if is_causal else scores.shape[-1]
        best = scores[..., :total].sort(dim=-1, descending=True).indices[..., : detector.num_blocks]
        held = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, best, True)
        held = held.repeat_interleave(width, dim=-1)[..., :num_keys]
        if is_causal:
            held[..., total * width : max(0, start + size)] = True
        dense[:, :, rows] = held.unsqueeze(2)
    return dense.tril(num_keys - num_queries) if is_causal else dense


@REDUCTIONS
@given(
    num_queries=SIZES, num_keys=SIZES, seed=st.integers(0, 999), is_causal=st.booleans(),
    num_blocks=st.integers(1, 5), sizes=st.sampled_from([(4, 8, 2), (6, 4, 4), (16, 9, 3)]),
)  # fmt: skip
def test_the_mask_holds_the_best_blocks_and_the_keys_of_the_tile(
    reduction: str, num_queries: int, num_keys: int, seed: int, is_causal: bool, num_blocks: int,
    sizes: tuple[int, int, int],
) -> None:  # fmt: skip
    block_size, tile_size, pooled = sizes
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector = Quest(
        block_size=block_size, num_blocks=num_blocks, num_queries=pooled, reduction=reduction,
        tile_size=tile_size,
    )  # fmt: skip
    mask = detector.find(query, key, is_causal=is_causal, scale=0.5)
    expected = chosen_blocks(detector, query, key, is_causal=is_causal)
    assert torch.equal(mask.to_dense(), expected)


@REDUCTIONS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_block_of_a_planted_key_is_found_and_held_by_every_row(
    is_causal: bool, strict: bool, reduction: str
) -> None:
    query, key = tensors(num_queries=256, num_keys=256)
    query[..., 0] += 4.0
    key[:, :, 53, 0] += 9.0  # one key of the block
    detector = Quest(block_size=16, num_blocks=1, tile_size=32, reduction=reduction)
    find = detector.find_strict if strict else detector.find
    dense = find(query, key, is_causal=is_causal).to_dense()
    assert dense[:, :, 64:, 48:64].all()
    assert is_causal or torch.equal(dense.sum(-1), torch.full((2, 4, 256), 16))


def test_the_maximum_over_the_rows_themselves_finds_what_one_row_looks_at() -> None:
    query, key = torch.zeros(1, 1, 16, 2), torch.zeros(1, 1, 32, 2)
    query[..., 0], query[:, :, 11] = 1.0, torch.tensor([0.0, 9.0])
    key[:, :, 3, 0], key[:, :, 20, 1] = 5.0, 5.0
    find = Quest(block_size=4, num_blocks=1, num_queries=16, reduction="max", tile_size=16).find
    assert find(query, key).to_dense()[0, 0, 0].nonzero().flatten().tolist() == [20, 21, 22, 23]
    mean = Quest(block_size=4, num_blocks=1, num_queries=16, reduction="mean", tile_size=16)
    assert mean.find(query, key).to_dense()[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3]


@REDUCTIONS
@given(num_queries=SIZES, num_keys=SIZES, cut=SIZES, seed=st.integers(0, 999))
@example(num_queries=60, num_keys=60, cut=31, seed=0)
@example(num_queries=40, num_keys=57, cut=21, seed=0)
@example(num_queries=60, num_keys=41, cut=43, seed=0)
def test_no_later_key_moves_a_causal_row(
    reduction: str, num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector, cut = SMALL.replace(reduction=reduction), min(cut, num_queries)
    before = detector.find(query, key, is_causal=True).to_dense()
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -50
    after = detector.find(query, key, is_causal=True).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@REDUCTIONS
@given(num_queries=SIZES, num_keys=SIZES, cut=SIZES, seed=st.integers(0, 999))
@example(num_queries=60, num_keys=60, cut=31, seed=0)
@example(num_queries=53, num_keys=44, cut=41, seed=0)
def test_no_later_key_or_query_moves_a_strictly_causal_row(
    reduction: str, num_queries: int, num_keys: int, cut: int, seed: int
) -> None:
    query, key = tensors(seed, num_queries=num_queries, num_keys=num_keys)
    detector, cut = SMALL.replace(reduction=reduction), min(cut, num_queries)
    before = detector.find_strict(query, key, is_causal=True).to_dense()
    query[:, :, cut:] *= -50
    key[:, :, max(0, cut + num_keys - num_queries) :] *= -50
    after = detector.find_strict(query, key, is_causal=True).to_dense()
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])


@pytest.mark.parametrize("num_earlier", [0, 3, 20])
def test_in_a_strict_rectangle_no_later_query_moves_a_row(num_earlier: int) -> None:
    query, key = tensors(num_queries=30, num_keys=25)
    earlier = tensors(1, num_queries=20)[0][:, :, :num_earlier] if num_earlier else None
    rectangle: Any = {"query_start": 25, "strict": True, "earlier_query": earlier}
    before = SMALL.find_rectangle(query, key, **rectangle).to_dense()
    for cut in (1, 8, 9, 20):
        changed = query.clone()
        changed[:, :, cut:] *= -50
        after = SMALL.find_rectangle(changed, key, **rectangle).to_dense()
        assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    loose = SMALL.find_rectangle(query, key, query_start=25)
    assert torch.equal(loose.to_dense(), SMALL.find(query, key).to_dense())
    if earlier is not None:
        other = SMALL.find_rectangle(query, key, **{**rectangle, "earlier_query": -earlier})
        assert not torch.equal(before, other.to_dense())


@given(attention_inputs(), st.booleans(), st.booleans())
def test_any_input_gives_a_mask_and_shared_key_heads_are_as_repeated_ones(
    inputs: AttentionInputs, is_causal: bool, strict: bool
) -> None:
    query, key, _ = inputs
    find = SMALL.find_strict if strict else SMALL.find
    mask = find(query, key, is_causal=is_causal).validate()
    if inputs.structure == "plain":
        again = find(query, inputs.expanded_key(), is_causal=is_causal)
        assert torch.equal(mask.to_dense(), again.to_dense())


@REDUCTIONS
@pytest.mark.parametrize("is_causal", [False, True])
def test_tiles_scored_one_by_one_are_the_same(
    is_causal: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key = tensors(num_queries=61, num_keys=75)
    detector = SMALL.replace(reduction=reduction)
    whole = detector.find(query, key, is_causal=is_causal).to_dense()
    monkeypatch.setattr(blocks_module, "_CHUNK_BYTES", 1)
    assert torch.equal(whole, detector.find(query, key, is_causal=is_causal).to_dense())


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@REDUCTIONS
def test_no_intermediate_grows_with_the_square_of_the_length(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "_CHUNK_BYTES", 1 << 15)
    detector = Quest(block_size=16, num_blocks=2, tile_size=16, reduction=reduction)
    largest = []
    for n in (1024, 2048):
        query, key = torch.zeros(1, 2, n, 8), torch.zeros(1, 2, n, 8)
        with Largest() as record:
            detector.find(query, key, is_causal=True)
        largest.append(record.numel)
        assert record.numel <= 2 * n * 32
    assert largest[1] <= 2.1 * largest[0]


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_value_is_read(is_causal: bool) -> None:
    """On the meta device there are none: a size that depends on one would raise."""
    query, key = (x.to("meta") for x in tensors(num_queries=50))
    for find in (SMALL.find, SMALL.find_strict):
        assert find(query, key, is_causal=is_causal).device.type == "meta"


# torch's own: its compiler makes an instance of the function to trace it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_finding_compiles_to_one_graph() -> None:
    detector = SMALL.replace(reduction="max")

    def find(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
        mask = detector.find_strict(query, key, is_causal=True)
        return [part.key_index for part in mask.parts()]  # type: ignore[attr-defined]

    torch._dynamo.reset()
    compiled = torch.compile(find, fullgraph=True, backend="aot_eager")
    inputs = tensors(num_keys=53)
    torch.testing.assert_close(compiled(*inputs), find(*inputs))


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
@pytest.mark.parametrize("strict", [False, True])
def test_with_all_blocks_attention_is_exact(causal: str, strict: bool) -> None:
    query, key = tensors(num_queries=45, num_keys=45)
    attention = HyperAttention(
        detector=SMALL.replace(num_blocks=20), num_samples=0, min_seq_len=8, causal=causal,
        strict_causal=strict,
    )  # fmt: skip
    out = attention(query, key, key, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, key, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_bad_options_are_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"num_queries=3 does not divide tile_size=64.*divisor"):
        Quest(num_queries=3)
    with pytest.raises(ArgumentError, match=r"quest: reduction='sum'.*'mean', 'max'"):
        Quest(reduction="sum")
    for name in ("block_size", "num_blocks", "num_queries", "tile_size"):
        with pytest.raises(ArgumentError, match=f"quest: {name}=0"):
            Quest(**{name: 0})
        with pytest.raises(ArgumentTypeError, match=f"quest: {name}=2.5"):
            Quest(**{name: 2.5})
