"""The user's loss of a batch, checked, with observed or sampled labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_merge.curvature.labels import SampledLabels
from lit_merge.errors import InputError

_ANY = 1e3  # a temperature that leaves only impossible classes out


class Objective:
    """The mean loss over a batch, as a function of the batch and its examples' indices."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        labels: Literal["sampled", "observed"],
        seed: int,
        temperature: float = 1.0,
    ) -> None:
        """Bind model and loss.

        Args:
            model: Given to the loss.
            loss: Returns the mean loss over the batch.
            labels: Whether the targets in the batch are used, or replaced by samples from the
                model's predictions.
            seed: For the samples.
            temperature: For the samples; see :class:`SampledLabels`.

        Raises:
            InputError: ``labels`` is neither of the two.
        """
        if labels not in ("sampled", "observed"):
            raise InputError(
                f'labels: must be "sampled" or "observed"; got {labels!r}. '
                '"sampled" is the Fisher information, "observed" the empirical one.'
            )
        self.model = model
        self._loss = loss
        self._sampled = labels == "sampled"
        self._seed = seed
        self._temperature = temperature
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def with_any_labels(self) -> Objective:
        """Return the same loss with labels drawn almost without regard to the prediction.

        Where a model is sure and right, its gradients are nothing but rounding, and two ways of
        computing them cannot be compared. With such labels they are large.
        """
        return Objective(
            self.model, self._loss, labels="sampled", seed=self._seed, temperature=_ANY
        )

    def forget(self) -> None:
        """Drop the samples; until then an example keeps its labels, in whatever batch it comes."""
        self._drawn = {}

    def __call__(self, batch: Any, indices: Sequence[int]) -> Tensor:
        """Return the loss.

        Args:
            batch: B examples.
            indices: [B], index of each in the data set.

        Raises:
            InputError: The loss is not one finite number, or makes no labels to replace.
        """
        torch.clear_autocast_cache()  # it holds weights cast while they were frozen, or were not
        if self._sampled:
            with SampledLabels(
                self._seed, indices, self._drawn, temperature=self._temperature
            ) as sampling:
                value = self._loss(self.model, batch)
        else:
            value = self._loss(self.model, batch)
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
        if self._sampled and not sampling.calls:
            raise InputError(
                "loss: must call cross_entropy, nll_loss, binary_cross_entropy, "
                "binary_cross_entropy_with_logits or mse_loss of torch.nn.functional (or the "
                "modules of torch.nn that do) for labels to be sampled; got none of these calls. "
                'Use one of them, or labels="observed".'
            )
        if not value.isfinite().all():
            raise InputError(
                f"loss: must be finite; got {value.item()} on the examples {_short(indices)}. "
                "Look for NaN and Inf in the weights and in the inputs."
            )
        return value.reshape(())


def _short(indices: Sequence[int]) -> str:
    text = ", ".join(str(index) for index in indices[:8])
    return text if len(indices) <= 8 else f"{text}, …"
