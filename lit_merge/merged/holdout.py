"""The held-out part of a fit: which examples, and the best state that was seen on them.

A fit must not lose to its own initialisation. So a share of the unlabelled training examples is
not learned from; the loss on it is measured at step 0, every so many steps and at the end, and the
fit ends with the state of the least one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.sharding import copy_into, whole
from lit_merge.tasks import MergeBatch, MultiTaskDataModule

LEAST_EXAMPLES = 10
"""A task with fewer training examples keeps all of them to learn from."""


def choose_held_out(
    sizes: Mapping[str, int], share: float, *, seed: int
) -> dict[str, tuple[int, ...]]:
    """Return the places of the held-out examples of each task, ascending.

    Args:
        sizes: Number of training examples by task.
        share: How many of them to hold out, in [0, 1); at least one of ten, where it is not 0.
        seed: Seed of the choice.

    >>> choose_held_out({"svhn": 20, "dtd": 9}, 0.1, seed=0)
    {'svhn': (4, 19), 'dtd': ()}
    """
    chosen = {}
    for number, (task, size) in enumerate(sizes.items()):
        count = max(1, round(share * size)) if share and size >= LEAST_EXAMPLES else 0
        order = np.random.default_rng((seed, number)).permutation(size)[: min(count, size - 1)]
        chosen[task] = tuple(sorted(order.tolist()))
    return chosen


def held_out_batches(
    data: MultiTaskDataModule,
    places: Mapping[str, Sequence[int]],
    *,
    rank: int,
    world_size: int,
) -> list[MergeBatch]:
    """Return a rank's share of the held-out examples, each batch of one task.

    Every rank has equally many batches; where the examples do not divide, duplicates that are not
    valid fill them up.

    Args:
        data: The tasks' examples.
        places: From :func:`choose_held_out`.
        rank: This rank.
        world_size: Number of ranks.
    """
    batches = []
    for number, name in enumerate(data.task_names):
        examples, held = data.examples(name, "train"), places[name]
        share = -(-len(held) // world_size)
        mine = held[rank * share : (rank + 1) * share]
        filled = [*mine] + [held[0]] * (share - len(mine)) if held else []
        for start in range(0, share, data.eval_batch_size):
            part = filled[start : start + data.eval_batch_size]
            inputs, labels = data.tasks[name].collate([examples[i] for i in part])
            index = torch.tensor(part)
            valid = torch.arange(start, start + len(part)) < len(mine)
            batches.append(MergeBatch(inputs, labels, torch.full_like(index, number), valid, index))
    return batches


class BestState:
    """The state of least held-out loss so far.

    Attributes:
        loss: The least loss; infinite before the first measurement.
        step: The step that it was measured at.
        measured: The step of the last measurement; −1 before the first.
        waited: How many measurements have passed without a new best.
    """

    def __init__(self) -> None:
        self.loss = math.inf
        self.step = -1
        self.measured = -1
        self.waited = 0
        self._state: dict[str, Tensor] = {}

    @torch.no_grad()
    def note(self, loss: float, *, step: int, state: Mapping[str, Tensor]) -> None:
        """Take a measurement, with a copy of the state if it is the best.

        Args:
            loss: The loss; NaN is never the best.
            step: The step.
            state: All that is learned, by name.
        """
        self.measured = step
        if loss < self.loss:
            self.loss, self.step, self.waited = loss, step, 0
            self._state = {name: value.detach().clone() for name, value in state.items()}
        else:
            self.waited += 1

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Write the best state into what is learned; nothing before the first measurement.

        Args:
            state: All that is learned, by name; written to.

        Raises:
            InputError: If the best state is that of another model.
        """
        if not self._state:
            return
        found = {name: tuple(value.shape) for name, value in self._state.items()}
        wanted = {name: tuple(value.shape) for name, value in state.items()}
        if found != wanted:
            differ = sorted(set(found.items()) ^ set(wanted.items()))
            raise InputError(
                f"checkpoint: its best state must be of what is learned here; got another "
                f"{differ[0][0]!r}. Resume with the options of the fit that wrote it."
            )
        for name, value in state.items():
            copy_into(value, whole(self._state[name]).to(value.device))

    def state_dict(self) -> dict[str, Any]:
        """Return everything as primitives and whole tensors on the CPU; collective if sharded."""
        return {
            "loss": self.loss,
            "step": self.step,
            "measured": self.measured,
            "waited": self.waited,
            "state": {name: whole(value).cpu() for name, value in self._state.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` has returned."""
        self.loss, self.step = float(state["loss"]), int(state["step"])
        self.measured, self.waited = int(state["measured"]), int(state["waited"])
        self._state = dict(state["state"])
