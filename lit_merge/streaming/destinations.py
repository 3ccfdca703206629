"""Where a merge may write: folders that are free, apart from each other and from the inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

from lit_merge.errors import InputError
from lit_merge.location import is_remote
from lit_merge.methods import MergeMethod
from lit_merge.output import require_free, resolved
from lit_merge.streaming.request import Request
from lit_merge.streaming.unfinished import Process
from lit_merge.upload import require_free_url


def require_outputs(
    outputs: Mapping[str | Path, MergeMethod], request: Request, process: Process
) -> None:
    """Check, before anything is read, that the outputs of a merge can be written.

    Args:
        outputs: The method by output.
        request: What was asked for.
        process: Which of the processes that share the merge this one is.

    Raises:
        InputError: One is not free, they are not apart from each other, or one that is to be
            replaced holds an input.
    """
    inputs = [request.base, request.base_hessian, *request.experts.values()]
    _require_apart(list(outputs))
    for output in outputs:
        if is_remote(output):
            require_free_url(output, replace=request.replace)
            if process.count > 1:
                raise InputError(
                    f"{output}: must be a local folder when several processes share a merge; got a "
                    f"URL and {process.count} processes. Use one process."
                )
            continue
        require_free(output, replace=request.replace)
        if request.replace:
            _require_outside(output, inputs)


@contextmanager
def local_folders(outputs: Iterable[str | Path]) -> Iterator[dict[str | Path, Path]]:
    """Yield where each output is written: URLs into a folder that is removed afterwards."""
    with ExitStack() as stack:
        yield {
            output: Path(stack.enter_context(TemporaryDirectory(prefix="lit-merge-"))) / "merged"
            if is_remote(output)
            else Path(output)
            for output in outputs
        }


def _require_apart(outputs: Sequence[str | Path]) -> None:
    if not outputs:
        raise InputError("outputs: must be one folder or more; got none. Name one.")
    for one, other in permutations((path for path in outputs if not is_remote(path)), 2):
        if resolved(one).is_relative_to(resolved(other)):
            raise InputError(
                f"outputs: must be folders apart from each other; got {str(one)!r} and "
                f"{str(other)!r}, one of which is or holds the other. Name other folders."
            )


def _require_outside(output: str | Path, inputs: Iterable[str | Path | None]) -> None:
    folder = Path(output).resolve()
    for path in inputs:
        if path is not None and Path(path).resolve().is_relative_to(folder):
            raise InputError(
                f"{output}: must not hold the inputs when it is replaced; got {str(path)!r} in it. "
                f"Name another output folder."
            )
