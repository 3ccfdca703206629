"""The pass over the examples for a module that is sharded with FSDP2 or tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_merge.callbacks.exact_diagonal import ExactPass
from lit_merge.callbacks.pass_settings import PassSettings
from lit_merge.callbacks.training_loss import TrainingLoss
from lit_merge.curvature import take_examples
from lit_merge.curvature.quality import Halves
from lit_merge.curvature.sharded import ShardedFisher
from lit_merge.distributed import (
    broadcast,
    failing_together,
    gather,
    in_step,
    rank,
    sharded_parameters,
    sum_over_ranks,
)
from lit_merge.errors import InputError
from lit_merge.passes.data_pass import DataPass
from lit_merge.passes.data_ranks import DataRanks
from lit_merge.passes.glimpse import require_same_data
from lit_merge.passes.on_device import on_device, to_device
from lit_merge.passes.unfinished import UnfinishedPass
from lit_merge.sharding import local_part, sharded_as


def pass_over(
    trainer: pl.Trainer, module: pl.LightningModule, *, loss: TrainingLoss, settings: PassSettings
) -> ExactPass:
    """Return the pass that goes with a module, sharded or not."""
    kind = ShardedPass if sharded_parameters(module) else ExactPass
    return kind(trainer, module, loss=loss, settings=settings)


@dataclass(frozen=True)
class ShardedPass(ExactPass):
    """The curvature of every example, in the module's own shards.

    Forwards and backwards are collective, so the ranks make them in step: where one has no examples
    left, it repeats the first one of the pass, which does not count.
    """

    def _build(self) -> ShardedFisher:
        if self.settings.estimator != "exact":
            raise InputError(
                'estimator: must be "exact" where parameters are sharded; got '
                f'"{self.settings.estimator}". Use "exact", or strategy="ddp".'
            )
        return ShardedFisher(self.module, self.loss, **self.settings.of_fisher(self.module))

    def _require_same(self, data: DataPass) -> None:
        ranks = DataRanks.of(self.trainer)
        if data.indexed:
            super()._require_same(data)
        elif ranks.size > 1:  # those of one part of the model have one stream
            require_same_data(data, seed=self.settings.seed, group=ranks.group)

    def _few(self, data: DataPass) -> Any:
        """Return the first examples of the pass, the same on all ranks. Collective."""
        if data.indexed:
            return data.first_few()
        few = None
        with failing_together():
            if rank() == 0:
                few = data.first_few()
        return broadcast(few)

    def _add_all(
        self,
        data: DataPass,
        estimator: Any,
        halves: Halves,
        unfinished: UnfinishedPass | None,
    ) -> None:
        spare = to_device(self.trainer, self._few(data))
        batches = on_device(self.trainer, data, "Curvature")
        for (indices, batch), counts in in_step(batches, spare=((0,), spare)):
            # Steps may change the batch that they are given.
            own = batch if counts else take_examples(batch, [0])
            estimator.update(own, indices=indices, counts=counts)
            halves.add(len(indices) * counts, estimator.entries)

    def _here(self, estimator: Any, halves: Halves) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the sums over all ranks already: most are. Collective."""
        ranks = DataRanks.of(self.trainer)
        sums: dict[str, Tensor] = estimator.sums()
        if ranks.size > 1:
            own = {name: local_part(sums[name]) for name in estimator.own_sums}
            own = sum_over_ranks(own, device=self.module.device, group=ranks.group)
            sums |= {name: sharded_as(part, sums[name]) for name, part in own.items()}
        return sums, self._entries_over_ranks(estimator, halves, ranks)

    def _entries_over_ranks(
        self, estimator: ShardedFisher, halves: Halves, ranks: DataRanks
    ) -> dict[str, Tensor]:
        """Return the halves' sums; an entry that several ranks have counts once."""
        first, second = halves.sums(estimator.entries)
        holders = estimator.holders(halves.positions)
        all_of_them = {"first": first, "second": second, "holders": holders}
        found = sum_over_ranks(all_of_them, device=self.module.device)
        parts = torch.cat(
            [
                torch.full((len(chosen),), ranks.size if name in estimator.own_sums else 1)
                for name, chosen in halves.positions.items()
            ]
        )
        share = parts / found.pop("holders")
        return {name: value * share for name, value in found.items()}

    def _over_ranks(
        self, sums: dict[str, Tensor], both: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return sums, both

    def _count(self, here: int) -> int:
        ranks = DataRanks.of(self.trainer)
        return sum(gather(here, group=ranks.group)) if ranks.size > 1 else here
