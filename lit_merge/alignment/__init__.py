"""Alignment: the permutation symmetries of a model, found, proved, matched and applied.

``units`` says what lies along the axes of tensors, ``call``, ``rearranging`` and ``operations``
what operations make of them, and ``propagation`` follows a forward; ``symmetries`` reads the
symmetries off, ``proof`` tests them on a ``generic_model``, ``permute`` applies permutations. The
matching of two models, and of several, is in ``matching``, ``weight_matching``,
``activation_matching`` and ``several_models``.
"""

from lit_merge.alignment.permute import permute, permute_statistics
from lit_merge.alignment.proof import Proof, prove
from lit_merge.alignment.symmetries import find_symmetries, search_symmetries
from lit_merge.alignment.symmetry import PermutedAxis, PermutedSite, Symmetry

__all__ = [
    "PermutedAxis",
    "PermutedSite",
    "Proof",
    "Symmetry",
    "find_symmetries",
    "permute",
    "permute_statistics",
    "prove",
    "search_symmetries",
]
