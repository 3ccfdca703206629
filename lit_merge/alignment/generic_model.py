"""A model and inputs on which an error cannot hide: float64, random, nothing zero or equal.

At initialisation many things are alike that training makes different: norms have γ = 1 and β = 0,
last layers of branches are zero. Permuting them wrongly would change nothing there. Here all
weights are moved by noise, and computations that models force into float32 run in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lit_merge.errors import InputError

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, what would be made in a narrower floating type is made in float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, with float64 in place of the type it asks for."""
        asked = dict(kwargs or {})
        if asked.get("dtype") in _NARROW:
            asked["dtype"] = torch.float64
        return func(*args, **asked)


@dataclass(frozen=True, eq=False)
class GenericModel:
    """A generic copy of a model, with inputs.

    Attributes:
        name: Of the model's class.
        model: In float64, on the CPU, in evaluation mode, without gradients.
        inputs: What a forward takes.
        generator: Of further random numbers.
    """

    name: str
    model: nn.Module
    inputs: Any
    generator: torch.Generator

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers themselves, by their names in the state dict."""
        state = self.model.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def generic_model(model: nn.Module, example_inputs: Any, *, seed: int = 0) -> GenericModel:
    """Return a generic copy of a model, and inputs of the shapes and whole numbers of an example.

    Args:
        model: Left as it is.
        example_inputs: What a forward takes.
        seed: Of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    made = _noisy_copy(model, generator)
    return GenericModel(
        type(model).__name__, made, _random_inputs(example_inputs, generator), generator
    )


def run_generic(generic: GenericModel, forward: Callable[[nn.Module, Any], Any]) -> list[Tensor]:
    """Run a generic model, with attention as plain operations; return its floating outputs.

    Raises:
        InputError: There are none.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(InFloat64())  # type: ignore[no-untyped-call]
        outputs = forward(generic.model, generic.inputs)
    found = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    floating = [output for output in found if output.is_floating_point()]
    if not floating:
        raise InputError(
            f"forward: must return outputs of {generic.name}; got no tensor of floating numbers. "
            "Pass a `forward` that returns them, as a tensor, tuple or dictionary."
        )
    return floating


def _noisy_copy(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Return a copy in float64, on the CPU and in evaluation mode, whose weights are noisy.

    A matrix gets noise of half the size that is usual for its inputs, a vector 10 % and 0.1; what
    is nowhere negative among the buffers (running variances) stays so.
    """
    made = copy.deepcopy(model).to(device="cpu", dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.requires_grad_(False).copy_(_noisy(parameter, generator))
        for buffer in made.buffers():
            if buffer.is_floating_point() and bool((buffer >= 0).all()):
                buffer.mul_((0.2 * _normal(buffer.shape, generator)).exp())
            elif buffer.is_floating_point():
                buffer.add_(0.1 * buffer.std(correction=0) * _normal(buffer.shape, generator))
    return made


def _noisy(parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = _normal(parameter.shape, generator)
    if parameter.ndim < 2:
        return parameter * (1 + 0.1 * noise) + 0.1 * _normal(parameter.shape, generator)
    inputs = parameter.numel() // parameter.shape[0]
    return parameter + noise / (2 * math.sqrt(max(inputs, 1)))


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _random_inputs(inputs: Any, generator: torch.Generator) -> Any:
    """Return inputs in float64 on the CPU, with random numbers where they have floating ones."""

    def made(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.cpu()
        return _normal(value.shape, generator)

    if isinstance(inputs, Mapping):  # also those of tokenizers, which are no plain dictionaries
        return {key: tree_map(made, value) for key, value in inputs.items()}
    return tree_map(made, inputs)
