"""Tables of sizes: made once for a device, and usable wherever tensors are."""

from __future__ import annotations

import torch

from hyperframe.tables import int_table, kept

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
