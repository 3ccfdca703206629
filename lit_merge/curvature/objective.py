"""The user's loss of a batch, checked, with observed, sampled or all possible labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_merge.curvature.batch_of_one import RightBatchNorm
from lit_merge.curvature.batches import split_batch
from lit_merge.curvature.differentiation import drop_caches
from lit_merge.curvature.expected import ExpectedLabels
from lit_merge.curvature.labels import SampledLabels
from lit_merge.curvature.losses import LossInterception, Reduction
from lit_merge.errors import InputError

Labels = Literal["sampled", "observed", "expected"]

CAUSES_OF_NO_MEAN = (
    "Usual causes: a mean over the tokens of texts of different lengths "
    '(reduction="mean" or "sum" makes each text an example of its own), a sum instead of a mean, '
    "batch statistics (BatchNorm without running statistics), a loss between examples "
    "(contrastive), random numbers in the forward, reentrant checkpointing."
)

_ANY = math.inf  # a temperature that leaves only impossible classes out


class Objective:
    """The mean loss over a batch, as a function of the batch and its examples' indices.

    It takes several rounds to get the squared gradients of several draws, or of every possible
    label: see :meth:`rounds`. The objective itself is that of the first.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        labels: Labels,
        seed: int,
        samples: int = 1,
        reduction: Reduction = "loss",
    ) -> None:
        """Bind model and loss.

        Args:
            model: Given to the loss.
            loss: Returns the mean loss over the batch.
            labels: Whether the targets in the batch are used, replaced by samples from the model's
                predictions, or by every possible label in turn.
            seed: For the samples.
            samples: How many draws per example.
            reduction: How the terms of an example are put together; see
                :mod:`lit_merge.curvature.losses`.

        Raises:
            InputError: ``labels``, ``samples`` or ``reduction`` is not one of its values.
        """
        _require_settings(labels, samples, reduction)
        self.model = model
        self._loss = loss
        self._labels = labels
        self._seed = seed
        self._samples = samples
        self._reduction: Reduction = reduction
        self._temperature = 1.0  # see SampledLabels
        self._round = 0
        self._num_rounds = samples
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def with_any_labels(self) -> Objective:
        """Return the same loss with labels drawn almost without regard to the prediction.

        Where a model is sure and right, its gradients are nothing but rounding, and two ways of
        computing them cannot be compared. With such labels they are large.
        """
        other = copy.copy(self)
        other._labels, other._temperature = "sampled", _ANY
        other._samples = other._num_rounds = 1
        other.forget()
        return other

    def rounds(self) -> Iterator[Objective]:
        """Yield the objectives whose squared gradients add up to those wanted.

        With expected labels the first must have been called before the second is asked for: only
        then is it known how many outputs there are.
        """
        yield self
        for number in range(1, self._num_rounds):
            later = copy.copy(self)
            later._round = number
            later.forget()
            yield later

    def forget(self) -> None:
        """Drop the samples; until then an example keeps its labels, in whatever batch it comes."""
        self._drawn = {}

    def require_expectation(self, batch: Any, indices: Sequence[int]) -> None:
        """Raise if labels are expected and the loss is not made of torch's losses alone.

        Every round weighs what it intercepts; another term would be counted in every one of them.

        Args:
            batch: B examples.
            indices: [B], index of each in the data set.
        """
        if self._labels != "expected":
            return
        once, twice = (
            self._value(ExpectedLabels(0, len(indices), self._reduction, factor=factor), batch)
            for factor in (1.0, 2.0)
        )
        if not torch.allclose(2 * once, twice, rtol=1e-4, atol=0):
            raise InputError(
                'labels: must be "sampled" or "observed" for a loss that is more than a weighted '
                'sum of losses of torch.nn.functional; got "expected" and a loss that becomes '
                f"{float(twice):.6g}, not {2 * float(once):.6g}, when these are doubled. Use "
                'labels="sampled" with several samples.'
            )

    def require_mean(self, batch: Any, indices: Sequence[int]) -> None:
        """Raise unless the loss of examples together is the mean of their losses.

        Args:
            batch: B examples; two are enough.
            indices: [B], index of each in the data set.
        """
        together = self(batch, indices).detach()
        alone = [
            self(example, [index]).detach()
            for index, example in zip(indices, split_batch(batch), strict=True)
        ]
        mean = torch.stack(alone).mean()
        half = together.dtype in (torch.float16, torch.bfloat16)
        if not torch.allclose(together, mean, rtol=3e-2 if half else 1e-3, atol=1e-6):
            raise InputError(
                "loss: must be the mean over the examples of losses that do not depend on each "
                f"other; got {float(together):.8g} for {len(alone)} examples whose mean is "
                f"{float(mean):.8g}. {CAUSES_OF_NO_MEAN}"
            )

    def __call__(self, batch: Any, indices: Sequence[int]) -> Tensor:
        """Return the loss.

        Args:
            batch: B examples.
            indices: [B], index of each in the data set.

        Raises:
            InputError: The loss is not one finite number, or makes no call to intercept where one
                is needed.
        """
        torch.clear_autocast_cache()  # it holds weights cast while they were frozen, or were not
        drop_caches(self.model)
        interception = self._interception(indices)
        with RightBatchNorm() if len(indices) == 1 else nullcontext():
            value = self._value(interception, batch)
        if isinstance(interception, ExpectedLabels):
            self._num_rounds = interception.outputs
        if not value.isfinite().all():
            raise InputError(
                f"loss: must be finite; got {value.item()} on the examples {_short(indices)}. "
                "Look for NaN and Inf in the weights and in the inputs."
            )
        return value if self._samples == 1 else value * self._samples**-0.5

    def _interception(self, indices: Sequence[int]) -> LossInterception | None:
        if self._labels == "expected":
            return ExpectedLabels(self._round, len(indices), self._reduction)
        if self._labels == "sampled":
            return SampledLabels(
                self._seed,
                indices,
                self._drawn,
                draw=self._round,
                temperature=self._temperature,
                reduction=self._reduction,
            )
        return (
            None if self._reduction == "loss" else LossInterception(len(indices), self._reduction)
        )

    def _value(self, interception: LossInterception | None, batch: Any) -> Tensor:
        """Return the loss as one number."""
        if interception is None:
            return _one_number(self._loss(self.model, batch))
        with interception:
            value = _one_number(self._loss(self.model, batch))
        if not interception.calls:
            raise InputError(
                "loss: must call cross_entropy, nll_loss, binary_cross_entropy, "
                "binary_cross_entropy_with_logits or mse_loss of torch.nn.functional (or the "
                "modules of torch.nn that do) for labels to be sampled or expected and for another "
                "reduction; got none of these calls. "
                'Use one of them, or labels="observed" with reduction="loss".'
            )
        return interception.scaled_back(value)


def _one_number(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(
            f"loss: must return the mean loss as a tensor; got {type(value).__name__}. "
            'Models of transformers return no loss when the batch has no "labels".'
        )
    if value.numel() != 1:
        raise InputError(
            "loss: must return one number, the mean over the batch; "
            f"got shape {tuple(value.shape)}. Take the mean."
        )
    return value.reshape(())


def _require_settings(labels: str, samples: int, reduction: str) -> None:
    if labels not in get_args(Labels):
        raise InputError(
            f'labels: must be "sampled", "observed" or "expected"; got {labels!r}. "sampled" is '
            'the Fisher information, "expected" the same exactly at a pass per output, "observed" '
            "the empirical one."
        )
    if samples < 1 or (samples > 1 and labels != "sampled"):
        raise InputError(
            f'samples: must be at least 1, and 1 without labels="sampled"; got {samples} with '
            f"labels={labels!r}. Several samples average over that many draws of every label."
        )
    if reduction not in get_args(Reduction):
        raise InputError(
            f'reduction: must be "loss", "mean" or "sum"; got {reduction!r}. "loss" takes the loss '
            'as it is, "mean" and "sum" put the terms of each example together first.'
        )


def _short(indices: Sequence[int]) -> str:
    text = ", ".join(str(index) for index in indices[:8])
    return text if len(indices) <= 8 else f"{text}, …"
