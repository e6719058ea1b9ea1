"""What every test runs under: one torch thread per worker, Hypothesis profiles, the gpu marker."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping

# nothing in the test suite may be fetched; has to be set before transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import hypothesis
import pytest
import torch

from tests import quick_interpreter

# kernels run in triton's interpreter where there is no GPU; read when triton is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    quick_interpreter.install()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

_SLOW_HEALTH_CHECKS = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]

# dev: quick and random, to find things while working. ci: the same examples every time. nightly:
# random again, and many. derandomize is always said: where CI is set the default is True
hypothesis.settings.register_profile("dev", max_examples=25, deadline=None, derandomize=False)
hypothesis.settings.register_profile(
    "ci",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=_SLOW_HEALTH_CHECKS,
)
hypothesis.settings.register_profile(
    "nightly",
    max_examples=500,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=_SLOW_HEALTH_CHECKS,
)
PROFILES = ("dev", "ci", "nightly")


def chosen_profile(environ: Mapping[str, str]) -> str:
    """The profile that the environment asks for; `ci` where CI runs, else `dev`."""
    name = environ.get("HYPOTHESIS_PROFILE") or ("ci" if environ.get("CI") else "dev")
    if name not in PROFILES:
        raise pytest.UsageError(
            f"HYPOTHESIS_PROFILE={name}: there is no such profile; choose one of "
            f"{', '.join(PROFILES)}"
        )
    return name


_PROFILE = chosen_profile(os.environ)
hypothesis.settings.load_profile(_PROFILE)


def _why_no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    build = "a CPU build" if torch.version.cuda is None else f"built for {torch.version.cuda}"
    return f"no CUDA device (torch {torch.__version__} is {build})"


_NO_GPU = _why_no_gpu()


def pytest_report_header() -> list[str]:
    device = torch.cuda.get_device_name() if _NO_GPU is None else _NO_GPU
    return [
        f"torch: {torch.__version__}, {torch.get_num_threads()} threads; device: {device}",
        f"property tests: profile {_PROFILE}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _NO_GPU is None:
        return
    skip = pytest.mark.skip(reason=f"gpu: {_NO_GPU}")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # a test that forgets its generator still sees the same numbers in every order of the tests
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", ()) if "gpu" in r.keywords]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} gpu tests were skipped: {_NO_GPU}; a machine with a GPU runs them"
        )
