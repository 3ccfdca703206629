"""Proving symmetries: permute at random, run, compare.

A symmetry holds if the outputs of the model stay what they are, in float64 and on a model and
inputs that are generic (:mod:`lit_merge.alignment.generic_model`), whatever the permutation. All
symmetries are tried together, and then in splits that tell any two apart: in one split or the
other the first is permuted while the second stands still. For n symmetries that takes 2⌈log₂ n⌉ + 2
forwards; only where a split fails is each tried alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_merge.alignment.generic_model import GenericModel, generic_model, run_generic
from lit_merge.alignment.permute import permute
from lit_merge.alignment.symmetry import Symmetry
from lit_merge.correction.forward import Forward, run_model
from lit_merge.errors import InputError

Permutations: TypeAlias = dict[str, Tensor]

_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Proof:
    """What came out of a proof.

    Attributes:
        proved: The symmetries that hold, in the order given.
        rejected: The error of those that do not: the largest change of an output, relative to the
            largest entry of that output.
        error: The largest error of the proved ones, permuted together.
        forwards: How often the model was run.
    """

    proved: tuple[Symmetry, ...]
    rejected: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    forwards: int = 0


def prove(
    model: nn.Module,
    example_inputs: Any,
    symmetries: Sequence[Symmetry],
    *,
    forward: Forward = run_model,
    strict: bool = False,
    seed: int = 0,
) -> Proof:
    """Test symmetries on a copy of a model; the model itself is left as it is.

    Args:
        model: The network, whose weights serve only to make generic ones.
        example_inputs: What ``forward`` takes; of floating numbers only the shape counts.
        symmetries: To be proved.
        forward: Runs the model; all tensors in what it returns are compared.
        strict: Raise if there is a symmetry that does not hold, rather than leave it out.
        seed: Of weights, inputs and permutations.

    Raises:
        InputError: ``strict`` and a symmetry does not hold; or the outputs are not finite, or do
            not depend on the weights that are permuted, so that nothing can be proved.
    """
    generic = generic_model(model, example_inputs, seed=seed)
    return prove_on(generic, symmetries, forward=forward, strict=strict)


def prove_on(
    generic: GenericModel,
    symmetries: Sequence[Symmetry],
    *,
    forward: Forward = run_model,
    strict: bool = False,
) -> Proof:
    """Test symmetries as :func:`prove` does, on a generic model that was made before."""
    if not symmetries:
        return Proof(())
    trial = _Trial(generic, forward)
    trial.check_that_it_can_fail(symmetries)
    error = max(trial.error(split) for split in _splits(symmetries))
    rejected: dict[str, float] = {}
    if not error <= _TOLERANCE:
        alone = {s.name: max(trial.error([s]) for _ in range(2)) for s in symmetries}
        rejected = {name: e for name, e in alone.items() if not e <= _TOLERANCE}
    if strict and rejected:
        worst = max(rejected, key=lambda name: rejected[name])
        raise InputError(
            f"symmetries: must leave the outputs of {generic.name} as they are; got "
            f"{len(rejected)} that the proof rejects, such as {worst!r}, which changes them by "
            f"{rejected[worst]:.1e}. Protect its parameters, or drop what is rejected."
        )
    proved = _without(symmetries, rejected)
    if rejected and proved:
        error = max(trial.error(split) for split in _splits(proved))
    return Proof(proved, rejected, error if proved else 0.0, trial.forwards)


def _without(symmetries: Sequence[Symmetry], rejected: Mapping[str, float]) -> tuple[Symmetry, ...]:
    """Return the symmetries that remain, those inside of a rejected one on their own."""
    return tuple(
        replace(s, inside=None) if s.inside in rejected else s
        for s in symmetries
        if s.name not in rejected
    )


def _splits(symmetries: Sequence[Symmetry]) -> list[list[Symmetry]]:
    """Return all symmetries, twice, and for each binary digit those that have it set or not."""
    splits = [list(symmetries)] * 2
    for digit in range((len(symmetries) - 1).bit_length()):
        for value in (0, 1):
            splits.append([s for i, s in enumerate(symmetries) if i >> digit & 1 == value])
    return splits


class _Trial:
    """One generic model with its outputs, and what they become under permutations."""

    def __init__(self, generic: GenericModel, forward: Forward) -> None:
        self.generic = generic
        self.forward = forward
        self.forwards = 0
        self.places = generic.tensors()
        self.weights = {name: tensor.detach().clone() for name, tensor in self.places.items()}
        self.outputs = self._run()
        if not all(bool(output.isfinite().all()) for output in self.outputs):
            raise InputError(
                f"example_inputs: must give finite outputs of {generic.name} in the "
                "proof; got NaN or infinity. Give inputs without such values and with at least "
                "one unpadded token."
            )

    def check_that_it_can_fail(self, symmetries: Sequence[Symmetry]) -> None:
        """Permute the first axis of each symmetry alone, which must change the outputs."""
        broken = [replace(s, axes=s.axes[:1]) for s in symmetries if len(s.axes) > 1]
        if broken and self.error(broken) <= _TOLERANCE:
            raise InputError(
                "example_inputs: must give outputs that depend on the weights that are permuted; "
                "got outputs that do not. Give inputs that reach the model's outputs."
            )

    def error(self, symmetries: Sequence[Symmetry]) -> float:
        """Return the largest relative change of an output under random permutations."""
        permutations = {s.name: self._random(s.size) for s in symmetries}
        moved = permute(self.weights, symmetries, permutations)
        changed = [name for name, tensor in moved.items() if tensor is not self.weights[name]]
        with torch.no_grad():
            for name in changed:
                self.places[name].copy_(moved[name])
            outputs = self._run()
            for name in changed:
                self.places[name].copy_(self.weights[name])
        return max(map(_relative_change, self.outputs, outputs))

    def _random(self, size: int) -> Tensor:
        """Return a random permutation that is not the identity."""
        identity = torch.arange(size)
        while size > 1:
            permutation = torch.randperm(size, generator=self.generic.generator)
            if not torch.equal(permutation, identity):
                return permutation
        return identity

    def _run(self) -> list[Tensor]:
        self.forwards += 1
        return run_generic(self.generic, self.forward)


def _relative_change(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape:
        return float("inf")
    largest = float(before.abs().max()) if before.numel() else 0.0
    change = float((before - after).abs().max()) if before.numel() else 0.0
    return change / largest if largest else change
