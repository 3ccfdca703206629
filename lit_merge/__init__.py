"""Train fine-tuned experts with PyTorch Lightning and merge them into one model.

The names here, and the subpackages, are imported when they are first used, so that neither
``import lit_merge`` nor the command line pays for what it does not need.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from lit_merge.errors import InputError

if TYPE_CHECKING:
    from lit_merge import callbacks, correction, curvature, methods
    from lit_merge.checkpoint_curvature import curvature_of_checkpoint
    from lit_merge.correction import RescaleShift
    from lit_merge.evaluation import Evaluation, EvaluationRow
    from lit_merge.evaluation.file import read_evaluation, write_evaluation
    from lit_merge.evaluation.measurement import evaluate
    from lit_merge.evaluation.model_entry import ModelEntry
    from lit_merge.expert import Expert, ExpertInfo, open_expert, write_expert
    from lit_merge.export import export_task
    from lit_merge.export.multi_task import export_multi_task
    from lit_merge.forecast import Forecast, forecast_merge
    from lit_merge.inspection import Inspection, inspect_path
    from lit_merge.least_squares import LeastSquares
    from lit_merge.merge_record import MergeRecord, read_merge_record
    from lit_merge.methods import (
        DARE,
        DELLA,
        EMR,
        SLERP,
        TIES,
        TSVM,
        WUDI,
        Average,
        Breadcrumbs,
        Consensus,
        FisherAverage,
        GradientMatching,
        IsoC,
        IsoCTS,
        KroneckerMatching,
        MagMax,
        MagnitudePrune,
        MaTS,
        MergeMethod,
        ModelStock,
        RegMean,
        TALLMasks,
        TaskArithmetic,
        WeightedAverage,
    )
    from lit_merge.module import MergeModule
    from lit_merge.parameters import ParametersPolicy
    from lit_merge.report import write_report
    from lit_merge.streaming import MergeResult, merge, merge_state_dicts
    from lit_merge.tasks import (
        ClassificationModule,
        ImageTask,
        LanguageTask,
        MultiTaskDataModule,
        Task,
        TaskDataModule,
        TextTask,
        TimmClassifier,
        TransformersCausalLM,
        TransformersClassifier,
    )

try:
    __version__ = version("lit-merge")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "unknown"

_SUBPACKAGES = ("callbacks", "correction", "curvature", "methods")
_HOMES = {
    "DARE": "methods",
    "DELLA": "methods",
    "EMR": "methods",
    "SLERP": "methods",
    "TIES": "methods",
    "TSVM": "methods",
    "WUDI": "methods",
    "Average": "methods",
    "Breadcrumbs": "methods",
    "ClassificationModule": "tasks",
    "Consensus": "methods",
    "Evaluation": "evaluation",
    "EvaluationRow": "evaluation",
    "Expert": "expert",
    "ExpertInfo": "expert",
    "FisherAverage": "methods",
    "Forecast": "forecast",
    "GradientMatching": "methods",
    "ImageTask": "tasks",
    "Inspection": "inspection",
    "IsoC": "methods",
    "IsoCTS": "methods",
    "KroneckerMatching": "methods",
    "LanguageTask": "tasks",
    "LeastSquares": "least_squares",
    "MaTS": "methods",
    "MagMax": "methods",
    "MagnitudePrune": "methods",
    "MergeMethod": "methods",
    "MergeModule": "module",
    "MergeRecord": "merge_record",
    "MergeResult": "streaming",
    "ModelEntry": "evaluation.model_entry",
    "ModelStock": "methods",
    "MultiTaskDataModule": "tasks",
    "ParametersPolicy": "parameters",
    "RegMean": "methods",
    "RescaleShift": "correction",
    "TALLMasks": "methods",
    "Task": "tasks",
    "TaskArithmetic": "methods",
    "TaskDataModule": "tasks",
    "TextTask": "tasks",
    "TimmClassifier": "tasks",
    "TransformersCausalLM": "tasks",
    "TransformersClassifier": "tasks",
    "WeightedAverage": "methods",
    "curvature_of_checkpoint": "checkpoint_curvature",
    "evaluate": "evaluation.measurement",
    "export_multi_task": "export.multi_task",
    "export_task": "export",
    "forecast_merge": "forecast",
    "inspect_path": "inspection",
    "merge": "streaming",
    "merge_state_dicts": "streaming",
    "open_expert": "expert",
    "read_evaluation": "evaluation.file",
    "read_merge_record": "merge_record",
    "write_evaluation": "evaluation.file",
    "write_expert": "expert",
    "write_report": "report",
}

__all__ = [
    "DARE",
    "DELLA",
    "EMR",
    "SLERP",
    "TIES",
    "TSVM",
    "WUDI",
    "Average",
    "Breadcrumbs",
    "ClassificationModule",
    "Consensus",
    "Evaluation",
    "EvaluationRow",
    "Expert",
    "ExpertInfo",
    "FisherAverage",
    "Forecast",
    "GradientMatching",
    "ImageTask",
    "InputError",
    "Inspection",
    "IsoC",
    "IsoCTS",
    "KroneckerMatching",
    "LanguageTask",
    "LeastSquares",
    "MaTS",
    "MagMax",
    "MagnitudePrune",
    "MergeMethod",
    "MergeModule",
    "MergeRecord",
    "MergeResult",
    "ModelEntry",
    "ModelStock",
    "MultiTaskDataModule",
    "ParametersPolicy",
    "RegMean",
    "RescaleShift",
    "TALLMasks",
    "Task",
    "TaskArithmetic",
    "TaskDataModule",
    "TextTask",
    "TimmClassifier",
    "TransformersCausalLM",
    "TransformersClassifier",
    "WeightedAverage",
    "__version__",
    "callbacks",
    "correction",
    "curvature",
    "curvature_of_checkpoint",
    "evaluate",
    "export_multi_task",
    "export_task",
    "forecast_merge",
    "inspect_path",
    "merge",
    "merge_state_dicts",
    "methods",
    "open_expert",
    "read_evaluation",
    "read_merge_record",
    "write_evaluation",
    "write_expert",
    "write_report",
]


def __getattr__(name: str) -> object:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"lit_merge.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_merge' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lit_merge.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES, *_HOMES})
