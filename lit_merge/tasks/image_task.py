"""An image classification task from a ``.npz`` file or a folder of images per class.

An image becomes a float tensor ``[C, H, W]``, scaled to [0, 1] and normalised by ``(x − mean) /
std``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.tasks.task import IGNORED, Examples, Split, Task, check_labels, require_file


class ImageTask(Task):
    """Images and their classes.

    Args:
        path: A ``.npz`` file with ``x_train, y_train, x_test, y_test`` (and ``x_validation``,
            ``y_validation``): images uint8 ``[N, H, W]`` or ``[N, H, W, C]``, labels ``[N]``. Or a
            folder ``train/<class>/*.png``, ``test/<class>/*.png`` (the layout "imagefolder" of
            ``datasets``; the classes are numbered in the order of their names).
        num_classes: Number of classes.
        channels: Colour channels of the input, 1 or 3; gray images are repeated, coloured ones made
            gray.
        image_size: Height and width of the input: images are resized (their shorter side, with
            antialiasing) and cut to the centre. None leaves them as they are; a folder needs a
            number.
        mean: Mean per channel of the scaled images, one number or one per channel.
        std: Standard deviation per channel, likewise.
        **options: See :class:`Task`.

    Raises:
        InputError: If an option is out of range; at first use, if the file or folder is not as
            said.
    """

    def __init__(
        self,
        path: str,
        *,
        num_classes: int,
        channels: int = 3,
        image_size: int | None = None,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        **options: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **options)
        if channels not in (1, 3):
            raise InputError(
                f"channels: must be 1 or 3; got {channels}. Use 3 for coloured images."
            )
        if image_size is not None and image_size < 1:
            raise InputError(f"image_size: must be at least 1; got {image_size}. 224 is usual.")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise InputError(
                    f"{name}: must be one number or one per channel ({channels}); got "
                    f"{list(values)}. Give one number for all channels."
                )
        if min(std) <= 0:
            raise InputError(f"std: must be positive; got {list(std)}. Use 1 to leave the scale.")
        self.path = path
        self.channels = channels
        self.image_size = image_size
        self._mean = torch.tensor(list(mean)).view(-1, 1, 1)
        self._std = torch.tensor(list(std)).view(-1, 1, 1)

    def load(self, split: Split) -> Examples | None:
        """Open the images of a split; see :meth:`Task.load`."""
        path = require_file(self.path, "path")
        return self._load_folder(path, split) if path.is_dir() else self._load_arrays(path, split)

    def input_format(self) -> Hashable:
        """Return channels and size."""
        size: Any = self.image_size
        if size is None:
            examples = self.train or self.test
            if examples is not None:
                size = tuple(examples[0][0].shape[1:])
        return ("image", self.channels, size)

    def describe(self) -> str:
        """Return the kind of task and its file."""
        return f"ImageTask({self.path})"

    def _load_arrays(self, path: Path, split: Split) -> Examples | None:
        images_name, labels_name = f"x_{split}", f"y_{split}"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                if images_name not in archive:
                    return None
                images = archive[images_name]
                labels = archive.get(labels_name)
        except (
            ValueError,
            OSError,
            EOFError,
            zipfile.BadZipFile,
            TypeError,
            AttributeError,
        ) as error:
            raise InputError(
                f"{path}: must be a .npz file of plain arrays; got {error}. Write it with "
                "numpy.savez."
            ) from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise InputError(
                f"{path}: {images_name} must be uint8 [N, H, W] or [N, H, W, C]; got "
                f"{images.dtype} {list(images.shape)}. Convert it."
            )
        if split == "train" and self.unlabelled:
            labels = np.full(len(images), IGNORED, dtype=np.int64)
        elif labels is None:
            raise InputError(
                f"{path}: must hold {labels_name} beside {images_name}; got no such array. Add the "
                "labels."
            )
        else:
            labels = check_labels(
                labels, self.num_classes, where=f"{path}, {labels_name}, row {{row}}"
            )
        if len(labels) != len(images):
            raise InputError(
                f"{path}: {images_name} and {labels_name} must have equal lengths; got "
                f"{len(images)} and {len(labels)}. Save both again."
            )
        return _Images(self, images, labels)

    def _load_folder(self, path: Path, split: Split) -> Examples | None:
        from datasets import load_dataset

        if not (path / split).is_dir():
            if not any((path / name).is_dir() for name in ("train", "validation", "test")):
                raise InputError(
                    f"{path}: must hold train/<class>/ or test/<class>/ with images; got neither. "
                    "Sort the images into such folders."
                )
            return None
        if self.image_size is None:
            raise InputError(
                f"image_size: must be set for a folder of images ({path}), whose sizes may differ; "
                "got none. Set image_size, such as 224."
            )
        table = load_dataset("imagefolder", data_dir=str(path / split), split="train")
        if "label" not in table.column_names:
            raise InputError(
                f"{path / split}: must hold one folder of images per class; got images without "
                "classes or one class. Sort the images into folders."
            )
        classes = table.features["label"].names
        if len(classes) != self.num_classes:
            raise InputError(
                f"{path / split}: must hold {self.num_classes} folders, one per class; got "
                f"{len(classes)}: {', '.join(classes[:10])}. Correct num_classes."
            )
        labels = np.asarray(table["label"], dtype=np.int64)
        if split == "train" and self.unlabelled:
            labels = np.full(len(labels), IGNORED, dtype=np.int64)
        return _Images(self, table.select_columns(["image"]), labels)

    def prepare(self, image: Any) -> Tensor:
        """Turn an image, uint8 ``[H, W]``, ``[H, W, C]`` or PIL, into a float ``[C, H, W]``."""
        if not isinstance(image, np.ndarray):
            image = np.asarray(image.convert("L" if self.channels == 1 else "RGB"))
        pixels = torch.from_numpy(np.array(image)).float() / 255
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        if pixels.shape[0] != self.channels:
            pixels = (
                pixels[:1].expand(self.channels, -1, -1)
                if self.channels == 3
                else _gray(pixels[:3])
            )
        if self.image_size is not None:
            pixels = _resize(pixels, self.image_size)
        return (pixels - self._mean) / self._std


class _Images:
    def __init__(
        self, task: ImageTask, images: Any, labels: np.ndarray[Any, np.dtype[np.int64]]
    ) -> None:
        self._task = task
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._images[index]
        image = image["image"] if isinstance(image, dict) else image
        return self._task.prepare(image), int(self._labels[index])


def _gray(pixels: Tensor) -> Tensor:
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601, as PIL's "L"
    return (pixels * luma).sum(0, keepdim=True)


def _resize(pixels: Tensor, size: int) -> Tensor:
    height, width = pixels.shape[1:]
    scale = size / min(height, width)
    if scale != 1:
        shape = (max(size, round(height * scale)), max(size, round(width * scale)))
        pixels = F.interpolate(
            pixels[None], shape, mode="bilinear", antialias=True, align_corners=False
        )[0]
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top : top + size, left : left + size]
