"""The learned fit of a merged model: the loss of a mixed batch, what it trains, and the best of it.

A batch that mixes the tasks goes through the network once. Its loss is the mean over the valid
examples of all ranks, so that W processes make the step of one. At step 0, every so many steps and
at the end the loss on the held-out examples is measured, and the fit ends with the state that was
best there: it does not lose to its own initialisation. Which experts teach, and what the closed
form does before, is :class:`~lit_merge.module.MergeModule`'s part.

Note:
    A task with fewer than ten training examples holds none out, and without any held-out example
    at all the last state stays. A handful of examples decides little: it is noise then that
    chooses between states. A model that was corrected before may have seen them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_merge.correction import Site
from lit_merge.distributed import is_dtensor, reshard
from lit_merge.errors import InputError
from lit_merge.merged.classifier import MergedClassifier
from lit_merge.merged.elastic import ElasticPenalty
from lit_merge.merged.expert_lessons import Surroundings
from lit_merge.merged.final_feature import only_feature
from lit_merge.merged.fit_optimizer import fit_optimizer
from lit_merge.merged.fit_settings import FitSettings
from lit_merge.merged.holdout import BestState, choose_held_out, held_out_batches
from lit_merge.merged.mixup import Mixup
from lit_merge.merged.network import CorrectionFactory, MergedNetwork
from lit_merge.merged.targets import Targets
from lit_merge.merged.trained_batch_norm import running_statistics, share_running_statistics
from lit_merge.tasks import MultiTaskDataModule
from lit_merge.tasks.mixed_batches import MergeBatch
from lit_merge.tasks.schedule import with_cosine

RISING_STEPS = 20
"""Steps over which the learning rate rises: the first ones of Adam go in any direction."""

_STATE = "lit_merge_fit"
_COEFFICIENTS = "merged.coefficients.weight"


class LearnedClassifier(MergedClassifier):
    """A merged network whose corrections, and what else the settings say, are trained.

    Args:
        architecture: The network that the experts were trained with; copied, never changed.
        correction: Makes a correction module from (number of tasks, number of channels).
        fit: What is learned, and how.
        seed: Seed of the choice of held-out examples.

    Attributes:
        anchored: Whether the batch norms of the fit that is under way have been made ready for it.
    """

    def __init__(
        self,
        architecture: nn.Module,
        *,
        correction: CorrectionFactory,
        fit: FitSettings,
        seed: int,
    ) -> None:
        super().__init__(architecture, correction=correction)
        self.fit = fit
        self.seed = seed
        self.targets: Targets | None = None
        self.mixup: Mixup | None = None
        self.elastic: ElasticPenalty | None = None
        self.best = BestState()
        self._held_out: list[MergeBatch] = []
        self._sums = torch.empty(0)
        self._keeps_idle = False
        self.anchored = False

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
        """Return a network, see the base class, whose trained parameters ask for gradients."""
        if self.fit.surgery_rank and surgery_rank not in (0, self.fit.surgery_rank):
            raise InputError(
                f"surgery_rank: must be that of {source}, {surgery_rank}; got "
                f"{self.fit.surgery_rank}. Leave it out."
            )
        merged = super().build(
            tasks,
            heads,
            sites,
            source=source,
            surgery_rank=surgery_rank or self.fit.surgery_rank,
            coefficients=self.fit.coefficients == "layer",
        )
        if self.fit.feature_weight:
            merged.final_feature.require("feature_weight", self.architecture)
        if self.fit.batch_norm_mode == "train" and not merged.shared_batch_norms():
            raise InputError(
                'batch_norm_mode: must not be "train" for a network without batch norms that '
                f"learn; got a {type(self.architecture).__name__}. Leave it out."
            )
        if self.fit.trainable == "all":
            _train(merged.shared_parameters())
        if self.fit.heads == "refit":
            heads_found = merged.head_parameters()
            if not heads_found:
                merged.final_feature.require("heads", self.architecture)
            _train(heads_found)
        return merged

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """All that is trained, by name; each rank's part where it is sharded."""
        reshard(self.network)
        return {n: p for n, p in self.network.named_parameters() if p.requires_grad}

    @property
    def fitted(self) -> dict[str, Tensor]:
        """All that a fit changes, by name: what is learned, and running statistics."""
        statistics = running_statistics(self.network) if self.fit.trains_batch_norm else {}
        return {**self.learned, **statistics}

    def require_synchronised(self) -> None:
        """Check that the strategy brings the gradients of all ranks together.

        Raises:
            InputError: If it leaves that to modules that are sharded, which these are not; if they
                are, and an elastic penalty is wanted.
        """
        sharded = any(is_dtensor(p) for p in self.learned.values())
        if self.device_mesh is not None and self.trainer.world_size > 1 and not sharded:
            raise InputError(
                "strategy: must bring the gradients of all processes together; got "
                f"{type(self.trainer.strategy).__name__}, which leaves that to sharded modules. "
                'Use strategy="ddp".'
            )
        if sharded and self.fit.elastic:
            raise InputError(
                f"elastic: must be 0 where weights are sharded; got {self.fit.elastic}. Use "
                'strategy="ddp".'
            )

    def hold_out(self, data: MultiTaskDataModule) -> None:
        """Hold out examples, so that neither the closed form nor the fit sees them."""
        sizes = {name: len(data.examples(name, "train")) for name in data.task_names}
        held_out = choose_held_out(sizes, self.fit.holdout, seed=self.seed)
        data.hold_out(held_out)
        self._held_out = held_out_batches(
            data, held_out, rank=self.global_rank, world_size=self.trainer.world_size
        )

    def start_learning(self) -> None:
        """Get ready for the first step; the targets and the closed form are there already."""
        self._sums = torch.zeros(len(self.tasks), 2, dtype=torch.float64, device=self.device)
        # FSDP2 takes parameters without gradients as they are.
        sharded = any(is_dtensor(p) for p in self.learned.values())
        self._keeps_idle = self.trainer.world_size > 1 and not sharded

    def training_step(self, batch: MergeBatch, batch_idx: int) -> Tensor:
        """Return the loss of a mixed batch, normalised over the valid examples of all ranks."""
        # One example has no statistics to normalise by.
        several = self.fit.trains_batch_norm and len(batch.task) > 1
        with self.network.normalising() if several else nullcontext():
            losses = self._losses(batch, mixup=self.mixup)
        own = losses.sum()
        sums = torch.stack([own.detach(), batch.valid.sum().to(own)])
        total, count = cast("Tensor", self.trainer.strategy.reduce(sums, reduce_op="sum")).unbind()
        if not bool(torch.isfinite(total)):
            raise InputError(
                f"lr: must keep the loss finite; got NaN or infinity at step {self.global_step} "
                f"with lr={self.fit.lr}. Lower lr, or use a wider precision."
            )
        self._count_losses(self._sums, batch, losses)
        self.log("train/loss", total / count, prog_bar=True, batch_size=len(losses))
        # The gradients are averaged over the ranks: W times this rank's share of the sum makes them
        # those of one process with all examples.
        loss = own * (self.trainer.world_size / count)
        if self.elastic is not None:
            penalty = self.elastic(self.network.shared_parameters())
            self.log("train/elastic", penalty.detach(), batch_size=len(losses))
            loss = loss + penalty
        if self._keeps_idle:
            # Zero, to keep parameters whose layer did not run in the graph, where
            # DistributedDataParallel looks for them.
            loss = loss + torch.stack([p.sum() for p in self.learned.values()]).sum() * 0.0
        return loss

    def _losses(self, batch: MergeBatch, *, mixup: Mixup | None = None) -> Tensor:
        """Return each example's loss, ``[B]``, zero where it is not valid."""
        task = self.own_tasks(batch)
        inputs, answers = batch.inputs, None
        if mixup is not None:
            inputs = mixup.blend(inputs, task, step=self.global_step, rank=self.global_rank)
            answers = mixup.answers(inputs, task)
        watched = self.network.final_feature.reading() if self.fit.feature_weight else nullcontext()
        with watched as seen:
            logits = self.forward(inputs, task).float()
        if self.fit.teacher == "experts":
            assert self.targets is not None, "asked for when the fit started"
            losses = self.targets.loss(
                logits,
                only_feature(seen, len(logits)) if seen is not None else None,
                answers or self.targets.at(task, batch.index),
                task,
                temperature=self.fit.temperature,
                feature_weight=self.fit.feature_weight,
            )
        else:
            classes = torch.tensor([n or logits.shape[-1] for n in self._num_classes])
            classes = classes.to(task)[task]
            places = torch.arange(logits.shape[-1], device=logits.device)
            known = places < classes.view(-1, *[1] * (logits.ndim - 1))
            terms = F.cross_entropy(
                logits.masked_fill(~known, -torch.inf).flatten(0, -2),
                batch.labels.flatten(),
                reduction="none",
            )
            losses = terms.view(len(task), -1).mean(1)  # over the tokens of a language task
        return losses * batch.valid

    def _count_losses(self, sums: Tensor, batch: MergeBatch, losses: Tensor) -> None:
        """Add each task's loss and number of valid examples to sums, ``[T, 2]``."""
        counted = torch.stack([losses.detach(), batch.valid.to(losses)], dim=1)
        sums.index_add_(0, self.own_tasks(batch), counted.to(sums))

    @torch.no_grad()
    def holdout_losses(self) -> dict[str, float]:
        """Return the mean loss on each task's held-out examples. Collective.

        Tasks that hold none out are left out.
        """
        sums = torch.zeros_like(self._sums)
        surroundings = Surroundings.of(self)
        for batch in self._held_out:
            moved = surroundings.move(batch)
            with surroundings.autocast():
                losses = self._losses(moved)
            self._count_losses(sums, moved, losses)
        sums = cast("Tensor", self.trainer.strategy.reduce(sums, reduce_op="sum"))
        by_task = zip(self.tasks, sums.tolist(), strict=True)
        return {task: loss / count for task, (loss, count) in by_task if count}

    def on_train_start(self) -> None:
        """Measure the initialisation on the held-out examples."""
        self._measure(log=True)

    def on_train_batch_end(self, outputs: Any, batch: MergeBatch, batch_idx: int) -> None:
        """Measure every so many steps; stop where patience is at its end."""
        self._measure(log=True)

    def on_train_epoch_end(self) -> None:
        """Log each task's mean loss over the epoch; measure if it is the last one."""
        sums = cast("Tensor", self.trainer.strategy.reduce(self._sums, reduce_op="sum"))
        self._sums = torch.zeros_like(self._sums)
        for name, (loss, count) in zip(self.tasks, sums.tolist(), strict=True):
            if count:
                self.log(f"train/{name}/loss", loss / count, sync_dist=True)
        if self._ends():
            self._measure(log=True, due=True)

    def on_train_end(self) -> None:
        """Take the best state, and give the weights what the coefficients say."""
        self._measure(log=False, due=True)
        self._share_statistics()
        self.best.restore(self.fitted)
        coefficients = self.network.coefficients
        if coefficients is not None and coefficients.active:
            self.move_along_task_vectors()
            coefficients.take()
            nn.init.zeros_(coefficients.weight)

    def on_fit_end(self) -> None:
        """Drop the experts and their outputs, the penalty and the held-out examples."""
        self.targets = self.mixup = self.elastic = None
        self._held_out = []
        self.anchored = False
        self.best = BestState()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, MultiTaskDataModule):
            data.hold_out({})

    @torch.no_grad()
    def move_along_task_vectors(self, *, sign: float = 1.0) -> None:
        """Add to the shared weights what the coefficients say; −1 takes it away."""
        coefficients = self.network.coefficients
        assert coefficients is not None, "built for it"
        parameters = self.network.shared_parameters()
        for name, value in coefficients.moved(parameters, sign=sign).items():
            parameters[name].copy_(value)

    def _measure(self, *, log: bool, due: bool = False) -> None:
        step, best = self.global_step, self.best
        if not self._any_held_out or best.measured == step:
            return
        if not due and step % self.fit.holdout_every:
            return
        self._share_statistics()
        losses = self.holdout_losses()
        loss = fmean(losses.values())
        best.note(loss, step=step, state=self.fitted)
        if log:
            by_task = {f"holdout/{task}/loss": value for task, value in losses.items()}
            self.log_dict({**by_task, "holdout/loss": loss}, sync_dist=True)
        if self.fit.patience and best.waited >= self.fit.patience:
            self.trainer.should_stop = True

    def _share_statistics(self) -> None:
        if self.fit.trains_batch_norm and self.trainer.world_size > 1:
            reduce = cast("Callable[[Tensor], Tensor]", self.trainer.strategy.reduce)
            share_running_statistics(self.network, reduce)

    @property
    def _any_held_out(self) -> bool:
        # Every rank has equally many batches.
        return bool(self._held_out)

    def _ends(self) -> bool:
        trainer = self.trainer
        steps, epochs = trainer.max_steps, trainer.max_epochs
        return (
            trainer.should_stop
            or 0 <= steps <= self.global_step
            or (epochs is not None and 0 <= epochs <= self.current_epoch + 1)
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with a cosine to zero; none for a fit of the closed form alone.

        Raises:
            InputError: If there is nothing to learn.
        """
        if 0 in (self.trainer.max_steps, self.trainer.max_epochs):
            return []
        optimizer = fit_optimizer(self.network, self.learned, self.fit)
        return with_cosine(self, optimizer, first_steps=RISING_STEPS)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the record and, in a fit, the best state; the weights are those that predict."""
        super().on_save_checkpoint(checkpoint)
        state: dict[str, Any] = {"anchored": self.anchored}
        if self.best.measured >= 0:
            state["best"] = self.best.state_dict()
        coefficients = self.network.coefficients
        if coefficients is not None:
            tensors = checkpoint["state_dict"]
            # A module without coefficients, and without experts, must be able to load it.
            state["coefficients"] = tensors.pop(_COEFFICIENTS)
            if coefficients.active:
                shared = self.network.shared_state()
                tensors |= {f"merged.network.{name}": value for name, value in shared.items()}
        checkpoint[_STATE] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model of a checkpoint, unless it is there already, and take its best state."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get(_STATE, {})
        self.anchored = bool(state.get("anchored", False))
        self.best = BestState()
        if "best" in state:
            self.best.load_state_dict(state["best"])
        coefficients = self.network.coefficients
        if coefficients is not None:
            found = state.get("coefficients", torch.zeros_like(coefficients.weight))
            checkpoint["state_dict"][_COEFFICIENTS] = found


def _train(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
