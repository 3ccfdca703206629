"""A way around a fault of torch: batch norm's derivatives on a batch of one example.

Seen in torch 2.15 on CPUs: in eval mode, where the gradient of the output of ``batch_norm`` arrives
with the channels last and the batch has one example, the derivatives with respect to input and
weight are silently wrong. Channels last and first cannot be told apart by the strides then. With a
contiguous gradient they are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BATCH_NORMS = (F.batch_norm, torch.batch_norm, F.instance_norm)


class RightBatchNorm(TorchFunctionMode):
    """Within this context ``batch_norm`` has the right derivatives on one example."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function; a batch norm gets its gradient in the order of its output."""
        result = func(*args, **(kwargs or {}))
        if func in _BATCH_NORMS and len(result) == 1 and result.requires_grad:
            result.register_hook(_contiguous)
        return result


def _contiguous(g: Tensor) -> Tensor:
    return g.clone(memory_format=torch.contiguous_format)
