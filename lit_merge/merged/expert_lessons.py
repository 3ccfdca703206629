"""What a merged model learns from an expert before the expert is dropped.

Its activation statistics on a few examples set the corrections in closed form, its logits on all
training examples are the targets of the learned fit. An expert is loaded once, run without
gradients, and freed; with mixup it stays for the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from lit_merge.checkpoint import aligned, fingerprint
from lit_merge.correction import (
    ChannelStatistics,
    Site,
    from_tensors,
    gather_statistics,
    run_model,
)
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.least_squares.prefix_sweep import Teacher
from lit_merge.merged.distillation import logits_of_all
from lit_merge.merged.final_feature import only_feature
from lit_merge.merged.fit_settings import FitSettings
from lit_merge.merged.mixup import Mixup
from lit_merge.merged.network import MergedNetwork, expert_network
from lit_merge.merged.targets import Targets
from lit_merge.tasks import MultiTaskDataModule


@dataclass(frozen=True)
class Surroundings:
    """How a network is run here: on which device, in which precision.

    Attributes:
        place: Moves a network to the device and precision.
        move: Moves inputs there.
        autocast: Makes the context of a forward.
    """

    place: Callable[[MergedNetwork], MergedNetwork]
    move: Callable[[Any], Any]
    autocast: Callable[[], AbstractContextManager[Any]]

    @classmethod
    def of(cls, module: L.LightningModule) -> Surroundings:
        """Return the device and precision of the trainer that a module is attached to."""
        precision, strategy = module.trainer.precision_plugin, module.trainer.strategy

        def place(network: MergedNetwork) -> MergedNetwork:
            precision.convert_module(network)
            return network.to(module.device).eval()

        def move(inputs: Any) -> Any:
            return strategy.batch_to_device(precision.convert_input(inputs))

        return cls(place, move, precision.forward_context)

    def run(self, model: nn.Module, inputs: Any) -> Any:
        """Run a network on inputs that were moved."""
        with self.autocast():
            return run_model(model, inputs)


class ExpertLessons:
    """One expert, ready to be asked.

    Args:
        network: The architecture.
        path: The expert: folder or checkpoint.
        task: Its task.
        head_names: Names in the network of the tensors that make its head.
        surroundings: Where to run it.

    Raises:
        InputError: If the expert cannot be read or does not fit the network.
    """

    def __init__(
        self,
        network: nn.Module,
        path: str | Path,
        *,
        task: str,
        head_names: Sequence[str],
        surroundings: Surroundings,
    ) -> None:
        expert = open_expert(path)
        try:
            alone = expert_network(network, expert.weights, task=task, head_names=head_names)
        finally:
            expert.close()
        self.task = task
        self._expert = surroundings.place(alone)
        self._surroundings = surroundings

    def statistics(
        self, batches: Iterable[Any], sites: Sequence[Site]
    ) -> dict[str, ChannelStatistics]:
        """Return the expert's activation statistics over batches of inputs.

        Raises:
            InputError: If an activation is NaN or infinite.
        """
        with self._expert.context.using(0):
            return gather_statistics(
                self._expert.network, batches, sites, forward=self._surroundings.run
            )

    def teacher(self) -> Teacher:
        """Return the expert as what the layers of a merged model are solved for."""
        context = self._expert.context
        return Teacher(self._expert.network, self._surroundings.run, partial(context.using, 0))

    def logits(self, batches: Iterable[Any], *, num_classes: int | None) -> Tensor:
        """Return the expert's logits on all examples, float32 ``[N, C]``; see :meth:`answers`."""
        return self.answers(batches, num_classes=num_classes)[0]

    def answers(
        self, batches: Iterable[Any], *, num_classes: int | None, features: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return the expert's logits and final features on all examples.

        Args:
            batches: Inputs, batch after batch, not moved yet.
            num_classes: C, where it is known.
            features: Whether to return the features.

        Returns:
            Logits, float32 ``[N, C]``, and features, ``[N, ...]``, in the type that they have; or
            None.

        Raises:
            InputError: If a logit is NaN or infinite, or there are other than C of them; if the
                head does not run once.
        """
        read: list[Tensor] = []

        def forward(inputs: Any) -> Tensor:
            with self._surroundings.autocast(), self._expert.final_feature.reading() as seen:
                logits: Tensor = self._expert(self._surroundings.move(inputs), 0)
            if features:
                read.append(only_feature(seen, len(logits)))
            return logits

        logits = logits_of_all(forward, batches, task=self.task)
        if num_classes not in (None, logits.shape[1]):
            raise InputError(
                f"experts: the expert of task {self.task!r} must have {num_classes} classes; got "
                f"{logits.shape[1]}. Give the expert that was merged."
            )
        return logits, torch.cat(read) if features else None


def ask_experts(
    lessons: Callable[[str], ExpertLessons],
    num_classes: Mapping[str, int | None],
    data: MultiTaskDataModule,
    *,
    fit: FitSettings,
    seed: int,
    shown: bool,
) -> tuple[Targets, Mixup | None]:
    """Return the experts' outputs on all training examples, and who answers for others.

    One expert is there at a time, but for mixup.

    Args:
        lessons: Loads the expert of a task.
        num_classes: Number of classes by task, in the order of their indices; None where it is not
            known.
        data: The tasks' examples.
        fit: What the outputs are for.
        seed: Seed of mixup.
        shown: Whether to draw a bar.

    Raises:
        InputError: If an expert cannot be read, does not fit, or gives outputs that are not finite.
    """
    seen = sum(len(data.examples(task, "train")) for task in num_classes)
    features = fit.feature_weight > 0
    answers: list[tuple[Tensor, Tensor | None]] = []
    staying = []
    with lessons_bar(seen, shown=shown) as advance:
        for task, classes in num_classes.items():
            ask = partial(lessons(task).answers, num_classes=classes, features=features)
            answers.append(ask(_inputs(data, task, advance)))
            if fit.mixup:
                staying.append(ask)
    logits = [own for own, _ in answers]
    read = [feature for _, feature in answers if feature is not None]
    targets = Targets.of(logits, read or None, tasks=list(num_classes))
    return targets, Mixup(staying, fit.mixup, seed) if staying else None


def _inputs(data: MultiTaskDataModule, task: str, advance: Callable[[int], None]) -> Iterator[Any]:
    """Yield the inputs of all training examples of a task, batch after batch."""
    for inputs, labels in data.batches(task):
        yield inputs
        advance(len(labels))


def require_merged_expert(path: str | Path, *, task: str, merge: Mapping[str, Any]) -> None:
    """Check that an expert is the one that was merged, where the record of the merge says which.

    Args:
        path: The expert.
        task: Its task.
        merge: Contents of ``merge.json``.

    Raises:
        InputError: If its weights are others.
    """
    experts = merge.get("experts")
    entry = experts.get(task) if isinstance(experts, Mapping) else None
    known = entry.get("fingerprint") if isinstance(entry, Mapping) else None
    if not isinstance(known, str):
        return
    expert = open_expert(path)
    try:
        found = fingerprint(expert.weights)
    finally:
        expert.close()
    if found != known:
        raise InputError(
            f"{path}: must be the expert of task {task!r} that was merged, weights {known[:8]}…; "
            f"got {found[:8]}…. Correct the path, or merge again."
        )


@contextmanager
def lessons_bar(num_examples: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show how many examples the experts have seen.

    Args:
        num_examples: How many they will see in all.
        shown: Whether to draw a bar.

    Yields:
        What to call with each number of examples.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown) as progress:
        task = progress.add_task("Asking the experts", total=num_examples)
        yield lambda count: progress.advance(task, count)


def stored_statistics(
    path: str | Path, sites: Sequence[Site], *, task: str, required: bool = True
) -> dict[str, ChannelStatistics] | None:
    """Return an expert's statistics from its folder instead of running it.

    Args:
        path: The expert folder.
        sites: The sites of the network; those in the file may carry a prefix ("model.").
        task: The task, for messages.
        required: Whether they must be there; otherwise None is returned where they are not.

    Raises:
        InputError: If the folder has no statistics, or none of one of the sites.
    """
    expert = open_expert(path)
    try:
        if expert.activations is None:
            if not required:
                return None
            raise InputError(
                f'{path}: must hold activations.safetensors for statistics="stored" (task '
                f"{task!r}); "
                'got none. Add the ActivationStatistics callback, or use statistics="calibration".'
            )
        wanted = [f"{site.name}.{part}" for site in sites for part in ("count", "mean", "m2")]
        file = aligned(expert.activations, wanted)
        missing = [name for name in wanted if name not in file]
        if missing and not required:
            return None
        if missing:
            raise InputError(
                f"{expert.activations.path}: must hold every corrected site; got none for "
                f"{missing[0].rpartition('.')[0]!r} (task {task!r}). Gather the statistics at the "
                "same "
                'sites, or use statistics="calibration".'
            )
        tensors = {name: file.tensor(name).clone() for name in wanted}
        return from_tensors(tensors, source=str(expert.activations.path))
    finally:
        expert.close()
