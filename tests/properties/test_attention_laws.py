"""Laws of the whole pipeline, over detectors, samplers, shapes and adversarial contents."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperframe.attention import HyperAttention
from hyperframe.detectors import create
from hyperframe.testing import dense_attention, masked_attention

DETECTORS = [
    "sort_lsh(block_size=5)",
    "sort_lsh(block_size=4, num_rounds=2, centre_keys=True, num_projections=2)",
    "sliding_window(width=4, num_sinks=2)",
    "heavy_columns(num_columns=4, num_queries=3, tile_size=6)",
    "oracle(budget=3)",
    "sliding_window(width=3, num_sinks=1) | heavy_columns(num_columns=3, tile_size=5)",
    "sort_lsh(block_size=5) | oracle(budget=2) | sliding_window(width=2)",
    "vertical_slash(num_columns=4, num_diagonals=4, num_queries=3, num_segments=3, tile_size=4)",
    "antidiagonal(block_size=3, num_blocks=2, stride=3, tile_size=6, top_p=0.9)",
    "quest(block_size=3, num_blocks=2, num_queries=2, reduction='max', tile_size=4)",
    "pca_tree(leaf_size=3, num_leaves=2, num_means=2, tile_size=4, chunk_size=16)",
    "kmeans(block_size=3, num_blocks=2, num_steps=2, batch_size=5, tile_size=4, chunk_size=8)",
    "balanced_lsh(block_size=5, num_rounds=2, checkpoint=4)",
    "reformer_lsh(block_size=4, num_buckets=6, num_rounds=2)",
    "lsh_topk(num_keys=4, num_buckets=4, num_rounds=2, reach=5, tile_size=4)",
    (
        "sliding_window(width=2, num_sinks=1) | heavy_columns(num_columns=2, tile_size=6) | "
        "lsh_topk(num_keys=4, num_buckets=4, num_rounds=2, reach=5, tile_size=1)"
    ),
]
detectors = st.sampled_from(DETECTORS)
samplers = st.sampled_from(["uniform", "row_norm"])
causals = st.sampled_from(["single_pass", "recursive"])


@st.composite
def problems(
    draw: st.DrawFn, *, longest: int = 33
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value in float64, of any shape, with ties, zeros or huge entries."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    key_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    batch, dim, value_dim = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 4)),
    )
    n_q, n_k = draw(st.integers(1, longest)), draw(st.integers(1, longest))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    query, key = normal(batch, key_heads * group, n_q, dim), normal(batch, key_heads, n_k, dim)
    value = normal(batch, key_heads, n_k, value_dim)
    content = draw(st.sampled_from(["plain", "ties", "zero", "huge", "zero values", "sink"]))
    if content == "ties":
        query, key = query.round(), key.round()
    elif content == "zero":
        query, key = query * 0, key * 0
    elif content == "huge":
        query, key = 30 * query, 30 * key
    elif content == "zero values":
        value[:, :, ::2] = 0
    elif content == "sink":
        key[:, :, 0] = 9 * query[:, :key_heads].mean(2)
        value[:, :, 0] *= 1e-3
    return query, key, value


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@given(
    inputs=problems(), detector=detectors, sampler=samplers, causal=causals,
    is_causal=st.booleans(), min_seq_len=st.integers(0, 12),
)  # fmt: skip
def test_with_all_keys_sampled_everything_is_exact(
    inputs: Any, detector: str, sampler: str, causal: str, is_causal: bool, min_seq_len: int
) -> None:
    attention = HyperAttention(
        detector=detector, sampler=sampler, num_samples=33, causal=causal, min_seq_len=min_seq_len
    )
    out, lse = attention(*inputs, is_causal=is_causal, return_lse=True)
    expected = dense_attention(*inputs, is_causal=is_causal)
    close(out, expected.out)
    close(lse, expected.lse)


@given(inputs=problems(), detector=detectors, is_causal=st.booleans(), seed=st.integers(0, 99))
def test_without_samples_it_is_attention_by_the_mask(
    inputs: Any, detector: str, is_causal: bool, seed: int
) -> None:
    query, key, value = inputs
    if query.shape[2] == 1:
        return  # always exact
    g = torch.Generator().manual_seed(seed)
    mask = create(detector).find(query, key, is_causal=is_causal, generator=g)
    expected = masked_attention(query, key, value, mask.to_dense())
    attention = HyperAttention(detector=detector, num_samples=0, min_seq_len=0)
    out, lse = attention(
        *inputs, is_causal=is_causal, return_lse=True, generator=g.manual_seed(seed)
    )
    close(out, expected.out)
    close(lse, expected.lse)


@given(
    inputs=problems(), detector=detectors, sampler=samplers, causal=causals,
    is_causal=st.booleans(), num_samples=st.integers(0, 9), seed=st.integers(0, 99),
    estimator=st.sampled_from(["uniform", "exact"]),
)  # fmt: skip
def test_the_two_backends_agree_and_outputs_are_finite(
    inputs: Any, detector: str, sampler: str, causal: str, is_causal: bool, num_samples: int,
    seed: int, estimator: str,
) -> None:  # fmt: skip
    states = [
        HyperAttention(
            detector=detector, sampler=sampler, estimator=estimator, num_samples=num_samples,
            causal=causal, min_seq_len=3, seed=seed, backend=backend,
        )(*inputs, is_causal=is_causal, return_lse=True)
        for backend in ("reference", "torch")
    ]  # fmt: skip
    for reference, ours in zip(*states, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-7, atol=1e-7)
    assert states[1][0].isfinite().all()


@given(
    inputs=problems(), detector=detectors, sampler=samplers, causal=causals,
    num_samples=st.integers(0, 9), cut=st.integers(0, 32), seed=st.integers(0, 99),
    factor=st.sampled_from([0.0, -7.0, 1e4]),
)  # fmt: skip
def test_no_later_key_or_value_moves_a_bit_of_an_earlier_row(
    inputs: Any, detector: str, sampler: str, causal: str, num_samples: int, cut: int, seed: int,
    factor: float,
) -> None:  # fmt: skip
    attention = HyperAttention(
        detector=detector, sampler=sampler, num_samples=num_samples, causal=causal, min_seq_len=3,
        seed=seed,
    )  # fmt: skip
    query, key, value = inputs
    cut = min(cut, query.shape[2])
    first = max(0, cut + key.shape[2] - query.shape[2])
    before = attention(query, key, value, is_causal=True, return_lse=True)
    key, value = key.clone(), value.clone()
    key[:, :, first:] *= factor
    value[:, :, first:] = value[:, :, first:] * factor + 1
    after = attention(query, key, value, is_causal=True, return_lse=True)
    for mine, its in zip(before, after, strict=True):
        assert torch.equal(mine[:, :, :cut], its[:, :, :cut])


@given(
    inputs=problems(), detector=detectors, sampler=samplers, causal=causals,
    is_causal=st.booleans(), bits=st.integers(0, 2**33), num_samples=st.integers(0, 9),
)  # fmt: skip
def test_the_content_of_padding_does_not_matter(
    inputs: Any, detector: str, sampler: str, causal: str, is_causal: bool, bits: int,
    num_samples: int,
) -> None:  # fmt: skip
    query, key, value = inputs
    real = torch.tensor([[bits >> j & 1 == 1 for j in range(key.shape[2])]] * key.shape[0])
    attention = HyperAttention(
        detector=detector, sampler=sampler, num_samples=num_samples, causal=causal, min_seq_len=3
    )
    if attention.detector.is_positional:
        # positions need contiguous keys: everything between the first and the last real one
        real = (real.cumsum(-1) > 0) & (real.flip(-1).cumsum(-1).flip(-1) > 0)
    before = attention(*inputs, is_causal=is_causal, key_padding_mask=real)
    key, value = (x.masked_fill(~real[:, None, :, None], float("nan")) for x in (key, value))
    after = attention(query, key, value, is_causal=is_causal, key_padding_mask=real)
    assert torch.equal(before, after)
    assert before.isfinite().all()


@given(
    inputs=problems(), detector=detectors, is_causal=st.booleans(), causal=causals,
    num_samples=st.integers(0, 9),
)  # fmt: skip
def test_outputs_are_weighted_means_of_values(
    inputs: Any, detector: str, is_causal: bool, causal: str, num_samples: int
) -> None:
    query, key, value = inputs
    attention = HyperAttention(
        detector=detector, num_samples=num_samples, causal=causal, min_seq_len=3
    )
    out, lse = attention(query, key, value, is_causal=is_causal, return_lse=True)
    group = query.shape[1] // key.shape[1]
    low, high = (
        bound.repeat_interleave(group, 1).unsqueeze(2) for bound in (value.amin(2), value.amax(2))
    )
    has_keys = (lse > float("-inf")).unsqueeze(-1)
    inside = (out >= low - 1e-9) & (out <= high + 1e-9)
    assert (inside | ~has_keys).all()
    assert (out.masked_fill(has_keys, 0) == 0).all()
    # linear in the values, and a constant stays what it is
    ones = attention(query, key, torch.ones_like(value), is_causal=is_causal)
    close(ones, has_keys.double().expand_as(ones))
    double = attention(query, key, -2 * value, is_causal=is_causal)
    close(double, -2 * out)
