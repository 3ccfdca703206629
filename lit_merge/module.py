"""MergeModule: merge experts, repair the merge in closed form, refine the repair in a short fit.

What a fit does, on one device or many::

    module = MergeModule(net, {"svhn": "runs/svhn", "dtd": "runs/dtd"}, base="runs/base")
    trainer.fit(module, datamodule=MultiTaskDataModule({"svhn": ..., "dtd": ...}))
    module.save_corrected("corrected/")

1. ``configure_model`` merges the experts' files (or loads a merged folder) into a copy of the
   network, with a head per task and a correction per task and site.
2. When the fit starts, each expert runs once over its own task's examples: its activation
   statistics set the corrections (TACT), its logits become the targets. Then the expert is dropped.
3. Each training batch mixes the tasks and goes through the merged network once. Only the
   corrections learn. To keep the best of several epochs, use Lightning's ModelCheckpoint on
   ``val/nll``; for the closed form alone, set ``max_steps=0``.

Checkpoints hold merged weights, heads and corrections; they load with ``weights_only=True`` where
the experts are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_merge.checkpoint import open_state_dict
from lit_merge.correction import RescaleShift, fit_tact
from lit_merge.distributed import broadcast
from lit_merge.errors import InputError
from lit_merge.merged.classifier import MergedClassifier
from lit_merge.merged.distillation import distillation_loss
from lit_merge.merged.expert_lessons import (
    ExpertLessons,
    Surroundings,
    lessons_bar,
    require_merged_expert,
    stored_statistics,
)
from lit_merge.merged.folder import MergedParts, open_merged
from lit_merge.merged.network import CorrectionFactory, choose_sites, heads_in
from lit_merge.methods import GradientMatching, MergeMethod
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import merge_in_memory
from lit_merge.streaming.provenance import method_settings
from lit_merge.tasks import MultiTaskDataModule
from lit_merge.tasks.classification import ClassificationModule
from lit_merge.tasks.classification_metrics import weighted_mean
from lit_merge.tasks.mixed_batches import MergeBatch
from lit_merge.tasks.schedule import with_cosine

ClosedForm = Literal["tact", "none"]
Statistics = Literal["calibration", "stored"]
Teacher = Literal["experts", "labels"]


class MergeModule(MergedClassifier):
    """A merged model with per-task corrections that are fitted on a few examples.

    Give either ``merged``, a folder that ``lit_merge.merge`` or :meth:`save_corrected` has written,
    or ``experts`` (with ``base``), which are merged when the module is set up. With ``merged``, the
    experts are needed only where they teach. Without either, the module waits for a checkpoint.

    Args:
        model: The architecture: a network that gives logits (or an object with ``logits``), or a
            :class:`~lit_merge.tasks.classification.ClassificationModule`, whose network is taken.
            It is copied and stays as it is.
        experts: Path of each task's expert, by task name.
        base: Path of the model that the experts were fine-tuned from; None for methods without.
        method: How to merge.
        merged: A merged or corrected folder, instead of merging.
        correction: Makes a correction module from (number of tasks, number of channels).
        sites: Where to correct; see :func:`lit_merge.correction.find_sites`. A corrected folder
            brings its own.
        closed_form: "tact" sets the corrections from activation statistics when the first fit
            starts; "none" begins at the identity.
        statistics: Where the experts' statistics come from: "calibration" runs each expert on the
            calibration examples, "stored" takes its activations.safetensors.
        teacher: What the fit learns from: the "experts"' logits, or the "labels".
        temperature: Softens the experts' logits; 1 takes them as they are.
        lr: Adam's largest learning rate; falls to zero over the fit as a cosine.
        calibration_examples: Training examples per task for the closed form, as one batch.
        policy: What happens to tensors that are no ordinary weights.
        base_hessian: Hessian of the base, for methods that use one.
        seed: Seed of the choice of calibration examples.

    Raises:
        InputError: If an option is out of range; later, if files, tasks and network do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: dict[str, str] | None = None,
        base: str | None = None,
        method: MergeMethod = GradientMatching(),  # noqa: B008 - frozen
        merged: str | None = None,
        correction: CorrectionFactory = RescaleShift,
        sites: str | list[str] = "auto",
        closed_form: ClosedForm = "tact",
        statistics: Statistics = "calibration",
        teacher: Teacher = "experts",
        temperature: float = 2.0,
        lr: float = 1e-2,
        calibration_examples: int = 256,
        policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
        base_hessian: str | None = None,
        seed: int = 0,
    ) -> None:
        network = model.model if isinstance(model, ClassificationModule) else model
        super().__init__(network, correction=correction)
        # Primitives, and nothing of where the experts are: a checkpoint must load elsewhere, with
        # weights_only=True.
        self.save_hyperparameters(
            {
                "sites": sites,
                "closed_form": closed_form,
                "statistics": statistics,
                "teacher": teacher,
                "temperature": temperature,
                "lr": lr,
                "calibration_examples": calibration_examples,
                "seed": seed,
            }
        )
        self.experts = dict(experts or {})
        self.base = base
        self.method = method
        self.source = merged
        self.sites = sites
        self.closed_form = closed_form
        self.statistics = statistics
        self.teacher = teacher
        self.temperature = temperature
        self.lr = lr
        self.calibration_examples = calibration_examples
        self.policy = policy
        self.base_hessian = base_hessian
        self.seed = seed
        self._check_options()
        self.train_losses = nn.ModuleList()
        self._targets: dict[int, Tensor] = {}

    def _check_options(self) -> None:
        for name, value, known in (
            ("closed_form", self.closed_form, get_args(ClosedForm)),
            ("statistics", self.statistics, get_args(Statistics)),
            ("teacher", self.teacher, get_args(Teacher)),
        ):
            if value not in known:
                raise InputError(
                    f"{name}: must be one of {', '.join(known)}; got {value!r}. Choose one."
                )
        for name, number in (("temperature", self.temperature), ("lr", self.lr)):
            if not (number > 0 and math.isfinite(number)):
                raise InputError(
                    f"{name}: must be positive and finite; got {number}. Leave the default."
                )
        if self.calibration_examples < 2:
            raise InputError(
                "calibration_examples: must be at least 2, for a variance; got "
                f"{self.calibration_examples}. 64 are enough."
            )
        if self.method.masks and self.experts and self.source is None:
            raise InputError(
                f"method: must give one model for all tasks; got {type(self.method).__name__}, "
                "which gives each its own. Merge into a folder, and evaluate or export that."
            )
        if self.source is not None and self.base is not None:
            raise InputError(
                f"base: must be left out where merged is given; got {self.base!r}. The folder "
                f"{self.source} holds what the base gave."
            )

    @classmethod
    def from_folder(cls, path: str | Path, model: nn.Module, **options: Any) -> MergeModule:
        """Return a module with the model of a merged or corrected folder, ready to predict.

        Args:
            path: What ``lit_merge.merge`` or :meth:`save_corrected` has written.
            model: The architecture.
            **options: Further arguments of the class.

        Raises:
            InputError: If it is no such folder, or does not fit the network.
        """
        module = cls(model, merged=str(path), **options)
        module.configure_model()
        return module.eval()

    def configure_model(self) -> None:
        """Merge, or load what was merged; does nothing the second time, or before a checkpoint.

        Raises:
            InputError: If the files are not as they should be, or do not fit the network.
        """
        if self.merged is not None:
            return
        if self.source is not None:
            with open_merged(self.source) as parts:
                parts.require_one_model(self.source)
                self._set_up(parts, source=self.source)
        elif self.experts:
            # Every process merges for itself: the results are equal, and no files are shared.
            made = merge_in_memory(
                self.base,
                self.experts,
                self.method,
                policy=self.policy,
                base_hessian=self.base_hessian,
            )
            record = {
                "tasks": list(made.tasks),
                "method": method_settings(self.method),
                "traces": dict(made.traces),
                "notes": list(made.notes),
                "warnings": list(made.warnings),
            }
            weights = open_state_dict(made.state, path=f"merge of {', '.join(made.tasks)}")
            parts = MergedParts(weights, made.heads, made.tasks, record)
            self._set_up(parts, source="experts")

    def _set_up(self, parts: MergedParts, *, source: str) -> None:
        if self.experts and set(self.experts) != set(parts.tasks):
            raise InputError(
                f"experts: must be those that were merged, {', '.join(parts.tasks)}; got "
                f"{', '.join(self.experts)}. Name each of them."
            )
        heads = heads_in(self.architecture, parts.weights, parts.heads)
        if parts.record is not None:
            self.require_correction(parts.record.correction, source=source)
            sites = parts.record.sites
        else:
            names = dict.fromkeys(name for own in heads.values() for name in own)
            sites = choose_sites(self.architecture, self.sites, tuple(names))
        merged = self.build(parts.tasks, heads, sites, source=source)
        merged.load_shared(parts.weights)
        if parts.record is not None and parts.corrections is not None:
            merged.load_corrections(parts.corrections)
            self.calibrated.fill_(int(parts.record.calibrated))
        self._merge_record = parts.merge
        self.merged = merged

    def on_fit_start(self) -> None:
        """Set the corrections in closed form, and ask the experts for their logits.

        Raises:
            InputError: If the data module's tasks are not the experts', or an expert is missing,
                does not fit, or gives outputs that are not finite.
        """
        data = self.meet_data(every_task=True)
        self.train_losses = nn.ModuleList(weighted_mean() for _ in self.tasks).to(self.device)
        learns = self.trainer.max_steps != 0 and self.trainer.max_epochs != 0
        calibrates = self.closed_form == "tact" and not self.calibrated
        asks = learns and self.teacher == "experts"
        for name in self.tasks if learns and self.teacher == "labels" else ():
            if data.tasks[name].unlabelled:
                raise InputError(
                    f'teacher: must be "experts" for the unlabelled task {name!r}; got "labels". '
                    'Use teacher: "experts".'
                )
        if (calibrates or asks) and not self.experts:
            raise InputError(
                "experts: must be given for a fit that learns from them; got none. Give the path "
                'of each expert, or use teacher: "labels" and closed_form: "none".'
            )
        self._targets = {}
        seen = sum(len(data.examples(task, "train")) for task in self.tasks) if asks else 0
        shown = asks and self.trainer.is_global_zero and bool(self.trainer.progress_bar_callback)
        with lessons_bar(seen, shown=shown) as advance:
            for index, task in enumerate(self.tasks if calibrates or asks else ()):
                self._learn_from(
                    task, index, data, calibrates=calibrates, asks=asks, advance=advance
                )
        if calibrates:
            # Bit for bit the same on every rank, whatever their devices' orders of summation.
            corrections = self.network.corrections
            state = {name: value.cpu() for name, value in corrections.state_dict().items()}
            corrections.load_state_dict(broadcast(state))
        self.calibrated.fill_(1)

    def _learn_from(
        self,
        task: str,
        index: int,
        data: MultiTaskDataModule,
        *,
        calibrates: bool,
        asks: bool,
        advance: Callable[[int], None],
    ) -> None:
        """Load one expert, take what it can teach, and drop it."""

        def batches() -> Iterator[Any]:
            for inputs, labels in data.batches(task):
                yield inputs
                advance(len(labels))

        network, path = self.network, self.experts[task]
        require_merged_expert(path, task=task, merge=self._merge_record)
        surroundings = Surroundings.of(self)
        expert = None
        if asks or self.statistics == "calibration":
            expert = ExpertLessons(
                self.architecture,
                path,
                task=task,
                head_names=network.head_names,
                surroundings=surroundings,
            )
        if calibrates:
            inputs = surroundings.move(
                data.calibration_batch(
                    task, num_examples=self.calibration_examples, seed=self.seed
                )[0]
            )
            if expert is None or self.statistics == "stored":
                statistics = stored_statistics(path, network.sites, task=task)
            else:
                statistics = expert.statistics(inputs, network.sites)
            fit_tact(
                network.network,
                network.corrections,
                network.context,
                task=index,
                inputs=inputs,
                expert_statistics=statistics,
                forward=surroundings.run,
            )
        if asks and expert is not None:
            width = self._num_classes[index]
            self._targets[index] = expert.logits(batches(), num_classes=width)

    def training_step(self, batch: MergeBatch, batch_idx: int) -> Tensor:
        """Return the loss of a mixed batch, normalised over the valid examples of all ranks."""
        losses = self._losses(batch)
        own = losses.sum()
        sums = torch.stack([own.detach(), batch.valid.sum().to(own)])
        total, count = cast("Tensor", self.trainer.strategy.reduce(sums, reduce_op="sum")).unbind()
        if not bool(torch.isfinite(total)):
            raise InputError(
                f"lr: must keep the loss finite; got NaN or infinity at step {self.global_step} "
                f"with lr={self.lr}. Lower lr, or use a wider precision."
            )
        task = self.own_tasks(batch)
        for index in range(len(self.tasks)):
            weights = ((task == index) & batch.valid).to(losses)
            self._train_metric(index).update(losses.detach(), weights)
        self.log("train/loss", total / count, prog_bar=True, batch_size=len(losses))
        # The gradients are averaged over the ranks: W times this rank's share of the sum makes them
        # those of one process with all examples. The zero keeps corrections whose layer did not run
        # in the graph, where DistributedDataParallel looks for them.
        idle = torch.stack([p.sum() for p in self.network.corrections.parameters()]).sum() * 0.0
        return own * (self.trainer.world_size / count) + idle

    def _losses(self, batch: MergeBatch) -> Tensor:
        """Return each example's loss, ``[B]``, zero where it is not valid."""
        task = self.own_tasks(batch)
        logits = self.forward(batch.inputs, task).float()
        losses = logits.new_zeros(len(task))
        for index in range(len(self.tasks)):
            rows = (task == index).nonzero().squeeze(1)
            own = self.own_logits(logits, rows, index)
            if self.teacher == "experts":
                targets = self._targets[index][batch.index[rows]]
                loss = distillation_loss(own, targets, temperature=self.temperature)
            else:
                loss = F.cross_entropy(own, batch.labels[rows], reduction="none")
            losses = losses.index_put((rows,), loss)
        return losses * batch.valid

    def on_train_epoch_end(self) -> None:
        """Log each task's mean loss over the epoch."""
        for index, name in enumerate(self.tasks):
            metric = self._train_metric(index)
            loss = metric.compute()
            metric.reset()
            if loss.isfinite():  # it is NaN for a task without an example in this epoch
                self.log(f"train/{name}/loss", loss, sync_dist=True)

    def on_fit_end(self) -> None:
        """Drop the experts' logits."""
        self._targets = {}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam on the corrections, with a cosine to zero."""
        parameters = self.network.corrections.parameters()
        # Some numbers have no gradient but rounding (the shift of attention keys, which softmax
        # ignores; all, once the experts are met). With Adam's usual eps they would wander by lr.
        return with_cosine(self, torch.optim.Adam(parameters, lr=self.lr, eps=1e-6))

    def _train_metric(self, index: int) -> MeanMetric:
        return cast("MeanMetric", self.train_losses[index])
