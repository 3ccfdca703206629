"""The optimizer of the learned fit: which parameters step how, and at which learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lit_merge.errors import InputError
from lit_merge.merged.fit_settings import FitSettings
from lit_merge.merged.muon import MuonWithAdam, hidden_matrices
from lit_merge.merged.network import MergedNetwork

# Some numbers have no gradient but rounding (the shift of attention keys, which softmax ignores;
# all, once the experts are met). With Adam's usual eps they would wander by lr.
_EPS = 1e-6


def fit_optimizer(
    merged: MergedNetwork, learned: Mapping[str, nn.Parameter], fit: FitSettings
) -> torch.optim.Optimizer:
    """Return the optimizer of what is learned; weights and heads have a learning rate of their own.

    Args:
        merged: The network.
        learned: Its parameters that are trained.
        fit: Which optimizer, and the learning rates.

    Raises:
        InputError: If there is nothing to learn.
    """
    weights = {id(parameter) for parameter in merged.network.parameters()}
    matrices: set[int] = set()
    if fit.optimizer == "muon":
        heads = set(merged.head_parameters())
        shared = {n: p for n, p in merged.shared_parameters().items() if n not in heads}
        matrices = {id(shared[name]) for name in hidden_matrices(merged.network, shared)}
    groups: list[dict[str, Any]] = [
        {"params": [], "lr": fit.lr, "muon": False},
        {"params": [], "lr": fit.weights_lr, "muon": False},
        {"params": [], "lr": fit.weights_lr, "muon": True},
    ]
    for parameter in learned.values():
        place = (id(parameter) in weights) + (id(parameter) in matrices)
        groups[place]["params"].append(parameter)
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError(
            "correction: must leave something to learn; got corrections without parameters, no "
            "surgery, no coefficients, and fixed weights and heads. Use RescaleShift, or "
            "max_steps: 0."
        )
    return MuonWithAdam(groups, eps=_EPS)
