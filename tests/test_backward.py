"""Backwards under a mode: the same gradients as torch's, and the mode is on in recomputed parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lit_merge.curvature.backward import accumulate_gradients, gradients


class Recording(TorchFunctionMode):
    """Counts calls of ``torch.tanh``."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.tanh
        return func(*args, **(kwargs or {}))


def leaves() -> list[Tensor]:
    return [
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.5, 2.0, 3.0)
    ]


def of(x: Tensor, y: Tensor) -> Tensor:
    return checkpoint(lambda t: torch.tanh(t).square() * y, x, use_reentrant=False)


def test_gradients_equal_those_of_torch() -> None:
    x, y, unused = leaves()
    expected = torch.autograd.grad(of(x, y), [x, y, unused], allow_unused=True)
    assert expected[2] is None
    assert gradients(of(x, y), [x, y, unused]) == expected
    assert x.grad is None


def test_recomputed_parts_run_under_the_mode() -> None:
    x, y, _ = leaves()
    with Recording() as mode:
        gradients(of(x, y), [x])
        assert mode.calls == 2
        torch.autograd.grad(of(x, y), [x])
        assert mode.calls == 3  # why torch's own is not used


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient": torch.tensor(2.0, dtype=torch.float64)},
        {"retain_graph": True},
        {"create_graph": True},
        {"inputs": True},
    ],
)
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_accumulating_equals_backward(settings: dict[str, Any]) -> None:
    found = []
    for run in (Tensor.backward, accumulate_gradients):
        x, y, _ = leaves()
        chosen = {**settings, "inputs": [x]} if "inputs" in settings else settings
        loss = of(x, y)
        run(loss, **chosen)
        if settings.get("retain_graph") or settings.get("create_graph"):
            run(loss, **chosen)
        found.append([x.grad, y.grad])
    assert found[0] == found[1]
