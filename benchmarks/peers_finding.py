"""What comes out on one input, beside what is right."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """What came out on one input.

    Attributes:
        peer: The library and function.
        input: What it was given.
        gives: What it gave, or how it failed.
        right: What is right.
        peer_right: Whether these agree.
        ours: What lit-merge gave.
        ours_right: Whether that is right.
    """

    peer: str
    input: str
    gives: str
    right: str
    peer_right: bool
    ours: str
    ours_right: bool


def found(
    peer: str,
    given: str,
    right: Tensor | str,
    theirs: Callable[[], Tensor],
    ours: Callable[[], Tensor],
    tolerance: float = 1e-5,
) -> Finding:
    """Run both sides; ``right`` as text means that refusing in words is right."""

    def run(side: Callable[[], Tensor]) -> tuple[str, bool]:
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                value = side().detach().double()
        except Exception as error:  # a failure is what is looked for
            text = f"{type(error).__name__}: {error}"
            return text, isinstance(right, str) and type(error).__name__ == "InputError"
        if isinstance(right, str):
            return _shown(value), False
        close = value.shape == right.shape and torch.allclose(
            value, right.double(), rtol=tolerance, atol=tolerance
        )
        return _shown(value), close

    gives, peer_right = run(theirs)
    own, ours_right = run(ours)
    shown = right if isinstance(right, str) else _shown(right)
    return Finding(peer, given, gives, shown, peer_right, own, ours_right)


def _shown(value: Tensor) -> str:
    return str([round(x, 5) for x in value.flatten().tolist()[:6]])
