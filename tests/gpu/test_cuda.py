"""The same laws on a CUDA device: the torch and the Triton backend against their oracles."""

from __future__ import annotations

import pytest
import torch

from hyperframe import HyperAttention
from hyperframe.testing import dense_attention

pytestmark = pytest.mark.gpu

SPECS = [
    "sort_lsh(block_size=64)",
    "sort_lsh(block_size=64, num_rounds=2)",
    "heavy_columns(num_columns=48, tile_size=32)",
    "sliding_window(width=32, num_sinks=3) | heavy_columns(num_columns=32)",
    "sliding_window(width=32) | sort_lsh(block_size=32)",
    "block_list(blocks=((0, 0), (1, 0), (2, 2)), block_size=100)",
    "oracle(budget=24)",
    "vertical_slash(num_columns=32, num_diagonals=16, num_segments=4, tile_size=16)",
    "antidiagonal(block_size=16, num_blocks=3, tile_size=32)",
    "pca_tree(leaf_size=8, num_leaves=4, tile_size=32, chunk_size=128)",
    "reformer_lsh(block_size=32, num_rounds=2)",
    "lsh_topk(num_keys=48, num_rounds=2, tile_size=32)",
]


def inputs(n_q: int, n_k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, n_q, 32), (2, 2, n_k, 32), (2, 2, n_k, 24)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).cuda()
            for shape in shapes]  # fmt: skip


@pytest.mark.parametrize("n_q, n_k", [(333, 333), (100, 333), (333, 100)])
@pytest.mark.parametrize("causal", [None, "single_pass", "recursive"])
@pytest.mark.parametrize("spec", SPECS)
def test_cuda_agrees_with_the_reference_backend(
    spec: str, causal: str | None, n_q: int, n_k: int
) -> None:
    if spec.startswith("block_list") and (n_q < 300 or n_k < 300):
        spec = "block_list(blocks=((0, 0),), block_size=100)"
    options = {"detector": spec, "num_samples": 40, "min_seq_len": 40}
    options["causal"] = causal or "single_pass"
    results = []
    for backend in ("reference", "torch"):
        q, k, v = (x.requires_grad_() for x in inputs(n_q, n_k, torch.float64))
        generator = torch.Generator("cuda").manual_seed(1)
        out, lse = HyperAttention(backend=backend, **options)(
            q, k, v, is_causal=causal is not None, return_lse=True, generator=generator
        )
        grads = torch.autograd.grad(out.square().sum() + lse.nan_to_num(neginf=0).sum(), (q, k, v))
        results.append([out, lse.nan_to_num(neginf=0), *grads])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [None, "single_pass", "recursive"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_triton_backend_agrees_with_the_torch_backend(spec: str, causal: str | None) -> None:
    # float32 in both: the choices depend on the dtype of the inputs. one length, because kernels
    # are compiled for every kind of plan; lengths of their own are drawn in tests/kernels/triton
    options = {"detector": spec, "num_samples": 40, "min_seq_len": 40}
    options["causal"] = causal or "single_pass"
    results = []
    for backend in ("torch", "triton"):
        q, k, v = (x.requires_grad_() for x in inputs(333, 333, torch.float32))
        generator = torch.Generator("cuda").manual_seed(1)
        out, lse = HyperAttention(backend=backend, **options)(
            q, k, v, is_causal=causal is not None, return_lse=True, generator=generator
        )
        lse = lse.masked_fill(torch.isinf(lse), 0)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v))
        results.append([out.detach(), lse.detach(), *grads])
    for expected, found in zip(*results, strict=True):
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("n_q, n_k", [(100, 333), (333, 100)])
@pytest.mark.parametrize("causal", [None, "single_pass"])
def test_the_triton_backend_takes_any_two_lengths(causal: str | None, n_q: int, n_k: int) -> None:
    results = []
    for backend in ("torch", "triton"):
        q, k, v = inputs(n_q, n_k, torch.float32)
        attention = HyperAttention(
            detector="sort_lsh(block_size=64)", num_samples=40, min_seq_len=40, backend=backend,
            causal=causal or "single_pass",
        )  # fmt: skip
        generator = torch.Generator("cuda").manual_seed(1)
        out, lse = attention(
            q, k, v, is_causal=causal is not None, return_lse=True, generator=generator
        )
        results.append([out, lse])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_everything_heavy_is_at_most_twice_as_far_from_the_oracle_as_sdpa(
    causal: bool, dtype: torch.dtype
) -> None:
    q, k, v = inputs(333, 333, dtype)
    attention = HyperAttention(detector="sort_lsh(block_size=333)", num_samples=0, min_seq_len=0)
    exact = dense_attention(q, k, v, is_causal=causal).out
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    floor = torch.finfo(dtype).eps * exact.abs().max()
    allowed = 2 * max(float((sdpa.double() - exact).abs().max()), float(floor))
    assert float((attention(q, k, v, is_causal=causal).double() - exact).abs().max()) <= allowed


def test_a_cpu_generator_gives_the_same_choice_on_both_devices() -> None:
    q, k, v = inputs(300, 300, torch.float32)
    attention = HyperAttention(detector="heavy_columns(num_columns=20)", num_samples=30,
                               min_seq_len=0)  # fmt: skip
    on_cuda = attention(q, k, v, generator=torch.Generator().manual_seed(0))
    on_cpu = attention(q.cpu(), k.cpu(), v.cpu(), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=1e-3, atol=1e-3)


def test_padding_is_cut_out_on_cuda() -> None:
    q, k, v = inputs(90, 90, torch.float32)
    mask = torch.ones(2, 90, dtype=torch.bool, device="cuda")
    mask[0, :30] = False
    mask[1, 70:] = False
    attention = HyperAttention(detector="oracle(budget=90)", num_samples=0, min_seq_len=0)
    exact = dense_attention(q, k, v, is_causal=True, key_padding_mask=mask).out
    found = attention(q, k, v, is_causal=True, key_padding_mask=mask)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)
