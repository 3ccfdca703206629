"""Folding one task's corrections into a network, so far as its layers can take them.

The fold of every layer is proved where it is made: the layer runs with its old and its new tensors
on what it was called with in a run of the network, and a fold that does not give the corrected
output is refused. What cannot be folded is named with its reason.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_merge.correction.fold import (
    CannotFoldError,
    fold_candidates,
    fold_input_candidates,
    fold_shift_into_mean,
)
from lit_merge.correction.forward import channels_last, module_at, with_first_tensor
from lit_merge.correction.layer_trace import Call, LayerTrace, trace_layers
from lit_merge.correction.site import Site

TOLERANCE = 1e-5
"""Largest difference of a proof, in units of the largest output (of 1 where that is less)."""


@dataclass(frozen=True)
class SiteAffine:
    """What one task multiplies and adds at a site.

    Attributes:
        site: Where.
        scale: Scale per channel, ``[C]``.
        shift: Shift per channel, ``[C]``.
    """

    site: Site
    scale: Tensor
    shift: Tensor

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return bool((self.scale == 1).all()) and not bool(self.shift.any())

    def __call__(self, value: Any) -> Any:
        """Return a layer's output or arguments with the first tensor corrected."""
        x = channels_last(value, self.site)
        corrected = x * self.scale.to(x) + self.shift.to(x)
        return with_first_tensor(value, corrected.movedim(-1, self.site.channel_dim))


@dataclass(frozen=True)
class Folding:
    """What became of a task's corrections.

    Attributes:
        network: A copy of the network with corrections inside.
        folded: Names of the sites that are in it.
        left: The sites that are not, with the reason.
    """

    network: nn.Module
    folded: tuple[str, ...]
    left: Mapping[str, str]


@torch.no_grad()
def fold_corrections(
    network: nn.Module,
    corrections: Sequence[SiteAffine],
    run: Callable[[nn.Module], object],
) -> Folding:
    """Return a network with corrections inside its weights.

    A shift behind a convolution without bias goes into the running mean of the BatchNorm that
    takes the convolution's output, where the run shows that nothing else takes it.

    Args:
        network: The plain network, in evaluation mode, with nothing attached; unchanged.
        corrections: One per site.
        run: Calls the network on example inputs.

    Raises:
        InputError: The network lacks a site.
    """
    network = copy.deepcopy(network)
    trace = trace_layers(network, {c.site.module for c in corrections}, run)
    holders = _holders(network)
    folded: list[str] = []
    left: dict[str, str] = {}
    for correction in corrections:
        reason = None
        if not correction.is_identity:
            reason = _fold_site(network, correction, trace, holders)
        if reason is None:
            folded.append(correction.site.name)
        else:
            left[correction.site.name] = reason
    return Folding(network, tuple(folded), left)


def _fold_site(
    network: nn.Module, correction: SiteAffine, trace: LayerTrace, holders: Mapping[int, int]
) -> str | None:
    """Fold one site, in place, or return why it cannot be folded."""
    try:
        _overwrite_folded(network, correction, trace, holders)
    except CannotFoldError as error:
        return str(error)
    return None


def _overwrite_folded(
    network: nn.Module, correction: SiteAffine, trace: LayerTrace, holders: Mapping[int, int]
) -> None:
    name = correction.site.module
    module = module_at(network, name)
    if name not in trace.calls:
        raise CannotFoldError("the example inputs do not reach it")
    try:
        made = _folded(module, correction, trace, holders)
    except CannotFoldError:
        follower = trace.followers.get(name)
        if follower is None or correction.site.before or module._parameters.get("bias") is not None:
            raise
        norm = module_at(network, follower)
        mean = fold_shift_into_mean(norm, correction.shift)
        _require_own(norm, mean, holders)
        scaling = SiteAffine(correction.site, correction.scale, torch.zeros_like(correction.shift))
        made = _folded(module, scaling, trace, holders)
        _overwrite(norm, mean)
    _overwrite(module, made)


def _folded(
    module: nn.Module, correction: SiteAffine, trace: LayerTrace, holders: Mapping[int, int]
) -> dict[str, Tensor]:
    """Return the layer's own tensors with a correction inside, after trying them."""
    before = correction.site.before
    candidates = fold_input_candidates if before else fold_candidates
    call = trace.calls[correction.site.module]
    for made in candidates(module, correction.scale, correction.shift):
        _require_own(module, made, holders)
        if correction.site.module in trace.read_elsewhere:
            raise CannotFoldError("its parameters are also used outside of it")
        found = functional_call(module, made, call.args, call.kwargs)
        if largest_difference(found, _corrected(module, correction, call)) <= TOLERANCE:
            return made
    what = "what it takes" if before else "what it gives"
    raise CannotFoldError(
        f"no weights of a {type(module).__name__} scale and shift {what}, channel by channel"
    )


def _corrected(module: nn.Module, correction: SiteAffine, call: Call) -> Any:
    """Return what a layer gives with the correction at it."""
    # Not the output of the traced run: what came behind the layer may have worked in place on it.
    if not correction.site.before:
        return correction(module(*call.args, **call.kwargs))
    if call.args:
        return module(*correction(call.args), **call.kwargs)
    name = next(iter(call.kwargs))
    (value,) = correction((call.kwargs[name],))
    return module(**{**call.kwargs, name: value})


def _require_own(
    module: nn.Module, tensors: Mapping[str, Tensor], holders: Mapping[int, int]
) -> None:
    for leaf in tensors:
        if holders[id(getattr(module, leaf))] > 1:
            raise CannotFoldError(f"its {leaf} is shared with another layer")


def _overwrite(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for leaf, value in tensors.items():
        getattr(module, leaf).copy_(value)


def _holders(network: nn.Module) -> Counter[int]:
    """Return how many modules hold each parameter or buffer, by its id."""
    return Counter(
        id(tensor)
        for module in network.modules()  # each once, also one that has two names
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in units of the largest expected value or of 1.

    Infinite where the shapes differ or a value is not finite.

    >>> largest_difference(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 10.0]))
    0.1
    """
    if found.shape != expected.shape:
        return math.inf
    if not found.numel():
        return 0.0
    left, right = found.detach().double(), expected.detach().double()
    difference = float((left - right).abs().max() / right.abs().max().clamp(min=1.0))
    return difference if math.isfinite(difference) else math.inf
