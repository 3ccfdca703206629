"""MergeModule: merge experts, repair the merge in closed form, refine the repair in a short fit.

What a fit does, on one device or many::

    module = MergeModule(net, {"svhn": "runs/svhn", "dtd": "runs/dtd"}, base="runs/base")
    trainer.fit(module, datamodule=MultiTaskDataModule({"svhn": ..., "dtd": ...}))
    module.save_corrected("corrected/")

1. ``configure_model`` merges the experts' files (or loads a merged folder) into a copy of the
   network, with a head per task and a correction per task and site.
2. When the fit starts, each expert runs once over its own task's examples: its activation
   statistics set the corrections (TACT), its logits become the targets. Then it is dropped.
3. Each training batch mixes the tasks and goes through the merged network once. Only the
   corrections learn, unless ``trainable`` and others say more. The fit ends with the state that was
   best on held-out examples; for the closed form alone, set ``max_steps=0``.

Checkpoints hold merged weights, heads and corrections; they load with ``weights_only=True`` where
the experts are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_merge.correction import ChannelStatistics, RescaleShift, Site
from lit_merge.errors import InputError
from lit_merge.least_squares import LeastSquares
from lit_merge.merged.closed_form import (
    BatchNorm,
    ClosedForm,
    ClosedFormSettings,
    Sources,
    Statistics,
    apply_closed_form,
    calibration_batches,
    solving_bar,
)
from lit_merge.merged.coefficients import read_task_vectors
from lit_merge.merged.elastic import read_elastic, read_merged_gaussian
from lit_merge.merged.expert_lessons import (
    ExpertLessons,
    Surroundings,
    ask_experts,
    require_merged_expert,
    stored_statistics,
)
from lit_merge.merged.fit_settings import (
    BatchNormMode,
    CoefficientFit,
    FitSettings,
    HeadFit,
    OptimizerName,
    Teacher,
    Trainable,
    require_lessons,
)
from lit_merge.merged.folder import MergedParts, open_merged
from lit_merge.merged.in_memory import merge_parts, require_one_model
from lit_merge.merged.learned import LearnedClassifier
from lit_merge.merged.network import NEED_NO_RUN, CorrectionFactory, choose_sites, heads_in
from lit_merge.merged.recorded_base import open_base
from lit_merge.merged.sharded import shard, whole_network
from lit_merge.merged.trained_batch_norm import anchor_shared
from lit_merge.methods import GradientMatching, MergeMethod
from lit_merge.parameters import ParametersPolicy
from lit_merge.tasks import MultiTaskDataModule
from lit_merge.tasks.classification import ClassificationModule


class MergeModule(LearnedClassifier):
    """A merged model with per-task corrections that are fitted on a few examples.

    Give either ``merged``, a folder that ``lit_merge.merge`` or :meth:`save_corrected` has written,
    or ``experts`` (with ``base``), which are merged when the module is set up. With ``merged``, the
    experts are needed only where they teach. Without either, the module waits for a checkpoint.

    Args:
        model: A network that gives logits (or an object with ``logits``), or a
            :class:`~lit_merge.tasks.classification.ClassificationModule` of one; it is copied.
        experts: Path of each task's expert, by task name.
        base: Path of the model that the experts were fine-tuned from; None for methods without.
        method: How to merge.
        merged: A merged or corrected folder, instead of merging.
        correction: Makes a correction module from (number of tasks, number of channels).
        sites: Where to correct; see :func:`lit_merge.correction.find_sites`. [] leaves nothing per
            task but heads. A corrected folder brings its own.
        least_squares: How to solve the layers for the experts' activations; None leaves them.
        closed_form: "tact" sets a scale and shift per task and channel when the first fit starts,
            from activation statistics (with least_squares, as these say), "repair" one for all
            tasks; "none" begins at the identity.
        batch_norm: "reestimate" measures the running statistics of BatchNorm anew before that.
        statistics: Where the experts' statistics come from: the "calibration" examples, the
            "stored" activations.safetensors, or "auto": that where it has all sites.
        teacher: What the fit learns from: the "experts"' logits, or the "labels".
        trainable: "scale_shift" learns the corrections alone, "all" the shared weights too.
        heads: "refit" learns the heads too.
        coefficients: "layer" learns how far each layer goes along each expert's task vector, on
            top of the merge. Needs the base, and memory for a model per task.
        batch_norm_mode: Whether BatchNorm normalises by each mixed batch in the fit ("train") or
            keeps its running statistics ("freeze"); "auto" trains it with trainable "all".
        surgery_rank: Rank of the representation surgery before the head; 0 for none.
        temperature: Softens the experts' logits; 1 takes them as they are.
        feature_weight: Weight of the squared distance to the expert's final feature (the input of
            its head), in units of that feature's variance on the task; 0 for none.
        mixup: Learns from blends of two examples of a task, shared by Beta(mixup, mixup), for which
            the experts are asked at every step and stay in memory; 0 for none.
        optimizer: What shared weights that are matrices learn by; all else learns by Adam.
        lr: Largest learning rate; falls to zero over the fit as a cosine.
        weights_lr: The same for shared weights and heads.
        elastic: Pulls the shared weights to the merged ones by the merge's ``hessian.safetensors``;
            loss per squared change of an average weight, 0 for none.
        holdout: Share of each task's training examples (of ten at least) that is only measured; the
            fit ends with the state that was best on it. 0 keeps the last state.
        holdout_every: Steps between two measurements.
        patience: Stop after so many measurements in a row without a new best; 0 for never.
        calibration_examples: Training examples per task for the closed form, shared by the ranks.
        calibration_batch_size: How many of them go through a model at a time; None for all.
        policy: What happens to tensors that are no ordinary weights.
        base_hessian: Hessian of the base, for methods that use one.
        seed: Seed of the choice of calibration and held-out examples.

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
        least_squares: LeastSquares | None = None,
        closed_form: ClosedForm = "tact",
        batch_norm: BatchNorm = "keep",
        statistics: Statistics = "calibration",
        teacher: Teacher = "experts",
        trainable: Trainable = "scale_shift",
        heads: HeadFit = "fixed",
        coefficients: CoefficientFit = "none",
        batch_norm_mode: BatchNormMode = "auto",
        surgery_rank: int = 0,
        temperature: float = 2.0,
        feature_weight: float = 0.0,
        mixup: float = 0.0,
        optimizer: OptimizerName = "muon",
        lr: float = 1e-2,
        weights_lr: float = 3e-3,
        elastic: float = 0.0,
        holdout: float = 0.1,
        holdout_every: int = 25,
        patience: int = 0,
        calibration_examples: int = 256,
        calibration_batch_size: int | None = None,
        policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
        base_hessian: str | None = None,
        seed: int = 0,
    ) -> None:
        network = model.model if isinstance(model, ClassificationModule) else model
        fit = FitSettings(
            teacher=teacher,
            trainable=trainable,
            heads=heads,
            coefficients=coefficients,
            batch_norm_mode=batch_norm_mode,
            surgery_rank=surgery_rank,
            temperature=temperature,
            feature_weight=feature_weight,
            mixup=mixup,
            optimizer=optimizer,
            lr=lr,
            weights_lr=weights_lr,
            elastic=elastic,
            holdout=holdout,
            holdout_every=holdout_every,
            patience=patience,
        )
        super().__init__(network, correction=correction, fit=fit, seed=seed)
        # Primitives, and nothing of where the experts are: a checkpoint must load elsewhere, with
        # weights_only=True.
        self.save_hyperparameters(
            {
                "sites": sites,
                "closed_form": closed_form,
                "least_squares": None if least_squares is None else asdict(least_squares),
                "batch_norm": batch_norm,
                "statistics": statistics,
                **asdict(fit),
                "calibration_examples": calibration_examples,
                "calibration_batch_size": calibration_batch_size,
                "seed": seed,
            }
        )
        self.experts = dict(experts or {})
        self.base = base
        self.method = method
        self.source, self.sites = merged, sites
        self.calibration = ClosedFormSettings(
            closed_form=closed_form,
            least_squares=least_squares,
            batch_norm=batch_norm,
            statistics=statistics,
            examples=calibration_examples,
            batch_size=calibration_batch_size,
            seed=seed,
        )
        self.policy, self.base_hessian = policy, base_hessian
        if self.experts and self.source is None:
            require_one_model(self.method)
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
            parts = merge_parts(
                self.base,
                self.experts,
                self.method,
                policy=self.policy,
                base_hessian=self.base_hessian,
            )
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
            sites = choose_sites(
                self.architecture, self.sites, tuple(names), example_inputs=self._two_examples()
            )
        rank = 0 if parts.record is None else parts.record.surgery_rank
        merged = self.build(parts.tasks, heads, sites, source=source, surgery_rank=rank)
        merged.load_shared(parts.weights)
        if parts.record is not None:
            self.calibrated.fill_(int(parts.record.calibrated))
            self.solved = parts.record.solved
        if parts.corrections is not None:
            merged.load_corrections(parts.corrections)
        if parts.surgery is not None:
            merged.load_surgery(parts.surgery)
        if self.device_mesh is not None:
            shard(merged, self.device_mesh)
        self._merge_record = parts.merge
        self.merged = merged

    def _two_examples(self) -> Any:
        """Return inputs that show where the sites are; None where no kind of site needs any."""
        data = getattr(self._trainer, "datamodule", None)
        wanted = (self.sites,) if isinstance(self.sites, str) else self.sites
        if not isinstance(data, MultiTaskDataModule) or not set(wanted) - NEED_NO_RUN:
            return None
        return data.calibration_batch(data.task_names[0], num_examples=2)[0]

    def on_fit_start(self) -> None:
        """Set the corrections in closed form, and ask the experts for their logits.

        Raises:
            InputError: If the data module's tasks are not the experts', or an expert is missing,
                does not fit, or gives outputs that are not finite.
        """
        self.network.keep_attached()
        data = self.meet_data(every_task=True)
        learns = self.trainer.max_steps != 0 and self.trainer.max_epochs != 0
        calibrates = self.calibration.does_something and not self.calibrated
        asks = learns and self.fit.teacher == "experts"
        moves = learns and self.fit.coefficients == "layer"
        if (calibrates or asks or moves) and not self.experts:
            raise InputError(
                "experts: must be given for a fit that learns from them; got none. Give the path "
                'of each expert, or use teacher: "labels" and closed_form: "none".'
            )
        if learns:
            require_lessons(self.fit, data)
            self.require_synchronised()
            self.hold_out(data)
        if calibrates:
            self._calibrate(data)
        self.calibrated.fill_(1)
        if learns:
            if self.fit.trains_batch_norm and not self.anchored:
                self._anchor(data)
            self.targets = self.mixup = self.elastic = None
            if asks:
                classes = dict(zip(self.tasks, self._num_classes, strict=True))
                shown = self._shows_progress
                self.targets, self.mixup = ask_experts(
                    self._expert, classes, data, fit=self.fit, seed=self.seed, shown=shown
                )
            if self.fit.elastic:
                weights = self.network.shared_parameters()
                self.elastic = read_elastic(self.source, weights, strength=self.fit.elastic)
            if moves:
                self._give_task_vectors()
            self.start_learning()

    def _calibrate(self, data: MultiTaskDataModule) -> None:
        """Set weights and corrections in closed form."""
        bar = solving_bar(shown=self._shows_progress)
        with bar as advance, whole_network(self.network, self.blank_network) as network:
            sources = Sources(
                expert=self._expert,
                stored=self._stored,
                precisions=self._precisions,
                data=data,
                surroundings=Surroundings.of(self),
                advance=advance,
            )
            self.solved = apply_closed_form(network, self.calibration, sources)

    def _anchor(self, data: MultiTaskDataModule) -> None:
        """Make batch norms ready for the fit; one that is resumed has them ready."""
        place = Surroundings.of(self)
        batches = calibration_batches(self.tasks, data, self.calibration, place)
        anchor_shared(self.network, self.blank_network, batches, place)
        self.anchored = True

    @property
    def _shows_progress(self) -> bool:
        return self.trainer.is_global_zero and bool(self.trainer.progress_bar_callback)

    def _stored(self, task: str, sites: Sequence[Site]) -> dict[str, ChannelStatistics] | None:
        """Return an expert's stored statistics; None where they may be missing, and are."""
        path = self.experts[task]
        require_merged_expert(path, task=task, merge=self._merge_record)
        must = self.calibration.statistics == "stored"
        return stored_statistics(path, sites, task=task, required=must)

    def _precisions(self) -> dict[str, Tensor]:
        names = list(self.network.shared_parameters())
        return read_merged_gaussian(self.source, names, option="least_squares.precision")[1]

    def _give_task_vectors(self) -> None:
        """Hand the experts' task vectors to the coefficients, for the length of the fit."""
        for task, path in self.experts.items():
            require_merged_expert(path, task=task, merge=self._merge_record)
        coefficients, shared = self.network.coefficients, self.network.shared_parameters()
        assert coefficients is not None, "built with the network"
        experts = [self.experts[task] for task in self.tasks]
        with open_base(self._merge_record, self.base, source=self.source) as base:
            coefficients.give(read_task_vectors(base, experts, shared))
        # The weights of a checkpoint have been moved already.
        self.move_along_task_vectors(sign=-1.0)

    def _expert(self, task: str) -> ExpertLessons:
        """Return a task's expert, loaded and ready to be asked."""
        path = self.experts[task]
        require_merged_expert(path, task=task, merge=self._merge_record)
        return ExpertLessons(
            self.architecture,
            path,
            task=task,
            head_names=self.network.head_names,
            surroundings=Surroundings.of(self),
        )
