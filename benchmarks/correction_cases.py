"""What is corrected: the experts of one architecture, locality and seed, and their data.

Local experts share one base. Non-local ones have a base each, trained from another initialisation
on another order of the data; the "base" that a merge starts from is then the mean of the bases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from correction_data import TASKS, TaskImages
from correction_experts import Zoo, accuracy, load
from torch import Tensor, nn

from lit_merge import ExpertInfo, MultiTaskDataModule, open_expert, write_expert
from lit_merge.parameters import detect_heads
from lit_merge.tasks.task import DatasetTask, Task

LOCALITIES = ("local", "non-local")


@dataclass(frozen=True)
class Case:
    """Experts to merge, and what they are merged with.

    Attributes:
        architecture: "cnn" or "vit".
        locality: "local" or "non-local".
        seed: Of the experts.
        base: Folder of the first expert's base: the unmerged model of the controls.
        origin: Folder of what task vectors are counted from: the base, or the mean of the bases.
        experts: Expert folders by task.
        tasks: Images by task.
        unlabelled: The images by task that a correction may see.
        labelled: The images by task that a head is refitted on.
        accuracies: The experts' test accuracies by task.
    """

    architecture: str
    locality: str
    seed: int
    base: Path
    origin: Path
    experts: Mapping[str, Path]
    tasks: Mapping[str, TaskImages]
    unlabelled: Mapping[str, Tensor]
    labelled: Mapping[str, tuple[Tensor, Tensor]]
    accuracies: Mapping[str, float]

    def expert(self, task: str) -> nn.Module:
        """Return a task's expert."""
        return load(self.architecture, self.experts[task], self.tasks[task].num_classes)

    def without_head(self, folder: Path) -> nn.Module:
        """Return the network of a folder with a random head."""
        return load(self.architecture, folder, 10, head="fresh")

    def ratio(self, logits: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """Return test accuracies as per cent of the experts'.

        Args:
            logits: Takes images and a task to the logits ``[B, C]``.
        """
        return {
            task: 100 * _accuracy(logits, task, images) / self.accuracies[task]
            for task, images in self.tasks.items()
        }

    def data(self, batch_size: int) -> MultiTaskDataModule:
        """Return the unlabelled images as the product takes them, mixed in every batch."""
        tasks: dict[str, Task] = {
            task: DatasetTask(
                [(image, -100) for image in images],
                num_classes=self.tasks[task].num_classes,
                unlabelled=True,
            )
            for task, images in self.unlabelled.items()
        }
        return MultiTaskDataModule(tasks, batch_size=batch_size, eval_batch_size=256)


def prepare(
    zoo: Zoo, locality: str, tasks: Mapping[str, TaskImages], *, unlabelled: int, labelled: int
) -> Case:
    """Return a case; what the cache lacks of its bases and experts is trained.

    Args:
        zoo: The networks.
        locality: "local" or "non-local".
        tasks: Images by task.
        unlabelled: Number of images a task that a correction may see.
        labelled: Number of images a task that a head is refitted on.
    """
    numbers = [0 if locality == "local" else place for place in range(len(TASKS))]
    bases = [zoo.base(number) for number in dict.fromkeys(numbers)]
    experts = {
        task: zoo.expert(task, number, tasks[task])
        for task, number in zip(TASKS, numbers, strict=True)
    }
    few = {name: images.calibration(unlabelled, seed=zoo.seed) for name, images in tasks.items()}
    known = {
        name: images.calibration(labelled, seed=zoo.seed + 50) for name, images in tasks.items()
    }
    networks = {
        name: load(zoo.architecture, path, tasks[name].num_classes)
        for name, path in experts.items()
    }
    return Case(
        zoo.architecture,
        locality,
        zoo.seed,
        bases[0],
        bases[0] if len(bases) == 1 else _mean(zoo, bases),
        experts,
        tasks,
        {name: images.inputs for name, images in few.items()},
        {name: (images.inputs, images.labels) for name, images in known.items()},
        {name: accuracy(network, tasks[name].test) for name, network in networks.items()},
    )


def _mean(zoo: Zoo, bases: list[Path]) -> Path:
    """Write the mean of several bases, without heads, and return its folder."""
    folder = zoo.folder / f"mean-of-{len(bases)}"
    if not folder.exists():
        states = []
        for base in bases:
            expert = open_expert(base)
            states.append({name: expert.weights.tensor(name).clone() for name in expert.weights})
            expert.close()
        heads = set(detect_heads(load(zoo.architecture, bases[0], 10, head="fresh")))
        mean = {
            name: torch.stack([state[name].float() for state in states]).mean(0).to(value.dtype)
            for name, value in states[0].items()
            if name not in heads
        }
        write_expert(folder, weights=mean, info=ExpertInfo(task="pretraining"))
    return folder


@torch.no_grad()
def _accuracy(logits: Callable[[Tensor, str], Tensor], task: str, images: TaskImages) -> float:
    right = [
        logits(inputs, task).argmax(1) == labels
        for inputs, labels in zip(
            torch.split(images.test.inputs, 250), torch.split(images.test.labels, 250), strict=True
        )
    ]
    return torch.cat(right).float().mean().item()
