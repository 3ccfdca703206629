"""Measuring models: accuracy and loss on every task, and the two things that explain them.

Every model becomes a :class:`~lit_merge.module.MergeModule`, so that one code tests all of them: a
base is a merge that adds nothing (with the experts' heads), an expert a merge of one. A merge with
masks is as many models as it has tasks: each is built, tested and dropped in turn. A base or merge
that has nothing of any task's own, neither heads nor corrections, is tested on every task that it
fits, whatever its experts' tasks were called.
:func:`evaluate` also fits the control that a correction must beat, a linear head on the base's
features, and gathers the activations' variance by site.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_merge.checkpoint import fingerprint
from lit_merge.correction import Site
from lit_merge.correction.forward import module_at
from lit_merge.correction.linear_probe import linear_probe
from lit_merge.correction.routing import TaskRouter
from lit_merge.correction.statistics import gather_statistics, variance_by_site
from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation, EvaluationRow, Kind, VarianceRow, perplexity_of
from lit_merge.evaluation.model_entry import ModelEntry, is_merged, resolve_entries
from lit_merge.expert.info import current_versions
from lit_merge.heads import detect_heads
from lit_merge.merged.folder import has_masks
from lit_merge.merged.network import MergedNetwork, choose_sites, heads_in
from lit_merge.merged.task_model import open_task_models
from lit_merge.methods import Average, MergeMethod, TaskArithmetic
from lit_merge.module import MergeModule
from lit_merge.parameters import ParametersPolicy
from lit_merge.tasks import ClassificationModule, MultiTaskDataModule
from lit_merge.tasks.task import Task

_POLICY = ParametersPolicy()
_WITH_VARIANCE: tuple[Kind, ...] = ("expert", "merged", "corrected")


def evaluate(
    trainer: Trainer,
    model: nn.Module,
    models: Mapping[str, str | ModelEntry],
    tasks: Mapping[str, Task],
    *,
    batch_size: int = 64,
    probe: bool = False,
    variance: bool = False,
    examples: int = 256,
    sites: str | list[str] = "auto",
    policy: ParametersPolicy = _POLICY,
    seed: int = 0,
) -> Evaluation:
    """Test every model on the test examples of every task it knows.

    Args:
        trainer: Says where and with which precision; its ``test`` is called for each model.
        model: The architecture, as for :class:`~lit_merge.module.MergeModule`.
        models: Paths by name.
        tasks: Tasks by name, each with test examples.
        batch_size: Examples per batch and device.
        probe: Whether to fit the control: for each task a linear head on the features of the
            base, from ``examples`` labelled training examples.
        variance: Whether to measure the activations' variance of experts, merged and corrected
            models, on ``examples`` test examples of each task.
        examples: Number of examples per task for these two.
        sites: Where to measure the variance; see :func:`lit_merge.correction.find_sites`.
        policy: Which tensors are heads, as it was for the merge.
        seed: Seed of the choice of training examples.

    Raises:
        InputError: If there is nothing to test, a path or task is wrong, the networks do not fit,
            or the control is asked for without a base.
    """
    started = time.perf_counter()
    entries = resolve_entries(models, list(tasks))
    bench = _Bench(trainer, model, entries, tasks, batch_size=batch_size, policy=policy, seed=seed)
    if probe and not bench.of_kind("base"):
        raise InputError(
            "linear_probe: must have the base's features; got no model of kind base. Add "
            "models: {base: {path: ..., kind: base}}, or leave the control out."
        )
    rows: list[EvaluationRow] = []
    variances: list[VarianceRow] = []
    provenance: dict[str, Any] = {}
    notes: list[str] = []
    for name in entries:
        described: list[dict[str, Any]] = []
        for module in bench.modules(name):
            rank_zero_info(f"Testing {name} ({bench.kind(name)}) on {', '.join(module.tasks)}")
            rows += bench.test(name, module)
            if probe and bench.kind(name) == "base":
                found, left_out = bench.probe(name, module, examples=examples)
                rows += found
                notes += left_out
            if variance and bench.kind(name) in _WITH_VARIANCE:
                variances += bench.variances(name, module, where=sites, examples=examples)
            described.append(bench.describe(name, module))
        provenance[name] = described[0] if len(described) == 1 else _as_one(described)
    return Evaluation(
        tuple(rows),
        tuple(variances),
        tuple(notes),
        {
            "versions": current_versions(),
            "models": provenance,
            "run": {
                "processes": trainer.world_size,
                "precision": str(trainer.precision),
                "seconds": round(time.perf_counter() - started, 1),
            },
        },
    )


class _Bench:
    """Where models are tested: architecture, tasks and Trainer, which are the same for all."""

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        entries: Mapping[str, ModelEntry],
        tasks: Mapping[str, Task],
        *,
        batch_size: int,
        policy: ParametersPolicy,
        seed: int,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.entries = entries
        self.tasks = dict(tasks)
        self.batch_size = batch_size
        self.policy = policy
        self.seed = seed
        self.network = model.model if isinstance(model, ClassificationModule) else model

    def of_kind(self, kind: Kind) -> dict[str, ModelEntry]:
        """Return the entries of one kind."""
        return {name: entry for name, entry in self.entries.items() if entry.kind == kind}

    def kind(self, name: str) -> Kind:
        """Return what a model is."""
        kind = self.entries[name].kind
        assert kind is not None  # resolve_entries has said it
        return kind

    def modules(self, name: str) -> Iterator[MergeModule]:
        """Yield what a model consists of, set up on the CPU: one module for all tasks, or one each.

        Raises:
            InputError: Files are not as they should be, or do not fit network and tasks.
        """
        path = self.entries[name].path
        if not has_masks(path):
            yield self.module(name)
            return
        try:
            with open_task_models(path) as models:
                self._require_tasks(name, models.parts.tasks)
                for task in models.parts.tasks:
                    module = MergeModule(self.model)
                    model = models.model(task)
                    own = {task: {n: model.tensor(n) for n in model.head}} if model.head else {}
                    heads = heads_in(module.architecture, model, own)
                    module.merged = module.build((task,), heads, (), source=path)
                    module.merged.load_shared(model)
                    yield module
        except InputError as error:
            raise InputError(f'model "{name}": {error}') from error

    def module(self, name: str) -> MergeModule:
        """Return a model whose tasks share their weights, set up on the CPU."""
        entry = self.entries[name]
        experts = {str(e.task): e.path for e in self.of_kind("expert").values()}
        method: MergeMethod = Average()
        base = None
        try:
            if is_merged(entry.path):
                module = MergeModule(self.model, merged=entry.path)
            else:
                if entry.kind == "expert":
                    experts = {str(entry.task): entry.path}
                elif experts:
                    base, method = entry.path, TaskArithmetic(0.0)  # the base, with their heads
                else:
                    experts = dict.fromkeys(self.tasks, entry.path)  # the base's own head for all
                module = MergeModule(
                    self.model, experts=experts, base=base, method=method, policy=self.policy
                )
            module.configure_model()
            if entry.kind != "expert":
                self._widen(module, source=entry.path)
        except InputError as error:
            raise InputError(f'model "{name}": {error}') from error
        self._require_tasks(name, module.tasks)
        return module

    def _widen(self, module: MergeModule, *, source: str) -> None:
        """Let a model that is the same for all tasks be tested on every one that it fits."""
        merged = _network_of(module)
        corrected = bool(module.calibrated) and bool(merged.sites)
        if merged.head_names or corrected or merged.surgery_rank:
            return
        width = merged.num_classes()[0]
        fit = [
            name
            for name, task in self.tasks.items()
            if name in module.tasks or width is None or task.misfit(width) is None
        ]
        if fit and set(fit) != set(module.tasks):
            module.merged = module.build(fit, {}, (), source=source)
            module.merged.load_shared(merged.shared_state())

    def data(self, module: MergeModule) -> MultiTaskDataModule:
        """Return the examples of a model's tasks."""
        known = {task: self.tasks[task] for task in module.tasks}
        return MultiTaskDataModule(known, batch_size=self.batch_size)

    def test(self, name: str, module: MergeModule) -> list[EvaluationRow]:
        """Return the rows of a model: one per task."""
        self.trainer.test(module, datamodule=self.data(module), verbose=False)
        measured = self.trainer.callback_metrics
        rows: list[EvaluationRow] = []
        for task in module.tasks:
            count = self._num_test(task)
            share = float(measured[f"test/{task}/accuracy"])
            nll = float(measured[f"test/{task}/nll"])
            rows.append(
                EvaluationRow(
                    model=name,
                    kind=self.kind(name),
                    task=task,
                    accuracy=round(share * count) / count,  # the share itself is a float32
                    num_examples=count,
                    nll=nll,
                    stage=self.entries[name].stage,
                    perplexity=perplexity_of(nll) if self.tasks[task].has_perplexity else None,
                )
            )
        return rows

    def probe(
        self, name: str, module: MergeModule, *, examples: int
    ) -> tuple[list[EvaluationRow], list[str]]:
        """Return the rows of the control on this model's features, and what could not be run."""
        data = self.data(module)
        merged = self._placed(module)
        rows: list[EvaluationRow] = []
        notes: list[str] = []
        for index, task in enumerate(module.tasks):
            if self.tasks[task].unlabelled:
                notes.append(f"linear probe: left out for {task}, whose examples have no labels")
                continue
            if self.tasks[task].has_perplexity:
                notes.append(f"linear probe: left out for {task}, a language task, without a head")
                continue
            batch = data.calibration_batch(task, num_examples=examples, seed=self.seed)
            accuracy = linear_probe(
                merged.network,
                first_head(merged),
                [batch],
                data.batches(task, "test"),
                forward=self._forward(merged, index),
            )
            rows.append(
                EvaluationRow(
                    f"linear probe on {name}", "control", task, accuracy, self._num_test(task)
                )
            )
        return rows, notes

    def variances(
        self, name: str, module: MergeModule, *, where: str | list[str], examples: int
    ) -> list[VarianceRow]:
        """Return the variance at every site on the first test examples of every task.

        The sites of a task are in the order in which the model calls them, which need not be the
        order in which its modules were registered.
        """
        data = self.data(module)
        merged = self._placed(module)
        sites = choose_sites(self.network, where, merged.head_names)
        rows: list[VarianceRow] = []
        for index, task in enumerate(module.tasks):
            batches = data.batches(task, "test", batch_size=min(self.batch_size, examples))
            with _called(merged.network, sites) as called:
                statistics = gather_statistics(
                    merged.network,
                    (inputs for inputs, _ in islice(batches, -(-examples // self.batch_size))),
                    sites,
                    forward=self._forward(merged, index),
                )
            measured = variance_by_site(statistics)
            rows += [
                VarianceRow(name, self.kind(name), task, site, measured[site])
                for site in called
                if site in measured
            ]
        return rows

    def describe(self, name: str, module: MergeModule) -> dict[str, Any]:
        """Return where a model came from, for the provenance."""
        entry = self.entries[name]
        shared = _network_of(module).shared_state()
        return {**asdict(entry), "tasks": list(module.tasks), "fingerprint": fingerprint(shared)}

    def _require_tasks(self, name: str, tasks: Sequence[str]) -> None:
        unknown = [task for task in tasks if task not in self.tasks]
        if unknown:
            raise InputError(
                f'model "{name}": its tasks must be among {", ".join(self.tasks)}; got '
                f"{', '.join(unknown)}. Add the task to tasks."
            )

    def _num_test(self, task: str) -> int:
        return len(self.tasks[task].test or ()) * self.tasks[task].labels_per_example

    def _placed(self, module: MergeModule) -> MergedNetwork:
        merged = _network_of(module)
        return merged.to(self.trainer.strategy.root_device).eval()

    def _forward(self, merged: MergedNetwork, index: int) -> Callable[[nn.Module, Any], Any]:
        def run(network: nn.Module, inputs: Any) -> Any:
            return merged(self.trainer.strategy.batch_to_device(inputs), index)

        return run


@contextmanager
def _called(network: nn.Module, sites: Sequence[Site]) -> Iterator[list[str]]:
    """Yield a list that gets the names of the sites in the order of their first calls."""
    called: list[str] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name not in called:
                called.append(name)

        return hook

    handles = [module_at(network, s.module).register_forward_hook(note(s.name)) for s in sites]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


def _as_one(described: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the description of a model that is another one for each task."""
    return {
        **described[0],
        "tasks": [task for one in described for task in one["tasks"]],
        "fingerprint": {one["tasks"][0]: one["fingerprint"] for one in described},
    }


def first_head(merged: MergedNetwork) -> str:
    """Return the name of the module whose inputs are a network's features.

    Raises:
        InputError: If no head is known in the network.
    """
    routers = [n for n, m in merged.network.named_modules() if isinstance(m, TaskRouter)]
    heads = routers or [name.rpartition(".")[0] for name in detect_heads(merged.network)]
    if not heads:
        raise InputError(
            f"linear_probe: must have a model whose head is known; got "
            f"{type(merged.network).__name__}. Leave the control out."
        )
    return str(heads[0])


def _network_of(module: MergeModule) -> MergedNetwork:
    assert module.merged is not None  # configure_model has been called
    return module.merged
