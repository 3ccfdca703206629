"""An unfinished pass on disk: what a later run needs to go on where this one was stopped.

Every rank writes a file of its own into one folder, every so often and whole or not at all: the
sums, the state of the halves, how many batches are done, and what the pass was made of. Ranks write
at different times; that does no harm, because each goes on with its own examples.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_merge.checkpoint import SafetensorsWriter, TensorInfo
from lit_merge.checkpoint.safetensors_file import SafetensorsFile
from lit_merge.curvature.quality import Halves
from lit_merge.distributed import failing_together
from lit_merge.errors import InputError
from lit_merge.output import new_file
from lit_merge.passes.glimpse import alike
from lit_merge.strict_json import parse_json

FORMAT_VERSION = 1

_COST = 50  # a file that takes a second to write is written every 50 seconds at most


@dataclass
class UnfinishedPass:
    """The file of one rank's unfinished pass.

    Attributes:
        folder: Where the files of all ranks are.
        rank: Number of this rank.
        settings: What must be the same for the sums to be gone on with, as JSON primitives;
            "first_examples" is a :func:`~lit_merge.passes.glimpse.glimpse`.
        every: Seconds between two writings; they become more where writing takes long, so that it
            costs 2 % at most.
        replace: Whether files of another pass may be removed.
    """

    folder: Path
    rank: int
    settings: Mapping[str, Any]
    every: float
    replace: bool
    _due: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.settings = json.loads(json.dumps(self.settings))  # as it will be read
        self._due = time.monotonic() + self.every

    @property
    def path(self) -> Path:
        """The file of this rank."""
        return self.folder / f"rank-{self.rank}.safetensors"

    def require_same(self) -> None:
        """Remove the files of another pass if they may be replaced. Collective.

        Raises:
            InputError: There are such files, and they may not.
        """
        with failing_together():
            others = {path: why for path in self._files() if (why := self._difference(path))}
            if others and not self.replace:
                path, why = next(iter(others.items()))
                raise InputError(
                    f"{path}: must be of this very pass to go on with it; got one with another "
                    f"{why}. Repeat the settings of the run that was stopped, or give replace to "
                    "begin again, which removes it."
                )
        with failing_together():  # no rank writes before all have removed
            for path in others:
                path.unlink(missing_ok=True)  # other ranks may see it as well

    def load(self, halves: Halves) -> dict[str, Tensor] | None:
        """Take up the halves of this rank where they were, and return its sums.

        Args:
            halves: New ones, of the same parameters; changed.

        Returns:
            The sums by parameter name; None where nothing was written.
        """
        if not self.path.is_file():
            return None
        with SafetensorsFile(self.path) as file:
            state = parse_json(file.metadata["halves"].encode())
            halves.num_batches = state["num_batches"]
            halves.num_examples = state["num_examples"]
            halves.first = file.tensor("halves.first")
            halves.mark = file.tensor("halves.mark")
            return {
                name.removeprefix("sums."): file.tensor(name)
                for name in file
                if name.startswith("sums.")
            }

    def is_due(self) -> bool:
        """Return whether it is time to write."""
        return time.monotonic() >= self._due

    def save(self, sums: Mapping[str, Tensor], halves: Halves) -> None:
        """Write the sums of the batches that are done.

        Args:
            sums: By parameter name.
            halves: Their halves.
        """
        began = time.monotonic()
        state = {"num_batches": halves.num_batches, "num_examples": halves.num_examples}
        tensors = {f"sums.{name}": value for name, value in sums.items()}
        tensors |= {"halves.first": halves.first, "halves.mark": halves.mark}
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "settings": json.dumps(self.settings),
            "halves": json.dumps(state),
        }
        with new_file(self.path, replace=True) as path:
            _write(path, tensors, metadata)
        now = time.monotonic()
        self._due = now + max(self.every, _COST * (now - began))

    def remove(self) -> None:
        """Remove all ranks' files, what interrupted writings left, and the folder. Collective."""
        with failing_together():
            self.path.unlink(missing_ok=True)
            for path in self.folder.glob(f".{self.path.stem}.partial-*"):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # last: no rank looks through it any more; one of them does it
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.safetensors"))

    def _difference(self, path: Path) -> str | None:
        """Return what about a file is of another pass, None if nothing is."""
        with SafetensorsFile(path) as file:
            found = file.metadata.get("format_version")
            if found != str(FORMAT_VERSION):
                return f"format_version: {found} there, {FORMAT_VERSION} here"
            settings = parse_json(file.metadata["settings"].encode())
        for name, here in self.settings.items():
            there = settings.get(name)
            if not (alike(there or {}, here) if name == "first_examples" else there == here):
                return f"{name}: {_short(there)} there, {_short(here)} here"
        return None


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors one after the other, so that no second copy of them is held."""
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name, value in tensors.items():
            writer.write(name, 0, value)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
