"""The diagonal curvature of a model over some batches, in one call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor, nn

from lit_merge.curvature.losses import Reduction
from lit_merge.curvature.objective import Labels
from lit_merge.curvature.per_example import PerExampleFisher
from lit_merge.errors import InputError


def diagonal_hessian(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    labels: Labels = "sampled",
    samples: int = 1,
    reduction: Reduction = "loss",
    parameters: Collection[str] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Return :math:`Σ_n (∇ℓ_n)^2`, the sum over all examples of their squared gradients.

    With sampled labels its expectation is the diagonal of the Fisher information, which for the
    usual losses is the (generalised Gauss-Newton) Hessian of the summed loss; with expected labels
    it is that diagonal. The model is left as it was.

    Args:
        model: Any module; run in eval mode.
        batches: Batches on the model's device; nested containers of tensors whose first dimension
            counts the examples.
        loss: Called as ``loss(model, batch)``; returns the mean over the batch's examples.
        labels: "sampled" from the model's predictions, "expected" over them, or "observed" in the
            batch.
        samples: How many sampled labels per example the sums are the mean over.
        reduction: How the terms of an example's loss are put together: "loss" as the loss does it,
            "mean" or "sum" example by example, for sequences of different lengths.
        parameters: Names or patterns of the parameters wanted, None for all trainable ones.
        seed: For sampled labels.

    Returns:
        By parameter name, in the parameter's shape, float32 (float64 for float64 parameters).

    Raises:
        InputError: No batches, a loss that is no mean over examples, or not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> def loss(model, batch):  # gradients 2·1·1 and 2·2·2
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> diagonal_hessian(model, [batch], loss, labels="observed")
        {'weight': tensor([[68.]])}
    """
    estimator = PerExampleFisher(
        model,
        loss,
        labels=labels,
        samples=samples,
        reduction=reduction,
        parameters=parameters,
        seed=seed,
    )
    for batch in batches:
        estimator.update(batch)
    if not estimator.num_examples:
        raise InputError(
            "batches: must hold at least one example; got none. An iterator that was used before "
            "is empty."
        )
    return estimator.sums()
