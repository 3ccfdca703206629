r"""How much a model's outputs depend on each row of a layer's output.

For one random direction u of the outputs, and activations a ``[B, ..., C]`` of a layer, the weight
of a row n is :math:`\|\partial (u^\top f) / \partial a_n\|^2`. Its expectation is the squared
Frobenius norm of the Jacobian of the outputs by this row: a token that the classifier does not read
has none. No labels are needed.

:class:`RowWeights` keeps what a sweep needs of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.correction.forward import first_tensor, module_at, rows, with_first_tensor


def row_sensitivity(
    model: nn.Module, run: Callable[[], Any], places: Mapping[str, int], *, seed: int = 0
) -> dict[str, Tensor]:
    """Return the weight of every row at some modules' outputs.

    Args:
        model: The network, in evaluation mode.
        run: Runs it on a batch and returns its outputs: a tensor, or something with ``logits``.
        places: The axis of the channels in the output, by qualified name of the module.
        seed: Seed of the random direction.

    Returns:
        float32 ``[B, ..., 1]`` by name, the rows of a module in the order of its output with the
        channels last; none for modules that do not run, or that the outputs do not depend on.
    """
    probes: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., Any]:
        def follow(module: nn.Module, args: Any, output: Any) -> Any:
            values = first_tensor(output)
            if values is None:
                return output
            # Added and not marked: a leaf could not be changed in place by the next layer.
            probes[name] = torch.zeros_like(values, requires_grad=True)
            return with_first_tensor(output, values + probes[name])

        return follow

    with ExitStack() as stack:
        for name in places:
            handle = module_at(model, name).register_forward_hook(hook(name))
            stack.callback(handle.remove)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        outputs = run()
        read = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
        read = first_tensor(outputs) if read is None else read
        assert read is not None, "a network returns a tensor"
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(read.shape, generator=generator).to(read)
        if read.ndim == 2:  # what is added to all logits changes nothing
            direction = direction - direction.mean(-1, keepdim=True)
        direction = torch.where(read.isfinite(), direction, 0)
        total = (torch.where(read.isfinite(), read, 0) * direction).sum()
        gradients = torch.autograd.grad(total, list(probes.values()), allow_unused=True)
    return {
        name: gradient.detach().float().movedim(places[name], -1).square().sum(-1, keepdim=True)
        for name, gradient in zip(probes, gradients, strict=True)
        if gradient is not None
    }


class RowWeights:
    """How much the rows of each batch count, at each module.

    Args:
        share: Share of a row's weight that follows the sensitivity, in [0, 1].
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._found: dict[tuple[int, str], Tensor] = {}

    def measure(
        self,
        number: int,
        model: nn.Module,
        run: Callable[[], Any],
        places: Mapping[str, int],
        mask: Tensor | None,
        *,
        seed: int,
    ) -> None:
        """Measure the rows of a batch; see :func:`row_sensitivity`.

        Args:
            number: The batch.
            model: The expert.
            run: Runs it on the batch.
            places: Axis of the channels by module.
            mask: The tokens that count.
            seed: Seed of the random direction.
        """
        for name, values in row_sensitivity(model, run, places, seed=seed).items():
            self._found[number, name] = rows(values, mask)[:, 0]

    def of(self, number: int, name: str) -> Tensor | None:
        """Return the weight of each row of a batch at a module, ``[n]`` of mean one, or None."""
        found = self._found.get((number, name))
        if found is None:
            return None
        if not found.isfinite().all():
            return None  # the layer whose values are not finite is yet to come, and says so
        mean = found.mean().clamp_min(torch.finfo(found.dtype).tiny)
        return 1 - self.share + self.share * found / mean
