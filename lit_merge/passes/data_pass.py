"""One pass over the training examples: every example once, shared out over the ranks.

A training loader shuffles, repeats examples so that all ranks get as many, and may drop the last
batch. A sum over examples wants none of that. :func:`data_pass` therefore takes the data set, the
collate function and the worker settings of the training loader and puts its own order on them: rank
r of W takes the examples r, r + W, r + 2W, … of those selected, which are in random order, so that
any part of a pass says what the whole will say. Ranks may have different numbers of batches, even
none, so there must be no collective call inside the loop over a pass.

An iterable data set is taken as it comes, in its own batches, as many as one epoch yields. How the
ranks share it is its own business, as it is in training: on several ranks it must split itself.

Notation: N examples in the training set, n ≤ N of them in the pass, W ranks.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from lit_merge.curvature.batches import batch_size_of, take_examples
from lit_merge.errors import InputError
from lit_merge.passes.training_examples import FIX, random_subset, training_examples

FEW = 8
"""Examples for a probe: enough for two of them to differ."""


class DataPass(ABC):
    """One rank's share of a pass; iterating it yields ``(indices, batch)``, batches on the CPU.

    Attributes:
        indexed: Whether examples can be asked for by index, and the pass shares them out itself.
        num_examples: N, or None when only the end of a stream will tell.
        num_here: How many examples this rank will see, None when only the end will tell.
    """

    indexed: ClassVar[bool]
    num_examples: int | None
    num_here: int | None

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Any]]:
        """Yield all batches."""
        return self.batches()

    @abstractmethod
    def batches(self, start: int = 0) -> Iterator[tuple[tuple[int, ...], Any]]:
        """Yield the index of each example of a batch in the training set, and the batch.

        Args:
            start: How many batches are left out at the beginning; the others stay as they are.
        """

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """Return what decides which rank has which examples in which batch, as JSON primitives."""

    @abstractmethod
    def first_few(self) -> Any:
        """Return a small batch of the first examples of the pass, for a probe before it."""


class IndexedPass(DataPass):
    """A pass over a data set whose examples can be asked for by index."""

    indexed = True

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        selected: Sequence[int],
        num_examples: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        """Share out the selected examples.

        Args:
            loader: Where data set, collate function and worker settings come from.
            selected: The n indices, of all ranks together.
            num_examples: N.
            batch_size: Examples per batch.
            rank: Number of this rank.
            world_size: W.
            seed: For the workers' random numbers (augmentations).
        """
        here = tuple(selected[rank::world_size])
        # At least two batches for all who have several examples: one says nothing of the others.
        batch_size = min(batch_size, max(1, -(-len(selected) // (2 * world_size))))
        self.num_examples = num_examples
        self.num_here = len(here)
        self._loader = loader
        self._selected = selected
        self._batch_size = batch_size
        self._world_size = world_size
        self._batches = [here[i : i + batch_size] for i in range(0, len(here), batch_size)]
        self._seed = seed

    def batches(self, start: int = 0) -> Iterator[tuple[tuple[int, ...], Any]]:
        """Yield the batches of this rank."""
        wanted = self._batches[start:]
        loader = _like(self._loader, seed=self._seed, batch_sampler=wanted)
        yield from zip(wanted, loader, strict=True)

    def plan(self) -> dict[str, Any]:
        """Return N, batch size, number of ranks and a digest of the order."""
        digest = hashlib.sha256()
        for index in self._selected:
            digest.update(b"%d " % index)
        return {
            "num_examples": self.num_examples,
            "batch_size": self._batch_size,
            "world_size": self._world_size,
            "order": digest.hexdigest(),
        }

    def first_few(self) -> Any:
        """Return the first examples of all ranks together, the same ones on every rank."""
        few = [self._selected[:FEW]]
        return next(iter(_like(self._loader, seed=self._seed, batch_sampler=few, num_workers=0)))


class StreamPass(DataPass):
    """A pass over whatever an iterable yields, up to a limit, numbered as it comes."""

    indexed = False

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        num_examples: int | None,
        max_here: int | None,
        max_batches: int | None,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        """Wrap a stream.

        Args:
            loader: Yields batches.
            num_examples: N, where the data set knows its length.
            max_here: How many examples this rank takes at most, None for all.
            max_batches: How many batches this rank takes at most, None for all.
            rank: Number of this rank.
            world_size: W.
            seed: For the workers' random numbers.
        """
        self.num_examples = num_examples
        self.num_here = max_here
        self._loader = loader
        self._max_batches = max_batches
        self._rank = rank
        self._world_size = world_size
        self._seed = seed

    def batches(self, start: int = 0) -> Iterator[tuple[tuple[int, ...], Any]]:
        """Yield batches until the stream or the limit ends; a batch across the limit is cut."""
        seen = 0
        for number, whole in enumerate(islice(self._batches(), self._max_batches)):
            size = batch_size_of(whole)
            left = size if self.num_here is None else min(size, self.num_here - seen)
            if left == 0:
                return
            batch = whole if left == size else take_examples(whole, range(left))
            if number >= start:
                yield tuple((seen + i) * self._world_size + self._rank for i in range(left)), batch
            seen += left

    def plan(self) -> dict[str, Any]:
        """Return N and the limits; the order of a stream is its own."""
        return {
            "num_examples": self.num_examples,
            "world_size": self._world_size,
            "max_here": self.num_here,
            "max_batches": self._max_batches,
        }

    def first_few(self) -> Any:
        """Return the beginning of this rank's first batch."""
        for batch in islice(self._batches(num_workers=0), self._max_batches):
            return take_examples(batch, range(min(FEW, batch_size_of(batch))))
        raise InputError(f"train_dataloader: must yield at least one example; got none. {FIX}")

    def _batches(self, **changes: Any) -> Iterable[Any]:
        # Never the user's own DataLoader: with persistent workers a second iteration would restart
        # the one that training is in the middle of.
        if isinstance(self._loader, DataLoader):
            size = self._loader.batch_size
            return _like(self._loader, seed=self._seed, batch_size=size, **changes)
        return self._loader


def require_seen(num_examples: int) -> None:
    """Raise when a pass has seen no example on any rank.

    Raises:
        InputError: It has not.
    """
    if num_examples < 1:
        raise InputError(
            "train_dataloader: must yield its examples again for the pass; got none on any rank. "
            f"It may be a stream that can be read once. {FIX}"
        )


def curvature_loader(*owners: object, otherwise: Callable[[], Any]) -> tuple[Any, bool]:
    """Return the loader for a pass, and whether it is one of its own for the pass.

    Args:
        owners: Data module and module; the first with a method ``curvature_dataloader`` is asked.
        otherwise: Returns the training loader.

    Raises:
        InputError: ``curvature_dataloader()`` returned nothing.
    """
    for owner in owners:
        hook = getattr(owner, "curvature_dataloader", None)
        if hook is None:
            continue
        loader = hook()
        if loader is None:
            raise InputError(
                f"{type(owner).__name__}.curvature_dataloader: must return a DataLoader; got None. "
                "Return one, or remove the method to use the training loader."
            )
        return loader, True
    return otherwise(), False


def data_pass(
    loader: Any,
    *,
    rank: int = 0,
    world_size: int = 1,
    max_examples: int | None = None,
    batch_size: int | None = None,
    epoch_batches: float = float("inf"),
    seed: int = 0,
) -> DataPass:
    """Return one rank's share of one pass over the examples behind a training loader.

    Args:
        loader: What ``train_dataloader()`` returns, or what Lightning made of it.
        rank: Number of this rank.
        world_size: W.
        max_examples: Take a random subset of so many examples at most (of a stream, the first
            ones); None takes all.
        batch_size: Examples per batch and rank; None takes the training loader's.
        epoch_batches: How many batches an epoch has on one rank where the Trainer limits that.
        seed: Chooses the subset; seeds the workers.

    Raises:
        InputError: The loader is a collection of loaders, its batches or its sampler cannot be
            taken apart, or there are no examples.
    """
    if isinstance(loader, (dict, list, tuple)) or type(loader).__name__ == "CombinedLoader":
        raise InputError(
            "train_dataloader: must be one loader for a pass over the examples; got a collection "
            f"of them ({type(loader).__name__}). {FIX}"
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if batch_size is not None:
            raise InputError(
                f"batch_size: must be None where the data is a stream; got {batch_size}. The "
                "stream comes in its own batches; leave batch_size out."
            )
        data = getattr(loader, "dataset", None)
        return StreamPass(
            loader,
            num_examples=len(data) if isinstance(data, Sized) else None,
            max_here=None if max_examples is None else -(-max_examples // world_size),
            max_batches=None if epoch_batches == float("inf") else int(epoch_batches),
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
    shown = training_examples(
        loader,
        world_size=world_size,
        epoch_batches=epoch_batches,
        batch_size=batch_size,
        seed=seed,
    )
    size = shown.most if max_examples is None else min(shown.most, max_examples)
    return IndexedPass(
        loader,
        selected=random_subset(shown.indices, size, seed=seed),
        num_examples=len(shown.indices),
        batch_size=shown.batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )


def _like(loader: DataLoader[Any], *, seed: int, **changes: Any) -> DataLoader[Any]:
    """Return a loader over the same data set that makes other batches."""
    settings: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        # Its own, so that starting the workers draws nothing from the global random numbers.
        "generator": torch.Generator().manual_seed(seed),
    }
    settings |= changes
    if settings["num_workers"] == 0:
        settings |= {"prefetch_factor": None, "multiprocessing_context": None, "timeout": 0}
    return DataLoader(loader.dataset, **settings)
