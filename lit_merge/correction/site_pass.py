"""One pass in which every site is measured on ALL examples before anything behind it runs.

What a closed form sets at a site changes everything behind it, so statistics behind must wait. Here
all batches of all tasks go through the model in step (:mod:`lit_merge.correction.lockstep`): they
meet at a site, their moments are merged over batches and ranks, the site is set, and they go on. So
the numbers are those of one big batch on one device, however the examples are split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_merge.correction.forward import (
    Forward,
    MaskOf,
    attention_mask_of,
    channels_last,
    evaluation_mode,
    rows,
    run_model,
)
from lit_merge.correction.lockstep import Arrival, Place, Strand, run_in_step
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.site import Site
from lit_merge.correction.statistics import ChannelStatistics, require_finite
from lit_merge.correction.wrappers import bare
from lit_merge.distributed import (
    broadcast,
    failing_together,
    fsdp_units,
    gather,
    reshard,
    world_size,
)
from lit_merge.errors import InputError

StatisticsOfTasks: TypeAlias = dict[int, ChannelStatistics]
Visit: TypeAlias = Callable[[Site, StatisticsOfTasks], None]


@torch.no_grad()
def visit_sites(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Mapping[int, Iterable[Any]],
    visit: Visit,
    *,
    context: TaskContext | None = None,
    forward: Forward = run_model,
    mask: MaskOf = attention_mask_of,
) -> tuple[str, ...]:
    """Run all batches in step; show each site's statistics to a function before they go on.

    Collective: every rank calls it with the same sites and tasks, each with its own batches. Ranks
    may have different numbers of batches, even none, as long as every task has one somewhere.

    Statistics are those of the site before corrections that are attached to it. The activations
    that all batches need at one place are in memory at once.

    Note:
        The ranks of an FSDP2 model run equally many forwards, because each communicates: where a
        rank has fewer batches it runs one again that does not count.

    Args:
        model: The network; run bare, without gradients, in evaluation mode.
        sites: Where to stop, in any order.
        batches: The calibration examples by task index.
        visit: Called with a site and its statistics by task, on every rank with the same numbers;
            may change the site, not what comes before it.
        context: Told the task of each batch; None for a model without per-task parts.
        forward: Runs the model on one batch; its result is not used.
        mask: Takes a batch to the mask ``[B, T]`` of the tokens that count, or to None.

    Returns:
        The names of the sites that ran, in the order in which they did.

    Raises:
        InputError: On every rank: a task has no batch; a site runs twice in a forward, yields NaN
            or infinity, or nothing but padding; ranks differ; or ``visit`` has raised it.
    """
    with failing_together():
        own = [(task, batch) for task, some in batches.items() for batch in some]
        masks = [(task, mask(batch)) for task, batch in own]
    by_rank = gather(sorted({task for task, _ in own}))
    for task in batches:
        if not any(task in present for present in by_rank):
            raise InputError(
                f"batches: task {task} must have calibration examples; got none. Give at least one "
                "batch of each task, on any rank."
            )
    walk = _SitePass(sites, masks, visit)
    network = bare(model)
    units = fsdp_units(network)
    shares = [*own, *_spares(own)] if units else own
    places = [Place(site.name, site.module, before=site.before) for site in sites]

    @contextmanager
    def around(task: int) -> Iterator[None]:
        for unit in units:  # another forward may have let go of the parameters that this one uses
            unit.unshard()
        with nullcontext() if context is None else context.using(task):
            yield

    strands = [
        Strand(network, partial(forward, network, batch), places, around=partial(around, task))
        for task, batch in shares
    ]
    with evaluation_mode(network):
        walk.run(strands, busy=[bool(present or units) for present in by_rank])
    reshard(network)
    return tuple(walk.visited)


def _spares(own: Sequence[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Return batches to run again, so that every rank runs as many as the one with the most."""
    counts = gather(len(own))
    first = next(rank for rank, count in enumerate(counts) if count)
    spare = broadcast(own[0] if own else None, source=first)
    assert spare is not None
    return [own[0] if own else spare] * (max(counts) - len(own))


class _SitePass:
    """What happens where the forwards of this rank meet, and between the ranks."""

    def __init__(
        self, sites: Sequence[Site], batches: Sequence[tuple[int, Tensor | None]], visit: Visit
    ) -> None:
        self.sites = {site.name: site for site in sites}
        self.batches = batches
        self.visit = visit
        self.visited: list[str] = []
        self._agreed = False  # whether the ranks know of the error that is raised

    def run(self, strands: Sequence[Strand], *, busy: Sequence[bool]) -> None:
        """Run this rank's forwards, and meet the other ranks at every site and at the end."""
        self.busy = busy
        try:
            if strands:
                run_in_step(strands, self._act)
            while self._meet(None, {}):
                pass
        except Exception as error:
            if not self._agreed:
                self._exchange(None, {}, error)
            raise

    def _act(self, name: str, arrivals: dict[int, Arrival]) -> None:
        if name in self.visited:
            raise InputError(
                f"site {name!r}: must run once in a forward; got a second call (a shared layer). "
                "Leave it out of the sites: its calls would need different scales."
            )
        site, own = self.sites[name], StatisticsOfTasks()
        for number, arrival in arrivals.items():
            if number >= len(self.batches):  # a spare
                continue
            task, mask = self.batches[number]
            values = channels_last(arrival.inputs if site.before else arrival.output, site)
            statistics = own.setdefault(task, ChannelStatistics.empty(site.num_features))
            statistics.update(rows(values, mask))
        self._meet(name, own)

    def _meet(self, name: str | None, own: StatisticsOfTasks) -> bool:
        """Merge the statistics of all ranks at a site and visit it; False when all have ended."""
        states = self._exchange(name, own, None)
        names = {one for (_, one, _), busy in zip(states, self.busy, strict=True) if busy}
        if len(names) > 1:
            raise self._known_to_all(
                "model: must run the same sites in the same order on every rank; got "
                f"{sorted(map(str, names))} at one time. Build the same model on every rank."
            )
        name = names.pop()
        if name is None:
            return False
        merged = StatisticsOfTasks()
        for _, _, of_rank in states:
            for task, statistics in of_rank.items():
                empty = ChannelStatistics.empty(statistics.num_features)
                merged[task] = merged.get(task, empty).merge(statistics)
        for task, statistics in merged.items():
            require_finite(statistics, site=f"{name} (task {task})")
            if not statistics.count:
                raise InputError(
                    f"site {name!r}: must have values of task {task} that count; got none, all are "
                    "padding. Check the attention masks."
                )
        self.visited.append(name)
        self.visit(self.sites[name], dict(sorted(merged.items())))
        return True

    def _exchange(
        self, name: str | None, own: StatisticsOfTasks, error: Exception | None
    ) -> tuple[tuple[str | None, str | None, StatisticsOfTasks], ...]:
        if world_size() > 1:  # merged on the CPU, so that all ranks have the same bits
            own = {task: one.to(torch.device("cpu")) for task, one in own.items()}
        message = None if error is None else str(error) or type(error).__name__
        states = gather((message, name, own))
        for rank, (told, _, _) in enumerate(states):
            if told is not None and error is None:
                raise self._known_to_all(f"rank {rank}: {told}")
        return states

    def _known_to_all(self, message: str) -> InputError:
        self._agreed = True
        return InputError(message)
