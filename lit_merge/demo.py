"""``lit-merge demo``: the whole way on real handwritten digits, in minutes and without downloads.

A small ViT learns the digits of scikit-learn; four experts are fine-tuned from it, each on another
view of the drawings or another question about them; then the experts are merged, corrected,
evaluated and reported. Every step is an ordinary ``lit-merge`` command with a YAML file that the
demo writes first, so that each can be read, changed and run again by hand.

The table holds the controls that a correction must beat: the same correction, with the same
examples and steps, on the base that was never merged, and a fresh linear head fitted with labels
on the base's features.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_merge.errors import InputError

TASKS: dict[str, dict[str, str]] = {
    "tilted": {"view": "tilted"},
    "mirrored": {"view": "mirrored"},
    "negative": {"view": "negative"},
    "odd": {"view": "upside-down", "question": "odd"},
}
"""The experts' tasks: the arguments of :class:`~lit_merge.tasks.digits.DigitsTask` by name."""

METHODS: dict[str, dict[str, Any]] = {
    "average": {"class_path": "Average"},
    "task-arithmetic": {"class_path": "TaskArithmetic", "init_args": {"scale": 0.3}},
    "ties": {"class_path": "TIES", "init_args": {"density": 0.2, "scale": 1.0}},
    "fisher": {"class_path": "FisherAverage"},
    "gradient-matching": {"class_path": "GradientMatching"},
    # No task vector at all: the base with the experts' heads, for the control.
    "unmerged-base": {"class_path": "TaskArithmetic", "init_args": {"scale": 0.0}},
}
"""What the demo merges with, by the name of the output folder."""

CALIBRATION_EXAMPLES = 256
"""Examples per task, without labels, for the closed form; with labels, for the linear probe."""

_MARK = "configs/README.txt"
_MODEL_KWARGS = {
    "img_size": 16,
    "patch_size": 4,
    "in_chans": 1,
    "depth": 3,
    "embed_dim": 64,
    "num_heads": 4,
}
_EPOCHS = {"base": 20, "expert": 8}
# Drawing the bar at every step would take as long as the step.
_PROGRESS = {"class_path": "RichProgressBar", "init_args": {"refresh_rate": 20}}
_LEARNING_RATE = {"base": 1e-3, "expert": 5e-4}


@dataclass(frozen=True)
class Step:
    """One command of the demo.

    Attributes:
        title: What it does.
        arguments: What stands after ``lit-merge``.
        config: The content of its YAML file; empty where it has none.
    """

    title: str
    arguments: tuple[str, ...]
    config: dict[str, Any]


def _task(name: str) -> dict[str, Any]:
    return {"class_path": "DigitsTask", "init_args": TASKS.get(name, {})}


def _classifier(name: str, *, role: str, **options: Any) -> dict[str, Any]:
    return {
        "class_path": "TimmClassifier",
        "init_args": {
            "model_name": "vit_tiny_patch16_224",
            "num_classes": 2 if TASKS.get(name, {}).get("question") == "odd" else 10,
            "model_kwargs": _MODEL_KWARGS,
            "lr": _LEARNING_RATE[role],
            "weight_decay": 0.05,
            "warmup": 0.3,
            **options,
        },
    }


def _fit(run: Path, name: str, *, role: str, seed: int, callbacks: Sequence[Any]) -> dict[str, Any]:
    start = {} if role == "base" else {"checkpoint": str(run / "base/last.ckpt"), "head": "fresh"}
    checkpoint = {"dirpath": str(run / name), "save_last": True, "save_top_k": 0}
    return {
        "seed_everything": seed,
        "model": _classifier(name, role=role, **start),
        "data": {
            "class_path": "TaskDataModule",
            "init_args": {"task": _task(name), "batch_size": 32, "eval_batch_size": 512},
        },
        "trainer": {
            "max_epochs": _EPOCHS[role],
            "accelerator": "cpu",
            "logger": False,
            "enable_model_summary": False,
            "callbacks": [
                _PROGRESS,
                {"class_path": "ModelCheckpoint", "init_args": checkpoint},
                *callbacks,
            ],
        },
    }


def _correction(
    run: Path, merged: str, *, output: str, steps: int, seed: int, **options: Any
) -> dict[str, Any]:
    return {
        "seed_everything": seed,
        "model": _classifier("", role="expert"),
        "merged": str(run / merged),
        "experts": {task: str(run / task / "expert") for task in TASKS},
        "tasks": {task: _task(task) for task in TASKS},
        "calibration_examples": CALIBRATION_EXAMPLES,
        "lr": 0.02,
        "batch_size": 64,
        **options,
        "output": str(run / output),
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [_PROGRESS],
        },
    }


def plan(run: Path, *, seed: int, steps: int) -> Iterator[Step]:
    """Yield the commands of the demo in their order.

    Args:
        run: The folder that everything is written to.
        seed: Seed of every training.
        steps: Steps of the learned correction.
    """

    def with_config(title: str, command: str, name: str, config: dict[str, Any]) -> Step:
        return Step(title, (command, "--config", str(run / "configs" / f"{name}.yaml")), config)

    base = _fit(run, "base", role="base", seed=seed, callbacks=[])
    yield with_config("Train the base on upright digits", "fit", "fit-base", base)
    gather = [
        {"class_path": "DiagonalHessian", "init_args": {}},
        {"class_path": "ActivationStatistics", "init_args": {}},
    ]
    for task in TASKS:
        callbacks = [
            {**entry, "init_args": {"output": str(run / task / "expert")}} for entry in gather
        ]
        expert = _fit(run, task, role="expert", seed=seed, callbacks=callbacks)
        title = f'Fine-tune the expert "{task}", gathering its curvature'
        yield with_config(title, "fit", f"fit-{task}", expert)
    for name, method in METHODS.items():
        config = {
            "base": str(run / "base/last.ckpt"),
            "experts": {task: str(run / task / "expert") for task in TASKS},
            "method": method,
            "output": str(run / name),
        }
        yield with_config(f"Merge: {name}", "merge", f"merge-{name}", config)
    corrections: dict[str, tuple[str, str, int, dict[str, Any]]] = {
        "tact": ("Correct by activation statistics alone (TACT)", "gradient-matching", 0, {}),
        "solved": (
            "Solve the layers for the experts' activations: one model",
            "gradient-matching",
            0,
            {"least_squares": {}, "closed_form": "none"},
        ),
        "closed-form": (
            "Solve the layers, with a scale and shift per task",
            "gradient-matching",
            0,
            {"least_squares": {}},
        ),
        "corrected": (
            "Refine that in a short fit",
            "closed-form",
            steps,
            {"lr": 0.003, "feature_weight": 5.0},
        ),
        "control": (
            "Control: TACT and a fit of the same length on the unmerged base",
            "unmerged-base",
            steps,
            {},
        ),
    }
    for output, (title, merged, length, options) in corrections.items():
        config = _correction(run, merged, output=output, steps=length, seed=seed, **options)
        yield with_config(title, "correct", f"correct-{output}", config)
    models = {
        "base": {"path": str(run / "unmerged-base"), "kind": "base"},
        **{
            f"expert {task}": {"path": str(run / task / "expert"), "kind": "expert", "task": task}
            for task in TASKS
        },
        **{
            name: {"path": str(run / name), "kind": "merged"}
            for name in METHODS
            if name != "unmerged-base"
        },
        "gradient-matching": {
            "path": str(run / "gradient-matching"),
            "kind": "merged",
            "stage": 1,
        },
        "gradient-matching + TACT": {"path": str(run / "tact"), "kind": "corrected"},
        "least squares, one model": {
            "path": str(run / "solved"),
            "kind": "corrected",
            "stage": 2,
        },
        "least squares + scale and shift": {
            "path": str(run / "closed-form"),
            "kind": "corrected",
            "stage": 3,
        },
        "least squares + learned": {
            "path": str(run / "corrected"),
            "kind": "corrected",
            "stage": 4,
        },
        "base + TACT + learned": {"path": str(run / "control"), "kind": "control"},
    }
    evaluation = {
        "model": _classifier("", role="expert"),
        "tasks": {task: _task(task) for task in TASKS},
        "models": models,
        "linear_probe": True,
        "variance": True,
        "output": str(run / "evaluation.json"),
        "trainer": {"accelerator": "cpu", "logger": False},
    }
    yield with_config("Evaluate everything", "evaluate", "evaluate", evaluation)
    files = [str(run / name) for name in ("evaluation.json", "gradient-matching", "corrected")]
    report = ("report", *files, "--output", str(run / "report.html"))
    yield Step("Write the report", (*report, "--title", "lit-merge demo: digits"), {})


def _prepare(run: Path, *, replace: bool) -> None:
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        if not replace:
            raise InputError(
                f"{run}: must be a new or empty folder; got one with files. "
                "Give another --output, or --replace to do the demo again."
            )
        if not (run / _MARK).is_file():
            raise InputError(
                f"{run}: --replace takes only the folder of an earlier demo; got one without "
                f"{_MARK}. Give another --output."
            )
        shutil.rmtree(run)
    (run / _MARK).parent.mkdir(parents=True)
    (run / _MARK).write_text("Written by lit-merge demo: one file per command.\n")


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge demo``.

    Returns:
        The exit status: that of the first step that fails, or 0.

    Raises:
        InputError: If the output folder is in use.
    """
    parser = argparse.ArgumentParser(
        prog="lit-merge demo",
        description="Train, merge, correct, evaluate and report on real digits, without downloads.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write")
    parser.add_argument("--replace", action="store_true", help="replace an earlier demo's folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of every training")
    parser.add_argument("--steps", type=int, default=150, help="steps of the learned correction")
    options = parser.parse_args(list(argv))
    run: Path = options.output
    _prepare(run, replace=options.replace)

    from rich.console import Console

    from lit_merge.cli import main as run_command

    console = Console()
    start = time.perf_counter()
    steps = list(plan(run, seed=options.seed, steps=options.steps))
    for number, step in enumerate(steps, 1):
        if step.config:
            Path(step.arguments[-1]).write_text(yaml.safe_dump(step.config, sort_keys=False))
        console.rule(f"[bold]{number}/{len(steps)} {step.title}", align="left")
        console.print(f"$ lit-merge {shlex.join(step.arguments)}", style="dim", soft_wrap=True)
        began = time.perf_counter()
        status = run_command(step.arguments)
        if status:
            return status
        console.print(f"{time.perf_counter() - began:.1f} s", style="dim")
    console.rule(align="left")
    console.print(f"Done in {time.perf_counter() - start:.0f} s. Open {run / 'report.html'}")
    return 0
