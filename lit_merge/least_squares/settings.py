"""How the layers of a merged model are solved: the options of the sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lit_merge.errors import InputError

Ridge = Literal["auto"]
Prefix = Literal["merged", "expert"]
Wanted = Literal["outputs", "weights"]
Scales = Literal["regression", "statistics"]


@dataclass(frozen=True)
class LeastSquares:
    """How the layers of a merged model are solved, one behind the other.

    The defaults are what did best on small models (benchmarks/RESULTS.md); RegMean++ is
    ``wanted="weights"`` and RegMean that with ``prefix="expert"``, both without ``skips`` and
    ``sensitivity``.

    Args:
        ridge: How strongly a layer is held to the merge that it starts from, in units of the mean
            diagonal entry of its Gram; "auto" takes the one that predicts one half of the examples
            best from the other, layer by layer.
        precision: The same, weight by weight in proportion to the precision of the merge (its
            mean over the layer counts as one); 0 for none. Needs a merge with a Hessian.
        layers: Which layers, by shell-style patterns over their names.
        norms: Whether the affine parts of norms are solved, too. A BatchNorm directly behind a
            layer always is, together with it.
        embeddings: Whether tables of embeddings are solved, too.
        heads: Whether each task's head is solved for its expert's outputs, too.
        skips: Whether a layer at the end of a residual branch makes up for what the merged model's
            skip connection lacks of the expert's.
        sensitivity: Share of the rows' weight that follows how much the expert's outputs depend on
            them, from 0 (all rows count alike) to 1.
        scales: How corrections at the sites are set on the way: "regression" on the expert's
            activations, row by row, or "statistics", which is TACT.
        prefix: Whose inputs a layer is solved on: those behind the solved layers of the "merged"
            model, or each "expert"'s own.
        wanted: What the outputs should be: the experts' "outputs", or what the experts' "weights"
            make of the same inputs.
        max_rows: Rows of a batch that are used at a layer, chosen at random; None for all.

    Raises:
        InputError: An option is out of range.
    """

    ridge: float | Ridge = "auto"
    precision: float = 0.0
    layers: tuple[str, ...] = ("*",)
    norms: bool = False
    embeddings: bool = False
    heads: bool = True
    skips: bool = True
    sensitivity: float = 0.9
    scales: Scales = "regression"
    prefix: Prefix = "merged"
    wanted: Wanted = "outputs"
    max_rows: int | None = 8192

    def __post_init__(self) -> None:
        def require(fine: bool, what: str, must: str) -> None:
            if not fine:
                raise InputError(
                    f"least_squares.{what}: must be {must}; got {getattr(self, what)!r}. "
                    "Leave the default."
                )

        number = isinstance(self.ridge, (int, float)) and 0 <= self.ridge < math.inf
        require(number or self.ridge == "auto", "ridge", '"auto" or a finite number from 0')
        listed = not isinstance(self.layers, str)
        require(listed, "layers", "a list of patterns")
        require(0 <= self.precision < math.inf, "precision", "a finite number from 0")
        require(0 <= self.sensitivity <= 1, "sensitivity", "in [0, 1]")
        require(self.max_rows is None or self.max_rows >= 2, "max_rows", "at least 2, or null")
        for name, known in (("scales", Scales), ("prefix", Prefix), ("wanted", Wanted)):
            kinds = get_args(known)
            require(getattr(self, name) in kinds, name, f"one of {', '.join(kinds)}")
