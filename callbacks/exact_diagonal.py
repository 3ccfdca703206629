"""The exact diagonal of the Fisher information of a LightningModule, in one pass over all ranks."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import lightning.pytorch as pl

from lit_merge.callbacks.curvature_result import Curvature
from lit_merge.callbacks.expert_folder import plain_names_of
from lit_merge.callbacks.training_loss import TrainingLoss, without_trace
from lit_merge.curvature import CurvatureWarning, PerExampleFisher, ProbeReport
from lit_merge.distributed import sum_number, sum_over_ranks
from lit_merge.errors import InputError
from lit_merge.passes.data_pass import DataPass, on_device, require_seen, to_device


@dataclass(frozen=True)
class ExactPass:
    """The squared gradients of every example, of a module in a Trainer.

    Attributes:
        trainer: Whose device, precision and progress bar are used.
        module: The module, in whatever mode; it is left as it was.
        loss: Its mean loss.
        labels: "sampled" from the model's predictions or "observed" in the data.
        parameters: Names of the parameters; None for all that are trained.
        seed: For sampled labels and augmentations.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    loss: TrainingLoss
    labels: Literal["sampled", "observed"]
    parameters: Sequence[str] | None
    seed: int

    def try_out(self, data: DataPass) -> ProbeReport:
        """Compare two examples with a plain loop, as every pass begins. Collective.

        Raises:
            InputError: The loss or the module cannot be measured.
        """
        with without_trace(self.module, seed=self.seed), self._warned_once():
            return self._probed(data)[1]

    def run(self, data: DataPass) -> Curvature:
        """Sum over the examples of all ranks. Collective.

        Each rank takes its own examples, without padding or repeats, and the ranks' sums are added
        up once, at the end. The probe comes first, on the weights as they now are: on untrained
        ones (a head that is still zero) it may have compared zeros with zeros.

        Args:
            data: This rank's share of the examples; it may have none.

        Raises:
            InputError: On every rank, when one of them cannot go on.
        """
        with without_trace(self.module, seed=self.seed), self._warned_once():
            fisher, report = self._probed(data)
            for indices, batch in on_device(self.trainer, data, "Curvature"):
                fisher.update(batch, indices=indices)
            local, num_here = fisher.sums(), fisher.num_examples
            del fisher  # and with it its own copy of the sums
        seen = sum_number(num_here)
        require_seen(seen)
        sums = sum_over_ranks(local, device=self.module.device)
        total = max(seen, data.num_examples or 0)
        for value in sums.values():
            value.mul_(total / seen)
        notes = {"one_by_one": dict(report.one_by_one), "unused": list(report.unused)}
        return Curvature(sums, total, seen, notes)

    def _probed(self, data: DataPass) -> tuple[PerExampleFisher, ProbeReport]:
        fisher = PerExampleFisher(
            self.module,
            self.loss,
            labels=self.labels,
            parameters=self.parameters,
            seed=self.seed,
        )
        return fisher, fisher.probe(to_device(self.trainer, data.first_few()))

    @contextmanager
    def _warned_once(self) -> Iterator[None]:
        with warnings.catch_warnings():
            if not self.trainer.is_global_zero:
                warnings.simplefilter("ignore", CurvatureWarning)
            yield


def chosen_parameters(
    module: pl.LightningModule, patterns: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Return the names of the trained parameters that match a pattern, None for no patterns.

    Args:
        module: The module.
        patterns: Shell-style patterns over parameter names.

    Raises:
        InputError: A pattern matches no trained parameter.
    """
    if patterns is None:
        return None
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    plain = plain_names_of(module)
    names = {name: plain[name] for name in trained}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names.values()):
            near = difflib.get_close_matches(pattern, names.values(), n=3, cutoff=0.4)
            raise InputError(
                f"parameters: must match trained parameters of {type(module).__name__}; got "
                f"{pattern!r}, which matches none. Near it are: "
                f"{', '.join(near or list(names.values())[:3])}."
            )
    return tuple(n for n in trained if any(fnmatchcase(names[n], p) for p in patterns))
