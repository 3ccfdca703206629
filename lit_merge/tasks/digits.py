"""Tasks on scikit-learn's bundled handwritten digits: real data that needs no download.

1797 gray images, 8 × 8, of digits that people wrote (the test part of the UCI set "Optical
Recognition of Handwritten Digits", CC BY 4.0). Every task here shows the same drawings in another
way (tilted, mirrored, ...) or asks another question about them (which digit? is it odd?), so that
experts fine-tuned from one base pull its weights in different directions. The split into training
and test drawings is one for all tasks: a drawing that a base or expert was trained on is in no
task's test set.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from lit_merge.errors import InputError
from lit_merge.tasks.task import Examples, Split, Task

View = Literal["upright", "tilted", "mirrored", "upside-down", "negative"]
Question = Literal["digit", "odd"]

IMAGE_SIZE = 16
"""Height and width of the images, after bilinear enlargement, in pixels."""
_TRAINING_DRAWINGS = 1300
_TILT = 60.0


def _tilt(images: Tensor) -> Tensor:
    """Turn images ``[N, 1, H, W]`` by 60 degrees, keeping their size."""
    angle = torch.tensor(_TILT).deg2rad()
    cos, sin, zero = angle.cos(), angle.sin(), torch.tensor(0.0)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero]).view(1, 2, 3).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


_VIEWS: dict[View, Callable[[Tensor], Tensor]] = {
    "upright": lambda images: images,
    "tilted": _tilt,
    "mirrored": lambda images: images.flip(3),
    "upside-down": lambda images: images.flip(2),
    "negative": lambda images: 1.0 - images,
}
_QUESTIONS: dict[Question, tuple[int, Callable[[Tensor], Tensor]]] = {
    "digit": (10, lambda digits: digits),
    "odd": (2, lambda digits: digits % 2),
}


class DigitsTask(Task):
    """A question about handwritten digits seen in one way; inputs are float ``[1, 16, 16]``.

    Args:
        view: How the drawings are shown: upright, tilted (by 60 degrees), mirrored (left and right
            swapped), upside-down (top and bottom swapped) or negative (white on black swapped).
        question: What the label says: the digit (10 classes) or whether it is odd (2 classes).
        **options: See :class:`~lit_merge.tasks.Task`, without num_classes.

    Raises:
        InputError: If there is no such view or question.

    Note:
        1300 drawings are for training, 497 for testing, the same ones for every task.
    """

    def __init__(
        self, view: View = "upright", question: Question = "digit", **options: Any
    ) -> None:
        for name, value, known in (
            ("view", view, get_args(View)),
            ("question", question, get_args(Question)),
        ):
            if value not in known:
                raise InputError(
                    f"{name}: must be one of {', '.join(known)}; got {value!r}. Choose one."
                )
        super().__init__(num_classes=_QUESTIONS[question][0], **options)
        self.view = view
        self.question = question

    def load(self, split: Split) -> Examples | None:
        """Return the drawings of a split; there is no validation split of its own."""
        if split == "validation":
            return None
        from sklearn.datasets import load_digits

        bunch = load_digits()
        order = np.random.default_rng(0).permutation(len(bunch.target))
        chosen = order[:_TRAINING_DRAWINGS] if split == "train" else order[_TRAINING_DRAWINGS:]
        images = torch.tensor(bunch.images[chosen] / 16.0, dtype=torch.float32).unsqueeze(1)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        answer = _QUESTIONS[self.question][1]
        labels = answer(torch.tensor(bunch.target[chosen], dtype=torch.int64))
        return TensorDataset(_VIEWS[self.view](images), labels)

    def input_format(self) -> Hashable:
        """Return channels and size: one for all views."""
        return ("image", 1, IMAGE_SIZE)
