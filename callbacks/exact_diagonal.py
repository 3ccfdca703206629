"""The diagonal curvature of a LightningModule, by one pass over the examples of all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_merge.callbacks.curvature_result import Curvature
from lit_merge.callbacks.pass_settings import PassSettings
from lit_merge.callbacks.training_loss import TrainingLoss, without_trace
from lit_merge.curvature import CurvatureWarning, PerExampleFisher, split_batch
from lit_merge.curvature.hutchinson import HessianDiagonal, without_negatives
from lit_merge.curvature.quality import Halves, Quality
from lit_merge.distributed import rank, sum_number, sum_over_ranks, world_size
from lit_merge.errors import InputError
from lit_merge.passes.data_pass import DataPass, require_seen
from lit_merge.passes.glimpse import require_same_data
from lit_merge.passes.on_device import on_device, to_device
from lit_merge.passes.unfinished import UnfinishedPass


@dataclass(frozen=True)
class ExactPass:
    """The curvature of every example, of a module in a Trainer.

    Attributes:
        trainer: Whose device, precision and progress bar are used.
        module: The module, in whatever mode; it is left as it was.
        loss: Its mean loss.
        settings: What is measured.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    loss: TrainingLoss
    settings: PassSettings

    def try_out(self, data: DataPass) -> None:
        """Compare two examples with a plain loop, as every exact pass begins. Collective.

        Raises:
            InputError: The loss or the module cannot be measured, or the ranks' data differ.
        """
        self._require_same(data)
        with self._measuring():
            self._probe(self._build(), data)

    def run(self, data: DataPass, *, unfinished: UnfinishedPass | None = None) -> Curvature:
        """Sum over the examples of all ranks. Collective.

        Each rank takes its own examples, without padding or repeats, and the ranks' sums are added
        up once, at the end. The probe comes first, on the weights as they now are: on untrained
        ones (a head that is still zero) it may have compared zeros with zeros.

        Args:
            data: This rank's share of the examples; it may have none.
            unfinished: Where to write the sums every so often, and where to go on if there are any.

        Raises:
            InputError: On every rank, when one of them cannot go on.
        """
        self._require_same(data)
        if unfinished is not None:
            unfinished.require_same()
        with self._measuring():
            estimator = self._build()
            notes = self._probe(estimator, data)
            halves = Halves(estimator.sizes, seed=self.settings.seed)
            if unfinished is not None:
                _go_on(unfinished, estimator, halves)
            self._add_all(data, estimator, halves, unfinished)
            here = self._here(estimator, halves)
            del estimator  # and with it its own copy of the sums
        counts = (self._count(halves.num_examples[0]), self._count(halves.num_examples[1]))
        seen = sum(counts)
        require_seen(seen)
        sums, both = self._over_ranks(*here)
        total = max(seen, data.num_examples or 0)
        for value in sums.values():
            value.mul_(total / seen)
        quality = halves.compare(both["first"], both["second"], counts)
        self._warn_of_poor(quality, total)
        if self.settings.estimator == "hutchinson":
            notes["negative_share"] = _negative_share(sums)
            sums = without_negatives(sums, "clamp")
        return Curvature(sums, total, seen, {**self.settings.details(), **notes}, quality)

    def _build(self) -> PerExampleFisher | HessianDiagonal:
        return self.settings.build(self.module, self.loss)

    def _probe(
        self, estimator: PerExampleFisher | HessianDiagonal, data: DataPass
    ) -> dict[str, Any]:
        """Try the estimator out on the first examples; return what ``expert.json`` says of it."""
        few = to_device(self.trainer, self._few(data))
        if isinstance(estimator, HessianDiagonal):
            self._build().update(few)
            return {}
        report = estimator.probe(few)
        return {"one_by_one": dict(report.one_by_one), "unused": list(report.unused)}

    def _require_same(self, data: DataPass) -> None:
        require_same_data(data, seed=self.settings.seed)

    def _few(self, data: DataPass) -> Any:
        """Return the examples for the probe, on the CPU."""
        return data.first_few()

    def _here(
        self, estimator: PerExampleFisher | HessianDiagonal, halves: Halves
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return this rank's sums, and those of the halves over the entries that they follow."""
        both = dict(zip(("first", "second"), halves.sums(estimator.entries), strict=True))
        return estimator.sums(), both

    def _over_ranks(
        self, sums: dict[str, Tensor], both: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the same, over all ranks. Collective."""
        device = self.module.device
        return sum_over_ranks(sums, device=device), sum_over_ranks(both, device=device)

    def _count(self, here: int) -> int:
        """Return how many examples all ranks have together. Collective."""
        return sum_number(here)

    def _add_all(
        self,
        data: DataPass,
        estimator: PerExampleFisher | HessianDiagonal,
        halves: Halves,
        unfinished: UnfinishedPass | None,
    ) -> None:
        start, done = halves.num_batches, sum(halves.num_examples)
        for indices, batch in on_device(self.trainer, data, "Curvature", start=start, done=done):
            self._add(estimator, batch, indices)
            halves.add(len(indices), estimator.entries)
            if unfinished is not None and unfinished.is_due():
                unfinished.save(estimator.sums(), halves)

    def _add(
        self, estimator: PerExampleFisher | HessianDiagonal, batch: Any, indices: tuple[int, ...]
    ) -> None:
        """Add a batch; where it cannot be, say which of its examples are to blame."""
        try:
            estimator.update(batch, indices=indices)
        except InputError as error:
            blamed = [
                str(index)
                for index, example in zip(indices, split_batch(batch), strict=True)
                if not self._can_be_measured(example, index)
            ]
            if not blamed:
                raise
            where = f" on rank {rank()}" if world_size() > 1 else ""
            raise InputError(
                f"{error} Of the data set{where}, it is example {', '.join(blamed)} by itself."
            ) from error

    def _can_be_measured(self, example: Any, index: int) -> bool:
        try:
            self._build().update(example, indices=[index])
        except InputError:
            return False
        return True

    def _warn_of_poor(self, quality: Quality | None, total: int) -> None:
        if quality is None or not quality.poor or not self.trainer.is_global_zero:
            return
        if sum(quality.num_examples) < total:
            needed = quality.examples_needed()
            advice = f"max_examples={needed}" if needed < total else f"all {total}"
            warnings.warn(
                f"The curvature is a poor estimate: {quality}. Take more examples: {advice}.",
                CurvatureWarning,
                stacklevel=3,
            )

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Leave no trace in the module, and warn on one rank only."""
        with without_trace(self.module, seed=self.settings.seed), warnings.catch_warnings():
            if not self.trainer.is_global_zero:
                warnings.simplefilter("ignore", CurvatureWarning)
            yield


def _go_on(
    unfinished: UnfinishedPass, estimator: PerExampleFisher | HessianDiagonal, halves: Halves
) -> None:
    """Take up sums and halves where an earlier run was stopped, if one was."""
    sums = unfinished.load(halves)
    if sums is None:
        return
    done = sum(halves.num_examples)
    estimator.resume(sums, num_examples=done)
    rank_zero_info(
        f"Goes on after {done} examples on this device that an earlier run has done; their sums "
        f"are in {unfinished.folder}"
    )


def _negative_share(sums: dict[str, Tensor]) -> float:
    """Return the share of the negative entries in the sum of the absolute values."""
    below = sum(float(value.clamp(max=0).double().sum()) for value in sums.values())
    size = sum(float(value.double().abs().sum()) for value in sums.values())
    return -below / size if size else 0.0
