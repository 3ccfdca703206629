"""Estimators of the diagonal curvature: how sure each weight of a trained model is.

All return a SUM over examples, by parameter name. By a pass over the data: exactly, the squared
per-example gradients (:func:`diagonal_hessian`, :class:`PerExampleFisher`, and in shards
:class:`ShardedFisher`), with observed, sampled or expected labels; in expectation, the true Hessian
(:class:`HessianDiagonal`). Nearly for free, from training: :class:`SquaredBatchGradient`,
:func:`adam_second_moment`, :func:`ivon_hessian`.
"""

from lit_merge.curvature.adam import AdamSecondMoment, adam_second_moment
from lit_merge.curvature.batch_gradient import SquaredBatchGradient
from lit_merge.curvature.batches import batch_size_of, split_batch, take_examples
from lit_merge.curvature.beside import FisherBesideTraining
from lit_merge.curvature.diagonal import diagonal_hessian
from lit_merge.curvature.estimator import CurvatureEstimator, CurvatureWarning
from lit_merge.curvature.hutchinson import HessianDiagonal, without_negatives
from lit_merge.curvature.ivon import IvonHessian, ivon_hessian
from lit_merge.curvature.losses import Reduction
from lit_merge.curvature.objective import Labels
from lit_merge.curvature.per_example import PerExampleFisher
from lit_merge.curvature.probe import ProbeReport
from lit_merge.curvature.sharded import ShardedFisher

__all__ = [
    "AdamSecondMoment",
    "CurvatureEstimator",
    "CurvatureWarning",
    "FisherBesideTraining",
    "HessianDiagonal",
    "IvonHessian",
    "Labels",
    "PerExampleFisher",
    "ProbeReport",
    "Reduction",
    "ShardedFisher",
    "SquaredBatchGradient",
    "adam_second_moment",
    "batch_size_of",
    "diagonal_hessian",
    "ivon_hessian",
    "split_batch",
    "take_examples",
    "without_negatives",
]
