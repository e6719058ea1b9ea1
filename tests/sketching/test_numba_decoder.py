"""The numba decoder: its definition, ties, threads, and agreement with torch and the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.detectors.count_sketch import CountSketch
from hyperframe.errors import ArgumentError, MissingDependencyError, UnsupportedError
from hyperframe.kernels.sketch import packed_places, torch_candidates
from hyperframe.masks import EntryMask
from hyperframe.sketching.decoders import LEAST_PRODUCTS, choose_decoder

pytest.importorskip("numba")

from hyperframe.sketching import numba_decoder
from hyperframe.sketching.numba_decoder import numba_candidates

CPU = torch.device("cpu")


def tree(
    top: int, levels: int, *, width: int = 16, repetitions: int = 3, columns: int = 7,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Whole numbers, whose products are exact in every order of the sums; many scores are ties."""
    g = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=g).to(dtype)

    nodes = sum(top * 8**level for level in range(levels))
    blocks = torch.randint(width // 8, (2, nodes, repetitions), generator=g)
    unit = min(15, 127 // repetitions)
    return {
        "key": whole(2, columns, 5), "top": whole(2, repetitions, top, 5),
        "hashed": whole(2, levels, repetitions, width, 5),
        "places": packed_places(blocks, width // 8),
        "factor": 2.0, "unit": unit, "least": max(1, repetitions * unit // 3), "capacity": 9,
        "num_rows": top * 8**levels - 3,
    }  # fmt: skip


def by_hand(made: dict[str, Any], head: int, column: int) -> list[int]:
    """The rows of a column in order; of equal scores the first nodes stay."""
    top, hashed, places = (made[name][head] for name in ("top", "hashed", "places"))
    key, repetitions = made["key"][head, column].double(), top.shape[0]
    start, nodes = 0, top.shape[1]
    kept = list(range(nodes))
    for level in range(1 + len(hashed)):
        product = (top if level == 0 else hashed[level - 1]).double() @ key * made["factor"]
        byte = product.square().clamp(max=made["unit"]).floor()
        if level:
            kept = [8 * node + child for node in kept for child in range(8)]
        total = {}
        for node in kept:
            bucket = [node] * repetitions
            if level:
                block = places[start + node // 8].long().tolist()
                bucket = [8 * block[r] + node % 8 for r in range(repetitions)]
            total[node] = sum(float(byte[r, b]) for r, b in enumerate(bucket))
        if level:
            start, nodes = start + nodes, nodes * 8
        kept = [node for node in kept if total[node] >= made["least"]]
        kept = sorted(sorted(kept, key=lambda node: (-total[node], node))[: made["capacity"]])
    return [node for node in kept if node < made["num_rows"]]


@given(
    top=st.integers(1, 20), levels=st.integers(0, 2), blocks=st.integers(1, 3),
    repetitions=st.sampled_from([1, 3, 8, 51]), capacity=st.sampled_from([1, 5, 9, 200]),
    least=st.sampled_from([1, 60, 130, 255]), seed=st.integers(0, 999),
)  # fmt: skip
def test_candidates_are_those_of_the_definition_and_of_ties_the_first(
    top: int, levels: int, blocks: int, repetitions: int, capacity: int, least: int, seed: int
) -> None:
    made = tree(top, levels, width=8 * blocks, repetitions=repetitions, columns=3, seed=seed)
    made |= {"capacity": capacity, "least": least}
    row = numba_candidates(**made)
    assert row.dtype == torch.int64
    assert row.shape == torch_candidates(**made).shape
    for head in range(2):
        for column in range(3):
            expected = by_hand(made, head, column)
            unused = [-1] * (row.shape[2] - len(expected))
            assert row[head, column].tolist() == expected + unused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels, width", [(0, 8), (1, 8 * 300), (2, 24)])
def test_candidates_are_those_of_torch_where_there_is_room(
    levels: int, width: int, dtype: torch.dtype
) -> None:
    # 8 * 300 buckets: blocks need more than a byte
    made = tree(6, levels, width=width, repetitions=5, columns=40, dtype=dtype)
    made["capacity"] = 6 * 8**levels
    expected = torch_candidates(**made)
    assert (expected >= 0).any()
    row = numba_candidates(**made)
    assert torch.equal(row.sort(dim=-1).values, expected.sort(dim=-1).values)


@pytest.mark.parametrize("capacity", [2, 9])
@pytest.mark.parametrize("levels", [0, 2])
def test_candidates_are_those_of_the_kernels(levels: int, capacity: int) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    from hyperframe.kernels.triton.sketch import triton_candidates

    made = tree(11, levels, repetitions=5) | {"capacity": capacity}
    moved = {name: x.to(device) if torch.is_tensor(x) else x for name, x in made.items()}
    row = numba_candidates(**made)
    assert (row >= 0).any()
    assert torch.equal(row, triton_candidates(**moved).cpu())


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads_and_chunks_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tree(11, 2, columns=50)
    monkeypatch.setattr(numba_decoder, "num_threads", lambda: 1)
    expected = numba_candidates(**made)
    monkeypatch.setattr(numba_decoder, "num_threads", lambda: threads)
    for least in (64, 7):
        monkeypatch.setattr(numba_decoder, "_LEAST_COLUMNS", least)
        monkeypatch.setattr(numba_decoder, "_CHUNK_BYTES", 1)
        assert torch.equal(numba_candidates(**made), expected)


def test_calls_from_several_threads_do_not_meet() -> None:
    made = [tree(11, 2, columns=50, seed=seed) for seed in range(8)]
    expected = [numba_candidates(**one) for one in made]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: numba_candidates(**one), made))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_threads_are_those_of_torch_up_to_the_limit_of_numba(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numba_decoder.numba.config, "NUMBA_NUM_THREADS", 4)
    for asked, expected in ((1, 1), (3, 3), (9, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda asked=asked: asked)
        assert numba_decoder.num_threads() == expected


def test_where_nothing_can_be_kept_on_disk_it_is_compiled_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_it = numba_decoder.numba.njit

    def njit(*functions: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_it(*functions, **options)  # numba decorates modules that it loads late

    monkeypatch.setattr(numba_decoder.numba, "njit", njit)
    assert numba_decoder._jit(lambda x: x + 1)(2) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_detector_holds_the_same_entries_with_either_decoder(
    is_causal: bool, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 4, 600, 16, generator=g).unbind(0)
    query[:, :, ::60] *= 6
    query, key = query.to(dtype), key[:, :2].to(dtype)
    masks = []
    for decoder in ("torch", "numba"):
        detector = CountSketch(tau=12, search="sketch", width=4, keep=4, decoder=decoder)
        generator = torch.Generator().manual_seed(1)
        mask = detector.find(query, key, is_causal=is_causal, generator=generator)
        assert isinstance(mask, EntryMask)
        masks.append(mask)
    assert masks[0].nnz().sum() > 1000
    assert torch.equal(masks[0].key_count, masks[1].key_count)
    assert torch.equal(masks[0].to_dense(), masks[1].to_dense())


# ------------------------------------------------------------------------- the choice


def test_auto_goes_by_sizes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(products: int, device: str = "cpu") -> str:
        return choose_decoder("auto", device=torch.device(device), products=products)

    assert choice(LEAST_PRODUCTS - 1) == "torch"
    assert choice(LEAST_PRODUCTS) == "numba"
    assert choice(LEAST_PRODUCTS, "cuda") == "torch"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choice(LEAST_PRODUCTS) == "torch"


def test_a_request_that_cannot_be_met_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"numba.* runs on a CPU, but .* cuda:1"):
        choose_decoder("numba", device=torch.device("cuda:1"), products=1)
    with pytest.raises(ArgumentError, match=r"decoder='nunba'.*'numba'"):
        CountSketch(decoder="nunba")
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(UnsupportedError, match=r"torch\.compile"):
            choose_decoder("numba", device=CPU, products=1)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert choose_decoder("auto", device=CPU, products=LEAST_PRODUCTS) == "torch"
    with pytest.raises(MissingDependencyError, match=r"needs numba.*hyperframe-attention\[numba\]"):
        choose_decoder("numba", device=CPU, products=1)


def test_a_short_call_does_not_import_numba() -> None:
    code = (
        "import sys, torch\n"
        "from hyperframe.detectors import create\n"
        "x = torch.randn(1, 1, 300, 8)\n"
        "create('count_sketch(tau=4, search=\"sketch\", width=4)').find(x, x)\n"
        "assert 'numba' not in sys.modules\n"
        'create(\'count_sketch(tau=4, search="sketch", width=4, decoder="numba")\').find(x, x)\n'
        "assert 'numba' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
