"""The closed-form part of a correction: what a merged model takes from its experts in one pass.

In this order, each on request: running statistics of BatchNorm re-estimated, every layer solved for
the experts' activations, scales and shifts set per task (TACT) or for all tasks (REPAIR, the
control). Several ranks share the calibration examples, and end with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from lit_merge.correction import ChannelStatistics, Site, fit_tact
from lit_merge.correction.batch_norm import reestimate_batch_norm
from lit_merge.correction.repair import fit_repair
from lit_merge.distributed import make_equal
from lit_merge.errors import InputError
from lit_merge.least_squares.layer_solver import SolvedLayer
from lit_merge.least_squares.prefix_sweep import solve_in_prefix
from lit_merge.least_squares.settings import LeastSquares
from lit_merge.merged.expert_lessons import ExpertLessons, Surroundings
from lit_merge.merged.network import MergedNetwork
from lit_merge.tasks import MultiTaskDataModule
from lit_merge.tasks.task import Inputs

ClosedForm = Literal["tact", "repair", "none"]
Statistics = Literal["auto", "calibration", "stored"]
BatchNorm = Literal["keep", "reestimate"]


@dataclass(frozen=True, kw_only=True)
class ClosedFormSettings:
    """What is set in closed form, and from what.

    Attributes:
        closed_form: "tact" for a scale and shift per task, "repair" for one of all tasks, "none".
        least_squares: How to solve the layers first; None to leave them. With "tact", scales and
            shifts are then fitted on the way.
        batch_norm: Whether the running statistics of BatchNorm are re-estimated first.
        statistics: Where the experts' statistics come from: the "calibration" examples, the
            folders' "stored" ones, or "auto": stored where every expert has them at all sites.
        examples: Calibration examples per task.
        batch_size: How many of them go through a model at a time; None for all of a task. All of
            them are in memory at once in any case, but only what a layer holds meanwhile.
        seed: Seed of their choice.

    Raises:
        InputError: An option is out of range, or two of them exclude each other.
    """

    closed_form: ClosedForm = "tact"
    least_squares: LeastSquares | None = None
    batch_norm: BatchNorm = "keep"
    statistics: Statistics = "calibration"
    examples: int = 256
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("closed_form", self.closed_form, get_args(ClosedForm)),
            ("statistics", self.statistics, get_args(Statistics)),
            ("batch_norm", self.batch_norm, get_args(BatchNorm)),
        ):
            if value not in known:
                raise InputError(
                    f"{name}: must be one of {', '.join(known)}; got {value!r}. Choose one."
                )
        if self.examples < 2:
            raise InputError(
                "calibration_examples: must be at least 2, for a variance; got "
                f"{self.examples}. 64 are enough."
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(
                f"calibration_batch_size: must be at least 1, or null; got {self.batch_size}. "
                "Leave it out."
            )
        if self.least_squares is not None and self.closed_form == "repair":
            raise InputError(
                'closed_form: must be "tact" or "none" with least_squares, which are fitted for '
                'each task; got "repair". REPAIR is the control without them.'
            )
        if self.least_squares is not None and self.statistics == "stored":
            raise InputError(
                'statistics: must be "calibration" with least_squares, which compare activations '
                'example by example; got "stored". Leave it out.'
            )

    @property
    def does_something(self) -> bool:
        """Whether there is anything to do."""
        return (
            self.closed_form != "none"
            or self.least_squares is not None
            or self.batch_norm == "reestimate"
        )

    @property
    def asks_experts(self) -> bool:
        """Whether the experts are needed."""
        return self.closed_form != "none" or self.least_squares is not None


@dataclass(frozen=True)
class Sources:
    """Where a closed form gets from what it needs.

    Attributes:
        expert: Loads a task's expert.
        stored: Returns a task's stored statistics at sites, or None where its folder lacks some.
        precisions: Returns the merge's precision by name of the parameter.
        data: The tasks' examples.
        surroundings: Where networks run.
        advance: Called with every layer that has been solved.
    """

    expert: Callable[[str], ExpertLessons]
    stored: Callable[[str, Sequence[Site]], dict[str, ChannelStatistics] | None]
    precisions: Callable[[], Mapping[str, Tensor]]
    data: MultiTaskDataModule
    surroundings: Surroundings
    advance: Callable[[SolvedLayer], None]


def apply_closed_form(
    network: MergedNetwork, settings: ClosedFormSettings, sources: Sources
) -> tuple[SolvedLayer, ...]:
    """Set a merged network's weights and corrections in closed form. Collective.

    Args:
        network: The network, whole on every rank; changed.
        settings: What to do.
        sources: Experts and examples.

    Returns:
        The layers that were solved.

    Raises:
        InputError: The experts, examples and network do not fit, or values are not finite.
    """
    run = sources.surroundings.run
    batches = calibration_batches(network.tasks, sources.data, settings, sources.surroundings)
    solved: tuple[SolvedLayer, ...] = ()
    if settings.batch_norm == "reestimate":
        with network.corrections.disabled():
            reestimate_batch_norm(network.network, batches, context=network.context, forward=run)
    if settings.least_squares is not None:
        solved = _solve(network, settings, settings.least_squares, batches, sources)
    elif settings.closed_form != "none" and network.sites:
        fit = fit_tact if settings.closed_form == "tact" else fit_repair
        fit(
            network.network,
            network.corrections,
            network.context,
            batches=batches,
            expert_statistics=_statistics(network, settings, sources),
            forward=run,
        )
    # Bit for bit the same on every rank, whatever their devices' orders of summation.
    weights_too = settings.least_squares is not None or settings.batch_norm == "reestimate"
    for value in (network if weights_too else network.corrections).state_dict().values():
        make_equal(value)
    return solved


def calibration_batches(
    tasks: Sequence[str],
    data: MultiTaskDataModule,
    settings: ClosedFormSettings,
    surroundings: Surroundings,
) -> dict[int, list[Inputs]]:
    """Return this rank's calibration examples of each task, in batches, by task index.

    Args:
        tasks: Names of the tasks in the order of their indices.
        data: Their examples.
        settings: How many, and in what batches.
        surroundings: Where they go.
    """
    return {
        index: [
            surroundings.move(inputs)
            for inputs in data.calibration_batches(
                task,
                num_examples=settings.examples,
                seed=settings.seed,
                batch_size=settings.batch_size,
            )
        ]
        for index, task in enumerate(tasks)
    }


def _solve(
    network: MergedNetwork,
    settings: ClosedFormSettings,
    least_squares: LeastSquares,
    batches: Mapping[int, Sequence[Inputs]],
    sources: Sources,
) -> tuple[SolvedLayer, ...]:
    result = solve_in_prefix(
        network.network,
        [sources.expert(task).teacher() for task in network.tasks],
        [(index, inputs) for index, some in batches.items() for inputs in some],
        least_squares,
        context=network.context,
        forward=sources.surroundings.run,
        corrections=(
            network.corrections if settings.closed_form == "tact" and network.sites else None
        ),
        precisions=sources.precisions() if least_squares.precision else None,
        solved=sources.advance,
    )
    return result.layers


def _statistics(
    network: MergedNetwork, settings: ClosedFormSettings, sources: Sources
) -> dict[int, dict[str, ChannelStatistics]]:
    """Return each expert's statistics on its task; one expert is in memory at a time."""
    if settings.statistics != "calibration":
        stored = {
            index: sources.stored(task, network.sites) for index, task in enumerate(network.tasks)
        }
        found = {index: one for index, one in stored.items() if one is not None}
        if len(found) == len(stored):
            return found
    # All of them on every rank: the mean over a rank's share would not be that of all.
    return {
        index: sources.expert(task).statistics(
            [
                sources.surroundings.move(inputs)
                for inputs in sources.data.calibration_batches(
                    task,
                    num_examples=settings.examples,
                    seed=settings.seed,
                    batch_size=settings.batch_size,
                    share=False,
                )
            ],
            network.sites,
        )
        for index, task in enumerate(network.tasks)
    }


@contextmanager
def solving_bar(*, shown: bool) -> Iterator[Callable[[SolvedLayer], None]]:
    """Show which layer has been solved.

    Args:
        shown: Whether to draw a bar.

    Yields:
        What to call with each solved layer.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        bar = progress.add_task("Closed form", total=None)
        count = 0

        def advance(layer: SolvedLayer) -> None:
            nonlocal count
            count += 1
            progress.update(bar, description=f"Solved {count} layers, last {layer.name}")

        yield advance
