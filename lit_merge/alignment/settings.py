"""How groups of experts are brought into one order: the options, without models and files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lit_merge.alignment.several_models import Likeness
from lit_merge.errors import InputError

Choice = Literal["auto", "weights", "activations", "both", "none"]


@dataclass(frozen=True)
class AlignSettings:
    """Options of an alignment.

    Attributes:
        by: What is matched: "weights", "activations", "both"; "auto" is "activations" with tasks,
            "weights" without; "none" permutes nothing.
        likeness: What activations are compared by: "covariance", in which large ones count for
            more, or "correlation".
        activation_weight: For "both": how often the activations count.
        curvature: Whether to weight the comparison of weights by the bases' Hessians.
        cycle_consistent: Whether every base is matched with all others, not with the first alone.
        calibration_examples: How many examples of each task are used.
        batch_size: How many of them at a time.
        input_shape: Shape of one input, where there are no tasks: [3, 224, 224].
        seed: Of random inputs and choices, and of the order in which symmetries are visited.

    Raises:
        InputError: An option is out of range.
    """

    by: Choice = "auto"
    likeness: Likeness = "covariance"
    activation_weight: float = 10.0
    curvature: bool = False
    cycle_consistent: bool = False
    calibration_examples: int = 256
    batch_size: int = 64
    input_shape: list[int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in get_args(Choice):
            raise InputError(
                f"by: must be one of {', '.join(get_args(Choice))}; got {self.by!r}. Choose one of "
                "these."
            )
        for name in ("calibration_examples", "batch_size"):
            if getattr(self, name) < 2:
                raise InputError(
                    f"{name}: must be at least 2; got {getattr(self, name)}. Leave the default."
                )
