"""Merge methods: one frozen dataclass each, around a pure function on tensors."""

from lit_merge.methods.average import Average, WeightedAverage
from lit_merge.methods.breadcrumbs import Breadcrumbs
from lit_merge.methods.dare import DARE
from lit_merge.methods.della import DELLA
from lit_merge.methods.emr import EMR
from lit_merge.methods.fisher_average import FisherAverage
from lit_merge.methods.gradient_matching import GradientMatching
from lit_merge.methods.iso import IsoC, IsoCTS
from lit_merge.methods.kronecker_matching import KroneckerMatching
from lit_merge.methods.mag_max import MagMax
from lit_merge.methods.magnitude_prune import MagnitudePrune
from lit_merge.methods.mats import MaTS
from lit_merge.methods.method import MergeMethod, ParameterSlice
from lit_merge.methods.model_stock import ModelStock
from lit_merge.methods.reg_mean import RegMean
from lit_merge.methods.slerp import SLERP
from lit_merge.methods.tall_masks import Consensus, TALLMasks
from lit_merge.methods.task_arithmetic import TaskArithmetic
from lit_merge.methods.ties import TIES
from lit_merge.methods.tsv_m import TSVM
from lit_merge.methods.wudi import WUDI

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
    "Consensus",
    "FisherAverage",
    "GradientMatching",
    "IsoC",
    "IsoCTS",
    "KroneckerMatching",
    "MaTS",
    "MagMax",
    "MagnitudePrune",
    "MergeMethod",
    "ModelStock",
    "ParameterSlice",
    "RegMean",
    "TALLMasks",
    "TaskArithmetic",
    "WeightedAverage",
]
