"""Tasks and the data modules over them: one task to train an expert, several to correct a merge.

Everything that a task needs can be imported from here: :class:`Task` and its kinds, the two data
modules, and the ready modules for classification and language.
"""

from __future__ import annotations

from lit_merge.tasks.classification import (
    ClassificationModule,
    TimmClassifier,
    TransformersClassifier,
)
from lit_merge.tasks.data_modules import MultiTaskDataModule, TaskDataModule
from lit_merge.tasks.digits import DigitsTask
from lit_merge.tasks.image_task import ImageTask
from lit_merge.tasks.joined_task import JoinedTask
from lit_merge.tasks.language_model import TransformersCausalLM
from lit_merge.tasks.language_task import LanguageTask
from lit_merge.tasks.mixed_batches import MergeBatch
from lit_merge.tasks.task import IGNORED, DatasetTask, Task
from lit_merge.tasks.text_task import TextTask

__all__ = [
    "IGNORED",
    "ClassificationModule",
    "DatasetTask",
    "DigitsTask",
    "ImageTask",
    "JoinedTask",
    "LanguageTask",
    "MergeBatch",
    "MultiTaskDataModule",
    "Task",
    "TaskDataModule",
    "TextTask",
    "TimmClassifier",
    "TransformersCausalLM",
    "TransformersClassifier",
]
