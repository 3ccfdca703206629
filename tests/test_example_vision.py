"""The recipes "vision", local and non-local: the whole way on very small images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_merge import open_expert
from lit_merge.cli import main
from lit_merge.evaluation.file import read_evaluation
from lit_merge.inspection import inspect_path

CONFIGS = Path(__file__).parents[1] / "configs"
SETS = ("mnist", "kmnist", "fashion", "cifar10_gray28", "omniglot_small", "digits")

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of .npz files: 28 × 28 images whose class is where a bright square lies."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in SETS:
        arrays = {}
        for split, count in (("train", 40), ("test", 20)):
            labels = np.arange(count) % 10
            pixels = random.integers(0, 60, (count, 28, 28), dtype=np.uint8)
            for image, label in zip(pixels, labels, strict=True):
                row, column = 4 + 14 * (label // 5), 5 * (label % 5)
                image[row : row + 6, column : column + 5] += 150
            arrays |= {f"x_{split}": pixels, f"y_{split}": labels.astype(np.int64)}
        np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    return folder


def run(recipe: Path, images: Path, output: Path) -> None:
    small = {
        "sets": "local",
        "data": str(images),
        "output": str(output),
        "accelerator": "cpu",
        "pretraining_epochs": 1,
        "epochs": 1,
        "unlabelled_examples": 20,
        "steps": 1,
        "batch_size": 20,
        "network": {
            "model_name": "vit_tiny_patch16_224",
            "model_kwargs": {
                "img_size": 28,
                "patch_size": 14,
                "in_chans": 1,
                "embed_dim": 16,
                "depth": 1,
                "num_heads": 2,
                "weight_init": "reset",
            },
        },
    }
    words = [
        word
        for name, value in small.items()
        for word in (f"--variables.{name}", json.dumps(value) if value != "local" else "local")
    ]
    assert main(["run", "--config", str(recipe), *words]) == 0


def test_a_base_and_its_experts_are_trained_and_merged(tmp_path: Path, images: Path) -> None:
    recipe = yaml.safe_load((CONFIGS / "run_vision.yaml").read_text(encoding="utf-8"))
    wanted = ("Pretrain", "Fine-tune", "Merge by")
    recipe["steps"] = [step for step in recipe["steps"] if step["title"].startswith(wanted)]
    recipe["variables"]["methods"] = {"gradient-matching": {"class_path": "GradientMatching"}}
    recipe["variables"]["tasks"] = ["mnist", "fashion"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    output = tmp_path / "run"
    run(tmp_path / "recipe.yaml", images, output)
    base = torch.load(output / "base" / "last.ckpt", weights_only=True)["state_dict"]
    assert base["model.head.weight"].shape == (262, 16)
    heads = load_file(output / "gradient-matching" / "heads" / "fashion.safetensors")
    assert heads["model.head.weight"].shape == (10, 16)
    for task in ("mnist", "fashion"):
        expert = open_expert(output / task / "expert")
        assert expert.hessian is not None
        assert expert.activations is not None
        expert.close()


@pytest.mark.slow
def test_experts_of_two_bases_are_aligned_merged_and_corrected(
    tmp_path: Path, images: Path
) -> None:
    output = tmp_path / "run"
    run(CONFIGS / "run_vision_nonlocal.yaml", images, output)
    evaluation = read_evaluation(output / "evaluation.json")
    models = {row.model for row in evaluation.rows}
    assert {
        "average, not aligned",
        "average + REPAIR",
        "base, all weights distilled",
        "least squares, one model",
        "+ all weights",
    } <= models
    own = {row.model: row.task for row in evaluation.rows if row.model.startswith("expert ")}
    assert own == {f"expert {task}": task for task in ("mnist", "kmnist", "fashion")}
    assert all(row.num_examples == 20 for row in evaluation.rows if row.model == "average")
    assert "+ all weights" in (output / "report.html").read_text()
    alignment = json.loads((output / "aligned" / "align.json").read_text())
    assert list(alignment["groups"]) == ["first", "second"]
    assert inspect_path(str(output / "mnist" / "expert")).kind


@pytest.mark.slow
def test_experts_of_one_base_are_merged_and_corrected(tmp_path: Path, images: Path) -> None:
    output = tmp_path / "run"
    run(CONFIGS / "run_vision.yaml", images, output)
    evaluation = read_evaluation(output / "evaluation.json")
    assert {"gradient matching", "+ all weights"} <= {row.model for row in evaluation.rows}
    assert (output / "report.html").is_file()
