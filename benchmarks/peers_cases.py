"""What is merged side by side: the inputs, a case, and our side of it.

A case is one function of another library with its settings, and our method with the settings that
docs/methods.md names for it. Both get the same tensors in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """What every function merges: tensors by name, lists in the experts' order.

    Attributes:
        base: The base's weights.
        experts: The experts' weights.
        hessians: Their diagonal Hessians, sums over the training examples.
        grams: Their layers' Gram matrices, by the weight's name.
        examples: How many training examples each Hessian is a sum over.
    """

    base: State
    experts: list[State]
    hessians: list[State]
    grams: list[State]
    examples: list[int]

    def task_vectors(self) -> list[State]:
        """Return what each expert is away from the base."""
        return [{n: e[n] - self.base[n] for n in self.base} for e in self.experts]

    def chosen(self, tensors: tuple[str, ...], reads: str) -> Inputs:
        """Return the tensors that fit one of the patterns, in memory of their own.

        Args:
            tensors: Patterns of names.
            reads: Which curvature comes along: "hessian", "gram" or nothing.
        """

        def of(state: State) -> State:
            fits = (n for n in state if any(fnmatchcase(n, p) for p in tensors))
            return {name: state[name].clone() for name in fits}

        return Inputs(
            base=of(self.base),
            experts=[of(state) for state in self.experts],
            hessians=[of(state) for state in self.hessians] if reads == "hessian" else [],
            grams=[of(state) for state in self.grams] if reads == "gram" else [],
            examples=self.examples,
        )

    def double(self) -> Inputs:
        """Return the same numbers in float64."""

        def of(state: State) -> State:
            return {name: tensor.double() for name, tensor in state.items()}

        return Inputs(
            base=of(self.base),
            experts=[of(state) for state in self.experts],
            hessians=[of(state) for state in self.hessians],
            grams=[of(state) for state in self.grams],
            examples=self.examples,
        )


@dataclass(frozen=True)
class Case:
    """One function of another library beside our method.

    Attributes:
        peer: The library.
        name: The function and its settings, as a reader would call it.
        call: Takes the inputs, which it may change, and returns the merged tensors.
        method: The class in lit_merge.methods.
        arguments: Of it.
        equal: Whether both compute the same; False where random numbers differ.
        tensors: Patterns of the tensors that are merged; the others stay as in the base.
        reads: Which curvature is needed: "hessian", "gram" or nothing.
        rounds: How often both are timed.
    """

    peer: str
    name: str
    call: Callable[[Inputs], State]
    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    equal: bool = True
    tensors: tuple[str, ...] = ("*",)
    reads: str = ""
    rounds: int = 1


def read_inputs(models: Path, base: str, experts: Sequence[str]) -> Inputs:
    """Read all models, with what was gathered for them, into memory."""

    def read(name: str, file: str) -> State:
        return {key: tensor.clone() for key, tensor in load_file(models / name / file).items()}

    return Inputs(
        base=read(base, "model.safetensors"),
        experts=[read(name, "model.safetensors") for name in experts],
        hessians=[read(name, "hessian.safetensors") for name in experts],
        grams=[read(name, "gram.safetensors") for name in experts],
        examples=[int((models / name / "examples").read_text()) for name in experts],
    )


def merge_by_us(case: Case, inputs: Inputs) -> State:
    """Merge by lit-merge, in memory."""
    from lit_merge import merge_state_dicts, methods
    from lit_merge.methods import ParameterSlice

    method = getattr(methods, case.method)(**case.arguments)
    if case.reads == "gram":  # state dicts come without Grams; the methods themselves take them
        tasks = tuple(f"task{i}" for i in range(len(inputs.experts)))
        return {
            name: method(
                ParameterSlice(
                    name,
                    tasks,
                    tuple(expert[name] for expert in inputs.experts),
                    grams=tuple(gram[name] for gram in inputs.grams)
                    if name in inputs.grams[0]
                    else None,
                )
            )
            for name in inputs.base
        }
    return merge_state_dicts(
        inputs.base,
        inputs.experts,
        method,
        hessians=inputs.hessians or None,
    )


def largest_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference of two merged models; NaN counts as infinite."""
    return max((float(difference.max()) for difference in _differences(one, other)), default=0.0)


def differing_entries(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> int:
    """Return how many entries differ by more than rounding does, 1e-6."""
    return sum(int((difference > 1e-6).sum()) for difference in _differences(one, other))


def _differences(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[Tensor]:
    if one.keys() != other.keys():
        raise ValueError(f"differing tensors: {sorted(one.keys() ^ other.keys())[:3]}")
    for name, tensor in one.items():
        difference = tensor.detach().double() - other[name].detach().double()
        yield torch.nan_to_num(difference.abs(), nan=torch.inf)
