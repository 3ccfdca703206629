"""Which models to test: paths by name, and what each of them is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from lit_merge.errors import InputError
from lit_merge.evaluation import STAGED, Kind
from lit_merge.merged.folder import CORRECTION, MERGE


@dataclass(frozen=True)
class ModelEntry:
    """A model to test.

    Attributes:
        path: Its folder or checkpoint.
        kind: "base", "expert", "merged", "corrected" or "control"; None to tell it from the files
            and the model's name: a merged or corrected folder, an expert where the name is a task's
            or ``task`` is given, the base otherwise.
        task: The expert's task; None where the model's name is the task's.
        stage: Of a merged or corrected model: which step of one pipeline it is the result of,
            counted from 1; see :meth:`lit_merge.evaluation.Evaluation.stages`.
    """

    path: str
    kind: Kind | None = None
    task: str | None = None
    stage: int | None = None


def resolve_entries(
    models: Mapping[str, str | ModelEntry], tasks: Collection[str]
) -> dict[str, ModelEntry]:
    """Return what each model is, told from its files and name where the user did not say it.

    Raises:
        InputError: If there is no model or no task, a path does not exist, a kind is unknown, or
            the task of an expert is; or a stage has two models or one of another kind.
    """
    for parameter, given in (("models", models), ("tasks", tasks)):
        if not given:
            raise InputError(f"{parameter}: must name at least one; got none. Add one.")
    resolved: dict[str, ModelEntry] = {}
    for name, value in models.items():
        entry = value if isinstance(value, ModelEntry) else ModelEntry(str(value))
        path = Path(entry.path)
        if not path.exists():
            raise InputError(
                f"models.{name}: must exist; got {entry.path!r}, which does not. Check the path."
            )
        task = entry.task or (name if name in tasks else None)
        if entry.kind is not None:
            kind = entry.kind
        elif is_merged(path):
            kind = "corrected" if (path / CORRECTION).is_file() else "merged"
        else:
            kind = "base" if task is None else "expert"
        if kind not in get_args(Kind):
            raise InputError(
                f"models.{name}.kind: must be one of {', '.join(get_args(Kind))}; got {kind!r}. "
                "Correct it, or leave it out."
            )
        if kind == "expert" and task not in tasks:
            raise InputError(
                f"models.{name}.task: must be one of the tasks, {', '.join(tasks)}; got {task!r}. "
                "Name the expert after its task, or give its task."
            )
        if entry.stage is not None and (entry.stage < 1 or kind not in STAGED):
            raise InputError(
                f"models.{name}.stage: must be 1 or more, and of a model of kind "
                f"{' or '.join(STAGED)}; got {entry.stage} for kind {kind}. Leave it out, or "
                "correct the kind."
            )
        own = task if kind == "expert" else None
        resolved[name] = ModelEntry(entry.path, kind, own, entry.stage)
    by_stage: dict[int, str] = {}
    for name, entry in resolved.items():
        if entry.stage is not None and by_stage.setdefault(entry.stage, name) != name:
            raise InputError(
                f"models.{name}.stage: must be another than that of {by_stage[entry.stage]!r}; got "
                f"{entry.stage} for both. Give each step of the pipeline its own number."
            )
    return resolved


def is_merged(path: str | Path) -> bool:
    """Return whether a path is a merged or corrected folder, whatever it is tested as."""
    return any((Path(path) / file).is_file() for file in (MERGE, CORRECTION))
