r"""Labels sampled from the model's own predictions, put into the user's loss function.

The Fisher information of a model is the expectation of squared gradients over labels drawn from its
own predictive distribution; with observed labels one gets the empirical Fisher. To compute the
former with any loss function, the calls of :mod:`torch.nn.functional` losses inside it are
intercepted and their targets replaced by samples:

========================================  =====================================================
``cross_entropy``, ``nll_loss``           a class from the softmax
``binary_cross_entropy[_with_logits]``    0 or 1 from the Bernoulli distribution, per element
``mse_loss``                              the Gaussian of which the loss is the negative
                                          log-likelihood: variance D/2 for ``reduction="mean"``
                                          over D values per example, 1/2 otherwise
========================================  =====================================================

Decisions:

* Positions with ``ignore_index`` stay ignored. Soft targets (mixup, distillation) are replaced by
  sampled classes like any other.
* Class weights, ``pos_weight`` and ``label_smoothing`` are left out: they change what a model is
  trained towards, not what its predictions say. The curvature of a smoothed cross-entropy in the
  logits is that of the plain one, so nothing is lost. ``weight`` of a binary or squared loss stays,
  because it is per element and often a mask.
* The targets themselves are not looked at, so they may be missing (None).
* A loss that averages k terms within one example is taken as it is: its squared gradient is that of
  the average. With ``reduction="sum"`` it is that of their sum (:mod:`lit_merge.curvature.losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.counter import normals, uniforms
from lit_merge.curvature.losses import CLASSES, Loss, LossInterception, Reduction

_CALLS = 1 << 32  # more than the losses of one forward: where the streams of the next draw begin
_ROWS_AT_ONCE = 1 << 24  # elements of a cumulative distribution that are held at a time


class SampledLabels(LossInterception):
    """Within this context the losses of ``torch.nn.functional`` see sampled targets."""

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        drawn: dict[tuple[int, int], Tensor],
        *,
        draw: int = 0,
        temperature: float = 1.0,
        reduction: Reduction = "loss",
    ) -> None:
        """Set up the samples of one forward.

        Args:
            seed: The pass's seed.
            indices: Index in the data set of each of the B examples of the batch; the samples of an
                example depend on nothing else.
            drawn: Samples already drawn for a (call, example), which are used again, and to which
                new ones are added: so a batch and its examples one by one get the same labels.
            draw: Which of several independent draws per example.
            temperature: What the logits are divided by for drawing; above 1 the labels are less
                likely ones than the model predicts, and at infinity all that are possible at all
                are equally likely.
            reduction: See :mod:`lit_merge.curvature.losses`.
        """
        super().__init__(len(indices), reduction)
        self._seed = seed
        self._indices = tuple(indices)
        self._drawn = drawn
        self._first_stream = draw * _CALLS
        self._temperature = temperature

    def substitute(self, loss: Loss, arguments: dict[str, Any]) -> None:
        """Put samples in the place of the targets."""
        if loss in CLASSES:
            prediction = arguments["input"].detach()
            draw = _classes(_tempered(prediction, self._temperature))
            replace_classes(arguments, self._repeatable(without_classes(prediction), draw))
        elif loss is F.mse_loss:
            gaussian = gaussian_of(arguments, self)
            draw = _gaussian(gaussian.mean, gaussian.deviation)
            arguments[gaussian.target] = self._repeatable(gaussian.mean, draw)
        else:
            scores = bernoulli_logits(loss, arguments)
            draw = _bernoulli(_tempered(scores, self._temperature).sigmoid())
            arguments["target"] = self._repeatable(scores, draw).to(scores.dtype)

    def _repeatable(self, like: Tensor, draw: _Draw) -> Tensor:
        """Return a target shaped like a tensor with k rows per example, drawn or drawn before."""
        size, count = len(self._indices), self.count_of(like)
        keys = [(self.calls, index) for index in self._indices]
        if not all(key in self._drawn for key in keys):
            stream = self._first_stream + self.calls
            new = draw(self._seed, stream, self._indices, count).reshape(size, count)
            self._drawn.update(zip(keys, new, strict=True))
        return torch.stack([self._drawn[key] for key in keys]).view_as(like)


def replace_classes(arguments: dict[str, Any], classes: Tensor) -> None:
    """Let a classification loss see these classes, plainly, where its target is not ignored.

    Args:
        arguments: Of the call; changed.
        classes: int64, as many as the prediction has rows.
    """
    target = arguments["target"]
    if isinstance(target, Tensor) and not target.is_floating_point():
        ignored = target == arguments["ignore_index"]
        classes = torch.where(ignored, target, classes.view_as(target))
    arguments |= {"target": classes, "weight": None}
    if "label_smoothing" in arguments:
        arguments["label_smoothing"] = 0.0


def bernoulli_logits(loss: Loss, arguments: dict[str, Any]) -> Tensor:
    """Return the logits of a binary loss, of which ``pos_weight`` is taken away."""
    prediction: Tensor = arguments["input"].detach()
    if loss is F.binary_cross_entropy:
        return prediction.logit()
    arguments["pos_weight"] = None
    return prediction


class Gaussian(NamedTuple):
    """The distribution of which a squared loss is the negative log-likelihood.

    Attributes:
        mean: The prediction.
        deviation: The standard deviation of each element.
        target: Which argument of the loss is the target.
    """

    mean: Tensor
    deviation: float
    target: str


def gaussian_of(arguments: dict[str, Any], interception: LossInterception) -> Gaussian:
    """Return the Gaussian distribution of the targets of a call of ``mse_loss``."""
    prediction, target = arguments["input"], arguments["target"]
    replaced = "target"
    if isinstance(target, Tensor) and target.requires_grad > prediction.requires_grad:
        prediction, replaced = target, "input"  # it is symmetric: people swap them
    averaged = interception.reduction_of(arguments) == "mean"
    count = interception.count_of(prediction)
    return Gaussian(prediction.detach(), (count / 2 if averaged else 0.5) ** 0.5, replaced)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by a temperature; what is impossible stays so."""
    return torch.where(logits.isneginf(), logits, logits / temperature)


_Draw = Callable[[int, int, Sequence[int], int], Tensor]


def _classes(prediction: Tensor) -> _Draw:
    """Sample from the softmax over dimension 1 (0 of a single example)."""
    dim = min(1, prediction.dim() - 1)
    logits = prediction.movedim(dim, -1).flatten(0, -2) if dim else prediction[None]

    def draw(seed: int, stream: int, indices: Sequence[int], count: int) -> Tensor:
        u = uniforms(seed, stream, indices, count).flatten().to(logits.device)
        chunk = max(1, _ROWS_AT_ONCE // logits.shape[-1])
        parts = zip(torch.split(logits, chunk), torch.split(u, chunk), strict=True)
        return torch.cat([inverse_cdf(rows, numbers) for rows, numbers in parts])

    return draw


def inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """Return the class at which the cumulative softmax passes u.

    Args:
        logits: [R, C].
        u: [R], in (0, 1).

    Returns:
        [R], int64; never a class of probability zero.
    """
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    cumulative = logits.softmax(-1, dtype=precise).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    passed = torch.searchsorted(cumulative, u.to(precise)[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # the last class that is possible at all
    # NaN passes no class: any one will do, the loss then says what is wrong
    return torch.minimum(passed, last).clamp_(max=logits.shape[-1] - 1).squeeze(-1)


def _bernoulli(p: Tensor) -> _Draw:
    def draw(seed: int, stream: int, indices: Sequence[int], count: int) -> Tensor:
        u = uniforms(seed, stream, indices, count).to(p.device)
        return u < p.reshape(len(indices), count)

    return draw


def _gaussian(mean: Tensor, deviation: float) -> _Draw:
    def draw(seed: int, stream: int, indices: Sequence[int], count: int) -> Tensor:
        noise = normals(seed, stream, indices, count).to(mean)
        return mean.reshape(len(indices), count) + deviation * noise

    return draw


def without_classes(prediction: Tensor) -> Tensor:
    """Return a tensor of the shape of the class labels of a prediction [N, C, …] or [C]."""
    return prediction.select(min(1, prediction.dim() - 1), 0)
