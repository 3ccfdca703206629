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
  the average.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_merge.curvature.counter import normals, uniforms
from lit_merge.errors import InputError

_ROWS_AT_ONCE = 1 << 24  # elements of a cumulative distribution that are held at a time


class SampledLabels(TorchFunctionMode):
    """Within this context the losses of ``torch.nn.functional`` see sampled targets.

    Attributes:
        calls: How many losses were intercepted.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        drawn: dict[tuple[int, int], Tensor],
        *,
        temperature: float = 1.0,
    ) -> None:
        """Set up the samples of one forward.

        Args:
            seed: The pass's seed.
            indices: Index in the data set of each of the B examples of the batch; the samples of an
                example depend on nothing else.
            drawn: Samples already drawn for a (call, example), which are used again, and to which
                new ones are added: so a batch and its examples one by one get the same labels.
            temperature: What the logits are divided by for drawing; above 1 the labels are less
                likely ones than the model predicts.
        """
        super().__init__()
        self.calls = 0
        self._seed = seed
        self._indices = tuple(indices)
        self._drawn = drawn
        self._temperature = temperature

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a torch function, with a sampled target if it is a loss."""
        if func not in _SIGNATURES:
            return func(*args, **(kwargs or {}))
        bound = _SIGNATURES[func].bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        arguments = bound.arguments
        with torch.no_grad():
            self._sample(func, arguments)
        self.calls += 1
        return func(**arguments)

    def _sample(self, func: Callable[..., Any], arguments: dict[str, Any]) -> None:
        prediction, target = arguments["input"].detach(), arguments["target"]
        if func in (F.cross_entropy, F.nll_loss):
            draw = _classes(prediction / self._temperature)
            classes = self._repeatable(_without_classes(prediction), draw)
            if isinstance(target, Tensor) and not target.is_floating_point():
                ignored = target == arguments["ignore_index"]
                classes = torch.where(ignored, target, classes.view_as(target))
            arguments |= {"target": classes, "weight": None}
            if "label_smoothing" in arguments:
                arguments["label_smoothing"] = 0.0
        elif func is F.mse_loss:
            replaced = "target"
            if (
                isinstance(target, Tensor)
                and target.requires_grad > arguments["input"].requires_grad
            ):
                prediction, replaced = target.detach(), "input"  # it is symmetric: people swap them
            per_example = prediction.numel() // len(self._indices)
            mean = arguments["reduction"] == "mean"
            deviation = (per_example / 2 if mean else 0.5) ** 0.5
            arguments[replaced] = self._repeatable(prediction, _gaussian(prediction, deviation))
        else:
            logits = func is F.binary_cross_entropy_with_logits
            scores = prediction if logits else prediction.logit()
            draw = _bernoulli((scores / self._temperature).sigmoid())
            arguments["target"] = self._repeatable(prediction, draw).to(prediction.dtype)
            if logits:
                arguments["pos_weight"] = None

    def _repeatable(self, like: Tensor, draw: _Draw) -> Tensor:
        """Return a target shaped like a tensor with k rows per example, drawn or drawn before."""
        size = len(self._indices)
        rows = len(like) if like.dim() else 1
        if rows % size:
            raise InputError(
                "loss: must give torch's loss function the same number of rows for every example, "
                f"the examples one after the other; got {rows} rows for {size} examples. "
                'Use labels="observed", or mark rows to leave out by ignore_index.'
            )
        keys = [(self.calls, index) for index in self._indices]
        if not all(key in self._drawn for key in keys):
            count = like.numel() // size
            new = draw(self._seed, self.calls, self._indices, count).reshape(size, count)
            self._drawn.update(zip(keys, new, strict=True))
        return torch.stack([self._drawn[key] for key in keys]).view_as(like)


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


def _without_classes(prediction: Tensor) -> Tensor:
    """Return a tensor of the shape of the class labels of a prediction [N, C, …] or [C]."""
    return prediction.select(min(1, prediction.dim() - 1), 0)


_SIGNATURES: dict[Callable[..., Any], inspect.Signature] = {
    func: inspect.signature(func)
    for func in (
        F.cross_entropy,
        F.nll_loss,
        F.binary_cross_entropy_with_logits,
        F.binary_cross_entropy,
        F.mse_loss,
    )
}
