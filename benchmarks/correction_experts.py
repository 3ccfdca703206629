"""The bases and experts of the correction benchmark: trained once, then read from a cache.

    python benchmarks/correction_experts.py --architectures cnn vit --seeds 0 1

``<cache>/<architecture>-seed<s>-<settings>/base<b>/`` is a base, and below it lie the folders of
the experts that were fine-tuned from it. Bases of one seed differ in their initialisation and in
the order of their data, so they lie in different basins. Experts are what the product eats: expert
folders with weights, curvature and activation statistics.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from correction_data import TASKS, Images, TaskImages, pretraining_images, task_images
from correction_models import ARCHITECTURES, build
from torch import Tensor, nn

from lit_merge import ExpertInfo, open_expert, write_expert
from lit_merge.correction import find_sites, gather_statistics, to_tensors
from lit_merge.curvature import diagonal_hessian
from lit_merge.parameters import detect_heads

DEFAULT_CACHE = Path(tempfile.gettempdir()) / "lit-merge-correction"


@dataclass(frozen=True)
class Training:
    """How a network is trained: AdamW, and a learning rate that rises and falls once.

    Attributes:
        epochs: Passes over the images.
        batch_size: Images per step.
        lr: Largest learning rate.
    """

    epochs: float
    batch_size: int
    lr: float


PRETRAINING = {"cnn": Training(2, 64, 6e-3), "vit": Training(3, 32, 2e-3)}
FINE_TUNING = {"cnn": Training(3, 64, 3e-3), "vit": Training(4, 32, 1.5e-3)}
CURVATURE_EXAMPLES = 1024
STATISTICS_EXAMPLES = 512


@dataclass(frozen=True)
class Zoo:
    """The bases and experts of one architecture and seed; what is missing is trained.

    Attributes:
        cache: Where they are kept.
        architecture: "cnn" or "vit".
        seed: Of all that is random.
    """

    cache: Path
    architecture: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where this architecture's and seed's networks lie."""
        settings = (
            asdict(PRETRAINING[self.architecture]),
            asdict(FINE_TUNING[self.architecture]),
            CURVATURE_EXAMPLES,
            STATISTICS_EXAMPLES,
            TASKS,
        )
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        return self.cache / f"{self.architecture}-seed{self.seed}-{key}"

    def base(self, number: int) -> Path:
        """Return the folder of a base."""
        folder = self.folder / f"base{number}"
        if not (folder / "expert.json").exists():
            images, classes = pretraining_images()
            torch.manual_seed(1000 * self.seed + number)
            network = build(self.architecture, classes)
            train(network, images, PRETRAINING[self.architecture])
            heads = detect_heads(network)
            info = ExpertInfo(task="pretraining", head_parameters=heads)
            write_expert(folder, weights=network.state_dict(), info=info)
        return folder

    def expert(self, task: str, number: int, images: TaskImages) -> Path:
        """Return the folder of the expert of a task that was fine-tuned from a base."""
        folder = self.base(number) / task
        if not (folder / "expert.json").exists():
            network = load(self.architecture, self.base(number), images.num_classes, head="fresh")
            torch.manual_seed(1000 * self.seed + 100 * number + TASKS.index(task) + 10)
            train(network, images.train, FINE_TUNING[self.architecture])
            save_expert(folder, network, task, images)
        return folder


def load(architecture: str, folder: Path, classes: int, *, head: str = "load") -> nn.Module:
    """Return the network of a folder; with ``head="fresh"``, its head stays random."""
    torch.manual_seed(0)
    network = build(architecture, classes)
    expert = open_expert(folder)
    try:
        left_out = detect_heads(network) if head == "fresh" else ()
        weights = {n: expert.weights.tensor(n) for n in expert.weights if n not in left_out}
    finally:
        expert.close()
    network.load_state_dict(weights, strict=not left_out)
    return network.eval()


def train(network: nn.Module, images: Images, how: Training) -> None:
    """Train all weights on the labels."""
    # Convolutions of few channels are faster this way; the weights stay the same numbers.
    network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=how.lr, weight_decay=0.01)
    steps = int(how.epochs * len(images)) // how.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, how.lr, total_steps=steps + 1)
    rounds = [torch.randperm(len(images)) for _ in range(int(how.epochs) + 1)]
    for chosen in torch.split(torch.cat(rounds), how.batch_size)[:steps]:
        inputs = images.inputs[chosen].to(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(inputs), images.labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.eval().to(memory_format=torch.contiguous_format)


def save_expert(folder: Path, network: nn.Module, task: str, images: TaskImages) -> None:
    """Measure curvature and activations as the callbacks do, and write the expert folder."""
    some = images.calibration(CURVATURE_EXAMPLES, seed=1)
    batches = zip(torch.split(some.inputs, 64), torch.split(some.labels, 64), strict=True)
    hessian = diagonal_hessian(network, batches, _loss)
    share = len(images.train) / len(some)
    heads = detect_heads(network)
    statistics = gather_statistics(
        network,
        torch.split(images.calibration(STATISTICS_EXAMPLES, seed=1).inputs, 64),
        find_sites(network, where="auto", exclude=heads),
    )
    write_expert(
        folder,
        weights=network.state_dict(),
        info=ExpertInfo(
            task=task,
            estimator="exact",
            labels="sampled",
            num_examples=len(images.train),
            head_parameters=heads,
        ),
        hessian={name: value * share for name, value in hessian.items()},
        activations=to_tensors(statistics),
    )


@torch.no_grad()
def accuracy(network: nn.Module, images: Images) -> float:
    """Return the share of the images that a network gets right, in [0, 1]."""
    network.eval()
    right = [
        network(inputs).argmax(1) == labels
        for inputs, labels in zip(
            torch.split(images.inputs, 250), torch.split(images.labels, 250), strict=True
        )
    ]
    return torch.cat(right).float().mean().item()


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


def main() -> None:
    """Train what the cache lacks, and print the experts' accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--bases", nargs="+", type=int, default=[0, 1, 2, 3])
    options = parser.parse_args()
    tasks = task_images()
    for architecture in options.architectures:
        for seed in options.seeds:
            zoo = Zoo(options.cache, architecture, seed)
            for number in options.bases:
                begin = time.perf_counter()
                zoo.base(number)
                print(
                    f"{architecture} seed {seed} base {number}: {time.perf_counter() - begin:.0f} s"
                )
                # The local experts come from base 0; each other base has one of the non-local ones.
                own = (TASKS[number],) if number else TASKS
                for task in own:
                    begin = time.perf_counter()
                    folder = zoo.expert(task, number, tasks[task])
                    seconds = time.perf_counter() - begin
                    network = load(architecture, folder, tasks[task].num_classes)
                    score = 100 * accuracy(network, tasks[task].test)
                    print(f"  {folder}: {score:.1f} % ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
