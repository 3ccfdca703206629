"""An image classification task from a ``.npz`` file, a folder of images per class, or the hub.

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
from lit_merge.tasks.table import read_labels, read_table, require_column
from lit_merge.tasks.task import IGNORED, Examples, Split, Task, check_labels, require_file


class ImageTask(Task):
    """Images and their classes.

    Args:
        path: A ``.npz`` file with ``x_train, y_train, x_test, y_test`` (and ``x_validation``,
            ``y_validation``): images uint8 ``[N, H, W]`` or ``[N, H, W, C]``, labels ``[N]``. Or a
            folder ``train/<class>/*.png``, ``test/<class>/*.png`` (the layout "imagefolder" of
            ``datasets``; the classes are numbered in the order of their names). None with
            ``dataset``.
        num_classes: Number of classes.
        channels: Colour channels of the input, 1 or 3; gray images are repeated, coloured ones made
            gray.
        image_size: Height and width of the input: images are resized (their shorter side, with
            antialiasing) and cut to the centre. None leaves them as they are; a folder and a
            ``dataset`` need a number.
        mean: Mean per channel of the scaled images, one number or one per channel.
        std: Standard deviation per channel, likewise.
        dataset: A data set on the Hugging Face hub (``ylecun/mnist``), or a local folder that
            ``datasets`` can load; see :mod:`lit_merge.tasks.table`.
        dataset_config: Which configuration of the data set; None where it has only one.
        train: With ``dataset``: the name of the split ("train", "train[:2000]"); None where there
            is none.
        validation: The same for validation.
        test: The same for testing.
        image_column: With ``dataset``: the column with the images.
        label_column: With ``dataset``: the column with the classes, integers or class labels.
        **options: See :class:`Task`.

    Raises:
        InputError: If an option is out of range; at first use, if the file or folder is not as
            said.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        num_classes: int,
        channels: int = 3,
        image_size: int | None = None,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        dataset: str | None = None,
        dataset_config: str | None = None,
        train: str | None = "train",
        validation: str | None = None,
        test: str | None = "test",
        image_column: str = "image",
        label_column: str = "label",
        **options: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **options)
        if (path is None) == (dataset is None):
            raise InputError(
                "path: must be given, or dataset in its place; got "
                f"{'neither' if path is None else 'both'}. Name a file or folder, or a data set."
            )
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
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.sources: dict[Split, str | None] = {
            "train": train,
            "validation": validation,
            "test": test,
        }
        self.image_column = image_column
        self.label_column = label_column
        self.channels = channels
        self.image_size = image_size
        self._mean = torch.tensor(list(mean)).view(-1, 1, 1)
        self._std = torch.tensor(list(std)).view(-1, 1, 1)

    def load(self, split: Split) -> Examples | None:
        """Open the images of a split; see :meth:`Task.load`."""
        if self.path is None:
            return self._load_table(split)
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
        return f"ImageTask({self.path or self.dataset})"

    def _load_table(self, split: Split) -> Examples | None:
        from datasets import Image

        source = self.sources[split]
        if source is None:
            return None
        self._require_size(str(self.dataset))
        table, where = read_table(source, split, dataset=self.dataset, config=self.dataset_config)
        require_column(table, self.image_column, where, "Set image_column")
        if not isinstance(table.features[self.image_column], Image):
            raise InputError(
                f"{where}: {self.image_column!r} must hold images; got "
                f"{table.features[self.image_column]}. Set image_column."
            )
        if split == "train" and self.unlabelled:
            labels = np.full(len(table), IGNORED, dtype=np.int64)
        else:
            require_column(table, self.label_column, where, "Set label_column")
            labels = read_labels(table, self.label_column, self.num_classes, where)
        return _Images(self, _Column(table, self.image_column), labels)

    def _require_size(self, where: str) -> None:
        if self.image_size is None:
            raise InputError(
                f"image_size: must be set for the images of {where}, whose sizes may differ; got "
                "none. Set image_size, such as 224."
            )

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
        self._require_size(str(path))
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
        return _Images(self, _Column(table, "image"), labels)

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
        return self._task.prepare(self._images[index]), int(self._labels[index])


class _Column:
    """One column of a table of ``datasets``; only the row that is asked for is decoded."""

    def __init__(self, table: Any, name: str) -> None:
        self._table = table.select_columns([name])
        self._name = name

    def __getitem__(self, index: int) -> Any:
        return self._table[index][self._name]


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
