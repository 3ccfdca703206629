"""Forwards that wait for each other: every batch through every model up to a layer, then go on.

Closed forms need the activations of ALL calibration examples at a layer before that layer can be
set, and everything behind it only afterwards. Here each forward (one model, one batch) runs in a
thread of its own and stops at the places that it is given. When all have stopped there, an action
sees what they have brought, may change weights or what they go on with, and they continue. So a
sweep over all layers costs ONE forward per model and batch, for any architecture, with nothing kept
but what a forward keeps anyway: the activations that are still needed.

Only one thread runs at a time, so results do not depend on timing, and state that modules share
(the tasks of the running batch, say) is set anew for every stretch by ``around``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lit_merge.correction.forward import module_at
from lit_merge.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a forward stops.

    Attributes:
        key: What those who stop there are gathered under; models may use other modules for one key.
        module: Qualified name of the module.
        before: Whether it stops before the module runs, not after.
        last: Whether it stops behind the hooks that others have put there, not before them.
    """

    key: str
    module: str
    before: bool = False
    last: bool = False


@dataclass
class Arrival:
    """What a forward brings to a place; what is left in it is what the forward goes on with.

    Attributes:
        inputs: Positional arguments of the module.
        output: What the module has returned; None before it has run.
    """

    inputs: tuple[Any, ...]
    output: Any = None


@dataclass(frozen=True)
class Strand:
    """One forward among those that go in step.

    Attributes:
        model: The network that the places are in.
        call: Runs the network on one batch.
        places: Where to stop, in any order; strands of one model have the same.
        around: Makes a context that surrounds every stretch of the forward.
    """

    model: nn.Module
    call: Callable[[], Any]
    places: Sequence[Place]
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


Action = Callable[[str, dict[int, Arrival]], None]


def run_in_step(strands: Sequence[Strand], action: Action) -> None:
    """Run forwards without gradients, stopping together at their places.

    The first strand leads: whenever it has stopped, all those that wait under the same key are
    gathered and given to the action; then they go on. The others wait until it comes to their
    place.

    Args:
        strands: The forwards; the first is the leader.
        action: Called with a key and the arrivals by number of the strand, ascending.

    Raises:
        InputError: A model lacks a module, or the forwards do not meet at the same places.
        Exception: What a forward or the action has raised; all others are given up then.
    """
    walk = _Walk(strands)
    try:
        with ExitStack() as stack:
            for handle in walk.hooks():
                stack.callback(handle.remove)
            stack.enter_context(torch.no_grad())
            walk.run(action)
    finally:
        walk.give_up()


class _GivenUp(BaseException):
    """Ends a thread whose forward is no longer wanted."""


class _Runner:
    """The thread of one strand, and where it waits."""

    def __init__(self, strand: Strand, back: threading.Semaphore) -> None:
        self.strand = strand
        self.key: str | None = None
        self.arrival: Arrival | None = None
        self.error: BaseException | None = None
        self.finished = False
        self.unwanted = False
        self._back = back
        self._go = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._dtype = torch.get_default_dtype()

    @contextmanager
    def _stretch(self) -> Iterator[None]:
        """Give the thread the default dtype that it has set (half precision), and take it back."""
        outside = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            yield
        finally:
            self._dtype = torch.get_default_dtype()
            torch.set_default_dtype(outside)

    def advance(self) -> None:
        """Let the forward run until it waits or has ended."""
        with self._stretch(), self.strand.around():
            if self._thread.ident is None:
                self._thread.start()
            self._go.release()
            self._back.acquire()
        if self.error is not None:
            raise self.error

    def meet(self, key: str, arrival: Arrival) -> Arrival:
        """Wait, inside the thread, until the action has been taken."""
        self.key, self.arrival = key, arrival
        self._back.release()
        self._go.acquire()
        if self.unwanted:
            raise _GivenUp
        self.key = self.arrival = None
        return arrival

    def give_up(self) -> None:
        self.unwanted = True
        if self._thread.ident is not None:
            with self._stretch():
                self._go.release()
                self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self.unwanted:
                # The current device and the recording of gradients are a thread's own.
                if self._device is not None:
                    torch.cuda.set_device(self._device)
                with torch.no_grad():
                    self.strand.call()
        except _GivenUp:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.finished = True
            self._back.release()


class _Walk:
    """All strands, and which of them is running."""

    def __init__(self, strands: Sequence[Strand]) -> None:
        back = threading.Semaphore(0)
        self.runners = [_Runner(strand, back) for strand in strands]
        self.running: _Runner | None = None

    def hooks(self) -> list[Any]:
        """Put the stops into the models; the first to be put there is the first to be met."""
        places = {
            (id(one.strand.model), place): one.strand.model
            for one in self.runners
            for place in one.strand.places
        }
        late = [(place, model) for (_, place), model in places.items() if place.last]
        # Each of these is put in front of all, so in reverse order.
        early = [(place, model) for (_, place), model in places.items() if not place.last]
        handles: list[Any] = []
        for place, model in (*late, *reversed(early)):
            module, first = module_at(model, place.module), not place.last
            if place.before:
                hook = self._before(place)
                handles.append(module.register_forward_pre_hook(hook, prepend=first))
            else:
                handles.append(module.register_forward_hook(self._after(place), prepend=first))
        return handles

    def _before(self, place: Place) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            assert self.running is not None
            return self.running.meet(place.key, Arrival(args)).inputs

        return hook

    def _after(self, place: Place) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            assert self.running is not None
            return self.running.meet(place.key, Arrival(args, output)).output

        return hook

    def run(self, action: Action) -> None:
        leader = self.runners[0]
        moving = self.runners
        while True:
            for runner in moving:
                self.running = runner
                runner.advance()
            if leader.finished:
                break
            key = leader.key
            assert key is not None
            moving = [runner for runner in self.runners if runner.key == key]
            arrivals = {
                number: runner.arrival
                for number, runner in enumerate(self.runners)
                if runner.key == key and runner.arrival is not None
            }
            action(key, arrivals)
        for number, runner in enumerate(self.runners):
            if not runner.finished:
                raise InputError(
                    f"model: must run the same layers in the same order for every batch; got "
                    f"forward {number} waiting at {runner.key!r} when the first had ended. Leave "
                    "layers that only some examples reach out."
                )

    def give_up(self) -> None:
        for runner in self.runners:
            runner.give_up()
