"""Muon for weight matrices, Adam for everything else: the optimizer of a fit of all weights.

Adam looks at each entry of a weight matrix alone. The gradient of a few hundred examples has a few
large singular values, and Adam's steps go mostly along these. Muon steps along all singular
directions alike, which brings a fit of a few hundred steps further.

References:
    Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks" (momentum, the
    five Newton-Schulz iterations and their coefficients, a convolution as a matrix with a row per
    output channel, embeddings and heads left to Adam); Liu et al. (2025), arXiv:2502.16982 (steps
    of one length per entry, whatever the shape).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lit_merge.sharding import local_part, own_part, whole

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.775, 2.0315)
_RMS = 0.4  # of the entries of a step, in learning rates: what Adam moves them by, or twice


class MuonWithAdam(torch.optim.Adam):
    """Adam, except for groups of parameters with ``"muon": True``, which step by Muon.

    A step of Muon is ``0.4 · lr · √max(rows, columns)`` times the momentum with its singular values
    brought to about one: entries move by 0.4 · lr in the root mean square, so that a learning rate
    that is right for Adam is right for it.

    Args:
        groups: Groups of parameters, each with "params", "lr" and "muon".
        eps: What keeps entries still whose gradient is far below it, as rounding is; in Muon the
            root mean square of a matrix' momentum decides.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], *, eps: float) -> None:
        super().__init__([{"muon": False, **group} for group in groups], eps=eps)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step; the closure, if there is one, computes the loss and the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group["muon"]]
            super().step()
        finally:
            self.param_groups = every
        for group in every:
            if group["muon"]:
                self._step_matrices(group)
        return loss

    @torch.no_grad()
    def _step_matrices(self, group: Mapping[str, Any]) -> None:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # which Adam looks for when it is resumed
                state["momentum"] = torch.zeros_like(gradient)
            state["step"] += 1
            momentum: Tensor = state["momentum"]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            ahead = whole(gradient.lerp(momentum, MOMENTUM)).flatten(1)
            rms = ahead.float().square().mean().sqrt()
            length = _RMS * math.sqrt(max(ahead.shape)) * rms / (rms + group["eps"])
            step = (length * orthogonalised(ahead)).reshape(parameter.shape).to(parameter.dtype)
            local_part(parameter).sub_(own_part(step, parameter), alpha=group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix with the singular vectors of another, and singular values near one.

    Five Newton-Schulz iterations bring those above a hundredth of the largest into [0.65, 1.25]; in
    bfloat16 on a GPU, where its matrix products are fast.

    Args:
        matrix: ``[n, m]``.

    Returns:
        ``[n, m]``, float32, or bfloat16 on a GPU; zero for zero.
    """
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    wide = len(x) <= x.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def hidden_matrices(network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Return the names of the parameters that are matrices from features to features.

    These are two-dimensional weights and those of convolutions in one group. Not so: tables of
    embeddings, whose rows are seen one by one; the weights of norms over several dimensions; and
    the first layer of a network without embeddings, which reads the input, where a weak direction
    may be a pixel that is always black.

    Args:
        network: What the parameters are part of.
        parameters: Those that are asked about, by name in the network.
    """
    matrices: set[int] = set()
    others: set[int] = set()
    reads_input = True
    for module in network.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm | nn.RMSNorm):
            others.add(id(module.weight))
            reads_input &= not isinstance(module, nn.Embedding | nn.EmbeddingBag)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("weight") and parameter.ndim > 1:
                if reads_input:
                    others.add(id(parameter))
                elif parameter.ndim == 2 or (isinstance(module, _ConvNd) and module.groups == 1):
                    matrices.add(id(parameter))
                reads_input = False
    matrices -= others
    return {name for name, parameter in parameters.items() if id(parameter) in matrices}
