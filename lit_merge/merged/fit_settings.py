"""The options of the learned fit, checked together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lit_merge.errors import InputError
from lit_merge.merged.mixup import require_blendable
from lit_merge.tasks import MultiTaskDataModule

Teacher = Literal["experts", "labels"]
Trainable = Literal["scale_shift", "all"]
HeadFit = Literal["fixed", "refit"]
CoefficientFit = Literal["none", "layer"]
BatchNormMode = Literal["auto", "train", "freeze"]
OptimizerName = Literal["muon", "adam"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """What is learned, from whom, and for how long at most.

    Attributes:
        teacher: What the fit learns from: the "experts"' outputs, or the "labels".
        trainable: "scale_shift" for the corrections alone, "all" for the shared weights too.
        heads: Whether the heads are trained as well ("refit") or stay as they are ("fixed").
        coefficients: "layer" learns how far each layer goes along each task vector.
        batch_norm_mode: "train" normalises by the statistics of each mixed batch in training, and
            keeps their running average; "freeze" leaves the running statistics as they are. "auto"
            trains them where the shared weights learn without an elastic penalty.
        surgery_rank: Rank of the representation surgery before the head; 0 for none.
        temperature: Softens the experts' logits; 1 takes them as they are.
        feature_weight: Weight of the distance to the expert's final feature; 0 for none.
        mixup: Each example of a batch is blended with another of its task, in shares from
            Beta(mixup, mixup), and the experts answer for the blends; 0 for none.
        optimizer: What shared weights that are matrices learn by, "muon" or "adam"; all else, and
            with it all of "scale_shift", learns by Adam.
        lr: Largest learning rate of corrections, surgery and coefficients.
        weights_lr: Largest learning rate of shared weights and heads.
        elastic: Strength of the pull to the merged weights, in units of the loss per squared
            change of a weight of average precision; 0 for none.
        holdout: Share of each task's training examples that is held out, in [0, 1).
        holdout_every: Optimizer steps between two measurements on the held-out part.
        patience: Stop after so many measurements in a row without a new best; 0 for never.

    Raises:
        InputError: If an option is out of range, or needs another one.
    """

    teacher: Teacher = "experts"
    trainable: Trainable = "scale_shift"
    heads: HeadFit = "fixed"
    coefficients: CoefficientFit = "none"
    batch_norm_mode: BatchNormMode = "auto"
    surgery_rank: int = 0
    temperature: float = 2.0
    feature_weight: float = 0.0
    mixup: float = 0.0
    optimizer: OptimizerName = "muon"
    lr: float = 1e-2
    weights_lr: float = 3e-3
    elastic: float = 0.0
    holdout: float = 0.1
    holdout_every: int = 25
    patience: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        for name, value, known in (
            ("teacher", self.teacher, get_args(Teacher)),
            ("trainable", self.trainable, get_args(Trainable)),
            ("heads", self.heads, get_args(HeadFit)),
            ("coefficients", self.coefficients, get_args(CoefficientFit)),
            ("batch_norm_mode", self.batch_norm_mode, get_args(BatchNormMode)),
            ("optimizer", self.optimizer, get_args(OptimizerName)),
        ):
            if value not in known:
                raise InputError(
                    f"{name}: must be one of {', '.join(known)}; got {value!r}. Choose one."
                )
        for name in ("temperature", "lr", "weights_lr"):
            number = getattr(self, name)
            if not (number > 0 and math.isfinite(number)):
                raise InputError(
                    f"{name}: must be positive and finite; got {number}. Leave the default."
                )
        for name in ("feature_weight", "mixup", "elastic"):
            number = getattr(self, name)
            if not (number >= 0 and math.isfinite(number)):
                raise InputError(
                    f"{name}: must be at least 0 and finite; got {number}. 0 leaves it out."
                )
        for name, least in (("surgery_rank", 0), ("patience", 0), ("holdout_every", 1)):
            if getattr(self, name) < least:
                raise InputError(
                    f"{name}: must be at least {least}; got {getattr(self, name)}. Leave the "
                    "default."
                )
        if not 0 <= self.holdout < 1:
            raise InputError(
                f"holdout: must be a share in [0, 1); got {self.holdout}. 0 holds nothing out."
            )
        self._check_pairs()

    @property
    def trains_batch_norm(self) -> bool:
        """Whether batch norms, where there are any, normalise by the batch in training."""
        free = self.trainable == "all" and not self.elastic
        return self.batch_norm_mode == "train" or (self.batch_norm_mode == "auto" and free)

    def _check_pairs(self) -> None:
        if self.elastic and self.trainable != "all":
            raise InputError(
                'elastic: must go with trainable: "all", as it holds the shared weights; got '
                f'{self.elastic} with "{self.trainable}". Set one of the two.'
            )
        if self.batch_norm_mode == "train" and self.trainable != "all":
            raise InputError(
                'batch_norm_mode: must go with trainable: "all" where it is "train", as it changes '
                f'shared weights; got "{self.trainable}". Leave it out.'
            )
        if self.batch_norm_mode == "train" and self.elastic:
            raise InputError(
                'batch_norm_mode: must not be "train" with elastic, whose precision belongs to '
                f"running statistics that stay; got elastic {self.elastic}. Leave it out."
            )
        if self.patience and not self.holdout:
            raise InputError(
                f"patience: must go with a held-out part; got {self.patience} with holdout 0. Set "
                "holdout to 0.1."
            )
        for name, what in (("feature_weight", "features they are"), ("mixup", "answers it needs")):
            if getattr(self, name) and self.teacher == "labels":
                raise InputError(
                    f'{name}: must go with teacher: "experts", whose {what}; got '
                    f'{getattr(self, name)} with "labels". Set it to 0.'
                )


def require_lessons(settings: FitSettings, data: MultiTaskDataModule) -> None:
    """Check that the tasks have what a fit learns from.

    Args:
        settings: The fit's.
        data: The tasks' examples.

    Raises:
        InputError: If it learns from labels, and a task has none; from experts, on a language task;
            or from blends of inputs that are no floating-point numbers.
    """
    if settings.mixup:
        require_blendable(data.calibration_batch(data.task_names[0], num_examples=1)[0])
    for name, task in data.tasks.items():
        if settings.teacher == "labels" and task.unlabelled:
            raise InputError(
                f'teacher: must be "experts" for the unlabelled task {name!r}; got "labels". '
                'Use teacher: "experts".'
            )
        if settings.teacher == "experts" and task.has_perplexity:
            raise InputError(
                f'teacher: must be "labels" for the language task {name!r}, whose labels are '
                'the tokens of its texts; got "experts", whose logits of every token would '
                'have to be kept. Use teacher: "labels".'
            )
