"""What a pass over the training examples measures: the settings of callback and command."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import lightning.pytorch as pl

from lit_merge.callbacks.expert_callback import require_one_of, require_positive
from lit_merge.callbacks.expert_folder import plain_names_of
from lit_merge.callbacks.training_loss import TrainingLoss
from lit_merge.curvature import PerExampleFisher
from lit_merge.curvature.hutchinson import HessianDiagonal
from lit_merge.curvature.losses import Reduction
from lit_merge.curvature.objective import Labels
from lit_merge.errors import InputError

PassEstimatorName = Literal["exact", "hutchinson"]


@dataclass(frozen=True)
class PassSettings:
    """The settings of an estimator that makes a pass.

    Attributes:
        estimator: "exact" for the squared gradients of every example, "hutchinson" for an estimate
            of the diagonal of the true Hessian.
        labels: For "exact": "sampled" from the model's predictions, "observed" in the data, or
            "expected", over all labels. The Hessian is of the loss with its observed labels.
        samples: Labels drawn per example, or for "hutchinson" random vectors per batch.
        reduction: Whether the loss is taken as it is, or the terms of every example put together
            first, by their "mean" or "sum".
        parameters: Patterns over the names of the parameters; None for all that are trained.
        seed: For sampled labels and random vectors.

    Raises:
        InputError: A value cannot be, or does not go with another one.
    """

    estimator: PassEstimatorName = "exact"
    labels: Labels = "sampled"
    samples: int = 1
    reduction: Reduction = "loss"
    parameters: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_one_of("estimator", self.estimator, get_args(PassEstimatorName))
        require_one_of("labels", self.labels, get_args(Labels))
        require_one_of("reduction", self.reduction, get_args(Reduction))
        require_positive("samples", self.samples)
        if self.estimator == "hutchinson" and self.labels != "observed":
            raise InputError(
                'labels: must be "observed" with estimator "hutchinson", which estimates the '
                f'Hessian of the loss itself; got "{self.labels}". Leave labels out, or use '
                'estimator "exact".'
            )
        if self.samples > 1 and self.estimator == "exact" and self.labels != "sampled":
            raise InputError(
                f'samples: must be 1 without labels "sampled"; got {self.samples} with labels '
                f'"{self.labels}", which are not drawn. Leave samples out.'
            )

    def names(self, module: pl.LightningModule) -> tuple[str, ...] | None:
        """Return the names of the parameters in a module, None for all that are trained.

        Raises:
            InputError: A pattern matches no trained parameter.
        """
        return chosen_parameters(module, self.parameters)

    def build(
        self, module: pl.LightningModule, loss: TrainingLoss
    ) -> PerExampleFisher | HessianDiagonal:
        """Return the estimator of a module.

        The sums of a Hessian are kept with their negative entries, for the ranks' to be added up.

        Raises:
            InputError: No parameter of the module is trained, or they are sharded.
        """
        if self.estimator == "hutchinson":
            return HessianDiagonal(
                module,
                loss,
                samples=self.samples,
                negative="keep",
                reduction=self.reduction,
                parameters=self.names(module),
                seed=self.seed,
            )
        return PerExampleFisher(module, loss, **self.of_fisher(module))

    def of_fisher(self, module: pl.LightningModule) -> dict[str, Any]:
        """Return the settings of the exact estimator, sharded or not, of a module."""
        return {
            "labels": self.labels,
            "samples": self.samples,
            "reduction": self.reduction,
            "parameters": self.names(module),
            "seed": self.seed,
        }

    def details(self) -> dict[str, Any]:
        """Return what ``expert.json`` says of the settings beside estimator and labels."""
        return {
            "samples": self.samples,
            "reduction": self.reduction,
            "parameters": self.parameters,
            "seed": self.seed,
        }


def default_labels(estimator: str, labels: Labels | None) -> Labels:
    """Return the labels of an estimator where none were asked for.

    >>> default_labels("exact", None), default_labels("adam", None)
    ('sampled', 'observed')
    """
    return labels or ("sampled" if estimator == "exact" else "observed")


def chosen_parameters(
    module: pl.LightningModule, patterns: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Return the names of the trained parameters that match a pattern, None for no patterns.

    Args:
        module: The module.
        patterns: Shell-style patterns over parameter names.

    Raises:
        InputError: A pattern matches no trained parameter.
    """
    if patterns is None:
        return None
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    plain = plain_names_of(module)
    names = {name: plain[name] for name in trained}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            near = difflib.get_close_matches(pattern, names.values(), n=3, cutoff=0.4)
            raise InputError(
                f"parameters: must match trained parameters of {type(module).__name__}; got "
                f"{pattern!r}, which matches none. Near it are: "
                f"{', '.join(near or list(names.values())[:3])}."
            )
    return tuple(n for n in trained if any(fnmatchcase(names[n], p) for p in patterns))
