"""The ``lit-merge`` command: find the subcommand, run it, turn its errors into messages.

This module starts in milliseconds: what a subcommand needs (torch, lightning) is imported when it
runs. ``lit-merge --help`` and ``lit-merge COMMAND --help`` therefore print the pages of
:mod:`lit_merge.cli.commands`; ``lit-merge COMMAND --help_all`` builds the command's parser and
prints every option there is.

Exit status: 0 done, 1 a bug (with its traceback), 2 an input that cannot be used, 3 no room, 130
interrupted, 143 terminated; see :mod:`lit_merge.cli.stopping`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

import lit_merge
from lit_merge.cli.commands import COMMANDS, Command, overview
from lit_merge.cli.stopping import (
    INPUT_ERROR,
    NO_ROOM,
    Terminated,
    is_out_of_memory,
    status_of_exit,
    status_of_interrupt,
    terminating_in_order,
)
from lit_merge.errors import InputError, NoRoomError


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lit-merge``.

    Args:
        argv: The arguments after the program's name. When None those of the process, and modules
            in the working folder can then be imported too.

    Returns:
        The exit status.

    Raises:
        InputError: An input cannot be used and LIT_MERGE_TRACEBACK=1 asks for the traceback.
    """
    if argv is None:
        _find_modules_here()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with terminating_in_order():
            status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except InputError as error:
        if os.environ.get("LIT_MERGE_TRACEBACK") == "1":
            raise
        print(f"lit-merge: error: {error}", file=sys.stderr)
        return NO_ROOM if isinstance(error, NoRoomError) else INPUT_ERROR
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or os.environ.get("LIT_MERGE_TRACEBACK") == "1":
            raise
        reason = (str(error).splitlines() or ["nothing left"])[0]
        print(
            f"lit-merge: error: memory: must hold the models and a batch; got {reason!r}. Lower "
            "the batch size, or use a machine or device with more.",
            file=sys.stderr,
        )
        return NO_ROOM
    except KeyboardInterrupt as error:
        how = "terminated" if isinstance(error, Terminated) else "interrupted"
        print(f"lit-merge: {how}", file=sys.stderr)
        return status_of_interrupt(error)
    except BrokenPipeError:  # "lit-merge inspect … | head": the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:  # a parser has printed a help page or a configuration
        return status_of_exit(stop)


def _find_modules_here() -> None:
    """Let ``--model my_model.MyModel`` find my_model.py in the working folder.

    Last on the path: what is installed must not be shadowed by a file that happens to lie there.
    """
    if "" not in sys.path:
        sys.path.append("")


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(overview())
        return INPUT_ERROR
    name, rest = arguments[0], arguments[1:]
    if name in {"-h", "--help"} or arguments == ["help"]:
        print(overview())
        return 0
    if name in {"-V", "--version"}:
        print(f"lit-merge {lit_merge.__version__}")
        return 0
    if name == "help":
        name, rest = rest[0], ["--help"]
    command = _find(name)
    if command.options and not {"-h", "--help"}.isdisjoint(rest):
        print(command.page())
        return 0
    module, function = command.function.split(":")
    run: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return run(["--help" if argument == "--help_all" else argument for argument in rest])


def _find(name: str) -> Command:
    names = [command.name for command in COMMANDS]
    for command in COMMANDS:
        if command.name == name:
            return command
    near = difflib.get_close_matches(name, names, n=1)
    hint = f'Did you mean "{near[0]}"?' if near else 'Run "lit-merge --help" for what they do.'
    raise InputError(f"command: must be one of {', '.join(names)}; got {name!r}. {hint}")
