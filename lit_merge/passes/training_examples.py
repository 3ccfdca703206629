"""Which examples a training loader shows in an epoch, and in batches of what size.

What counts as the training set of an expert:

- With shuffling it is the whole data set, also under ``limit_train_batches``, which shows another
  part of it in every epoch; the limit then bounds how many examples a pass takes.
- Without shuffling (and under ``overfit_batches``) every epoch shows the same first examples; these
  are the training set.
- A subset sampler names the examples itself, and any other sampler is taken at its word: the
  training set is what one epoch of it yields, repeats included.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lit_merge.distributed import broadcast
from lit_merge.errors import InputError

FIX = (
    "Define curvature_dataloader() on the LightningModule or the LightningDataModule: it returns "
    "one DataLoader over the training examples."
)
"""What to do about any loader that a pass cannot take apart."""


@dataclass(frozen=True)
class TrainingExamples:
    """The examples behind a loader over a data set with indices.

    Attributes:
        indices: Indices in the data set, N of them.
        most: How many of them an epoch shows at most, on all ranks together.
        batch_size: Examples per batch and rank.
    """

    indices: Sequence[int]
    most: int
    batch_size: int


def training_examples(
    loader: DataLoader[Any],
    *,
    world_size: int = 1,
    epoch_batches: float = float("inf"),
    batch_size: int | None = None,
    seed: int = 0,
) -> TrainingExamples:
    """Return the examples that the epochs of a loader show.

    Args:
        loader: A loader over a data set with indices, as the user or Lightning has made it.
        world_size: Number of ranks.
        epoch_batches: How many batches an epoch has on one rank where the Trainer limits that.
        batch_size: Examples per batch and rank for the pass; None takes the loader's.
        seed: For the random numbers of a sampler of unknown kind.

    Raises:
        InputError: There are no examples, no batch size, or a sampler of unknown kind has been
            left as it is on several ranks.
    """
    own_batch_size = _batch_size(loader)
    if batch_size is None and own_batch_size is None:
        makes = type(loader.batch_sampler).__name__ if loader.batch_sampler else "the data set"
        raise InputError(
            f"train_dataloader: must have a batch_size; got batches made by {makes}. {FIX}"
        )
    indices = _indices(loader, world_size=world_size, seed=seed)
    most = len(indices)
    length = sized_len(loader)
    if own_batch_size is not None and epoch_batches < (float("inf") if length is None else length):
        most = min(most, int(epoch_batches) * own_batch_size * world_size)
        if _keeps_order(_innermost_sampler(loader)):
            indices = indices[:most]
    if not indices:
        raise InputError(f"train_dataloader: must have at least one example; got none. {FIX}")
    return TrainingExamples(indices, most, batch_size or own_batch_size or 1)


def random_subset(indices: Sequence[int], size: int, *, seed: int) -> Sequence[int]:
    """Return ``size`` of the indices, drawn without replacement, in random order.

    A larger size adds to the examples of a smaller one.

    >>> sorted(random_subset([4, 5, 6], 3, seed=0))
    [4, 5, 6]
    """
    generator = torch.Generator().manual_seed(seed)
    return [indices[i] for i in torch.randperm(len(indices), generator=generator)[:size].tolist()]


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Seed all global random numbers for the block, and put them back as if it had not been."""
    with isolate_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield


def _indices(loader: DataLoader[Any], *, world_size: int, seed: int) -> Sequence[int]:
    sampler = _innermost_sampler(loader)
    if isinstance(sampler, SubsetRandomSampler):
        return sorted(int(index) for index in sampler.indices)
    if sampler is None or _keeps_order(sampler) or _permutes(sampler):
        return range(len(loader.dataset))  # type: ignore[arg-type]
    if world_size > 1 and sampler is _outermost_sampler(loader):
        # Lightning wraps the samplers that it does not know, unless it was told not to: then this
        # one may yield this rank's share, or everything.
        raise InputError(
            f"train_dataloader: must have a sampler whose share per rank is known; got a "
            f"{type(sampler).__name__} that Lightning was told to leave alone. {FIX}"
        )
    generator = getattr(sampler, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    with own_random_numbers(seed):
        indices = [int(index) for index in sampler]
    if isinstance(generator, torch.Generator) and state is not None:
        generator.set_state(state)
    return broadcast(indices)  # the ranks' generators may be seeded differently


def _outermost_sampler(loader: DataLoader[Any]) -> Any:
    if loader.batch_sampler is None:
        return loader.sampler
    return getattr(loader.batch_sampler, "sampler", None)


def _innermost_sampler(loader: DataLoader[Any]) -> Any:
    """Return the sampler that decides which examples there are, below what Lightning put around."""
    sampler = _outermost_sampler(loader)
    if isinstance(sampler, DistributedSampler):
        return getattr(sampler.dataset, "_sampler", sampler)
    return sampler


def _keeps_order(sampler: Any) -> bool:
    if isinstance(sampler, DistributedSampler):
        return not sampler.shuffle
    return sampler is None or isinstance(sampler, SequentialSampler)


def _permutes(sampler: Any) -> bool:
    if isinstance(sampler, DistributedSampler):
        return True
    return (
        isinstance(sampler, RandomSampler)
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )


def _batch_size(loader: DataLoader[Any]) -> int | None:
    size = loader.batch_size
    if size is None:
        size = getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None
