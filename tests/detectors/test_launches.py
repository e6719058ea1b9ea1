"""What the presets for long inputs launch beside their operators: each is time of the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyperframe.detectors import create
from hyperframe.detectors.auto import PRESETS
from hyperframe.randomness import Stream

FREE = {"empty", "new_empty", "empty_like", "detach", "alias", "_unsafe_view", "promote_types"}


class Launches(TorchDispatchMode):
    """Counts operators that are no views: of torch, and of the library, whose insides it skips."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of_torch: list[str] = []
        self.own: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "hyperframe":
            self.own.append(name)
        elif not func.is_view and name not in FREE:
            self.of_torch.append(name)
        return func(*args, **(kwargs or {}))


# of torch: a seed, means of queries and of keys, leaves by number and their counts, one clamp; the
# operators of the library are a handful of launches each
@pytest.mark.parametrize("form", ["middle", "long"])
@pytest.mark.parametrize("preset, most, most_own", [("balanced", 6, 10), ("fast", 1, 8)])
def test_finding_launches_few_operators_of_torch_itself(
    preset: str, most: int, most_own: int, form: str
) -> None:
    # four segments, so that tiles have keys of their segment before them, as long inputs do
    spec = getattr(PRESETS[preset], form).replace("min_segment=2048", "min_segment=256")
    detector = create(spec)
    query, key = torch.randn(1, 2, 1024, 16), torch.randn(1, 1, 1024, 16)

    def find() -> Launches:
        with Launches() as launches:
            detector.find(query, key, is_causal=True, generator=Stream(0))
        return launches

    find()  # tables of positions are made once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hyperframe.detectors.base.may_look_at", lambda where: False)
        found = find()
    assert len(found.of_torch) <= most, found.of_torch
    assert len(found.own) <= most_own, found.own
