"""Algorithm 3 to the letter: its transcription, Lemma 2's mean and rate, gradients, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe import HyperAttention, hyper_attention, kernels
from hyperframe.detectors import create
from hyperframe.errors import ArgumentError, UnsupportedError
from hyperframe.positional import POSITION_TILE
from hyperframe.samplers import Uniform
from hyperframe.samplers import create as create_sampler
from hyperframe.samples import KeySample
from hyperframe.testing import causal_mask, dense_attention

FALSE_ALARM = 1e-6
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

SAMPLERS = ["row_norm", "row_norm(replacement=False)", "uniform", "stratified", "importance",
            "leverage"]  # fmt: skip
DETECTORS = ["sort_lsh(block_size=8)", "sliding_window(width=5, num_sinks=2)", "oracle(budget=4)"]


def tensors(
    num_queries: int = 40, num_keys: int = 40, *, batch: int = 2, heads: int = 4,
    key_heads: int = 2, dim: int = 6, value_dim: int = 5, seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Tensors:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, num_queries, dim, generator=g, dtype=torch.float64)
    key = torch.randn(batch, key_heads, num_keys, dim, generator=g, dtype=torch.float64)
    value = torch.randn(batch, key_heads, num_keys, value_dim, generator=g, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention(**options: Any) -> HyperAttention:
    defaults = {"detector": DETECTORS[0], "num_samples": 9, "min_seq_len": 0, "backend": "torch"}
    return HyperAttention(**(defaults | {"assembly": "paper"} | options))


# ------------------------------------------------------------------------------ the transcription


def matrices(sample: KeySample, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S `[B, H, m, n]`, and `S^T S` as weights of columns `[B, H, n]`, of one sample."""
    weight = sample.log_weight.double().exp()
    columns = torch.nn.functional.one_hot(sample.index, num_keys).double()
    s = weight.sqrt().unsqueeze(-1) * columns
    return s, (s.square()).sum(dim=-2)


def algorithm_3(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor,
    uniform: KeySample, sample: KeySample,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`D~^-1 A S^T S V`, its numerator and D~: line by line and dense, one set of draws."""
    group = query.shape[1] // key.shape[1]
    num_keys, m = key.shape[2], uniform.num_samples
    k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    a = torch.exp(query @ k.mT / math.sqrt(query.shape[-1]))
    # Algorithm 2, without cap and floor: D~_ii = <M_i, A_i> + n/m sum_s (1 - M_{i,s}) A_{i,s}
    drawn = torch.nn.functional.one_hot(uniform.index, num_keys).double().sum(dim=-2)
    counts = drawn.repeat_interleave(group, 1).unsqueeze(2)
    row_sums = (mask * a).sum(-1) + num_keys / m * ((~mask) * counts * a).sum(-1)
    # Lemma 2: rows of S are e_l / sqrt(m p_l)
    s, _ = matrices(sample, num_keys)
    s = s.repeat_interleave(group, 1)
    numerator = (a @ s.mT) @ (s @ v)
    return numerator / row_sums.unsqueeze(-1), numerator, row_sums


def drawn(
    inputs: Tensors, detector: str, sampler: str, m: int, seed: int
) -> tuple[torch.Tensor, KeySample, KeySample]:
    """The mask, the uniform columns and those of S, in the order in which a call draws them."""
    g = generator(seed)
    mask = create(detector).find(*inputs[:2], scale=inputs[0].shape[-1] ** -0.5, generator=g)
    uniform = Uniform().sample(*inputs, num_samples=m, generator=g)
    sample = create_sampler(sampler).sample(*inputs, num_samples=m, generator=g)
    return mask.to_dense(), uniform, sample


@given(
    detector=st.sampled_from(DETECTORS), sampler=st.sampled_from(SAMPLERS),
    num_queries=st.integers(2, 40), num_keys=st.integers(11, 40), m=st.integers(1, 10),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2)]), seed=st.integers(0, 99),
    backend=st.sampled_from(["torch", "reference"]),
)  # fmt: skip
def test_it_is_the_transcription_of_algorithm_3_given_the_same_draws(
    detector: str, sampler: str, num_queries: int, num_keys: int, m: int,
    heads: tuple[int, int], seed: int, backend: str,
) -> None:  # fmt: skip
    inputs = tensors(num_queries, num_keys, heads=heads[0], key_heads=heads[1], seed=seed)
    mask, uniform, sample = drawn(inputs, detector, sampler, m, seed)
    expected, _, row_sums = algorithm_3(*inputs, mask, uniform, sample)
    out, lse = attention(detector=detector, sampler=sampler, num_samples=m, backend=backend)(
        *inputs, generator=generator(seed), return_lse=True
    )
    is_empty = row_sums == 0  # nothing held and nothing drawn: no normaliser
    assert (out[is_empty] == 0).all()
    torch.testing.assert_close(lse.exp(), row_sums, rtol=1e-6, atol=0)
    expected = torch.where(is_empty.unsqueeze(-1), 0.0, expected)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_gradient_is_that_of_the_transcription(backend: str) -> None:
    inputs = tensors(24, 30)
    mask, uniform, sample = drawn(inputs, DETECTORS[0], "row_norm", 9, 3)
    weights = torch.randn(2, 4, 24, 6, generator=generator(), dtype=torch.float64)

    def gradients(out: torch.Tensor, lse: torch.Tensor, leaves: list[torch.Tensor]) -> Any:
        total = (out * weights[..., :5]).sum() + (lse * weights[..., 5]).sum()
        return torch.autograd.grad(total, leaves)

    leaves = [x.clone().requires_grad_() for x in inputs]
    out, _, row_sums = algorithm_3(*leaves, mask, uniform, sample)
    expected = gradients(out, row_sums.log(), leaves)
    leaves = [x.clone().requires_grad_() for x in inputs]
    found = gradients(
        *attention(sampler="row_norm", backend=backend)(
            *leaves, generator=generator(3), return_lse=True
        ), leaves,
    )  # fmt: skip
    for mine, its in zip(found, expected, strict=True):
        assert its.abs().max() > 1e-3
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-8)


def test_the_kernels_run_it_too() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "triton" not in kernels.available_backends(device):
        pytest.skip("triton cannot run here")
    inputs = [x.to(device) for x in tensors(7, 12, batch=1, heads=2, key_heads=1,
                                            dtype=torch.float32)]  # fmt: skip
    found = {}
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = attention(
            detector="sort_lsh(block_size=4)", sampler="row_norm", num_samples=5, backend=backend
        )(*leaves, return_lse=True)
        total = out.square().sum() + lse.sum()
        found[backend] = [out, lse, *torch.autograd.grad(total, leaves)]
    for mine, its in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-4, atol=2e-4)


# ------------------------------------------------------------------------------ causal


@pytest.mark.parametrize("num_queries, num_keys", [(150, 150), (100, 131), (140, 133)])
def test_in_a_single_causal_pass_every_tile_is_algorithm_3_on_its_prefix(
    num_queries: int, num_keys: int
) -> None:
    inputs, m = tensors(num_queries, num_keys), 11
    query, key, value = inputs
    detector = create("sliding_window(width=5, num_sinks=2)")  # draws nothing
    out, lse = attention(detector=detector, sampler="row_norm", num_samples=m)(
        *inputs, is_causal=True, return_lse=True, generator=generator(7)
    )
    offset = num_keys - num_queries
    ends = torch.arange(POSITION_TILE, num_queries + POSITION_TILE, POSITION_TILE)
    prefixes = (ends.clamp(max=num_queries) + offset).clamp(min=0)
    g = generator(7)
    uniform, sample = (
        create_sampler(name).sample_prefixes(
            *inputs, num_samples=m, prefixes=prefixes, generator=g
        ) for name in ("uniform", "row_norm")
    )  # fmt: skip
    mask = detector.find(query, key, is_causal=True).to_dense()
    visible = causal_mask(num_queries, num_keys)
    k, v = (x.repeat_interleave(2, 1) for x in (key, value))
    a = torch.exp(query @ k.mT / math.sqrt(6)) * visible
    for tile in range(len(prefixes)):
        rows = slice(tile * POSITION_TILE, (tile + 1) * POSITION_TILE)
        weights = [
            matrices(KeySample(index=x.index[:, :, tile], log_weight=x.log_weight[:, :, tile]),
                     num_keys)[1].repeat_interleave(2, 1).unsqueeze(2)
            for x in (uniform, sample)
        ]  # fmt: skip
        row_sums = (a * (mask + ~mask * weights[0]))[:, :, rows].sum(-1)
        numerator = ((a * weights[1]) @ v)[:, :, rows]
        is_empty = row_sums == 0
        expected = numerator / row_sums.masked_fill(is_empty, torch.inf).unsqueeze(-1)
        torch.testing.assert_close(out[:, :, rows], expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(lse[:, :, rows].exp(), row_sums, rtol=1e-6, atol=0)


def test_in_the_recursion_numerators_and_normalisers_of_the_parts_add_up() -> None:
    # two leaves of 16 and one rectangle: below the diagonal Algorithm 3, above it exact
    inputs = tensors(32, 32)
    query, key, value = inputs
    upper, lower = slice(0, 16), slice(16, 32)
    part = (query[:, :, lower], key[:, :, upper], value[:, :, upper])
    mask, uniform, sample = drawn(part, "sort_lsh(block_size=4)", "row_norm", 6, 2)
    _, numerator, row_sums = algorithm_3(*part, mask, uniform, sample)
    exact = dense_attention(*(x[:, :, lower] for x in inputs), is_causal=True)
    total = exact.lse.exp() + row_sums
    expected = (exact.out * exact.lse.exp().unsqueeze(-1) + numerator) / total.unsqueeze(-1)
    out, lse = attention(
        detector="sort_lsh(block_size=4)", num_samples=6, causal="recursive", min_seq_len=16
    )(*inputs, is_causal=True, return_lse=True, generator=generator(2))
    torch.testing.assert_close(out[:, :, lower], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(lse[:, :, lower].exp(), total, rtol=1e-6, atol=0)
    first = dense_attention(*(x[:, :, upper] for x in inputs), is_causal=True)
    torch.testing.assert_close(out[:, :, upper], first.out)


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_no_later_key_or_value_moves_a_row(causal: str) -> None:
    query, key, value = tensors(150, 150, dtype=torch.float32)
    for sampler in ("row_norm", "leverage", "row_norm(replacement=False)"):
        attend = attention(
            detector="sliding_window(width=5)", sampler=sampler, causal=causal,
            min_seq_len=0 if causal == "single_pass" else 16,
        )  # fmt: skip
        before = attend(query, key, value, is_causal=True, return_lse=True)
        for cut in (70, 129):
            other_key, other_value = key.clone(), value.clone()
            other_key[:, :, cut:] *= -3
            other_value[:, :, cut:] += 5
            after = attend(query, other_key, other_value, is_causal=True, return_lse=True)
            for mine, its in zip(before, after, strict=True):
                assert torch.equal(mine[:, :, :cut], its[:, :, :cut])
            assert not torch.equal(before[0][:, :, cut:], after[0][:, :, cut:])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("mode", ["full", "single_pass", "recursive"])
def test_with_as_many_samples_as_keys_it_is_exact(mode: str, sampler: str) -> None:
    for num_queries in (40, 33, 47):
        inputs = tensors(num_queries, 40)
        attend = attention(
            sampler=sampler, num_samples=40, causal="single_pass" if mode == "full" else mode,
            min_seq_len=10 if mode == "recursive" else 0,
        )  # fmt: skip
        out, lse = attend(*inputs, is_causal=mode != "full", return_lse=True)
        expected = dense_attention(*inputs, is_causal=mode != "full")
        torch.testing.assert_close(out, expected.out)
        torch.testing.assert_close(lse, expected.lse)


def test_padding_is_cut_out_first() -> None:
    query, key, value = tensors(30, 30, dtype=torch.float32)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 20:] = False
    attend = attention(detector="oracle(budget=3)", num_samples=5)
    padded = attend(query, key, value, key_padding_mask=mask)
    cut = attend(query, key[:, :, :20], value[:, :, :20])
    torch.testing.assert_close(padded, cut)


# ------------------------------------------------------------------------------ Lemma 2


def products(inputs: Tensors, m: int, copies: int, seed: int, **options: Any) -> torch.Tensor:
    """Independent `A S^T S V` of one problem: `[copies, n_q, d_v]`; A in units of its row sums."""
    many = [x.expand(copies, -1, -1, -1) for x in inputs]
    attend = attention(
        detector="oracle(budget=3)", estimator="exact", num_samples=m, **options
    )  # fmt: skip
    # with exact row sums the output is D^-1 A S^T S V
    return attend(*many, generator=generator(seed))[:, 0]


def mild(num_queries: int, num_keys: int) -> Tensors:
    """No column is much heavier than another, so that bounds by ranges say something."""
    query, key, value = tensors(
        num_queries, num_keys, batch=1, heads=1, key_heads=1, value_dim=3, seed=2
    )
    length = torch.linspace(0.7, 1.4, num_keys, dtype=torch.float64)[:, None]
    return 0.5 * query, key, torch.nn.functional.normalize(value, dim=-1) * length


@pytest.mark.statistical
@pytest.mark.parametrize("sampler", ["row_norm", "leverage", "row_norm(replacement=False)"])
def test_the_sampled_product_has_the_mean_of_lemma_2(sampler: str) -> None:
    """E[A S^T S V] = A V: every entry of a mean of N lies within Hoeffding's bound.

    An entry of one product lies within `r = sum_s w_s |a v|_s <= m max_l w_l |a v|_l` of 0, its
    mean of N is off by more than `r sqrt(2 L / N)` with probability below 2 exp(-L); 3 samplers,
    4 x 3 entries, together 1e-6.
    """
    copies, m = 40_000, 4
    inputs = mild(4, 12)
    found = products(inputs, m, copies, 5, sampler=sampler)
    expected = dense_attention(*inputs).out[0, 0]
    many = [x.expand(copies, -1, -1, -1) for x in inputs]
    sample = create_sampler(sampler).sample(*many, num_samples=m, generator=generator(6))
    weight = torch.zeros(12).scatter_(0, sample.index.flatten(), sample.log_weight.exp().flatten())
    assert (weight > 0).all()  # every key was drawn, and its weight is known
    shares = torch.softmax(inputs[0][0, 0] @ inputs[1][0, 0].mT / math.sqrt(6), dim=-1)
    terms = weight[:, None] * shares.unsqueeze(-1) * inputs[2][0, 0].abs()  # [rows, n, d]
    largest = m * terms.amax(dim=1)
    assert (found.abs() <= largest * (1 + 1e-6)).all()
    log_term = math.log(2 * 3 * 4 * 3 / FALSE_ALARM)
    radius = largest * math.sqrt(2 * log_term / copies)
    assert ((found.mean(0) - expected).abs() <= radius).all()
    assert (radius < 0.25 * expected.abs().max()).all()  # the bound says something


@pytest.mark.statistical
@pytest.mark.parametrize("m", [4, 16, 64])
def test_the_error_of_the_product_falls_with_the_root_of_m(m: int) -> None:
    """`E ||A S^T S V - A V||_F^2 = (sum_j ||A_j||^2 ||V_j||^2 / p_j - ||A V||_F^2) / m`, exactly.

    The error of m independent draws is the mean of m terms X - AV, each at most B long, of second
    moment s^2. So its square Z lies in [0, B^2], has the mean s^2 / m and, by independence, a
    second moment of at most 3 s^4 / m^2 + B^2 s^2 / m^3. Bernstein: the mean of N values of Z is
    off by more than sqrt(2 E[Z^2] L / N) + B^2 L / (3 N) with probability below 2 exp(-L); three
    m, together 1e-6.
    """
    copies = 8000
    inputs = mild(6, 80)
    query, key, value = (x[0, 0] for x in inputs)
    a = torch.softmax(query @ key.mT / math.sqrt(6), dim=-1)
    p = value.square().sum(-1) / value.square().sum()
    exact = a @ value
    terms = a.T.unsqueeze(-1) * value.unsqueeze(1) / p.view(-1, 1, 1) - exact  # [n, rows, d]
    squares = terms.square().sum((-1, -2))
    second, largest = float((p * squares).sum()), float(squares.max())
    # Lemma 2: with p by the norms the sum is ||A||_F^2 ||V||_F^2
    norms = a.square().sum() * value.square().sum()
    assert second == pytest.approx(float(norms - exact.square().sum()))
    log_term = math.log(3 * 2 / FALSE_ALARM)
    found = (products(inputs, m, copies, m, sampler="row_norm") - exact).square().sum((-1, -2))
    moment = 3 * second**2 / m**2 + largest * second / m**3
    radius = math.sqrt(2 * moment * log_term / copies) + largest * log_term / (3 * copies)
    assert radius < 0.5 * second / m  # half as fast or twice as fast a decay would be seen
    assert abs(float(found.mean()) - second / m) <= radius


def test_the_numerator_does_not_look_at_the_mask() -> None:
    inputs = tensors()
    found = []
    for detector in ("sliding_window(width=3)", "sliding_window(width=30)"):
        out, lse = attention(detector=detector)(*inputs, return_lse=True)
        found.append(out * lse.exp().unsqueeze(-1))
    torch.testing.assert_close(*found)
    out, lse = attention(detector=detector, assembly="residual", sampler="row_norm")(
        *inputs, return_lse=True
    )
    assert not torch.allclose(out * lse.exp().unsqueeze(-1), found[0], rtol=0.1)


# ------------------------------------------------------------------------------ options


def test_the_residual_assembly_is_the_default_and_auto_means_row_norm_beside_the_paper() -> None:
    assert HyperAttention().assembly == "residual"
    paper = HyperAttention(assembly="paper")
    assert paper.sampler.name == "row_norm"
    assert HyperAttention(assembly="paper", sampler="uniform").sampler.name == "uniform"
    assert paper.replace(assembly="residual").sampler == HyperAttention().sampler
    assert HyperAttention().replace(assembly="paper").sampler == paper.sampler
    chosen = HyperAttention(sampler="stratified").replace(assembly="paper")
    assert chosen.sampler.name == "stratified"


def test_the_repr_makes_an_equal_object() -> None:
    paper = HyperAttention(detector="sort_lsh", assembly="paper", sampler="leverage(ridge=2.0)")
    assert "assembly='paper'" in repr(paper)
    again = eval(repr(paper))
    assert again == paper != paper.replace(assembly="residual")


def test_hyper_attention_takes_the_option() -> None:
    inputs = tensors()
    options = {"detector": DETECTORS[0], "num_samples": 5, "min_seq_len": 0, "backend": "torch"}
    by_function = hyper_attention(*inputs, assembly="paper", **options)
    assert torch.equal(by_function, attention(num_samples=5)(*inputs))


def test_what_makes_no_sense_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"assembly='papers'.*'residual', 'paper'"):
        HyperAttention(assembly="papers")
    with pytest.raises(ArgumentError, match="num_samples=0 with assembly='paper'"):
        HyperAttention(assembly="paper", num_samples=0)
    for sampler in ("centroid", "auto(longest=0)"):
        with pytest.raises(UnsupportedError, match=r"assembly='paper'.*groups of keys"):
            HyperAttention(assembly="paper", sampler=sampler)
    with pytest.raises(UnsupportedError, match="importance looks at queries"):
        HyperAttention(assembly="paper", sampler="importance", strict_causal=True)


@pytest.mark.parametrize("causal", ["single_pass", "recursive"])
def test_the_same_seed_gives_the_same_bits_and_both_samples_differ(causal: str) -> None:
    inputs = tensors(100, 100, dtype=torch.float32)
    attend = attention(causal=causal, min_seq_len=20, sampler="uniform")
    for is_causal in (False, True):
        first = attend(*inputs, is_causal=is_causal)
        assert torch.equal(first, attend(*inputs, is_causal=is_causal))
        assert not torch.equal(first, attend.replace(seed=1)(*inputs, is_causal=is_causal))
    # constant values: were the columns of D~ those of S, the output would be the value
    ones = (inputs[0], inputs[1], torch.ones_like(inputs[2]))
    assert (attend(*ones, is_causal=False) - 1).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_compiles_to_one_graph(is_causal: bool) -> None:
    attend = attention(detector="sliding_window(width=4)", sampler="row_norm")
    inputs = tensors(24, 24, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: attend(*x, is_causal=is_causal), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), attend(*inputs, is_causal=is_causal))
