r"""The exact diagonal beside training: from the forward and backward that a training step makes.

No pass of its own: while a training step runs, the engine of :mod:`lit_merge.curvature.capture`
listens, and squares and adds per-example gradients as they come by. The ordinary gradients are
formed as well. The labels are those of training, the weights those of the moment: an average along
the end of the path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_merge.curvature.batches import batch_size_of, take_examples, tensors_in, unlike_pair
from lit_merge.curvature.capture import Capture
from lit_merge.curvature.coverage import wanted_parameters
from lit_merge.curvature.differentiation import differentiation, requiring_grad
from lit_merge.curvature.estimator import CurvatureEstimator, zeros_for
from lit_merge.curvature.per_example import PerExampleFisher
from lit_merge.errors import InputError

_DIFFERENCE = 1e-2  # of a parameter's largest sum, in the single precision of two computations


class FisherBesideTraining(CurvatureEstimator):
    """Σ_n (∂ℓ_n/∂θ)² over the examples of the training steps that it is told to watch.

    Around the forward and backward of a step call :meth:`start`, :meth:`end_forward` and
    :meth:`stop`. Dropout acts as it does in training. Every parameter must be one that the engine
    computes for all examples at once; batch statistics (BatchNorm in training mode) make an
    example's gradient depend on the others and are refused. The step's own results are the same but
    for rounding.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> estimator = FisherBesideTraining(model)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> estimator.start(x)
        >>> loss = model(x).mean()
        >>> estimator.end_forward()
        >>> loss.backward()
        >>> estimator.stop()
        >>> estimator.sums()  # 1² + 2²
        {'weight': tensor([[5.]])}
    """

    name: ClassVar[str] = "per-example-beside-training"
    exact: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    non_negative: ClassVar[bool] = True
    sharded: ClassVar[bool] = False

    def __init__(self, model: nn.Module, *, parameters: Collection[str] | None = None) -> None:
        """Choose the parameters.

        Args:
            model: Any module; one that DDP wraps is given unwrapped.
            parameters: Names or patterns of the parameters wanted, None for all trainable ones.

        Raises:
            InputError: No parameter is trainable, a name is unknown, or a parameter is sharded.
        """
        self._model = model
        self._parameters = wanted_parameters(model, parameters)
        self._totals: dict[str, Tensor] = {}
        self._num_examples = 0
        self._size = 0
        self._capture: Capture | None = None
        self._listening = ExitStack()

    @property
    def num_examples(self) -> int:
        """How many examples the sums are over."""
        return self._num_examples

    def sums(self) -> dict[str, Tensor]:
        """Return a copy of the sums over the examples seen (zeros if none), by parameter name."""
        self._allocate()
        return {
            name: total.clone(memory_format=torch.contiguous_format)
            for name, total in self._totals.items()
        }

    def resume(self, sums: dict[str, Tensor], *, num_examples: int) -> None:
        """Add the sums of an interrupted run.

        Args:
            sums: What :meth:`sums` gave.
            num_examples: Of these sums.
        """
        self._allocate()
        for name, total in sums.items():
            self._totals[name] += total
        self._num_examples += num_examples

    def start(self, batch: Any, *, loss_scale: float = 1.0) -> None:
        """Begin to listen, before the forward of a batch.

        Args:
            batch: B examples, the very tensors that the model gets.
            loss_scale: What the mean loss is multiplied with before the backward: 1/A for
                accumulation over A batches, times the scale of a gradient scaler.
        """
        assert self._capture is None, "started twice"
        self._allocate()
        self._size = batch_size_of(batch)
        capture = Capture(
            self._parameters, self._totals, self._size, factor=self._size / loss_scale
        )
        self._listening.enter_context(capture)
        capture.mark(tensor for _, tensor in tensors_in(batch, "batch"))
        self._capture = capture

    def end_forward(self) -> None:
        """Note that the loss is there and the backward begins."""
        if self._capture is not None:
            self._capture.end_forward()

    def stop(self) -> None:
        """Finish after the backward.

        Raises:
            InputError: A parameter cannot be computed for all examples at once.
        """
        capture, self._capture = self._capture, None
        if capture is None:
            return
        self._listening.close()
        capture.end_backward()
        self._num_examples += self._size
        _require_none(capture.failed)

    def cancel(self) -> None:
        """Stop listening to a step that failed."""
        self._capture = None
        self._listening.close()

    def try_out(self, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        """Compare with :class:`PerExampleFisher` on two examples, in eval mode; leave no trace.

        Args:
            batch: Examples, of which two are taken.
            loss: Called as ``loss(model, batch)``; the mean over the batch.

        Raises:
            InputError: A parameter cannot be computed, or what PerExampleFisher raises.
        """
        two = take_examples(batch, unlike_pair(batch))
        names = list(self._parameters)
        reference = PerExampleFisher(self._model, loss, labels="observed", parameters=names)
        _require_none(dict(reference.probe(two).one_by_one))
        reference.update(two)
        trial = FisherBesideTraining(self._model, parameters=names)
        with differentiation(self._model), requiring_grad(self._parameters.values()):
            trial.start(two)
            try:
                value = loss(self._model, two)
                trial.end_forward()
                torch.autograd.grad(value, list(self._parameters.values()), allow_unused=True)
                trial.stop()
            finally:
                trial.cancel()
        expected, found = reference.sums(), trial.sums()
        different = {
            name: "what comes by in training differs from the loop"
            for name in names
            if not _close(found[name], expected[name])
        }
        _require_none(different)

    def _allocate(self) -> None:
        if not self._totals:
            self._totals = {name: zeros_for(p) for name, p in self._parameters.items()}


def _close(found: Tensor, expected: Tensor) -> bool:
    difference = torch.linalg.vector_norm(found - expected, torch.inf)
    return float(difference) <= _DIFFERENCE * float(expected.max()) + 1e-10


def _require_none(failed: dict[str, str]) -> None:
    for name, reason in failed.items():
        raise InputError(
            f"{name}: must be one whose per-example gradients come by in training; got that "
            f"{reason}. Measure in a pass of its own, or leave the parameter out."
        )
