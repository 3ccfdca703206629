"""What a sweep works on: the layers that its settings name, heads excepted, and its batches."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.distributed import gather, rank
from lit_merge.errors import InputError
from lit_merge.least_squares.layer_plan import LayerPlan, plan_layers
from lit_merge.least_squares.settings import LeastSquares


def first_number(tasks: Sequence[int], num_tasks: int) -> int:
    """Return the number of this rank's first batch among those of all ranks. Collective.

    Args:
        tasks: The tasks of this rank's batches.
        num_tasks: Number of tasks over all ranks.

    Raises:
        InputError: On every rank: a task has no batch, a rank has none, or there is no such task.
    """
    of_ranks = gather(list(tasks))
    present = {task for some in of_ranks for task in some}
    missing = [task for task in range(num_tasks) if task not in present]
    if missing or not all(of_ranks):
        raise InputError(
            "batches: every task must have calibration examples, and every rank; got none "
            f"{f'of task {missing[0]}' if missing else 'on a rank'}. Give more examples."
        )
    if present - set(range(num_tasks)):
        raise InputError(
            f"batches: tasks must be indices of the {num_tasks} experts; got {max(present)}. "
            "Count from 0."
        )
    return sum(len(some) for some in of_ranks[: rank()])


def plan_sweep(
    model: nn.Module, run: Callable[[], Any], settings: LeastSquares, *, heads: Collection[str]
) -> LayerPlan:
    """Return what of a merged model is solved.

    Args:
        model: The network, in evaluation mode and without corrections.
        run: Runs it on a few examples.
        settings: What to solve.
        heads: Names of the routers; what is inside is each task's own.

    Raises:
        InputError: A pattern matches no module, or nothing that is wanted can be solved.
    """
    names = [name for name, _ in model.named_modules() if name]
    for pattern in settings.layers:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:5]
            raise InputError(
                f"least_squares.layers: must match modules of {type(model).__name__}; got "
                f"{pattern!r}, which matches none. Near it are: {', '.join(near)}."
            )
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def wanted(name: str, module: nn.Module) -> bool:
        in_head = any(name.startswith(f"{head}.") for head in heads)
        tied = any(uses[id(p)] > 1 for p in module.parameters(recurse=False))
        kind = True
        if isinstance(module, nn.Embedding):
            kind = settings.embeddings
        elif module.get_parameter("weight").ndim == 1:
            kind = settings.norms
        named = any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.layers)
        return kind and named and not in_head and not tied

    return plan_layers(model, run, wanted)


def precision_of(precisions: Mapping[str, Tensor], name: str, layer: nn.Module) -> Tensor:
    """Return the precision of a layer's weight.

    Args:
        precisions: By parameter name.
        name: The layer.
        layer: Its module.

    Raises:
        InputError: There is none, or none that fits.
    """
    parameter, shape = f"{name}.weight", tuple(layer.get_parameter("weight").shape)
    found = precisions.get(parameter)
    if found is None:
        raise InputError(
            f"least_squares.precision: must have the merge's precision of every solved layer; got "
            f"none of {parameter!r}. Leave the layer out, or set it to 0."
        )
    if tuple(found.shape) != shape:
        raise InputError(
            f"least_squares.precision: the precision of {parameter!r} must have shape {shape}; got "
            f"{tuple(found.shape)}. Take it from the merge of these experts."
        )
    fine = torch.isfinite(found).all() and (found >= 0).all() and (found > 0).any()
    if not bool(fine):
        raise InputError(
            f"least_squares.precision: the precision of {parameter!r} must be finite, from 0 and "
            f"not 0 everywhere; got values from {float(found.min())} to {float(found.max())}. "
            "Gather the Hessians again."
        )
    return found
