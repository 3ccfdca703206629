"""Estimators of the diagonal curvature: how sure each weight of a trained model is.

All return the SUM over examples of squared per-example gradients, by parameter name:
:func:`diagonal_hessian` and :class:`PerExampleFisher` exactly, by a pass over the data;
:class:`SquaredBatchGradient` and :func:`adam_second_moment` nearly for free, from training.
"""

from lit_merge.curvature.adam import adam_second_moment
from lit_merge.curvature.batch_gradient import SquaredBatchGradient
from lit_merge.curvature.batches import batch_size_of, split_batch, take_examples
from lit_merge.curvature.diagonal import diagonal_hessian
from lit_merge.curvature.estimator import CurvatureEstimator, CurvatureWarning
from lit_merge.curvature.per_example import PerExampleFisher
from lit_merge.curvature.probe import ProbeReport

__all__ = [
    "CurvatureEstimator",
    "CurvatureWarning",
    "PerExampleFisher",
    "ProbeReport",
    "SquaredBatchGradient",
    "adam_second_moment",
    "batch_size_of",
    "diagonal_hessian",
    "split_batch",
    "take_examples",
]
