r"""Matching by activations: which units of two models do the same on the same inputs.

Both models run on the same unlabelled examples; at each site, the module whose channels a symmetry
permutes, the correlation of every channel of the one with every channel of the other is gathered in
one pass. A unit's profit at a place is the sum of its channels' correlations over all sites of the
symmetry. Correlations do not depend on the scale and shift of a channel, so a convolution and the
BatchNorm behind it say the same.

.. math:: C_{ij} = \frac{\sum_n (a_{ni} - \bar a_i)(b_{nj} - \bar b_j)}
          {\sqrt{\sum_n (a_{ni} - \bar a_i)^2 \sum_n (b_{nj} - \bar b_j)^2}}

References:
    Li et al. (2015), arXiv:1511.07543; Jordan et al. (2022), arXiv:2211.08403, section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.alignment.symmetry import PermutedSite, Symmetry
from lit_merge.alignment.terms import Term, TermAxis
from lit_merge.correction.forward import (
    Forward,
    MaskOf,
    attention_mask_of,
    evaluation_mode,
    module_at,
    rows,
    run_model,
)
from lit_merge.errors import InputError

_BLOCK = 1 << 21  # elements raised to float64 at a time (16 MB)
_DEAD = 1e-20  # of the largest variance: a channel that does not vary correlates with nothing


class CrossMoments:
    """Means, squared deviations and cross products of two models' channels at one site.

    Attributes:
        count: Number of rows seen.
        mean: Of each model's channels, float64 ``[C]`` twice.
        m2: Σ (z − mean)² of each model's channels, float64 ``[C]`` twice.
        cross: Σ (a − mean a)(b − mean b), float64 ``[C, C]``.
    """

    def __init__(self, channels: int, other_channels: int) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        self.count = 0
        self.mean = zeros(channels), zeros(other_channels)
        self.m2 = zeros(channels), zeros(other_channels)
        self.cross = zeros(channels, other_channels)

    @torch.no_grad()
    def update(self, left: Tensor, right: Tensor) -> None:
        """Take in the rows of a batch, ``[n, C]`` of either model, of the same inputs."""
        step = max(1, _BLOCK // max(1, left.shape[1]))
        for start in range(0, len(left), step):
            a, b = (z[start : start + step].to("cpu", torch.float64) for z in (left, right))
            means = a.mean(0), b.mean(0)
            a, b = a - means[0], b - means[1]
            share = len(a) / (self.count + len(a))
            deltas = means[0] - self.mean[0], means[1] - self.mean[1]
            weight = self.count * share  # Chan et al.: n_a n_b / (n_a + n_b)
            self.cross += a.mT @ b + weight * torch.outer(*deltas)
            self.m2[0].add_(a.square().sum(0) + weight * deltas[0].square())
            self.m2[1].add_(b.square().sum(0) + weight * deltas[1].square())
            self.mean[0].add_(share * deltas[0])
            self.mean[1].add_(share * deltas[1])
            self.count += len(a)

    def covariance(self) -> Tensor:
        """Return the covariance of every channel with every other model's, ``[C, C]``."""
        return self.cross / max(self.count, 1)

    def correlation(self) -> Tensor:
        """Return the correlation likewise, in [−1, 1]; 0 for channels that do not vary."""
        inverse = []
        for m2 in self.m2:
            alive = m2 > _DEAD * m2.max()
            inverse.append(torch.where(alive, m2, 1.0).rsqrt() * alive)
        return inverse[0][:, None] * self.cross * inverse[1]


@torch.no_grad()
def gather_cross_moments(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    symmetries: Sequence[Symmetry],
    *,
    pairs: Sequence[tuple[int, int]] = ((0, 1),),
    forward: Forward = run_model,
    mask: MaskOf = attention_mask_of,
) -> dict[tuple[int, int], dict[str, CrossMoments]]:
    """Run models over the same batches, in evaluation mode, and compare their channels.

    Args:
        models: Networks of one architecture, with names of modules as the sites have them.
        batches: What ``forward`` takes, batch after batch.
        symmetries: Whose sites are compared.
        pairs: Which two of the models, by index, are compared.
        forward: Runs a model on one batch; its result is not used.
        mask: Takes a batch to the mask ``[B, T]`` of the tokens that count, or to None.

    Returns:
        The moments of each pair by site; sites that are never run are left out.

    Raises:
        InputError: There is no site or batch, or activations are NaN or infinite.
    """
    named = {site.name: site for symmetry in symmetries for site in symmetry.sites}
    if not named:
        raise InputError(
            "symmetries: must have sites whose activations can be compared; got none. "
            'Match by weights: by="weights".'
        )
    found: dict[tuple[int, int], dict[str, CrossMoments]] = {pair: {} for pair in pairs}
    remaining = iter(batches)
    first = list(itertools.islice(remaining, 1))
    sites = _different(models[0], first[0], named, forward) if first else {}
    with ExitStack() as stack:
        recorded: list[dict[str, list[Tensor]]] = []
        current: Tensor | None = None

        def record(into: dict[str, list[Tensor]], site: PermutedSite) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                into.setdefault(site.name, []).append(_rows(output, site, current))

            return hook

        for model in models:
            recorded.append({})
            stack.enter_context(evaluation_mode(model))
            for site in sites.values():
                handle = module_at(model, site.name).register_forward_hook(
                    record(recorded[-1], site)
                )
                stack.callback(handle.remove)
        for batch in itertools.chain(first, remaining):
            current = mask(batch)
            for model in models:
                forward(model, batch)
            for (a, b), moments in found.items():
                for name, values in recorded[a].items():
                    left, right = torch.cat(values), torch.cat(recorded[b][name])
                    if name not in moments:
                        moments[name] = CrossMoments(left.shape[1], right.shape[1])
                    moments[name].update(left, right)
            for outputs in recorded:
                outputs.clear()
    for moments in found.values():
        if not any(measured.count for measured in moments.values()):
            raise InputError(
                f"batches: must run at least one of the {len(named)} sites; got none that was "
                "run. Give at least one batch with examples in it."
            )
        for name, measured in moments.items():
            if not all(bool(m2.isfinite().all()) for m2 in measured.m2):
                raise InputError(
                    f"site {name!r}: activations must be finite; got NaN or infinity. Check the "
                    "weights and inputs, or use a wider precision."
                )
    return found


def activation_terms(
    symmetries: Sequence[Symmetry],
    moments: Mapping[str, CrossMoments],
    *,
    covariance: bool = False,
) -> dict[str, Term]:
    """Return the terms of matching by activations: one for each site.

    Args:
        symmetries: What may be permuted.
        moments: By site, the staying model first.
        covariance: Whether to compare by covariance, in which channels of a large variance count
            for more. It is divided by the mean variance of the site, so that sites count alike.
    """
    places: dict[str, list[TermAxis]] = {}
    for symmetry in symmetries:
        for site in symmetry.sites:
            if site.name in moments and moments[site.name].count:
                place = TermAxis(symmetry.name, 0, site.positions)
                places.setdefault(site.name, []).append(place)
    terms = {}
    for name, axes in places.items():
        one = moments[name]
        matrix = one.covariance() if covariance else one.correlation()
        if covariance:
            variances = (m2.mean() / one.count for m2 in one.m2)
            matrix = matrix / math.sqrt(math.prod(map(float, variances)) or 1.0)
        channels = matrix.shape[1]
        identity = torch.eye(channels, dtype=torch.float64)
        terms[f"activations of {name}"] = Term(
            matrix[None], identity[None], tuple(axes), float(channels)
        )
    return terms


def _different(
    model: nn.Module, batch: Any, sites: Mapping[str, PermutedSite], forward: Forward
) -> dict[str, PermutedSite]:
    """Return the sites without those that hand on what another one has given (containers)."""
    outputs: list[Any] = []
    found: dict[str, PermutedSite] = {}

    def look(site: PermutedSite) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # The version tells an in-place activation's output from what it was made of.
            seen = (output, getattr(output, "_version", 0))
            if not any(seen[0] is other and seen[1] == version for other, version in outputs):
                outputs.append(seen)
                found[site.name] = site

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for site in sites.values():
            handle = module_at(model, site.name).register_forward_hook(look(site))
            stack.callback(handle.remove)
        forward(model, batch)
    return found


def _rows(output: Any, site: PermutedSite, mask: Tensor | None) -> Tensor:
    if not isinstance(output, Tensor) or output.is_nested or output.ndim < 2:
        kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output)
        raise InputError(
            f"site {site.name!r}: its output must be a batch of tensors; got {kind}. "
            'Match by weights: by="weights".'
        )
    kept = rows(output.movedim(site.channel_dim, -1), mask)
    if kept.untyped_storage().data_ptr() == output.untyped_storage().data_ptr():
        return kept.clone()  # an in-place activation behind the site would change it
    return kept
