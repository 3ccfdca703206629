"""Least squares in the merged prefix: every layer solved in forward order, behind the solved ones.

The merged model and every expert run on the expert's own examples, all in step
(:mod:`lit_merge.correction.lockstep`). Where they meet at a layer, the merged model brings its
inputs, behind layers that are solved and corrected already, and the experts what the layer should
put out; the layer is solved (:mod:`lit_merge.least_squares.settings`) and the merged model goes
on with it. Where a site follows, each task's scale and shift are fitted before anything goes on. So
the sweep costs one forward per batch of the merged model and of the experts, and a solve per layer.

Two things make it better than layer-wise regression alone. At the end of a residual branch the
wanted output is the expert's branch plus what the merged model's skip lacks of the expert's skip,
so errors do not add up along the stream. And rows count by how much the expert's outputs depend on
them (:mod:`lit_merge.least_squares.sensitivity`).

Several ranks bring batches of their own; all sums go over the ranks, so the result is that of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.correction.corrections import Corrections
from lit_merge.correction.forward import (
    MaskOf,
    attention_mask_of,
    evaluation_mode,
    module_at,
)
from lit_merge.correction.lockstep import Arrival, Place, Strand, run_in_step
from lit_merge.correction.routing import TaskContext, TaskRouter
from lit_merge.correction.site import Site, channel_layout
from lit_merge.correction.wrappers import bare
from lit_merge.distributed import failing_together
from lit_merge.errors import InputError
from lit_merge.least_squares.embedding_table import EmbeddedRows, solve_embedding
from lit_merge.least_squares.head_solver import solve_heads
from lit_merge.least_squares.layer_plan import Event, PlannedLayer
from lit_merge.least_squares.layer_solver import LayerRows, SolvedLayer, TaskRows, solve_layer
from lit_merge.least_squares.linear_layers import linear_layer
from lit_merge.least_squares.sensitivity import RowWeights
from lit_merge.least_squares.settings import LeastSquares
from lit_merge.least_squares.site_fit import SitePair, before_norm, fit_site
from lit_merge.least_squares.skips import Skips
from lit_merge.least_squares.sweep_plan import first_number, plan_sweep, precision_of
from lit_merge.least_squares.teacher import Teacher, check_architecture


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has done.

    Attributes:
        layers: The solved layers in forward order.
        left: Why others that were wanted were not solved, by name.
    """

    layers: tuple[SolvedLayer, ...]
    left: Mapping[str, str]


@torch.no_grad()
def solve_in_prefix(
    model: nn.Module,
    teachers: Sequence[Teacher],
    batches: Sequence[tuple[int, Any]],
    settings: LeastSquares = LeastSquares(),  # noqa: B008 - frozen
    *,
    context: TaskContext,
    forward: Callable[[nn.Module, Any], Any],
    corrections: Corrections | None = None,
    mask: MaskOf = attention_mask_of,
    precisions: Mapping[str, Tensor] | None = None,
    solved: Callable[[SolvedLayer], None] = lambda layer: None,
) -> SweepResult:
    """Solve the layers of a merged model, in place, for the experts' activations. Collective.

    Args:
        model: The merged network, with routers for the heads; its weights are what the ridge ties
            to. Run in evaluation mode.
        teachers: The expert of each task.
        batches: Task and inputs of each batch of calibration examples; this rank's share, at least
            one. They are all in memory at once, with what a forward holds of them.
        settings: What to solve, and how.
        context: Told the task of each batch.
        forward: Runs the merged network on a batch.
        corrections: Scales and shifts at sites, attached to the model, that are fitted on the way;
            None for a model without numbers per task.
        mask: Takes a batch to the mask ``[B, T]`` of the tokens that count, or to None.
        precisions: The merge's precision by parameter name, for ``settings.precision``.
        solved: Called with every layer that has been solved.

    Raises:
        InputError: On every rank: a task has no examples on any rank, or a rank none at all;
            nothing can be solved; a pattern matches nothing; an activation is NaN or infinite; the
            experts' layers do not fit; a precision is missing; a system is singular.
    """
    first = first_number([task for task, _ in batches], len(teachers))
    if settings.precision and not precisions:
        raise InputError(
            "least_squares.precision: must come with the precision of a merge; got none. Merge by "
            "a method that gives a Hessian (GradientMatching), or set it to 0."
        )
    model = bare(model)
    sweep = _Sweep(
        model, teachers, batches, settings, corrections, mask, precisions or {}, solved, first
    )
    with ExitStack() as stack:
        for network in (model, *(teacher.model for teacher in teachers)):
            stack.enter_context(evaluation_mode(network))
        return sweep.run(context, forward)


class _Sweep:
    """What is at hand where the forwards of this rank meet."""

    def __init__(
        self,
        model: nn.Module,
        teachers: Sequence[Teacher],
        batches: Sequence[tuple[int, Any]],
        settings: LeastSquares,
        corrections: Corrections | None,
        mask: MaskOf,
        precisions: Mapping[str, Tensor],
        solved: Callable[[SolvedLayer], None],
        first: int,
    ) -> None:
        self.model = model
        self.teachers = teachers
        self.batches = batches
        self.settings = settings
        self.corrections = corrections
        self.masks = [mask(inputs) for _, inputs in batches]
        self.precisions = precisions
        self.told = solved
        # Random choices are those of one process that has the batches of all ranks.
        self.seeds = range(first, first + len(batches))
        self.sites = {site.name: site for site in corrections.sites} if corrections else {}
        self.heads = {
            name: module for name, module in model.named_modules() if isinstance(module, TaskRouter)
        }
        self.results: list[SolvedLayer] = []
        self.weights = RowWeights(settings.sensitivity)
        self._running = 0
        self._raised_together = False

    def run(self, context: TaskContext, forward: Callable[[nn.Module, Any], Any]) -> SweepResult:
        """Run this rank's forwards."""
        error: Exception | None = None
        try:
            self._run(context, forward)
        except Exception as caught:
            if self._raised_together:
                raise
            error = caught
        with failing_together():  # the other ranks wait here, or at a layer
            if error is not None:
                raise error
        return SweepResult(tuple(self.results), self.plan.left)

    def _run(self, context: TaskContext, forward: Callable[[nn.Module, Any], Any]) -> None:
        self.plan = plan_sweep(
            self.model,
            lambda: self._run_quietly(context, forward),
            self.settings,
            heads=tuple(self.heads),
        )
        places = self._places()
        if not places:
            raise InputError(
                "least_squares.layers: must leave something to do: layers, heads or sites; got "
                f"{self.settings.layers!r} and none of these. Leave the default."
            )
        self._check()
        if self.settings.sensitivity:
            self._measure_sensitivity()
        self.skips = Skips(self._uses_of_skips(), len(self.batches), lambda: self._running)
        models = [self.model, *(teacher.model for teacher in self.teachers)]
        with self.skips.catching(models):
            run_in_step(self._strands(places, context, forward), self._act)

    def _run_quietly(self, context: TaskContext, forward: Callable[[nn.Module, Any], Any]) -> None:
        task, inputs = self.batches[0]
        quiet = self.corrections.disabled() if self.corrections else nullcontext()
        with context.using(task), quiet:
            forward(self.model, inputs)

    def _check(self) -> None:
        """Raise unless the experts and the precisions fit what is to be done."""
        names = self.plan.modules | {*self.heads, *(site.module for site in self.sites.values())}
        layers = {name: m for name, m in self.model.named_modules() if name in names}
        for task, teacher in enumerate(self.teachers):
            check_architecture(teacher, layers, task=task)
        for name in self.plan.layers if self.settings.precision else ():
            precision_of(self.precisions, name, layers[name])

    def _places(self) -> list[tuple[Place, Place]]:
        """Return where the merged model and the experts stop."""
        kinds = {
            **dict.fromkeys(self.plan.layers, "layer"),
            **dict.fromkeys(self.plan.embeddings, "embedding"),
            **dict.fromkeys(self.heads if self.settings.heads else (), "head"),
        }
        places = []
        for name, kind in kinds.items():
            # Behind the corrections of what the layer is given.
            own = Place(f"{kind}:{name}", name, before=True, last=True)
            places.append((own, Place(f"{kind}:{name}", name)))
        for name, site in self.sites.items():
            place = Place(f"site:{name}", site.module, site.before)
            places.append((place, place))
        return places

    def _strands(
        self,
        places: Sequence[tuple[Place, Place]],
        context: TaskContext,
        forward: Callable[[nn.Module, Any], Any],
    ) -> list[Strand]:
        own, theirs = zip(*places, strict=True)
        strands = []
        for number, (task, inputs) in enumerate(self.batches):
            around = self._as_running(number, partial(context.using, task))
            strands.append(Strand(self.model, partial(forward, self.model, inputs), own, around))
        for number, (task, inputs) in enumerate(self.batches, len(self.batches)):
            teacher = self.teachers[task]
            around = self._as_running(number, teacher.around)
            call = partial(teacher.forward, teacher.model, inputs)
            strands.append(Strand(teacher.model, call, theirs, around))
        return strands

    def _as_running(
        self, number: int, around: Callable[[], AbstractContextManager[Any]]
    ) -> Callable[[], AbstractContextManager[Any]]:
        @contextmanager
        def running() -> Iterator[None]:
            self._running = number
            with around():
                yield

        return running

    def _uses_of_skips(self) -> dict[Event, int]:
        layers = [self.plan.layer_at(site) for site in self.sites.values()]
        events = [layer.skip for layer in (*self.plan.layers.values(), *layers) if layer]
        return Counter(event for event in events if event) if self.settings.skips else {}

    def _measure_sensitivity(self) -> None:
        axes = {site.module: site.channel_dim for site in self.sites.values() if not site.before}
        for name in (*self.plan.layers, *self.plan.embeddings):
            planned = self.plan.layers.get(name)
            behind = planned.ends[-1] if planned else name
            layout = channel_layout(self.model.get_submodule(behind))
            axes.setdefault(behind, -1 if layout is None else layout[1])
        for number, (task, inputs) in enumerate(self.batches):
            teacher, mask = self.teachers[task], self.masks[number]
            run = partial(teacher.forward, teacher.model, inputs)
            with teacher.around():
                self.weights.measure(
                    number, teacher.model, run, axes, mask, seed=self.seeds[number]
                )

    def _act(self, key: str, arrivals: dict[int, Arrival]) -> None:
        count = len(self.batches)
        what, _, name = key.partition(":")
        try:
            with failing_together():
                if len(arrivals) != 2 * count:
                    raise InputError(
                        f"{what} {name!r}: must run once in a forward of the merged model and of "
                        f"every expert; got {len(arrivals)} of {2 * count} forwards there. Leave "
                        "it out."
                    )
            merged = [arrivals[number] for number in range(count)]
            experts = [arrivals[count + number] for number in range(count)]
            if what == "site":
                self._fit_site(self.sites[name], merged, experts)
            elif what == "head":
                self._solve_heads(name, merged, experts)
            elif what == "embedding":
                self._solve_embedding(name, merged, experts)
            else:
                self._solve(self.plan.layers[name], merged, experts)
        except Exception:
            self._raised_together = True
            raise

    def _report(self, result: SolvedLayer) -> None:
        self.results.append(result)
        self.told(result)

    def _solve(
        self, planned: PlannedLayer, merged: Sequence[Arrival], experts: Sequence[Arrival]
    ) -> None:
        layer, name = planned.layer, planned.name
        own_shift = any(
            self.plan.layer_at(site) is planned
            # A shift behind an activation does not make up for one before it.
            and not (planned.activates and site.module == planned.norm and not site.before)
            for site in self.sites.values()
        )
        source = merged if self.settings.prefix == "merged" else experts
        lacks = self.skips.lacks(planned.skip)
        tasks = [
            TaskRows(
                task,
                inputs=source[number].inputs[0],
                output=experts[number].output,
                expert=linear_layer(name, module_at(self.teachers[task].model, name)),
                norm=self._norm(planned, self.teachers[task].model),
                lack=lacks[number],
                weights=self.weights.of(number, planned.ends[-1]),
                mask=self.masks[number],
                seed=self.seeds[number],
            )
            for number, (task, _) in enumerate(self.batches)
        ]
        norm = self._norm(planned, self.model)
        rows_of_all = LayerRows(layer, norm, tasks, len(self.teachers), self.settings)
        precision = None
        if self.settings.precision:
            precision = precision_of(self.precisions, name, layer.module)
        self._report(solve_layer(rows_of_all, per_task_shift=own_shift, precision=precision))

    @staticmethod
    def _norm(planned: PlannedLayer, model: nn.Module) -> nn.Module | None:
        return None if planned.norm is None else module_at(model, planned.norm)

    def _solve_embedding(
        self, name: str, merged: Sequence[Arrival], experts: Sequence[Arrival]
    ) -> None:
        tasks = [
            EmbeddedRows(
                task,
                merged[number].inputs[0],
                experts[number].output,
                self.weights.of(number, name),
                self.masks[number],
            )
            for number, (task, _) in enumerate(self.batches)
        ]
        table, count = self.plan.embeddings[name], len(self.teachers)
        self._report(solve_embedding(table, tasks, count, self.settings.ridge))

    def _solve_heads(
        self, name: str, merged: Sequence[Arrival], experts: Sequence[Arrival]
    ) -> None:
        batches = [
            TaskRows(
                task,
                inputs=merged[number].inputs[0],
                output=experts[number].output,
                mask=self.masks[number],
                seed=self.seeds[number],
            )
            for number, (task, _) in enumerate(self.batches)
        ]
        for result in solve_heads(name, self.heads[name], batches, self.settings):
            self._report(result)

    def _fit_site(self, site: Site, merged: Sequence[Arrival], experts: Sequence[Arrival]) -> None:
        assert self.corrections is not None
        planned = self.plan.layer_at(site)
        lacks = self.skips.lacks(planned.skip if planned else None)
        pairs = []
        for number, (task, _) in enumerate(self.batches):
            mine, theirs = merged[number], experts[number]
            wanted: Any = theirs.inputs if site.before else theirs.output
            between = planned is not None and (site.before or site.module == planned.name)
            if planned is not None and planned.norm is not None and between:
                wanted = before_norm(
                    wanted[0] if site.before else wanted,
                    module_at(self.teachers[task].model, planned.norm),
                    module_at(self.model, planned.norm),
                )
            pairs.append(
                SitePair(
                    task,
                    merged=mine.inputs if site.before else mine.output,
                    wanted=wanted,
                    lack=lacks[number],
                    weights=None if site.before else self.weights.of(number, site.module),
                    mask=self.masks[number],
                )
            )
        fit_site(site, self.corrections.at(site), pairs, len(self.teachers), self.settings.scales)


__all__ = ["LeastSquares", "SweepResult", "Teacher", "solve_in_prefix"]
