"""Merge methods: one frozen dataclass each, around a pure function on tensors."""

from lit_merge.methods.average import Average, WeightedAverage
from lit_merge.methods.fisher_average import FisherAverage
from lit_merge.methods.gradient_matching import GradientMatching
from lit_merge.methods.method import MergeMethod, ParameterSlice
from lit_merge.methods.task_arithmetic import TaskArithmetic
from lit_merge.methods.ties import TIES

__all__ = [
    "TIES",
    "Average",
    "FisherAverage",
    "GradientMatching",
    "MergeMethod",
    "ParameterSlice",
    "TaskArithmetic",
    "WeightedAverage",
]
