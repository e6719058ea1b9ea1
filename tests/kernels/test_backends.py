"""A requested backend runs or is refused by name; `auto` says once what it runs."""

from __future__ import annotations

import logging

import pytest
import torch

from hyperframe.errors import ArgumentError, BackendUnavailableError
from hyperframe.kernels import attend, available_backends, backends, resolve_backend
from hyperframe.kernels.exact import full_plan

CPU = torch.device("cpu")


def test_the_reference_and_torch_run_everywhere() -> None:
    for device in (None, "cpu", CPU):
        found = available_backends(device)
        assert {"reference", "torch"} <= set(found) <= set(backends.BACKENDS) - {"auto"}
    for name in ("reference", "torch"):
        assert resolve_backend(name, CPU) == name


def test_auto_resolves_to_a_backend_that_can_run_here() -> None:
    assert resolve_backend("auto", CPU) in available_backends(CPU)


def test_auto_is_torch_on_a_cpu_even_where_kernels_could_be_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("auto", CPU) == "torch"


def test_auto_logs_its_choice_once_a_device(caplog: pytest.LogCaptureFixture) -> None:
    backends._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="hyperframe.kernels.backends"):
        for _ in range(3):
            resolve_backend("auto", CPU)
    assert len(caplog.records) == 1
    chosen = resolve_backend("auto", CPU)
    assert f"backend='auto' runs '{chosen}' on cpu" in caplog.text


@pytest.mark.parametrize("name", ["tritn", "", "flash", "TORCH"])
def test_an_unknown_name_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(ArgumentError, match="is unknown; choose one of auto, reference, torch"):
        resolve_backend(name, CPU)


@pytest.mark.parametrize(
    "name", sorted(set(backends.BACKENDS) - {"auto", *available_backends(CPU)})
)
def test_a_known_name_that_cannot_run_is_refused_and_never_replaced(name: str) -> None:
    q = torch.zeros(1, 1, 2, 2)
    with pytest.raises(BackendUnavailableError, match=f"backend: '{name}' was asked for"):
        resolve_backend(name, CPU)
    with pytest.raises(BackendUnavailableError, match=r"choose one of .*, or 'auto'"):
        attend(q, q, q, full_plan(q, q, is_causal=False), scale=1.0, backend=name)


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_attend_runs_the_backend_it_was_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    original = backends._IMPLEMENTED[name]
    monkeypatch.setitem(
        backends._IMPLEMENTED, name, lambda *x, **y: called.append(name) or original(*x, **y)
    )
    q = torch.randn(1, 1, 2, 2)
    attend(q, q, q, full_plan(q, q, is_causal=False), scale=1.0, backend=name)
    assert called == [name]
