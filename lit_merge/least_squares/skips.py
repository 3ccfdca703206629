"""What residual connections bring past a layer, in the merged model and in the experts.

At the end of a residual branch, the branch of the merged model should be the expert's plus what the
merged model's skip lacks of the expert's: then errors do not add up along the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from lit_merge.correction.forward import module_at
from lit_merge.least_squares.layer_plan import Event


class Skips:
    """The skips of all running forwards, each kept until it has been asked for.

    Args:
        uses: How often each skip will be asked for in a batch.
        pairs: Number of batches B: forward b of the merged model belongs to forward B + b, which is
            an expert's.
        running: Returns the number of the forward that runs.
    """

    def __init__(self, uses: Mapping[Event, int], pairs: int, running: Callable[[], int]) -> None:
        self._uses = dict(uses)
        self._pairs = pairs
        self._running = running
        self._caught: dict[tuple[int, Event], Tensor] = {}

    @contextmanager
    def catching(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Keep what the skips bring in forwards of these models inside the block."""
        with ExitStack() as stack:
            for model in models:
                for event in self._uses:
                    module, catch = module_at(model, event.module), partial(self._catch, event)
                    if event.before:
                        handle = module.register_forward_pre_hook(catch, prepend=True)
                    else:
                        handle = module.register_forward_hook(catch)
                    stack.callback(handle.remove)
            yield
        self._caught.clear()

    def _catch(self, event: Event, module: nn.Module, args: Any, output: Any = None) -> None:
        # A copy: the addition may be in place.
        self._caught[self._running(), event] = (args[0] if event.before else output).clone()

    def lacks(self, event: Event | None) -> list[Tensor | None]:
        """Return what the merged model's skip lacks of the expert's, batch by batch.

        Args:
            event: The skip; None, or one that is not kept, lacks nothing.
        """
        if event is None or event not in self._uses:
            return [None] * self._pairs
        lacks: list[Tensor | None] = [
            self._caught[self._pairs + pair, event] - self._caught[pair, event]
            for pair in range(self._pairs)
        ]
        self._uses[event] -= 1
        if not self._uses[event]:
            for number in range(2 * self._pairs):
                del self._caught[number, event]
        return lacks
