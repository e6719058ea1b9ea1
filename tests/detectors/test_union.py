"""Union: the entries of all members, each of them once."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch

from hyperframe.attention import hyper_attention
from hyperframe.detectors import AbstractDetector, create
from hyperframe.detectors.union import Union
from hyperframe.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from hyperframe.masks import ListMask
from hyperframe.testing import dense_attention, masked_attention

MEMBERS = ("sliding_window(width=5, num_sinks=2)", "oracle(budget=4)", "sort_lsh(block_size=6)")


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, 30, 3, generator=g, dtype=torch.float64)
    return query, *torch.randn(2, 2, 2, 30, 3, generator=g, dtype=torch.float64).unbind()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class WithoutStrictForm(AbstractDetector):
    """The least a detector has to be."""

    def find(  # type: ignore[no-untyped-def]
        self, query, key, *, scale=None, is_causal=False, generator=None
    ):
        index = torch.zeros(key.shape[0], key.shape[1], 1, dtype=torch.int64)
        return ListMask.columns(
            index, num_query_heads=query.shape[1], num_queries=query.shape[2],
            num_keys=key.shape[2], is_causal=is_causal,
        )  # fmt: skip


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_the_mask_is_the_union_of_the_members_masks(is_causal: bool, strict: bool) -> None:
    query, key, _ = tensors()
    method = "find_strict" if strict else "find"
    masks = []
    for spec in MEMBERS:  # only the last member draws
        find = getattr(create(spec), method)
        masks.append(find(query, key, is_causal=is_causal, generator=generator()).to_dense())
    union = getattr(Union(detectors=MEMBERS), method)(
        query, key, is_causal=is_causal, generator=generator()
    )
    assert torch.equal(union.to_dense(), masks[0] | masks[1] | masks[2])
    assert torch.equal(union.nnz(), union.to_dense().sum((-1, -2)))


def test_an_entry_that_several_members_hold_counts_once() -> None:
    query, key, value = tensors()
    spec = " | ".join([*MEMBERS, "sort_lsh(block_size=15)", "sliding_window(width=9)"])
    for is_causal in (False, True):
        mask = create(spec).find(query, key, is_causal=is_causal, generator=generator(1))
        dense = mask.to_dense()
        members = sum(int(part.to_dense().sum()) for part in mask.parts())
        assert members > dense.sum()  # they do overlap
        out, lse = hyper_attention(
            query, key, value, detector=spec, num_samples=0, min_seq_len=0, is_causal=is_causal,
            return_lse=True, generator=generator(1),
        )  # fmt: skip
        expected = masked_attention(query, key, value, dense)
        torch.testing.assert_close(out, expected.out)
        torch.testing.assert_close(lse, expected.lse)


def test_nested_unions_are_flat_and_specs_say_the_same() -> None:
    nested = Union(detectors=(Union(detectors=MEMBERS[:2]), create(MEMBERS[2])))
    assert nested == create(" | ".join(MEMBERS))
    assert [member.name for member in nested.detectors] == ["sliding_window", "oracle", "sort_lsh"]


def test_members_are_told_where_a_rectangle_lies() -> None:
    query, key, _ = tensors()
    detector = create("sliding_window(width=8, num_sinks=4) | oracle(budget=2)")
    part = detector.find_rectangle(
        query[:, :, 12:20], key[:, :, 3:12], query_start=12, key_start=3, first_row=12
    )
    window, best = (d.find_rectangle(
        query[:, :, 12:20], key[:, :, 3:12], query_start=12, key_start=3, first_row=12
    ).to_dense() for d in detector.detectors)  # fmt: skip
    assert torch.equal(part.to_dense(), window | best)
    assert window[0, 0, :, 0].all()  # key 3 is a sink
    assert not window[0, 0, 0, 1]  # key 4 is neither a sink nor within 8 of query 12
    assert window[0, 0, 0, 2]


def test_a_union_is_positional_if_a_member_is() -> None:
    content = create("oracle(budget=2) | sort_lsh(block_size=6)")
    both = create("oracle(budget=2) | sliding_window(width=3)")
    nested = Union(detectors=(content, create("block_list | oracle")))
    for union, expected in ((content, False), (both, True), (nested, True)):
        copies = (pickle.loads(pickle.dumps(union)), copy.deepcopy(union), union.replace())
        for twin in (union, *copies):
            assert twin.is_positional is expected
            assert twin == union
            assert hash(twin) == hash(union)
            assert repr(twin) == repr(union)
    assert content.replace(detectors=both.detectors).is_positional
    assert content.replace(detectors=both.detectors) == both


def test_unions_without_positional_members_are_stacked_in_the_recursion() -> None:
    class Counting(Union):
        registry_name = "counting"
        shapes: ClassVar[list[int]] = []

        def find_rectangle(self, query, key, **options):  # type: ignore[no-untyped-def]
            self.shapes.append(query.shape[0])
            return super().find_rectangle(query, key, **options)

    query, key, value = (x[:, :, :24] for x in tensors())
    union = Counting(detectors=("oracle(budget=24)", "sort_lsh(block_size=6)"))
    out = hyper_attention(
        query, key, value, detector=union, num_samples=0, min_seq_len=3, is_causal=True,
        causal="recursive",
    )  # fmt: skip
    assert Counting.shapes == [8, 4, 2]
    torch.testing.assert_close(out, dense_attention(query, key, value, is_causal=True).out)


def test_members_are_told_where_rows_and_keys_lie_in_a_padded_call() -> None:
    query, key, _ = tensors()
    detector = create("sliding_window(width=8, num_sinks=0) | block_list(blocks=((3,1),))")
    detector = detector.replace(
        detectors=(detector.detectors[0], detector.detectors[1].replace(block_size=5))
    )
    for is_causal in (False, True):
        whole = detector.find(query, key, is_causal=is_causal).to_dense()
        part = detector.find_within(
            query[:, :, 3:21], key[:, :, 2:21], is_causal=is_causal, query_start=3, key_start=2,
            first_row=3, num_queries=30, num_keys=30,
        )  # fmt: skip
        assert torch.equal(part.to_dense(), whole[:, :, 3:21, 2:21])


def test_a_member_without_a_strict_form_is_named() -> None:
    query, key, _ = tensors()
    union = Union(detectors=(MEMBERS[0], WithoutStrictForm()))
    assert union.find(query, key, is_causal=True).to_dense()[..., 0].all()
    for method in ("find_strict", "find_rectangle"):
        options = {"strict": True} if method == "find_rectangle" else {"is_causal": True}
        with pytest.raises(UnsupportedError, match=r"without_strict_form.*strict_causal=False"):
            getattr(union, method)(query, key, **options)


@pytest.mark.parametrize(
    "detectors, error, words",
    [
        ((), ArgumentError, "empty"),
        ("oracle", ArgumentTypeError, "one object"),
        (create("oracle"), ArgumentTypeError, "one object"),
        (7, ArgumentTypeError, "one object"),
        (("oracel",), ArgumentError, "Did you mean 'oracle'"),
        ((3,), ArgumentTypeError, "3"),
    ],
)
def test_what_is_no_tuple_of_detectors_is_refused(
    detectors: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Union(detectors=detectors)
