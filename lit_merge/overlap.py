r"""What experts of one base have in common, layer by layer: their curvature and their task vectors.

Three things say why a merge works in one layer and not in another. The *curvature* says where an
expert is sure: the mean over a layer's weights of :math:`h_t`, summed over its training examples.
The *cosine* of two task vectors, :math:`τ_s·τ_t / (‖τ_s‖‖τ_t‖)`, says whether two experts have
gone the same way: near 0 they can be added, near 1 an average loses nothing, below 0 each undoes
the other. The *sign agreement* is the share of the weights that both have changed whose signs
agree: one half for unrelated experts, and more where weight decay has moved both alike.

Everything is a sum over the weights, so the files are streamed through once, in pieces, on all
cores and in constant memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.forecast.gather import StartPass, reading_hessians, silent, slices_of
from lit_merge.forecast.result import block_of
from lit_merge.methods import Average, MergeMethod, ParameterSlice, TaskArithmetic
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.open_inputs import open_inputs, tasks_of
from lit_merge.streaming.plan import plan_merge
from lit_merge.streaming.progress import merge_progress


@dataclass(frozen=True, eq=False)
class OverlapSums:
    r"""Sums over the weights of a layer, or of the model; T experts, all float64.

    Attributes:
        numel: Number of weights.
        products: :math:`τ_s·τ_t`, ``[T, T]``; None without a base.
        alike: How many weights both have changed, in the same direction, ``[T, T]``; likewise.
        changed: How many weights both have changed, ``[T, T]``; likewise.
        curvature: :math:`\sum h_t`, ``[T]``; None without Hessians.
    """

    numel: int
    products: Tensor | None
    alike: Tensor | None
    changed: Tensor | None
    curvature: Tensor | None

    def __add__(self, other: OverlapSums) -> OverlapSums:
        """Return the sums over both parts."""
        return OverlapSums(
            self.numel + other.numel,
            _sum(self.products, other.products),
            _sum(self.alike, other.alike),
            _sum(self.changed, other.changed),
            _sum(self.curvature, other.curvature),
        )

    def cosine(self, one: int, other: int) -> float | None:
        """Return the cosine of two task vectors; None where one is zero, or without a base."""
        if self.products is None:
            return None
        length = math.sqrt(float(self.products[one, one]) * float(self.products[other, other]))
        return float(self.products[one, other]) / length if length > 0 else None

    def sign_agreement(self, one: int, other: int) -> float | None:
        """Return the share of equal signs; None where no weight was changed by both."""
        if self.alike is None or self.changed is None:
            return None
        changed = float(self.changed[one, other])
        return float(self.alike[one, other]) / changed if changed > 0 else None

    def size(self, task: int) -> float | None:
        """Return the root mean square of a task vector's entries; None without a base."""
        if self.products is None:
            return None
        return math.sqrt(float(self.products[task, task]) / self.numel)

    def mean_curvature(self, task: int) -> float | None:
        """Return the mean over the weights of the Hessian, Σ over the expert's examples."""
        return None if self.curvature is None else float(self.curvature[task]) / self.numel


@dataclass(frozen=True)
class Overlap:
    """What experts have in common.

    Attributes:
        tasks: The experts' names, T of them.
        layers: The sums by layer, in the model's order; a layer is a numbered block, or a module
            outside of them (:func:`lit_merge.forecast.result.block_of`).
        notes: What a user should know.
    """

    tasks: tuple[str, ...]
    layers: Mapping[str, OverlapSums]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> OverlapSums:
        """The sums over all merged weights."""
        first, *others = self.layers.values()
        for one in others:
            first = first + one
        return first

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Places of two different experts, each pair once."""
        count = len(self.tasks)
        return tuple((one, other) for one in range(count) for other in range(one + 1, count))


def expert_overlap(
    base: str | Path | None,
    experts: Mapping[str, str | Path] | Sequence[str | Path],
    *,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    threads: int | None = None,
    progress: bool = True,
) -> Overlap:
    """Compare experts by layer, from their files.

    Args:
        base: What the experts were fine-tuned from, as in :func:`lit_merge.merge`; None to look at
            their curvature alone.
        experts: Expert folders by task name, or a list of them.
        policy: Which tensors are merged; only these are compared.
        threads: How many pieces are computed at once; None for one per core.
        progress: Whether to show progress on the standard error.

    Raises:
        InputError: As :func:`lit_merge.merge` before it writes.
    """
    with (
        open_inputs(base, tasks_of(experts), None) as inputs,
        merge_progress(shown=progress) as shown,
    ):
        return overlap_of_inputs(inputs, policy=policy, threads=threads, start=shown.start)


def overlap_of_inputs(
    inputs: MergeInputs,
    *,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    threads: int | None = None,
    start: StartPass = silent,
    layer_of: Callable[[str], str] = block_of,
) -> Overlap:
    """Compare opened experts by layer; see :func:`expert_overlap`.

    Args:
        inputs: The experts, with or without a base and Hessians.
        policy: As there.
        threads: As there.
        start: Called at the start of the pass with its name and bytes; what it returns is called
            with the bytes gone through.
        layer_of: Names the layer of a tensor.
    """
    notes = list(inputs.notes)
    method: MergeMethod = Average() if inputs.base is None else TaskArithmetic()
    if inputs.base is None:
        notes.append("Without the base there are no task vectors: only curvature is shown.")
    bare = [task for task in inputs.tasks if task not in inputs.hessians]
    if bare:
        notes.append(f"Curvature is left out: {', '.join(bare)} has no Hessian.")
    else:
        method = reading_hessians(method)
    plan = plan_merge(inputs, method, policy=policy, dtype=None, overrides={})
    tensors = [t for t in plan.tensors if t.action == "merge" and t.alias_of is None]
    layers: dict[str, OverlapSums] = {}
    for name, sums in slices_of(inputs, plan, tensors, method, start, threads=threads)(_sums_of):
        _require_finite(sums, name, inputs)
        layer = layer_of(name)
        layers[layer] = layers[layer] + sums if layer in layers else sums
    if not layers:
        notes.append("No tensor is merged: there is nothing to compare.")
    return Overlap(inputs.tasks, layers, tuple(notes))


def _sums_of(p: ParameterSlice) -> OverlapSums:
    """Return the sums over one slice; products of float32 are added up in float64 over slices."""
    products = alike = changed = curvature = None
    if p.base is not None:
        base = p.base.flatten()
        vectors = torch.stack([expert.flatten() - base for expert in p.experts])
        products = (vectors @ vectors.T).double()
        signs = vectors.sign_()
        balance = signs @ signs.T  # equal signs less opposite ones: exact below 2²⁴ entries
        touched = signs.abs_()
        both = touched @ touched.T
        changed, alike = both.double(), (balance.double() + both.double()) / 2
    if p.hessians is not None:
        curvature = torch.stack([hessian.double().sum() for hessian in p.hessians])
    return OverlapSums(p.experts[0].numel(), products, alike, changed, curvature)


def _require_finite(sums: OverlapSums, name: str, inputs: MergeInputs) -> None:
    if sums.products is None or sums.products.isfinite().all():
        return
    broken = ~sums.products.diagonal().isfinite()
    paths = [str(expert.path) for expert in inputs.experts.values()]
    # A NaN of the base is in every task vector.
    at = inputs.base.path if inputs.base and broken.all() else paths[int(broken.int().argmax())]
    raise InputError(
        f"{at}: tensor {name!r} must be finite for a task vector; got NaN, infinity or numbers too "
        "large to be squared. Train again, or leave the expert out."
    )


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return None if one is None or other is None else one + other
