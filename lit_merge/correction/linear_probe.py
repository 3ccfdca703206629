"""The control for every correction: a fresh linear head on a model's own features.

A merged or even an untouched base model may keep features that a task's old head cannot read. A
logistic regression on the inputs of the head, fitted on the same examples that a correction is
given (but with their labels), shows how much of a correction's gain the backbone had all along.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_merge.correction.forward import Forward, evaluation_mode, module_at, run_model
from lit_merge.errors import InputError


@torch.no_grad()
def head_inputs(
    model: nn.Module,
    head: str,
    batches: Iterable[tuple[Any, Tensor]],
    *,
    forward: Forward = run_model,
) -> tuple[Tensor, Tensor]:
    """Return what reaches the head of a model, in evaluation mode, with the labels.

    Args:
        model: The network.
        head: Name of the module whose inputs are the features, ``[B, D]``.
        batches: Pairs of inputs and labels ``[B]``.
        forward: Runs the model on the inputs of one pair; its result is not used.

    Returns:
        Features, float32 ``[N, D]``, and labels, int64 ``[N]``, on the CPU.

    Raises:
        InputError: There are no examples, the head is missing or did not run, or its inputs are no
            finite vectors, one for each label.
    """
    captured: list[Tensor] = []
    features: list[Tensor] = []
    targets: list[Tensor] = []

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(given, Tensor) or given.ndim != 2:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise InputError(
                f"head: {head!r} must take vectors [batch, features]; got {got}. Name the last "
                "linear layer of the head."
            )
        captured.append(given.detach().to("cpu", torch.float32))

    handle = module_at(model, head, parameter="head").register_forward_pre_hook(
        capture, with_kwargs=True
    )
    try:
        with evaluation_mode(model):
            for inputs, labels in batches:
                captured.clear()
                forward(model, inputs)
                if len(captured) != 1 or len(captured[0]) != len(labels):
                    raise InputError(
                        f"head: {head!r} must run once and take one vector for each of the "
                        f"{len(labels)} labels; got {[tuple(one.shape) for one in captured]}. Name "
                        "the last linear layer of the head."
                    )
                features.append(captured[0])
                targets.append(labels.detach().to("cpu", torch.int64))
    finally:
        handle.remove()
    if not features:
        raise InputError(
            "batches: must hold at least one example; got none. Give (inputs, labels) pairs; an "
            "iterator can be used once only."
        )
    stacked = torch.cat(features)
    if not stacked.isfinite().all():
        raise InputError(
            f"head: the inputs of {head!r} must be finite; got NaN or infinity. Check the weights."
        )
    return stacked, torch.cat(targets)


def linear_probe(
    model: nn.Module,
    head: str,
    train: Iterable[tuple[Any, Tensor]],
    test: Iterable[tuple[Any, Tensor]],
    *,
    forward: Forward = run_model,
    regularisation: float = 1.0,
) -> float:
    """Return the test accuracy of a logistic regression on the standardised inputs of the head.

    Args:
        model: The network.
        head: Name of the module whose inputs are the features.
        train: Pairs of inputs and labels to fit on.
        test: Pairs of inputs and labels to score on.
        forward: Runs the model on the inputs of one pair.
        regularisation: Weight of the squared norm against the summed loss; 1 is scikit-learn's.

    Returns:
        Share of the test examples that are right, between 0 and 1.

    Raises:
        InputError: As :func:`head_inputs`, or the training labels are all the same.
    """
    # Imported here: the command line must start without scikit-learn.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = head_inputs(model, head, train, forward=forward)
    if len(torch.unique(labels)) < 2:
        raise InputError(
            f"train: must hold at least two classes; got only class {int(labels[0])} in "
            f"{len(labels)} examples. Give more or shuffled examples."
        )
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(C=1 / regularisation, max_iter=5000)
    )
    classifier.fit(features.numpy(), labels.numpy())
    test_features, test_labels = head_inputs(model, head, test, forward=forward)
    return float(np.mean(classifier.predict(test_features.numpy()) == test_labels.numpy()))
