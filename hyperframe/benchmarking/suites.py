"""The named suites: what is measured, at which lengths, with which extras."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention import HyperAttention
from ..component import check_choice
from .methods import AbstractMethod, GivenTiles, SpecMethod

__all__ = ["SUITES", "Suite", "custom_suite", "suite"]

_LONG = (8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One set of measurements; the options of the command line replace its defaults.

    Attributes:
        name: what it is asked for by.
        about: one sentence.
        methods: what is compared with the exact kernels, and side by side.
        lengths: `n` on a GPU.
        cpu_lengths: `n` elsewhere.
        head_dims: head dimensions.
        inputs: kind of inputs, see `make_inputs`.
        backward: whether forward + backward is measured too.
        graphs: whether calls are also captured in CUDA graphs and replayed.
        stages: whether the stages of a forward are timed by themselves.
        longest_exact: exact kernels are not timed above this length; None times them everywhere.
    """

    name: str
    about: str
    methods: tuple[AbstractMethod, ...]
    lengths: tuple[int, ...] = _LONG
    cpu_lengths: tuple[int, ...] = (1024, 2048)
    head_dims: tuple[int, ...] = (64,)
    inputs: str = "planted"
    backward: bool = True
    graphs: bool = False
    stages: bool = True
    longest_exact: int | None = None


def _sort_lsh(num_samples: int = 256) -> SpecMethod:
    attention = HyperAttention(
        detector="sort_lsh(block_size=256)", num_samples=num_samples, min_seq_len=0
    )
    return SpecMethod(label="sort_lsh", is_causal=False, attention=attention)


def _recursive(leaf: int) -> SpecMethod:
    attention = HyperAttention(
        detector="sort_lsh(block_size=256)", num_samples=256, causal="recursive", min_seq_len=leaf
    )
    label = f"sort_lsh recursive, leaf {leaf}"
    return SpecMethod(label=label, is_causal=True, attention=attention)


def _window() -> SpecMethod:
    attention = HyperAttention(
        detector="sliding_window(width=256, num_sinks=16)", num_samples=256, min_seq_len=0
    )
    return SpecMethod(label="sliding_window", is_causal=True, attention=attention)


def _preset(name: str) -> SpecMethod:
    attention = HyperAttention(detector=name, num_samples=256, min_seq_len=0)
    return SpecMethod(label=name, is_causal=True, attention=attention)


_ALL = (
    Suite(
        name="overview", about="sort_lsh with and without a causal mask, at a few lengths",
        methods=(_sort_lsh(), _recursive(512)), lengths=(4096, 16384, 65536),
    ),
    Suite(
        name="sort_lsh", about="the published method without a mask, b = m = 256",
        methods=(_sort_lsh(),), head_dims=(64, 128),
    ),
    Suite(
        name="sort_lsh-recursive", about="the published causal recursion, exact leaves",
        methods=(_recursive(1024), _recursive(2048)), head_dims=(64, 128),
        cpu_lengths=(4096, 8192),
    ),
    Suite(
        name="tiles", about="the attention kernel alone, by a causal tile plan that is given",
        methods=(GivenTiles(),), head_dims=(64, 128), inputs="normal",
    ),
    Suite(
        name="window", about="window, sinks and samples, beside FlexAttention on the same window",
        methods=(_window(),), inputs="normal",
    ),
    Suite(
        name="presets", about="the presets of the default, finding included",
        methods=(_preset("fast"), _preset("balanced")), head_dims=(64, 128), graphs=True,
        lengths=(32768, 131072), cpu_lengths=(4096,),
    ),
    Suite(
        name="short", about="break-even at short lengths, launched one by one and as a graph",
        methods=(_sort_lsh(), _recursive(512)), graphs=True, stages=False,
        lengths=(1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384),
        cpu_lengths=(1024, 2048, 4096, 8192),
    ),
    Suite(
        name="growth", about="time and memory from 131k to a million positions",
        methods=(_sort_lsh(), _recursive(1024)), stages=False, longest_exact=262144,
        lengths=(131072, 262144, 524288, 1048576), cpu_lengths=(4096, 8192, 16384),
    ),
    Suite(
        name="memory", about="peak memory of a forward beside the size of its tensors",
        methods=(_sort_lsh(), _recursive(1024), GivenTiles(), _window()), inputs="normal",
        backward=False, stages=False, lengths=(16384, 131072), cpu_lengths=(4096,),
    ),
)  # fmt: skip

SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}
"""The suites by name."""


def suite(name: str) -> Suite:
    """Return a suite by name; an unknown name is an error that lists those there are."""
    check_choice("bench", "suite", name, tuple(SUITES))
    return SUITES[name]


def custom_suite(methods: tuple[AbstractMethod, ...]) -> Suite:
    """Return the suite of a user's own methods."""
    return Suite(name="custom", about="specs of the command line", methods=methods)
