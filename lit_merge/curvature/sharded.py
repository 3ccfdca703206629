r"""The exact diagonal Fisher information of a model that is sharded over ranks.

Each rank is shown examples of its own, and holds of :math:`h = Σ_n (∇ℓ_n)^2`, summed over the
examples of all ranks, what it holds of the parameters: shards stay sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_merge.curvature.batches import batch_size_of, outside_inference
from lit_merge.curvature.coverage import Coverage, wanted_parameters
from lit_merge.curvature.differentiation import differentiation
from lit_merge.curvature.estimator import example_numbers, zeros_for
from lit_merge.curvature.objective import Objective
from lit_merge.curvature.per_example import PerExampleFisher, require_finite, warn_of_loops
from lit_merge.curvature.probe import MeasuringCapture, ProbeReport, Trial, find_coverage
from lit_merge.curvature.sharded_capture import ShardedCapture
from lit_merge.curvature.sharded_passes import (
    ObjectiveTogether,
    ShardedProblem,
    add_at_once,
    add_one_by_one,
)
from lit_merge.distributed import failing_together, gather, world_size
from lit_merge.errors import InputError
from lit_merge.sharding import (
    UsedParameters,
    is_summed_over_data,
    local_part,
    own_entries,
    sharded_as,
)


class ShardedFisher(PerExampleFisher):
    """Σ_n (∂ℓ_n/∂θ)² of a model that FSDP2 or tensor parallelism has sharded, in shards.

    All methods but the properties are collective: every rank calls them, in the same order and
    equally often (:func:`~lit_merge.distributed.in_step`). Ranks of tensor parallelism that work on
    one part of the data show the same examples; their sums are the same as well.

    Besides the shards, a buffer as large as the largest parameter and its copy are needed.
    """

    name: ClassVar[str] = "per-example-sharded"
    sharded: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], **settings: Any
    ) -> None:
        """Choose what to differentiate.

        Args:
            model: A module with ``fully_shard`` or ``parallelize_module`` done.
            loss: As for :class:`PerExampleFisher`.
            settings: As for :class:`PerExampleFisher`.

        Raises:
            InputError: As by :class:`PerExampleFisher`.
        """
        self._used = UsedParameters(model)
        with self._used:  # for parameters to be as they are stored
            super().__init__(model, loss, **settings)
        self._problem: ShardedProblem = ShardedProblem(
            self._problem.objective, self._problem.parameters, self._used
        )
        self._held: tuple[Mapping[str, Tensor], dict[str, tuple[Tensor, Tensor]]] | None = None

    @property
    def own_sums(self) -> tuple[str, ...]:
        """Names of the parameters whose sums are over this rank's examples only.

        These are the ones that are not sharded over the ranks with different data.
        """
        used = self._used.by_name
        return tuple(
            name
            for name, parameter in self._parameters.items()
            if not is_summed_over_data(parameter, used.get(name, parameter))
        )

    def sums(self) -> dict[str, Tensor]:
        """Return a copy of the sums (zeros if there were no examples), sharded, by parameter name.

        Those of :attr:`own_sums` are still to be added up over the ranks.

        Raises:
            InputError: On every rank, if a sum is not finite on any.
        """
        self._allocate()
        with failing_together():
            require_finite({name: local_part(total) for name, total in self._totals.items()})
        with torch.inference_mode(False):
            return {
                name: sharded_as(local_part(total).clone(), total)
                for name, total in self._totals.items()
            }

    def probe(self, two_examples: Any) -> ProbeReport:
        """Compare both ways of computing on two examples, and choose for every parameter.

        Args:
            two_examples: A batch of two examples, the same on every rank.

        Raises:
            InputError: As by :meth:`PerExampleFisher.probe`.
        """
        return super().probe(two_examples)

    def update(
        self, batch: Any, *, indices: Sequence[int] | None = None, counts: bool = True
    ) -> None:
        """Add the examples of a batch on every rank.

        Args:
            batch: B examples, on the model's device; another number on every rank.
            indices: [B], the index of each example in the data set.
            counts: Whether the examples of this rank count. Where a rank has no more, it is to show
                some that do not.

        Raises:
            InputError: On every rank, if the loss is not finite on any, or there was no probe.
        """
        if not self._probed_with:
            raise InputError(
                "update: must come after a probe where parameters are sharded; got none before. "
                "Call probe() with two examples, the same on every rank."
            )
        with failing_together():
            size = batch_size_of(batch)
            numbers = example_numbers(indices, size, self._num_examples)
        self._allocate()
        objective = self._problem.objective
        with self._used, differentiation(objective.model):
            batch = outside_inference(batch)
            objective.forget()
            for one_round in objective.rounds():
                problem = replace(self._problem, objective=one_round)
                self._add_together(problem, batch, numbers, counts=counts)
        self._num_examples += size * counts

    def entries(self, positions: Mapping[str, Tensor]) -> Tensor:
        """Return some entries of the sums, zero where this rank does not hold them.

        Args:
            positions: By parameter name, row-major positions of the entries in the whole.
        """
        self._allocate()
        held = self._held_of(positions)
        found = torch.zeros(sum(map(len, positions.values())), dtype=torch.float64)
        for name, (places, own) in held.items():
            part = local_part(self._totals[name])
            found[places] = part.take(own.to(part.device)).cpu().double()
        return found

    def holders(self, positions: Mapping[str, Tensor]) -> Tensor:
        """Return 1 for each of some entries that this rank holds, and 0 for the others."""
        found = torch.zeros(sum(map(len, positions.values())), dtype=torch.float64)
        for places, _ in self._held_of(positions).values():
            found[places] = 1
        return found

    def _held_of(self, positions: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by name which of the entries are here, and where in this rank's part."""
        if self._held is None or self._held[0] is not positions:
            held, start = {}, 0
            for name, chosen in positions.items():
                here, own = _local(chosen, self._parameters[name])
                held[name] = (start + here, own)
                start += len(chosen)
            self._held = positions, held
        return self._held[1]

    def _allocate(self) -> None:
        if not self._totals:
            self._totals = {name: _zeros(p) for name, p in self._parameters.items()}

    def _wanted(
        self, model: nn.Module, selection: Collection[str] | None
    ) -> dict[str, nn.Parameter]:
        return wanted_parameters(model, selection, sharded=True)

    def _objective(
        self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], **settings: Any
    ) -> Objective:
        return ObjectiveTogether(model, loss, used=self._used, **settings)

    def _add_together(
        self, problem: ShardedProblem, batch: Any, numbers: Sequence[int], *, counts: bool
    ) -> None:
        """Add the squared gradients of one objective."""
        coverage = self._coverage
        if coverage.at_once or coverage.unused:
            at_once = {name: self._used.by_name[name] for name in sorted(coverage.at_once)}
            capture = ShardedCapture(at_once, self._totals, len(numbers), counts=counts)
            add_at_once(problem, coverage, capture, batch, numbers)
            _require_none(capture.failed)
        if coverage.one_by_one:
            names = sorted(coverage.one_by_one)
            add_one_by_one(problem, names, self._totals, batch, numbers, counts=counts)

    def _probe(self, examples: Any, indices: Sequence[int]) -> ProbeReport:
        objective = self._problem.objective
        with self._used, differentiation(objective.model):
            examples = outside_inference(examples)
            objective.forget()
            objective.require_expectation(examples, indices)
            make = partial(_ShardedTrial, self._used)
            self._coverage, report = find_coverage(self._problem, examples, indices, make)
        self._probed_with = len(indices)
        warn_of_loops(report.one_by_one)
        return report


class _ShardedTrial(Trial):
    """The examples of the probe, the same on all ranks, with the parts of their true squares.

    The squares of all ranks are added up, as in the pass.
    """

    _problem: ShardedProblem

    def __init__(
        self, used: UsedParameters, problem: ShardedProblem, batch: Any, indices: Sequence[int]
    ) -> None:
        self._used = used
        super().__init__(problem, batch, indices)

    def _zeros(self, name: str) -> Tensor:
        return _zeros(self._problem.parameters[name])

    def _one_by_one(self, totals: dict[str, Tensor]) -> tuple[list[Tensor], set[str]]:
        return add_one_by_one(
            self._problem, list(self._problem.parameters), totals, self._batch, self._indices
        )

    def _at_once(
        self, coverage: Coverage, totals: dict[str, Tensor]
    ) -> tuple[Tensor, MeasuringCapture]:
        at_once = {name: self._used.by_name[name] for name in sorted(totals)}
        capture = _MeasuringTogether(at_once, totals, len(self._indices))
        loss = add_at_once(self._problem, coverage, capture, self._batch, self._indices)
        return loss, capture

    def _largest_of(self, squares: Mapping[str, Tensor]) -> dict[str, float]:
        found = gather(super()._largest_of({n: local_part(s) for n, s in squares.items()}))
        return {name: max(largest[name] for largest in found) for name in squares}

    def _agreed(self, wrong: dict[str, str]) -> dict[str, str]:
        together: dict[str, str] = {}
        for others in gather(wrong):
            together = {**others, **together}
        return together

    def _agrees(self, name: str, squares: Tensor, cancelled: float) -> bool:
        return super()._agrees(name, squares, cancelled * world_size())

    def _difference(self, one: Tensor, other: Tensor) -> float:
        return super()._difference(local_part(one), local_part(other))


class _MeasuringTogether(MeasuringCapture, ShardedCapture):
    """Measures beside everything else how much may cancel, on every rank."""


def _zeros(parameter: Tensor) -> Tensor:
    """Return zeros to sum a parameter's squares in, sharded like it."""
    return sharded_as(zeros_for(local_part(parameter)), parameter)


def _local(positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return which row-major positions of a tensor are in this rank's part, and where there."""
    here = torch.ones(len(positions), dtype=torch.bool)
    own = torch.zeros(len(positions), dtype=torch.long)
    coordinates = torch.unravel_index(positions, like.shape) if like.dim() else ()
    for coordinate, entries in zip(coordinates, own_entries(like), strict=True):
        here &= (coordinate >= entries.start) & (coordinate < entries.stop)
        own = own * len(entries) + coordinate - entries.start
    return here.nonzero()[:, 0], own[here]


def _require_none(failed: Mapping[str, str]) -> None:
    for name, reason in failed.items():
        raise InputError(
            f"{name}: must be computed for all examples at once after the probe where parameters "
            f"are sharded; got that {reason}. Measure the unsharded model with "
            'strategy="ddp", or leave the parameter out.'
        )
