"""Plain models out of merged and corrected folders, for who has no lit-merge.

:func:`export_task` writes one task's model as timm, transformers, Lightning and torch load it;
:func:`export_multi_task` one network for all tasks of a corrected folder in one file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lit_merge.errors import InputError
from lit_merge.export.task import ExportFormat, ExportResult, export_merged

if TYPE_CHECKING:
    from torch import nn

    from lit_merge.export.corrected import Fold
    from lit_merge.tasks.task import Task

__all__ = ["ExportFormat", "ExportResult", "export_task"]


def export_task(
    merged: str | Path,
    task: str,
    output: str | Path,
    *,
    base: str | Path | None = None,
    model: nn.Module | None = None,
    examples: Mapping[str, Task] | None = None,
    fold: Fold = "possible",
    format: ExportFormat = "safetensors",
    dtype: str | None = None,
    replace: bool = False,
    progress: bool = True,
) -> ExportResult:
    """Write one task's plain model: the merged weights, masked or corrected, and its head.

    Of a merge, memory holds one chunk of one tensor. A corrected model is loaded whole: scales and
    shifts are folded into the layers that they follow, and corrected and exported model are run
    side by side. The folder appears whole or not at all.

    Args:
        merged: What :func:`lit_merge.merge` or ``lit-merge correct`` has written.
        task: Whose model.
        output: The folder to write.
        base: What was merged onto, for a merge with masks or one that was written as an adapter;
            None for where the merge found it.
        model: The architecture; needed for a corrected folder.
        examples: Tasks whose inputs prove the export of a corrected model; None makes inputs up
            where the network tells what it takes.
        fold: "possible" folds what can be folded and writes the rest beside it, as a small file of
            Python that needs torch alone; "require" makes such a rest an error.
        format: "safetensors", as transformers and timm read it, or "lightning": ``model.ckpt``,
            with the hyper-parameters of the expert's or the base's checkpoint where that is one.
        dtype: The floating type to write ("float32", "bfloat16", "float16", "float64"); None for
            the merge's, tensor by tensor.
        replace: Whether a folder that exists may be replaced.
        progress: Whether to show progress on the standard error.

    Raises:
        InputError: The folder is no merge, is damaged, or has no such task; the base is missing or
            another one; a value does not fit the type; a correction cannot be exported, or not
            exactly; or the output is not free.
    """
    # Imported where it is needed: plain merges are exported without Lightning.
    from lit_merge.export.corrected import export_corrected
    from lit_merge.export.corrected_folder import is_corrected

    if not is_corrected(merged):
        return export_merged(
            merged, task, output,
            base=base, format=format, dtype=dtype, replace=replace, progress=progress,
        )  # fmt: skip
    if base is not None:
        raise InputError(
            f"base: must be left out for {merged}, which is corrected and holds all weights; got "
            f"{str(base)!r}. Leave it out."
        )
    return export_corrected(
        merged, task, output,
        model=model, examples=examples, fold=fold,
        format=format, dtype=dtype, replace=replace, progress=progress,
    )  # fmt: skip
