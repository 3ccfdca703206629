"""Least squares: the layers of a merged model solved for the experts' activations.

``normal_equations`` is the maths of one layer; ``linear_layers`` and ``embedding_table`` read
modules as linear maps, ``layer_plan`` finds out which of a network's can be solved, and
``layer_solver`` and ``head_solver`` solve one from its rows. ``sensitivity`` says how much a row
counts, ``skips`` what a residual branch has to make up for; ``regression`` and ``site_fit`` set
scale and shift on the way. ``prefix_sweep`` goes through a network with all of it; ``settings`` are
its options.
"""

from lit_merge.least_squares.prefix_sweep import SweepResult, solve_in_prefix
from lit_merge.least_squares.settings import LeastSquares
from lit_merge.least_squares.teacher import Teacher

__all__ = ["LeastSquares", "SweepResult", "Teacher", "solve_in_prefix"]
