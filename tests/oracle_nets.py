"""Small networks around one layer or one use of a parameter, and their comparison with the loop."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature import CurvatureWarning, PerExampleFisher
from lit_merge.curvature.probe import ProbeReport

CLASSES = 3


class Net(nn.Module):
    """A layer before the part under test, if the input is not tokens, and three logits after it.

    Args:
        use: Called as ``use(net, x)`` with the stem's output, or the tokens.
        stem: Width of the input's last dimension; 0 leaves the input as it is.
        parts: Modules by name, and shapes of bare parameters by name.
    """

    def __init__(
        self,
        use: Callable[[Any, Tensor], Tensor],
        *,
        stem: int = 6,
        **parts: nn.Module | tuple[int, ...],
    ) -> None:
        super().__init__()
        self.use = use
        self.stem = nn.Linear(stem, stem) if stem else None
        for name, part in parts.items():
            value = part if isinstance(part, nn.Module) else nn.Parameter(torch.zeros(part))
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        if self.stem is not None and x.is_floating_point():
            x = self.stem(x).tanh()
        y = self.use(self, x)
        flat = torch.view_as_real(y).flatten(1) if y.is_complex() else y.flatten(1)
        columns = torch.arange(flat.shape[1] * CLASSES, dtype=flat.dtype).view(-1, CLASSES)
        return flat @ (columns + 1).sin() / math.sqrt(flat.shape[1])


class Case(NamedTuple):
    """One network with its input.

    Attributes:
        build: Makes the network.
        shape: Of the input, without the batch.
        one_by_one: Patterns of the parameters that may be computed one example at a time.
        tokens: How many tokens there are, if the input is tokens; 0 for normal numbers.
        rtol: Of the comparison; layers that compute in float32 whatever they get need 1e-6.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 6)
    one_by_one: tuple[str, ...] = ()
    tokens: int = 0
    rtol: float = 1e-8

    def model(self) -> nn.Module:
        """Return the network in float64, with random parameters."""
        torch.manual_seed(0)
        model = self.build().double().eval()
        randomise(model, 0.4)
        return model

    def batch(self, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of so many examples."""
        generator = torch.Generator().manual_seed(seed)
        shape = (size, *self.shape)
        if self.tokens:
            return torch.randint(self.tokens, shape, generator=generator), _labels(size)
        return torch.randn(shape, generator=generator, dtype=torch.float64), _labels(size)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return batches of 4, 3 and 1 examples."""
        return [self.batch(4), self.batch(3, seed=1), self.batch(1, seed=2)]


def _labels(size: int) -> Tensor:
    return torch.arange(size) % CLASSES


def randomise(model: nn.Module, spread: float) -> None:
    """Add noise to parameters and running statistics: no gradient is zero by initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.6, 1.5)


def cross_entropy(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    inputs, labels = batch
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return F.cross_entropy(getattr(output, "logits", output), labels)


def assert_exact(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    *,
    one_by_one: Sequence[str] = (),
    rtol: float = 1e-8,
) -> ProbeReport:
    """Compare every parameter with the loop, and the way it is computed with the way it may be.

    Args:
        model: Float64, in eval mode.
        batches: Pairs of inputs and labels; the first is probed with.
        loss: The mean over a batch.
        one_by_one: Patterns of the parameters that may be computed one example at a time, by name
            (``head.*``) or by the owner's type (``Swish.beta``).
        rtol: Share of an entry, and of its parameter's largest entry.
    """
    expected = _squares_by_loop(model, batches, loss)
    estimator = PerExampleFisher(model, loss, labels="observed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CurvatureWarning)
        report = estimator.probe(batches[0])
    slow = {
        name: reason
        for name, reason in report.one_by_one.items()
        if not any(fnmatchcase(n, pattern) for n in _names(model, name) for pattern in one_by_one)
    }
    assert not slow, slow
    for batch in batches:
        estimator.update(batch)  # warns, which is an error, if the probe was wrong about a way
    sums = estimator.sums()
    assert sums.keys() == expected.keys()
    largest = max(float(squares.max()) for squares in expected.values())
    assert largest > 0
    for name, squares in expected.items():
        # the gradient of the bias of attention keys is zero but for rounding, 1e-16 of the others
        atol = rtol * float(squares.max()) + 1e-24 * largest
        torch.testing.assert_close(sums[name], squares, rtol=rtol, atol=atol, msg=name)
    return report


def _squares_by_loop(
    model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """Sum squared gradients over examples: one backward and one new copy of the model for each.

    A new copy, because some models keep activations. The example goes in twice, which leaves the
    mean loss as it is, because the backward of batch norm in eval mode is wrong for a batch of one
    whose gradient is a transposed view (PyTorch 2.15 on CPU).
    """
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    for inputs, labels in batches:
        for i in range(len(labels)):
            copied, twice = copy.deepcopy(model), [i, i]
            pair = (
                {key: value[twice] for key, value in inputs.items()}
                if isinstance(inputs, dict)
                else inputs[twice]
            )
            loss(copied, (pair, labels[twice])).backward()
            for name, parameter in copied.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad**2
    return sums


def _names(model: nn.Module, parameter: str) -> tuple[str, str]:
    """Return a parameter's name, and the type of its module with the attribute's name."""
    path, _, attribute = parameter.rpartition(".")
    return parameter, f"{type(model.get_submodule(path)).__name__}.{attribute}"
