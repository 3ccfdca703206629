"""A merged model as a LightningModule: it predicts, is evaluated task by task, is saved and loaded.

How it is made and fitted is :class:`~lit_merge.module.MergeModule`'s part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lit_merge.correction import Site
from lit_merge.distributed import barrier, rank, reshard
from lit_merge.errors import InputError
from lit_merge.least_squares.layer_solver import SolvedLayer
from lit_merge.merged.folder import CorrectionRecord, write_corrected
from lit_merge.merged.network import (
    CorrectionFactory,
    MergedNetwork,
    check_sites,
    empty_heads,
    qualified_name,
)
from lit_merge.sharding import whole
from lit_merge.tasks import MultiTaskDataModule
from lit_merge.tasks.classification_metrics import TaskMetrics, update_metrics
from lit_merge.tasks.mixed_batches import MergeBatch, without_invalid

_STATE = "lit_merge"


class MergedClassifier(L.LightningModule):
    """A merged network with per-task heads and corrections.

    Args:
        architecture: The network that the experts were trained with; copied, never changed.
        correction: Makes a correction module from (number of tasks, number of channels).

    Attributes:
        merged: The network; None until it is set up.
        calibrated: Whether the closed form or a fit has set the corrections (0 or 1); a buffer, so
            that it goes where the corrections go.
        solved: The layers that least squares have solved, in their order.
    """

    calibrated: Tensor

    def __init__(self, architecture: nn.Module, *, correction: CorrectionFactory) -> None:
        super().__init__()
        # In a tuple, so that the architecture is no submodule: it is in no checkpoint.
        self._architecture = (architecture,)
        self.correction = correction
        self.merged: MergedNetwork | None = None
        self.register_buffer("calibrated", torch.tensor(0))
        self.solved: tuple[SolvedLayer, ...] = ()
        self.metrics = TaskMetrics()
        self._merge_record: Mapping[str, Any] = {}
        self._num_classes: list[int | None] = []
        self._own_index: tuple[int, ...] = ()

    @property
    def architecture(self) -> nn.Module:
        """The network that the experts were trained with."""
        return self._architecture[0]

    @property
    def network(self) -> MergedNetwork:
        """The merged network.

        Raises:
            InputError: If there is none yet.
        """
        if self.merged is None:
            raise InputError(
                "merged: must be given, or experts, or a checkpoint to load; got none of them. "
                "Give the merged folder or the experts, or call configure_model() first."
            )
        return self.merged

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the order of their indices."""
        return self.network.tasks

    def build(
        self,
        tasks: Sequence[str],
        heads: Mapping[str, Mapping[str, Tensor]],
        sites: Sequence[Site],
        *,
        source: str,
        surgery_rank: int = 0,
        coefficients: bool = False,
    ) -> MergedNetwork:
        """Return a network with these heads and sites, whose shared weights are to be loaded.

        Args:
            tasks: Names of the tasks in the order of their indices.
            heads: The tensors of each task's own, by name in the architecture.
            sites: Where to correct.
            source: Where tasks and sites come from, for messages.
            surgery_rank: Rank of the representation surgery before the head; 0 for none.
            coefficients: Whether there is a coefficient per task and layer.

        Raises:
            InputError: If they do not fit the architecture.
        """
        check_sites(self.architecture, sites, source=source)
        merged = MergedNetwork(
            self.architecture,
            tasks,
            heads=heads,
            sites=sites,
            correction=self.correction,
            surgery_rank=surgery_rank,
            coefficients=coefficients,
        )
        self._num_classes = list(merged.num_classes())
        return merged

    def blank_network(self) -> MergedNetwork:
        """Return a network like this one, whose tensors do not matter."""
        state = self.network.head_state()
        shapes = {task: {n: list(v.shape) for n, v in own.items()} for task, own in state.items()}
        heads, surgery = empty_heads(self.architecture, shapes), self.record().surgery_rank
        return self.build(
            self.tasks, heads, self.network.sites, source="network", surgery_rank=surgery
        )

    def forward(self, inputs: Any, task: str | Tensor) -> Tensor:
        """Return the logits of each example from its own task.

        Args:
            inputs: B examples.
            task: A task's name for all of them, or the index of each one's task, int64 ``[B]``.

        Returns:
            ``[B, widest head]``, −inf beyond a task's own classes; ``[B, L, vocabulary]`` of a
            language model.

        Raises:
            InputError: If there is no such task.
        """
        logits: Tensor = self.network(inputs, self._index(task) if isinstance(task, str) else task)
        return logits

    @torch.no_grad()
    def predict_task(self, inputs: Any, task: str) -> Tensor:
        """Return one task's class probabilities, float32 ``[B, C]``.

        Args:
            inputs: B examples of the task.
            task: Its name.

        Raises:
            InputError: If there is no such task.
        """
        width = self._num_classes[self._index(task)]
        return self.forward(inputs, task)[..., :width].float().softmax(-1)

    def predict_step(self, batch: MergeBatch, batch_idx: int) -> Tensor:
        """Return the class probabilities of a mixed batch, ``[B, widest head]``."""
        return self.forward(batch.inputs, self.own_tasks(batch)).float().softmax(-1)

    def validation_step(self, batch: MergeBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a validation batch."""
        self._count("val", batch)

    def test_step(self, batch: MergeBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count a test batch."""
        self._count("test", batch)

    def on_validation_start(self) -> None:
        """Check that the data fit the model."""
        self.meet_data()

    def on_test_start(self) -> None:
        """Check that the data fit the model."""
        self.meet_data()

    def on_predict_start(self) -> None:
        """Check that the data fit the model."""
        self.meet_data()

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and negative log-likelihood of each task, and their means over the tasks."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log accuracy and negative log-likelihood of each task, and their means over the tasks."""
        self._log_metrics("test")

    def meet_data(self, *, every_task: bool = False) -> MultiTaskDataModule:
        """Return the trainer's data module after checking its tasks against the model's.

        Args:
            every_task: Whether the data must have all tasks of the model.

        Raises:
            InputError: If there is no such data module, or its tasks or their classes are others.
        """
        tasks = self.tasks
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, MultiTaskDataModule):
            raise InputError(
                f"datamodule: must be a MultiTaskDataModule; got {type(data).__name__}. Pass "
                "datamodule=MultiTaskDataModule({task: Task, ...}) to the trainer."
            )
        missing = [name for name in tasks if name not in data.task_names]
        if set(data.task_names) - set(tasks) or (every_task and missing):
            raise InputError(
                f"tasks: the data module must have the model's tasks, {', '.join(tasks)}; got "
                f"{', '.join(data.task_names)}. Use the same names."
            )
        self._own_index = tuple(tasks.index(name) for name in data.task_names)
        for index, name in zip(self._own_index, data.task_names, strict=True):
            width = self._num_classes[index]
            misfit = None if width is None else data.tasks[name].misfit(width)
            if misfit is not None:
                raise InputError(f"task {name!r}: {misfit}")
            self._num_classes[index] = width or data.tasks[name].num_classes
        self.metrics.restart(tasks, [classes or 2 for classes in self._num_classes])
        self.metrics.to(self.device)
        return data

    def own_tasks(self, batch: MergeBatch) -> Tensor:
        """Return the model's index of each example's task, int64 ``[B]``."""
        return torch.tensor(self._own_index, device=batch.task.device)[batch.task]

    def _index(self, task: str) -> int:
        tasks = self.tasks
        if task not in tasks:
            raise InputError(
                f"task: must be one of {', '.join(tasks)}; got {task!r}. Check the name."
            )
        return tasks.index(task)

    def _count(self, stage: str, batch: MergeBatch) -> None:
        task = self.own_tasks(batch)
        logits = self.forward(batch.inputs, task)
        labels = without_invalid(batch.labels, batch.valid)
        for index in sorted(set(task.tolist())):
            rows = task == index
            own = logits[rows][..., : self._num_classes[index]]
            update_metrics(self.metrics.of(stage, index), own, labels[rows])

    def _log_metrics(self, stage: str) -> None:
        values, means = self.metrics.compute(stage)
        self.log_dict(values, sync_dist=True, add_dataloader_idx=False)
        self.log_dict(means, sync_dist=True, prog_bar=stage == "val")

    def record(self) -> CorrectionRecord:
        """Return what has to be known to build this model again."""
        return CorrectionRecord(
            tasks=self.tasks,
            num_classes=tuple(self._num_classes),
            sites=self.network.sites,
            correction=qualified_name(self.correction),
            calibrated=bool(self.calibrated),
            surgery_rank=self.network.surgery_rank,
            settings=dict(self.hparams),
            merge=self._merge_record,
            solved=self.solved,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what has to be known to build the model again."""
        heads = self.network.head_state()
        shapes = {t: {n: list(v.shape) for n, v in own.items()} for t, own in heads.items()}
        checkpoint[_STATE] = {"record": self.record().as_dict(), "heads": shapes}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model of a checkpoint, unless it is there already.

        Raises:
            InputError: If it is no checkpoint of a merged model, or one of other tasks or sites.
        """
        state = checkpoint.get(_STATE)
        if not isinstance(state, Mapping):
            raise InputError(
                f"checkpoint: must be one of a {type(self).__name__}; got one without its record. "
                "Load it with the class that wrote it."
            )
        record = CorrectionRecord.from_dict(state.get("record"), source="checkpoint")
        self.require_correction(record.correction, source="checkpoint")
        if self.merged is None:
            heads = empty_heads(self.architecture, state.get("heads", {}))
            self.merged = self.build(
                record.tasks,
                heads,
                record.sites,
                source="checkpoint",
                surgery_rank=record.surgery_rank,
            )
        elif self.network.surgery_rank != record.surgery_rank:
            raise InputError(
                f"checkpoint: must be of surgery_rank {self.network.surgery_rank}; got "
                f"{record.surgery_rank}. Give surgery_rank={record.surgery_rank}."
            )
        elif (self.tasks, self.network.sites) != (record.tasks, record.sites):
            raise InputError(
                f"checkpoint: must be of the tasks {', '.join(self.tasks)} and their "
                f"{len(self.network.sites)} sites; got {', '.join(record.tasks)} and "
                f"{len(record.sites)} sites. Give the experts and sites that it was made with."
            )
        self._num_classes = list(record.num_classes)
        self._merge_record = record.merge
        self.solved = record.solved

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights after setting the model up.

        A fit in forked processes (a notebook's) hands its weights to a process that has not.
        """
        if self.merged is None:
            self.configure_model()
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def require_correction(self, name: str, *, source: str) -> None:
        """Check that corrections were made by this module's class of corrections.

        Raises:
            InputError: If they were made by another one.
        """
        own = qualified_name(self.correction)
        if name != own:
            raise InputError(
                f"{source}: was corrected by {name}; got correction={own}. Pass the class {name}."
            )

    def save_corrected(
        self, path: str | Path, *, replace: bool = False, configuration: str | None = None
    ) -> Path:
        """Write merged weights, heads and corrections as a folder without pickles.

        On several ranks every one calls it, and the first one writes.

        Args:
            path: The folder.
            replace: Whether an existing non-empty folder may be replaced.
            configuration: The YAML with which ``lit-merge correct`` makes it again, to record.

        Returns:
            The path.

        Raises:
            InputError: If the folder may not be written.
        """
        reshard(self.network)
        # Here, as all ranks have to come together where tensors are sharded.
        heads = self.network.head_state()
        whole_heads = {task: _whole(own) for task, own in heads.items()}
        weights = _whole(self.network.shared_state())
        corrections = _whole(self.network.corrections.state_dict())
        surgery = _whole(self.network.final_feature.state_dict())
        if rank() == 0:
            write_corrected(
                path,
                weights=weights,
                heads=whole_heads,
                corrections=corrections,
                surgery=surgery,
                record=dataclasses.replace(self.record(), configuration=configuration),
                replace=replace,
            )
        barrier()
        return Path(path)


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in tensors.items()}
