"""Experts that arrive one after another, and one deployed model that goes with the time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_merge.callbacks.diagonal_hessian import DiagonalHessian
from lit_merge.callbacks.expert_callback import ExpertCallback, is_rehearsal
from lit_merge.callbacks.expert_folder import (
    describe,
    fingerprint_of,
    save_expert,
    weights_of,
    with_details,
)
from lit_merge.callbacks.input_grams import InputGrams
from lit_merge.callbacks.kronecker_factors import KroneckerFactors
from lit_merge.callbacks.temporal_rules import Deploy, Init, Rules
from lit_merge.callbacks.timeline import (
    Timeline,
    TimeStep,
    read_timeline,
    weights_fingerprint,
)
from lit_merge.checkpoint import alignment, load_into
from lit_merge.distributed import failing_together, rank, world_size
from lit_merge.errors import InputError
from lit_merge.expert import Expert, open_expert
from lit_merge.expert.sharded import WholeTensors
from lit_merge.heads import detect_heads
from lit_merge.methods import MergeMethod
from lit_merge.parameters import ParametersPolicy, plan_tensors
from lit_merge.sharding import copy_into
from lit_merge.streaming import merge
from lit_merge.streaming.unfinished import Process

_GATHERED_BY = {"hessian": DiagonalHessian, "gram": InputGrams, "kronecker": KroneckerFactors}


class TemporalMerging(ExpertCallback):
    """Train each expert from what came before, and deploy a model of all experts so far.

    Every fit with the same ``folder`` is a step of one timeline, in the same job or weeks later
    (:mod:`lit_merge.callbacks.timeline`). When it starts, the module's weights are replaced by
    those that the rule ``init`` names; those of the first fit stay, and are kept as the base. When
    it ends, ``<folder>/NN-<task>`` holds the expert and the deployed model, a merged folder. A fit
    that was interrupted does not count; one that is resumed from a checkpoint goes on with its
    step.

    The expert has curvature where a :class:`DiagonalHessian` is among the callbacks, before or
    after this one: it writes into the same folder. The deployed model of ``GradientMatching`` and
    ``FisherAverage`` is an expert itself: merging it with a later expert of the same base gives
    what merging all of them gives.

    Heads of the tasks are no part of what is passed on, unless ``policy.heads`` is "merge": a fit
    starts with the module's own head, and the deployed model has one per task.

    With several processes all must see the same folder.

    Example::

        temporal = TemporalMerging("runs/reviews", task="amazon", init="ema", deploy="ema")
        L.Trainer(callbacks=[temporal]).fit(module, datamodule)

    References:
        Dziadzio et al. (2024), arXiv:2412.06712.
    """

    def __init__(
        self,
        folder: str,
        *,
        task: str | None = None,
        init: Init = "ema",
        deploy: Deploy = "ema",
        decay: float = 0.5,
        method: MergeMethod | None = None,
        policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
        weights: Literal["last", "best"] = "last",
        replace: bool = False,
    ) -> None:
        """Configure the callback; all of it can stand in a YAML file.

        Args:
            folder: The timeline.
            task: Name of this step's task; None for its number.
            init: What a fit starts from: "fresh", the base; "last", the last expert; "ema", the
                running average of base and experts.
            deploy: What a step ends with: "last", its expert; "merge", all experts so far, merged
                by ``method``; "ema", the running average.
            decay: How much of the average before remains in the running average, in [0, 1).
            method: For "merge": how; None for ``GradientMatching()``.
            policy: What is done with heads, buffers and tensors that rules name.
            weights: Which weights are the expert: the "last", or those of the
                ``ModelCheckpoint``'s "best" checkpoint.
            replace: Whether a task that the timeline has already is done again. Its step and all
                later ones are removed when the fit starts.

        Raises:
            InputError: A value cannot be, or does not go with another.
        """
        super().__init__(
            weights=weights,
            max_examples=None,
            batch_size=None,
            output=None,
            replace=False,
            task=task,
            seed=0,
        )
        if "://" in folder:
            raise InputError(
                f"folder: must be a local folder; got {folder}. Copy the timeline afterwards."
            )
        if task is not None and (not task or task.startswith(".") or "/" in task):
            raise InputError(
                f"task: must be a name that a folder can have; got {task!r}. Use a plain word."
            )
        self.timeline = Path(folder)
        self.rules = Rules(init, deploy, decay, method, policy)
        self.again = replace
        self._before = Timeline(self.timeline, self.rules.settings())
        self._assigned: list[ExpertCallback] = []
        self._resumed_step: str | None = None

    @property
    def takes_shards(self) -> bool:
        """Parameters may be sharded: the experts are written whole."""
        return True

    @property
    def step(self) -> str:
        """Name of this step's task."""
        return self.task or f"{len(self._before.steps) + 1:02}"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the place in the timeline, and tell the other callbacks where the expert will be.

        Raises:
            InputError: The timeline has other rules or this task, or the fit could not end with a
                deployed model.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._resumed_step = None
        with failing_together():
            self._check_callbacks(trainer)
            self._before = self._place(read_timeline(self.timeline, self.rules.settings()))
            self.rules.deployment([*self._before.tasks, self.step]).check_tasks(
                [*self._before.tasks, self.step]
            )
        with failing_together():
            if trainer.is_global_zero and not is_rehearsal(trainer):
                self._before.remove_later()
                if self._before.base is not None:
                    self._before.write()
        self.output = str(self._before.step_folder(self.step) / "expert")
        self._assigned = [peer for peer in self._peers(trainer) if peer.output is None]
        for peer in self._assigned:
            peer.output = self.output

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the weights that the rule names, unless a checkpoint will be.

        Raises:
            InputError: The timeline's files are broken, or the module is another architecture.
        """
        if trainer.ckpt_path is not None:
            with failing_together():
                if rank() == 0:
                    self._before.check_files(self._before.base_folder)
        elif self._before.steps:
            self._load(pl_module)
            for peer in self._peers(trainer):
                peer.take_base(pl_module)
        elif not is_rehearsal(trainer):
            self._keep_base(pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that a checkpoint belongs to this step.

        Raises:
            InputError: It does not.
        """
        super().on_train_start(trainer, pl_module)
        place = self._before.step_folder(self.step).name
        if trainer.ckpt_path is not None and self._resumed_step != place:
            got = f"one of {self._resumed_step}" if self._resumed_step else "one of none"
            raise InputError(
                f"ckpt_path: must be a checkpoint of the step {place} of {self.timeline}; got "
                f"{got}. Start a new fit, whose weights the timeline chooses."
            )

    def look(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Need no data."""

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the expert, or join those that have measured it."""
        rules = {"number": len(self._before.steps) + 1, **self.rules.settings()}
        info = with_details(describe(module), **self.details(trainer), temporal=rules)
        self.save(trainer, module, info)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the deployed model, when all callbacks have written, and count the step.

        Raises:
            InputError: The experts cannot be merged, or another job has gone on with the timeline.
        """
        if self.written is None:  # a rehearsal, or a fit without any step
            return
        folder = self._before.step_folder(self.step)
        self._merge({**self._before.experts(), self.step: str(folder / "expert")}, folder)
        with failing_together():
            if rank() == 0:
                self._count(folder)
        rank_zero_info(f"TemporalMerging: deployed {folder / 'deployed'}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the other callbacks as they were."""
        for peer in self._assigned:
            peer.output = None
        self._assigned = []

    def state_dict(self) -> dict[str, Any]:
        """Return whose run it is, and which step of the timeline."""
        return {**super().state_dict(), "step": self._before.step_folder(self.step).name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the run of a checkpoint."""
        super().load_state_dict(state_dict)
        self._resumed_step = state_dict["step"]

    def _check_callbacks(self, trainer: pl.Trainer) -> None:
        peers = self._peers(trainer)
        for peer in peers:
            if peer.output is not None and peer not in self._assigned:
                raise InputError(
                    f"{type(peer).__name__}.output: must be left out beside TemporalMerging, which "
                    f"keeps the experts in {self.timeline}; got {peer.output}. Remove it."
                )
        method = self.rules.deployment([self.step])
        for kind, callback in _GATHERED_BY.items():
            if kind in method.needs and not any(isinstance(peer, callback) for peer in peers):
                raise InputError(
                    f"callbacks: must have a {callback.__name__} for {type(method).__name__}; got "
                    "none. Add it, or deploy with another method."
                )

    def _place(self, timeline: Timeline) -> Timeline:
        """Return the steps before this one."""
        if self.task is None or self.task not in timeline.tasks:
            return timeline
        if not self.again:
            raise InputError(
                f"task: must be none that {self.timeline} has had; got {self.task!r}. Give the "
                "step a name of its own, or replace: true to do it and all later ones again."
            )
        return timeline.before(self.task)

    def _keep_base(self, module: pl.LightningModule) -> None:
        """Write the weights that the first fit begins with. Collective."""
        with failing_together():
            if rank() == 0:  # the record first: it says that the folder is ours
                self._before.write()
        folder = self._before.base_folder
        save_expert(folder, module=module, info=describe(module), join=False, replace_folder=True)
        self._before = dataclasses.replace(self._before, base=fingerprint_of(module))
        with failing_together():
            if rank() == 0:
                self._before.write()

    def _load(self, module: pl.LightningModule) -> None:
        """Put the initial weights into the module. Collective."""
        start = self._before.start(self.rules.init)
        with failing_together():
            if rank() == 0:
                self._before.check_files(start)
        with failing_together():
            base, source = open_expert(self._before.base_folder), open_expert(start)
            try:
                own = _own_tensors(module, base, policy=self.rules.policy)
                load_into(module, source.weights, ignore=own, copy=copy_into)
            finally:
                base.close()
                source.close()
        rank_zero_info(f"TemporalMerging: starts from {start}")

    def _merge(self, experts: dict[str, str], folder: Path) -> None:
        """Merge the experts so far into the folders of this step. Collective."""
        # Started by torchrun, the processes share a merge; others do not know of each other.
        together = Process.from_environment().count == world_size()
        with failing_together():
            if not together and rank() != 0:
                return
            base = self._before.base_folder
            opened = open_expert(base)
            merges = self.rules.merges(tuple(experts), opened.weights)
            opened.close()
            for name, (method, policy) in merges.items():
                merge(base, experts, method, folder / name, policy=policy, progress=False)

    def _count(self, folder: Path) -> None:
        """Make the step part of the timeline."""
        if read_timeline(self.timeline, self.rules.settings()) != self._before:
            raise InputError(
                f"{self.timeline}: must have one job at a time; got another step while this fit "
                f"ran. Its expert is in {folder / 'expert'}: move it away, and fit again."
            )
        average = weights_fingerprint(folder / "average") if self.rules.averages else None
        expert, deployed = (weights_fingerprint(folder / part) for part in ("expert", "deployed"))
        step = TimeStep(self.step, expert, deployed, average)
        dataclasses.replace(self._before, steps=(*self._before.steps, step)).write()


def _own_tensors(module: nn.Module, base: Expert, *, policy: ParametersPolicy) -> tuple[str, ...]:
    """Return the names, in the base and in a module, of the tensors that the module keeps.

    Raises:
        InputError: The module is another architecture than the base.
    """
    weights = weights_of(module)
    names = alignment(weights, base.weights)
    given = WholeTensors({names[name]: tensor for name, tensor in weights.items()})
    given.path = Path(type(module).__name__)
    heads = {names[name] for name in detect_heads(module) if name in names}
    plans = plan_tensors(
        base.weights,
        {type(module).__name__: given},
        heads=heads | set(base.info.head_parameters),
        policy=policy,
    )
    own = {
        plan.name
        for plan in plans
        if plan.action == "per-task"
        or plan.name not in given
        or given.infos[plan.name].shape != plan.info.shape
    }
    return (*own, *(name for name, in_base in names.items() if in_base in own))
