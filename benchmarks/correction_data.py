"""The images that the correction benchmark trains and corrects on.

A base is pretrained on CIFAR-10 in gray, Omniglot and 8 × 8 digits: one head over the classes of
all three. The tasks are MNIST, KMNIST, Fashion-MNIST, and ``turned``, made here: by how many
quarter turns has an image of Fashion-MNIST been turned? Its label space is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DATA = Path(__file__).parents[2] / "shared" / "data" / "vision"
PRETRAINING = ("cifar10_gray28", "omniglot_small", "digits")
TASKS = ("mnist", "kmnist", "fashion", "turned")
MEAN, DEVIATION = 0.3, 0.35


@dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        inputs: float32 ``[N, 1, 28, 28]``, standardised.
        labels: int64 ``[N]``.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its label, as a data set does."""
        return self.inputs[index], int(self.labels[index])

    def take(self, chosen: Tensor | slice) -> Images:
        """Return some of them."""
        return Images(self.inputs[chosen], self.labels[chosen])


@dataclass(frozen=True)
class TaskImages:
    """A task: what it is trained and what it is tested on.

    Attributes:
        train: Training images.
        test: Test images.
        num_classes: Number of classes.
    """

    train: Images
    test: Images
    num_classes: int

    def calibration(self, count: int, *, seed: int) -> Images:
        """Return a few training images at random; what a correction is given."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        return self.train.take(order[:count])


def missing_data() -> str | None:
    """Return why the benchmark cannot run; None if it can."""
    absent = [name for name in (*PRETRAINING, *TASKS[:3]) if not (DATA / f"{name}.npz").exists()]
    return f"{DATA} does not hold {', '.join(absent)} (.npz)" if absent else None


def pretraining_images() -> tuple[Images, int]:
    """Return all training images of the pretraining sets, and the number of classes together."""
    inputs, labels, classes = [], [], 0
    for name in PRETRAINING:
        images, count = _read(name)["train"], int(np.load(DATA / f"{name}.npz")["y_train"].max())
        inputs.append(images.inputs)
        labels.append(images.labels + classes)
        classes += count + 1
    return Images(torch.cat(inputs), torch.cat(labels)), classes


def task_images() -> dict[str, TaskImages]:
    """Return the tasks by name."""
    tasks = {}
    for name in TASKS:
        change: Callable[[Images], Images] = _turned if name == "turned" else _unchanged
        splits = {
            split: change(images)
            for split, images in _read("fashion" if name == "turned" else name).items()
        }
        classes = int(splits["train"].labels.max()) + 1
        tasks[name] = TaskImages(splits["train"], splits["test"], classes)
    return tasks


def _read(name: str) -> dict[str, Images]:
    with np.load(DATA / f"{name}.npz") as file:
        return {
            split: Images(
                ((torch.from_numpy(file[f"x_{split}"]).float() / 255 - MEAN) / DEVIATION)[:, None],
                torch.from_numpy(file[f"y_{split}"]).long(),
            )
            for split in ("train", "test")
        }


def _unchanged(images: Images) -> Images:
    return images


def _turned(images: Images) -> Images:
    turns = torch.randint(4, (len(images),), generator=torch.Generator().manual_seed(4))
    inputs = images.inputs.clone()
    for count in range(1, 4):
        inputs[turns == count] = torch.rot90(inputs[turns == count], count, dims=(2, 3))
    return Images(inputs, turns)
