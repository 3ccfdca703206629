"""``--json``: one object on the standard output, and everything else on the standard error.

The same keys everywhere: ``command``, ``output`` (what was written; a list for several, null for
nothing), ``seconds``, ``notes``, ``warnings``, and beside them what the command has found out.
Numbers that JSON does not know (NaN, infinity) are null.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import PurePath
from typing import Any, TextIO

from jsonargparse import ArgumentParser

from lit_merge.cli.parsing import add_switch


def add_json(parser: ArgumentParser) -> None:
    """Add the option ``json``."""
    add_switch(parser, "json", "Print one JSON object instead of text, with the result.")


class JsonResult:
    """What prints a command's result as JSON.

    Args:
        command: The command's name.
        asked: Whether the user wants JSON.
    """

    def __init__(self, command: str, *, asked: bool) -> None:
        self.asked = asked
        self._command = command
        self._stdout = sys.stdout
        self._began = time.perf_counter()
        self._warnings: list[str] = []

    def warned(self, message: str) -> None:
        """Take note of a warning of Python's."""
        self._warnings.append(message)

    def show(self, content: Mapping[str, Any], *, output: object = None) -> None:
        """Print the object.

        Args:
            content: What was found out, its own notes, warnings and seconds among it.
            output: The path or the paths that were written.
        """
        shown = {
            "command": self._command,
            "output": output,
            "seconds": round(time.perf_counter() - self._began, 3),
            "notes": [],
            **content,
            "warnings": list(dict.fromkeys([*content.get("warnings", ()), *self._warnings])),
        }
        text = json.dumps(plain(shown), indent=2, ensure_ascii=False, allow_nan=False)
        print(text, file=self._stdout, flush=True)


@contextmanager
def json_result(command: str, *, asked: bool) -> Iterator[JsonResult]:
    """Yield what prints a command's result as JSON.

    Where that is asked for, all that is printed in the block goes to the standard error, and
    Python's warnings are collected on their way there.
    """
    result = JsonResult(command, asked=asked)
    if not asked:
        yield result
        return
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        show = warnings.showwarning

        def keep(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            result.warned(str(message))
            show(message, category, filename, lineno, file, line)

        warnings.showwarning = keep
        yield result


def plain(value: object) -> Any:
    """Return a value as JSON knows it.

    >>> plain({"path": PurePath("a"), "loss": float("nan"), "sizes": (1, 2)})
    {'path': 'a', 'loss': None, 'sizes': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if not isinstance(value, PurePath):
        with suppress(AttributeError, TypeError, ValueError, RuntimeError):
            return plain(value.item())  # type: ignore[attr-defined]  # a number of torch or numpy
    return str(value)
