"""Lightning callbacks that gather what a later merge needs while an expert trains.

The sources live in the top-level folder ``callbacks/``; the package is ``lit_merge.callbacks``.
"""

if __name__ != "lit_merge.callbacks":
    raise ImportError(
        f'import "lit_merge.callbacks", not "{__name__}": one class must not have two identities.'
    )

from lit_merge.callbacks.activation_statistics import ActivationStatistics
from lit_merge.callbacks.diagonal_hessian import DiagonalHessian
from lit_merge.callbacks.input_grams import InputGrams
from lit_merge.callbacks.kronecker_factors import KroneckerFactors
from lit_merge.callbacks.temporal_merging import TemporalMerging

__all__ = [
    "ActivationStatistics",
    "DiagonalHessian",
    "InputGrams",
    "KroneckerFactors",
    "TemporalMerging",
]
