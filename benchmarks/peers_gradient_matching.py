r"""What the script of gradient matching's authors computes, written anew from its formula.

Daheim et al. (2024), arXiv:2310.12808; read: UKPLab/iclr2024-model-merging at c6e4114. With
:math:`F` the **mean** over the examples of squared gradients, :math:`c_t` a number per model (the
recipe gives the sizes of the data sets, which makes sums of the means), one scale α for all tasks,
and :math:`δ` inside both brackets:

.. math:: θ = θ_0 + α \sum_t \frac{c_t F_t + c_0 F_0 + δ}{α \sum_s c_s F_s + c_0 F_0 + δ} τ_t

Its habits, kept here: everything in the type of the weights; the reciprocal of the denominator is
taken first and multiplied; no guard where it is zero or negative; δ is 0 unless set (the recipe
sets 1e-12); parameters only, and no names with ``position_ids`` or ``attn.masked_bias``, which stay
the base's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peers_cases import Case, Inputs, State
from torch import Tensor

SKIPPED = ("position_ids", "attn.masked_bias")


def merge_as_published(
    base: State,
    experts: Sequence[State],
    mean_hessians: Sequence[State],
    base_mean_hessian: State,
    counts: Sequence[float],
    base_count: float,
    *,
    scale: float = 1.0,
    damping: float = 0.0,
) -> State:
    """Return the merged parameters.

    Args:
        base: θ₀ by name.
        experts: θ_t likewise.
        mean_hessians: F_t, means over the examples.
        base_mean_hessian: F₀.
        counts: c_t.
        base_count: c₀.
        scale: α.
        damping: δ.
    """
    merged = {}
    for name, start in base.items():
        if any(part in name for part in SKIPPED) or not start.is_floating_point():
            merged[name] = start.clone()
            continue
        prior = base_count * base_mean_hessian[name]
        sums = [c * f[name] for c, f in zip(counts, mean_hessians, strict=True)]
        inverse = 1.0 / (torch.stack([scale * s for s in sums]).sum(0) + prior + damping)
        total: Tensor = torch.zeros_like(start)
        for expert, own in zip(experts, sums, strict=True):
            total = total + inverse * (own + damping + prior) * (expert[name] - start)
        merged[name] = start + scale * total
    return merged


def at_its_recipe(inputs: Inputs) -> State:
    """Merge with α = 1, δ = 1e-12, the sizes of the data sets, and no Hessian of the base."""
    means = [
        {name: tensor / count for name, tensor in hessian.items()}
        for hessian, count in zip(inputs.hessians, inputs.examples, strict=True)
    ]
    zero = {name: torch.zeros_like(tensor) for name, tensor in inputs.base.items()}
    counts = [float(count) for count in inputs.examples]
    return merge_as_published(inputs.base, inputs.experts, means, zero, counts, 0.0, damping=1e-12)


def cases() -> tuple[Case, ...]:
    """Return it beside ours."""
    return (
        Case(
            "authors' formula",
            "gradient matching, α = 1, δ = 1e-12",
            at_its_recipe,
            "GradientMatching",
            reads="hessian",
        ),
    )
