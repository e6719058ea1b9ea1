"""Tables of sizes: made once for a device, and usable wherever tensors are."""

from __future__ import annotations

import threading

import pytest
import torch

from hyperframe import tables
from hyperframe.tables import consecutive, int_table, kept, kept_few, spaced

CPU = torch.device("cpu")


def test_a_table_is_made_once_for_its_arguments() -> None:
    calls = []

    @kept
    def table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
        calls.append(rows)
        return int_table(rows, 2, device)

    first, again = table(((1, 2), (3, 4)), CPU), table(((1, 2), (3, 4)), device=CPU)
    assert first.tolist() == again.tolist() == [[1, 2], [3, 4]]
    assert table(((1, 2), (3, 4)), CPU) is first
    assert first.dtype == torch.int32
    assert table((), CPU).shape == (0, 2)
    assert table(((5, 6),), torch.device("meta")).device.type == "meta"
    assert len(calls) == 4  # positional and named arguments are told apart


def test_a_table_made_in_inference_mode_serves_a_backward() -> None:
    @kept
    def weights(device: torch.device) -> torch.Tensor:
        return torch.tensor([2.0, 3.0], device=device)

    with torch.inference_mode():
        assert not weights(CPU).is_inference()
    x = torch.ones(2, requires_grad=True)
    (x * weights(CPU)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 3.0]


def test_compiled_code_makes_its_own_table_in_one_graph() -> None:
    calls = []

    @kept
    def table(size: int, device: torch.device) -> torch.Tensor:
        calls.append(size)
        return int_table([[i, i + size] for i in range(3)], 2, device)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return x + table(4, x.device)

    x = torch.zeros(3, 2, dtype=torch.int32)
    expected = shifted(x)
    compiled = torch.compile(shifted, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_numbers_are_spaced_and_held_between_bounds() -> None:
    assert spaced(4, 3, -2, CPU).tolist() == [-2, 1, 4, 7]
    assert spaced(4, 3, -2, CPU, low=0, high=5, dtype=torch.int32).tolist() == [0, 1, 4, 5]
    assert spaced(3, -2, 9, CPU, high=7).tolist() == [7, 7, 5]
    assert spaced(0, 1, 0, CPU).shape == (0,)
    assert spaced(4, 3, -2, CPU) is spaced(4, 3, -2, CPU)
    assert consecutive(2, 5, CPU).tolist() == [2, 3, 4]


def test_of_larger_tables_only_the_latest_stay() -> None:
    calls = []

    @kept_few
    def table(size: int) -> torch.Tensor:
        calls.append(size)
        return torch.zeros(size)

    for size in (*range(20), 19, 0):
        table(size)
    assert calls == [*range(20), 0]


def test_nothing_is_kept_that_was_made_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a graph writes is not there before it runs; what it reads has to stay."""
    calls = []

    @kept
    def table(size: int) -> torch.Tensor:
        calls.append(size)
        return torch.zeros(size)

    before = table(3)
    monkeypatch.setattr(tables, "_READ_BY_GRAPHS", {})
    monkeypatch.setattr(tables, "_is_capturing", lambda: True)
    assert table(3) is before
    assert table(4) is not table(4)  # of the graph
    assert calls == [3, 4, 4]
    # made where the graph can make it: a copy from the host would be refused
    assert tables.maker_device(torch.device("meta")).type == "meta"
    assert spaced(7, 11, 13, torch.device("meta")).device.type == "meta"
    assert list(tables._READ_BY_GRAPHS.values()) == [before]
    monkeypatch.setattr(tables, "_is_capturing", lambda: False)
    assert tables.maker_device(torch.device("meta")).type == "cpu"
    assert table(4) is table(4)


def test_a_table_of_a_gpu_is_made_where_no_graph_claims_its_memory() -> None:
    threads = []

    def make() -> torch.Tensor:
        threads.append(threading.get_ident())
        return torch.zeros(3)

    with torch.inference_mode():
        table = tables._made_apart(make)
    assert not table.is_inference()
    assert threads != [threading.get_ident()]

    def fail() -> torch.Tensor:
        raise ValueError("no such table")

    with pytest.raises(ValueError, match="no such table"):
        tables._made_apart(fail)
