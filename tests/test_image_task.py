"""Image tasks from arrays and folders."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_merge.errors import InputError
from lit_merge.tasks.image_task import ImageTask
from lit_merge.tasks.task import IGNORED


def single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def arrays(path: Path, **changes: object) -> str:
    generator = np.random.default_rng(0)
    content = {
        "x_train": generator.integers(0, 256, (6, 4, 4), dtype=np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": generator.integers(0, 256, (3, 4, 4), dtype=np.uint8),
        "y_test": np.array([0, 1, 2]),
    }
    content |= changes
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return str(path)


def test_pixels_are_scaled_and_normalised(tmp_path):
    image = np.array([[[0, 255], [51, 102]]], dtype=np.uint8)
    path = arrays(tmp_path / "x.npz", x_test=image, y_test=np.array([1]))
    task = ImageTask(path, num_classes=3, channels=1, mean=[0.2], std=[0.4])
    assert task.test is not None
    pixels, label = task.test[0]
    torch.testing.assert_close(pixels, torch.tensor([[[-0.5, 2.0], [0.0, 0.5]]]))
    assert label == 1


def test_gray_images_are_repeated_and_coloured_ones_made_gray(tmp_path):
    colour = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    colour[..., 0] = 255
    gray = arrays(tmp_path / "gray.npz")
    coloured = arrays(tmp_path / "colour.npz", x_test=colour, y_test=np.array([0]))
    repeated = ImageTask(gray, num_classes=3, channels=3).test
    single = ImageTask(coloured, num_classes=3, channels=1, mean=[0.0], std=[1.0]).test
    assert repeated is not None
    assert single is not None
    assert repeated[0][0].shape == (3, 4, 4)
    assert torch.equal(repeated[0][0][0], repeated[0][0][2])
    torch.testing.assert_close(single[0][0], torch.full((1, 2, 2), 0.299))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 4), (3, 9)])
def test_images_are_resized_and_cut_to_a_square(tmp_path, height, width):
    images = np.full((1, height, width), 51, dtype=np.uint8)
    path = arrays(tmp_path / "x.npz", x_test=images, y_test=np.array([0]))
    task = ImageTask(path, num_classes=3, channels=1, image_size=6, mean=[0.0], std=[1.0])
    assert task.test is not None
    torch.testing.assert_close(task.test[0][0], torch.full((1, 6, 6), 0.2))


def test_a_missing_split_is_none_and_a_training_split_may_have_no_labels(tmp_path):
    path = arrays(tmp_path / "x.npz", y_train=None, x_test=None, y_test=None)
    task = ImageTask(path, num_classes=3, unlabelled=True)
    assert task.test is None
    assert task.train is not None
    assert task.train[0][1] == IGNORED


def test_two_tasks_fit_together_when_channels_and_size_are_equal(tmp_path):
    path = arrays(tmp_path / "x.npz")

    def form(**options: object) -> object:
        return ImageTask(path, num_classes=3, **options).input_format()  # type: ignore[arg-type]

    assert form() == form(mean=[0.1])
    assert form() != form(channels=1)
    assert form() != form(image_size=8)


def test_a_folder_of_images_gives_classes_by_name(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (10, 7 + i), (255 * label, 0, 0)).save(folder / f"{i}.png")
    task = ImageTask(str(tmp_path / "images"), num_classes=2, image_size=6, mean=[0.0], std=[1.0])
    assert task.train is not None
    assert task.validation is None
    assert len(task.train) == 6
    pixels, labels = task.collate([task.train[i] for i in range(6)])
    assert pixels.shape == (6, 3, 6, 6)
    torch.testing.assert_close(pixels[:, 0].amax((1, 2)), labels.float())
    with pytest.raises(InputError, match="must hold 3 folders, one per class; got 2: cat, dog"):
        ImageTask(str(tmp_path / "images"), num_classes=3, image_size=6).split("train")
    with pytest.raises(InputError, match="image_size: must be set for the images of"):
        ImageTask(str(tmp_path / "images"), num_classes=2).split("train")


def test_a_folder_without_splits_is_refused(tmp_path):
    with pytest.raises(InputError, match="must hold train/<class>/ or test/<class>/"):
        ImageTask(str(tmp_path), num_classes=2, image_size=6).split("train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": np.zeros((6, 4, 4))}, r"x_train must be uint8 .* got float64 \[6, 4, 4\]"),
        ({"x_train": np.zeros((6, 4), np.uint8)}, r"x_train must be uint8 \[N, H, W\]"),
        ({"y_train": np.arange(6)}, r"y_train, row 4: the label must .* got 3"),
        ({"y_train": np.zeros(5, int)}, "must have equal lengths; got 6 and 5"),
        ({"y_train": None}, "must hold y_train beside x_train"),
        ({"x_train": np.array([{}], dtype=object)}, "must be a .npz file of plain arrays"),
    ],
)
def test_bad_arrays_are_named(tmp_path, changes, message):
    path = arrays(tmp_path / "x.npz", **changes)
    with pytest.raises(InputError, match=message):
        ImageTask(path, num_classes=3).split("train")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text", single_array()])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x.npz: must be a .npz file of plain arrays"):
        ImageTask(str(path), num_classes=3).split("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels: must be 1 or 3; got 2"),
        ({"image_size": 0}, "image_size: must be at least 1; got 0"),
        ({"mean": [0.1, 0.2]}, r"mean: must be one number or one per channel \(3\)"),
        ({"std": [0.0]}, r"std: must be positive; got \[0.0\]"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(InputError, match=message):
        ImageTask("x.npz", num_classes=2, **options)
