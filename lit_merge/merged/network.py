"""One network for several tasks: shared merged weights, a head per task, a correction per task.

The network that a user trained experts with is copied; layers whose tensors stay per task (the
heads) become a :class:`~lit_merge.correction.routing.TaskRouter`, and a correction is put behind
every site. A batch that mixes tasks goes through it once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from lit_merge.checkpoint import Checkpoint, aligned, alignment, load_into, open_state_dict
from lit_merge.correction import Corrections, RescaleShift, Site, TaskContext, find_sites
from lit_merge.correction.batch_norm import batch_norms
from lit_merge.correction.forward import evaluation_mode
from lit_merge.correction.heads import install_heads
from lit_merge.correction.routing import TaskRouter
from lit_merge.correction.site import channel_layout, input_layout
from lit_merge.errors import InputError
from lit_merge.heads import detect_heads
from lit_merge.merged.coefficients import LayerCoefficients
from lit_merge.merged.final_feature import FinalFeature
from lit_merge.tasks.classification import read_logits

CorrectionFactory = Callable[[int, int], nn.Module]

NEED_NO_RUN = frozenset({"auto", "linear", "norm", "conv", "final"})
"""Kinds of sites that the modules themselves show."""


class MergedNetwork(nn.Module):
    """A network with shared weights, per-task heads and per-task corrections.

    Args:
        network: The architecture; copied, its weights do not matter.
        tasks: Names of the tasks in the order of their indices.
        heads: For each task the tensors of its own by name in the network; empty where all tasks
            share everything.
        sites: Where to correct; ``()`` for nowhere.
        correction: Makes the correction of a site from (number of tasks, number of channels).
        surgery_rank: Rank of the representation surgery before the head; 0 for none.
        coefficients: Whether there is a coefficient per task and layer, for its task vector.

    Attributes:
        network: The copy, with routers.
        corrections: The corrections, the identity at first.
        final_feature: What reaches the head.
        coefficients: The coefficients of the task vectors; None for none.
        tasks: Names of the tasks.
        head_names: Names of the tensors that each task has of its own.

    Raises:
        InputError: If heads or sites do not fit the network.
    """

    def __init__(
        self,
        network: nn.Module,
        tasks: Sequence[str],
        *,
        heads: Mapping[str, Mapping[str, Tensor]],
        sites: Sequence[Site],
        correction: CorrectionFactory = RescaleShift,
        surgery_rank: int = 0,
        coefficients: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.context = TaskContext()
        # Nominally in training mode, or Lightning warns at every fit; see forward.
        self.network = copy.deepcopy(network).requires_grad_(False).train()
        self.head_names = tuple(dict.fromkeys(n for own in heads.values() for n in own))
        self._routers: tuple[str, ...] = ()
        if self.head_names:
            install_heads(self.network, heads, self.context, tasks=self.tasks)
            # In the order of registration, so that the layer of the classes comes last.
            named = self.network.named_modules()
            self._routers = tuple(name for name, m in named if isinstance(m, TaskRouter))
        self._head_layers = tuple(name.rpartition(".")[0] for name in detect_heads(network))
        # Routers by a user's rule (norms, say) are no heads: what is known as one goes first.
        heads_first = (*self._head_layers[:1], *self._routers[-1:], None)
        self.final_feature = FinalFeature(heads_first[0], self.context)
        self.final_feature.attach(
            self.network, num_tasks=len(self.tasks), surgery_rank=surgery_rank
        )
        self.coefficients = (
            LayerCoefficients(self.shared_parameters(), len(self.tasks)) if coefficients else None
        )
        self.corrections = Corrections(sites, len(self.tasks), correction, context=self.context)
        self.corrections.attach(self.network)
        self._normalises = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """The places that are corrected."""
        return self.corrections.sites

    @property
    def surgery_rank(self) -> int:
        """Rank of the representation surgery before the head; 0 for none."""
        surgery = self.final_feature.surgery
        return 0 if surgery is None else surgery.down.shape[1]

    def forward(self, inputs: Any, task: Tensor | int) -> Tensor:
        """Return the logits of every example from its own task's head and corrections.

        The network always runs in evaluation mode: its dropout does nothing, and BatchNorm
        normalises by running statistics but in :meth:`normalising`.

        Args:
            inputs: B examples.
            task: Task index of each example, int64 ``[B]``; one int for all.

        Returns:
            ``[B, widest head]``, −inf beyond a task's own classes.
        """
        # Looking through all modules would take longer than a small layer.
        trains = self.training or self.network.training
        mode = evaluation_mode(self.network) if trains else nullcontext()
        with mode, self.context.using(task), self.corrections.overwriting():
            if self._normalises:
                for norm in self.shared_batch_norms().values():
                    norm.train()
            if self.coefficients is not None and self.coefficients.active:
                moved = self.coefficients.moved(self.shared_parameters())
                logits: Tensor = functional_call(
                    _Logits(self.network), {f"network.{n}": v for n, v in moved.items()}, (inputs,)
                )
                return logits
            return read_logits(self.network, inputs)

    def keep_attached(self) -> None:
        """Put the corrections back where layers were replaced by others of the same names.

        The Trainer's sync_batchnorm does so, and what was behind a batch norm is lost with it.
        """
        if self.sites and not self.corrections.attached:
            self.corrections.detach()
            self.corrections.attach(self.network)

    @contextmanager
    def normalising(self) -> Iterator[None]:
        """Let shared batch norms normalise by each batch inside the block, and keep the average.

        The statistics are those of the whole batch, its tasks mixed.
        """
        self._normalises = True
        try:
            yield
        finally:
            self._normalises = False

    def shared_batch_norms(self) -> dict[str, _BatchNorm]:
        """Return the batch norms that can be trained and that all tasks share, by name.

        These have running statistics, and a scale and shift behind them.
        """
        inside = tuple(f"{name}." for name in self._routers)
        norms = batch_norms(self.network, affine=True)
        return {name: norm for name, norm in norms.items() if not name.startswith(inside)}

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that all tasks share, by name in the original network."""
        inside = tuple(f"{name}." for name in self._routers)
        return {n: p for n, p in self.network.named_parameters() if not n.startswith(inside)}

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the heads, each task's or the shared one's, by name."""
        layers = self._routers or self._head_layers
        inside = tuple(f"{name}." for name in layers)
        return {n: p for n, p in self.network.named_parameters() if n.startswith(inside)}

    def num_classes(self) -> tuple[int | None, ...]:
        """Return the width of each task's head; None where it cannot be told."""
        # Layers per task by a user's rule (norms, say) are no heads: what is known as one goes
        # first.
        last = (*self._routers, *self._head_layers)[-1:]
        if not last:
            # A language model has no head, but an output layer that speaks its vocabulary.
            output = getattr(self.network, "get_output_embeddings", lambda: None)()
            return (None if output is None else _width(output),) * len(self.tasks)
        layer = self.network.get_submodule(last[0])
        if isinstance(layer, TaskRouter):
            return tuple(_width(head) for head in layer.heads.values())
        return (_width(layer),) * len(self.tasks)

    def load_shared(self, weights: Checkpoint | Mapping[str, Tensor]) -> None:
        """Load the weights that all tasks share; tensors of heads in it are passed over.

        Raises:
            InputError: If names or shapes do not fit.
        """
        routed = [f"{name}.*" for name in self._routers]
        load_into(self.network, weights, ignore=(*self.head_names, *routed))

    def load_corrections(self, tensors: Checkpoint | Mapping[str, Tensor]) -> None:
        """Load the corrections.

        Raises:
            InputError: If names or shapes do not fit.
        """
        load_into(self.corrections, tensors)

    def load_surgery(self, tensors: Checkpoint | Mapping[str, Tensor]) -> None:
        """Load the representation surgery.

        Raises:
            InputError: If names or shapes do not fit.
        """
        load_into(self.final_feature, tensors)

    def shared_state(self) -> dict[str, Tensor]:
        """Return the tensors that all tasks share, by name in the original network."""
        inside = tuple(f"{name}." for name in self._routers)
        state = self.network.state_dict()
        shared = {name: value for name, value in state.items() if not name.startswith(inside)}
        if self.coefficients is not None and self.coefficients.active:
            with torch.no_grad():
                shared |= self.coefficients.moved(self.shared_parameters())
        return shared

    def head_state(self) -> dict[str, dict[str, Tensor]]:
        """Return each task's own tensors by name in the original network."""
        state: dict[str, dict[str, Tensor]] = {task: {} for task in self.tasks}
        for router in self._routers:
            module = self.network.get_submodule(router)
            assert isinstance(module, TaskRouter)
            for task, head in zip(self.tasks, module.heads.values(), strict=True):
                for name, value in head.state_dict().items():
                    state[task][f"{router}.{name}"] = value
        return {task: own for task, own in state.items() if own}


class _Logits(nn.Module):
    """A network whose output is its logits: functional_call wants a module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Any) -> Tensor:
        return read_logits(self.network, inputs)


def _width(layer: nn.Module) -> int | None:
    layout = channel_layout(layer)
    return None if layout is None else layout[0]


def expert_network(
    network: nn.Module, weights: Checkpoint, *, task: str, head_names: Sequence[str]
) -> MergedNetwork:
    """Return one expert alone: a merged network of a single task without corrections.

    Args:
        network: The architecture.
        weights: The expert's weights.
        task: Its name.
        head_names: Names in the network of the tensors that make its head.

    Raises:
        InputError: If the weights do not fit.
    """
    named = aligned(weights, network.state_dict())
    own = own_tensors(named, head_names, task=task)
    expert = MergedNetwork(network, (task,), heads={task: own} if own else {}, sites=())
    expert.load_shared(named)
    return expert.eval()


def own_tensors(weights: Checkpoint, names: Sequence[str], *, task: str) -> dict[str, Tensor]:
    """Return the named tensors of a checkpoint.

    Raises:
        InputError: If one is missing.
    """
    missing = [name for name in names if name not in weights]
    if missing:
        raise InputError(
            f"{weights.path}: must hold the head of task {task!r}; got no {missing[0]!r}. "
            "Give the expert that was merged."
        )
    return {name: weights.tensor(name) for name in names}


def choose_sites(
    network: nn.Module,
    where: str | Sequence[str],
    head_names: Sequence[str],
    *,
    example_inputs: Any = None,
) -> tuple[Site, ...]:
    """Return the sites to correct: those of ``where`` outside of heads and per-task layers.

    Args:
        network: The architecture.
        where: A kind of site or a pattern, or several of these; an empty list for no site at all.
        head_names: Names of the tensors that each task has of its own.
        example_inputs: Two or more examples, for the kinds that a run alone shows.
    """
    if not isinstance(where, str) and not where:
        return ()
    exclude = (*detect_heads(network), *head_names)
    return find_sites(network, where=where, exclude=exclude, example_inputs=example_inputs)


def check_sites(network: nn.Module, sites: Sequence[Site], *, source: str) -> None:
    """Check recorded sites against a network, before anything is built from their sizes.

    Raises:
        InputError: If the network has no such layer, or one of other channels.
    """
    modules = dict(network.named_modules())
    layouts = {name: channel_layout(module) for name, module in modules.items()}
    widths = {layout[0] for layout in layouts.values() if layout}
    for site in sites:
        layout = layouts.get(site.module)
        if site.before and site.module in modules:
            layout = input_layout(modules[site.module])
        if layout is None and site.module in modules and site.num_features in widths:
            continue  # a block, say, does not tell its channels
        if layout != (site.num_features, site.channel_dim):
            got = "no such layer" if layout is None else f"{layout[0]} on axis {layout[1]}"
            raise InputError(
                f"{source}: site {site.name!r} must have {site.num_features} channels on axis "
                f"{site.channel_dim} of {type(network).__name__}; got {got}. Give the network that "
                "was corrected."
            )


def heads_in(
    network: nn.Module,
    weights: Checkpoint | Mapping[str, Tensor],
    heads: Mapping[str, Checkpoint | Mapping[str, Tensor]],
) -> dict[str, dict[str, Tensor]]:
    """Return each task's own tensors under the network's names.

    Args:
        network: The architecture.
        weights: The tensors that all tasks share; they help to find the prefix of the names.
        heads: The tensors of each task's own, under names like those of ``weights``.
    """
    state = network.state_dict()
    every = dict.fromkeys(name for named in (weights, *heads.values()) for name in named)
    names = alignment(every, state)
    # A base without a head and its experts can have different prefixes ("" and "model.bert.").
    alone = dict.fromkeys(n for own in heads.values() for n in own if names[n] not in state)
    names |= alignment(alone, state)
    renamed = {}
    for task, own in heads.items():
        source = own if isinstance(own, Checkpoint) else open_state_dict(own)
        renamed[task] = {names[name]: source.tensor(name) for name in source}
    return renamed


def empty_heads(
    network: nn.Module, shapes: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, dict[str, Tensor]]:
    """Return tensors of the given shapes in the network's own types, to be loaded later."""
    state = network.state_dict()
    return {
        task: {
            name: torch.zeros(tuple(shape), dtype=state[name].dtype if name in state else None)
            for name, shape in own.items()
        }
        for task, own in shapes.items()
    }


def qualified_name(factory: CorrectionFactory) -> str:
    """Return module and name of a factory of corrections.

    >>> from lit_merge.correction import RescaleShift
    >>> qualified_name(RescaleShift)
    'lit_merge.correction.rescale.RescaleShift'
    """
    name = getattr(factory, "__qualname__", type(factory).__qualname__)
    return f"{factory.__module__}.{name}"
