"""Activation statistics: mean and variance of every channel at every site, gathered in one pass.

Per channel are kept the number of rows n, their mean, and M2 = Σ(z − mean)², in float64; two such
triples combine exactly (Chan et al.), so batches, ranks and files can be merged in any order
without the cancellation of Σz² − (Σz)²/n. In files a site's triple is ``<site>.count``,
``<site>.mean`` and ``<site>.m2``.

References:
    Chan, Golub, LeVeque (1983), "Algorithms for computing the sample variance".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.correction.forward import (
    Forward,
    MaskOf,
    attention_mask_of,
    evaluation_mode,
    rows,
    run_model,
    watch_site,
)
from lit_merge.correction.site import Site
from lit_merge.correction.wrappers import bare
from lit_merge.errors import InputError

_PARTS = ("count", "mean", "m2")
_BLOCK = 1 << 22  # elements raised to float64 at a time (32 MB), whatever the batch is


def moments(values: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return count, mean and M2 per channel of one block of rows.

    Args:
        values: Rows, ``[n, C]``, n ≥ 1.

    Returns:
        n, the mean ``[C]`` and M2 ``[C]``, both float64.
    """
    wide = values.to(torch.float64)
    mean = wide.mean(dim=0)
    return wide.shape[0], mean, (wide - mean).square().sum(dim=0)


def merge_moments(
    count: int, mean: Tensor, m2: Tensor, other_count: int, other_mean: Tensor, other_m2: Tensor
) -> tuple[int, Tensor, Tensor]:
    r"""Return the moments of the union of two sets of rows.

    .. math:: M = M_a + M_b + δ² \frac{n_a n_b}{n_a + n_b}, \quad δ = μ_b − μ_a

    Args:
        count: Number of rows of the first set, n_a.
        mean: Its mean, ``[C]``.
        m2: Its sum of squared deviations, ``[C]``.
        other_count: Number of rows of the second set, n_b.
        other_mean: Its mean, ``[C]``.
        other_m2: Its sum of squared deviations, ``[C]``.

    >>> zero, four, two = torch.tensor([0.0]), torch.tensor([4.0]), torch.tensor([2.0])
    >>> count, mean, m2 = merge_moments(1, zero, zero, 3, four, two)
    >>> count, mean.item(), m2.item()
    (4, 3.0, 14.0)
    """
    total = count + other_count
    if total == 0:
        return 0, mean, m2
    delta = other_mean - mean
    share = other_count / total
    return total, mean + delta * share, m2 + other_m2 + delta.square() * (count * share)


class ChannelStatistics:
    """Count, mean and M2 of the channels of one site.

    Attributes:
        count: Number of rows seen (batch × space, or unpadded tokens).
        mean: Mean per channel, float64 ``[C]``.
        m2: Sum of squared deviations from the mean per channel, float64 ``[C]``.
    """

    def __init__(self, count: int, mean: Tensor, m2: Tensor) -> None:
        self.count = count
        self.mean = mean
        self.m2 = m2

    @classmethod
    def empty(cls, num_features: int) -> ChannelStatistics:
        """Return the statistics of no rows at all, to begin a pass with."""
        zeros = torch.zeros(num_features, dtype=torch.float64)
        return cls(0, zeros, zeros.clone())

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Take in more rows.

        Args:
            values: Rows, ``[n, C]`` of any floating dtype; the statistics move to its device.
        """
        if values.device.type == "mps":  # has no float64
            values = values.cpu()
        for block in torch.split(values, max(1, _BLOCK // max(1, values.shape[1]))):
            if len(block):
                self.merge(ChannelStatistics(*moments(block)))

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Take in the rows that other statistics have seen, and return these statistics."""
        device = other.mean.device if other.count else self.mean.device
        self.count, self.mean, self.m2 = merge_moments(
            self.count,
            self.mean.to(device),
            self.m2.to(device),
            other.count,
            other.mean.to(device),
            other.m2.to(device),
        )
        return self

    def to(self, device: torch.device) -> ChannelStatistics:
        """Return these statistics on a device."""
        return ChannelStatistics(self.count, self.mean.to(device), self.m2.to(device))

    @property
    def num_features(self) -> int:
        """Number of channels C."""
        return len(self.mean)

    @property
    def variance(self) -> Tensor:
        """Variance per channel over the rows (divided by n), float64 ``[C]``."""
        return self.m2 / max(self.count, 1)

    @property
    def std(self) -> Tensor:
        """Standard deviation per channel, float64 ``[C]``."""
        return self.variance.sqrt()

    def __repr__(self) -> str:
        return f"ChannelStatistics(count={self.count}, num_features={self.num_features})"


@torch.no_grad()
def gather_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    sites: Sequence[Site],
    *,
    forward: Forward = run_model,
    mask: MaskOf = attention_mask_of,
) -> dict[str, ChannelStatistics]:
    """Run a model over batches, without gradients, in evaluation mode, and measure its sites.

    A module that is called several times in a forward (shared layers) has its calls pooled; one
    that is never called has no entry in the result. The model is left as it was.

    Args:
        model: The network.
        batches: What ``forward`` takes, batch after batch.
        sites: Where to measure.
        forward: Runs the model on one batch; its result is not used.
        mask: Takes a batch to the mask ``[B, T]`` of the tokens that count, or to None.

    Returns:
        Statistics by site name, in the order of ``sites``.

    Raises:
        InputError: There was no batch, no site was run, or activations are NaN or infinite.
    """
    statistics: dict[str, ChannelStatistics] = {}
    current_mask: Tensor | None = None

    def measure(site: Site) -> Callable[[Tensor], None]:
        def see(values: Tensor) -> None:
            statistics.setdefault(site.name, ChannelStatistics.empty(site.num_features))
            statistics[site.name].update(rows(values, current_mask))

        return see

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        for site in sites:
            stack.callback(watch_site(model, site, measure(site)).remove)
        for batch in batches:
            current_mask = mask(batch)
            # Not through wrappers: a compiled model ignores new hooks, a parallel one communicates.
            forward(bare(model), batch)
    if not any(one.count for one in statistics.values()):
        raise InputError(
            f"batches: must run at least one of the {len(sites)} sites; got none that was run. "
            "Give at least one batch with examples in it, and check the names of the sites."
        )
    seen = {name: one for name, one in statistics.items() if one.count}
    gathered = {site.name: seen[site.name] for site in sites if site.name in seen}
    for name, one in gathered.items():
        require_finite(one, site=name)
    return gathered


def require_finite(statistics: ChannelStatistics, *, site: str) -> None:
    """Raise unless all numbers are finite; a NaN or Inf in any row shows in mean or M2.

    Raises:
        InputError: They are not; names the site and how many channels.
    """
    bad = ~(statistics.mean.isfinite() & statistics.m2.isfinite())
    if bad.any():
        raise InputError(
            f"site {site!r}: activations must be finite; got NaN or infinity in "
            f"{int(bad.sum())} of {bad.numel()} channels. Check the weights and inputs, or "
            "use a wider precision."
        )


def variance_by_site(statistics: Mapping[str, ChannelStatistics]) -> dict[str, float]:
    """Return each site's variance, averaged over its channels: what collapses in a merge."""
    return {name: float(one.variance.mean()) for name, one in statistics.items()}


def to_tensors(statistics: Mapping[str, ChannelStatistics]) -> dict[str, Tensor]:
    """Return statistics as the tensors of ``activations.safetensors``, on the CPU."""
    tensors = {}
    for site, one in statistics.items():
        tensors[f"{site}.count"] = torch.tensor(one.count, dtype=torch.int64)
        tensors[f"{site}.mean"] = one.mean.to("cpu", torch.float64)
        tensors[f"{site}.m2"] = one.m2.to("cpu", torch.float64)
    return tensors


def from_tensors(
    tensors: Mapping[str, Tensor], *, source: str = "activations"
) -> dict[str, ChannelStatistics]:
    """Return the statistics that :func:`to_tensors` has written.

    Args:
        tensors: Tensors by name, three for each site.
        source: The file, for messages.

    Raises:
        InputError: A part is missing or unknown, or its shape or values cannot be.
    """
    sites = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    statistics = {}
    for site in sites:
        missing = [part for part in _PARTS if f"{site}.{part}" not in tensors]
        if missing:
            raise InputError(
                f"{source}: site {site!r} must have count, mean and m2; got no "
                f"{' and no '.join(missing)}. Gather the statistics again."
            )
        count, mean, m2 = (tensors[f"{site}.{part}"] for part in _PARTS)
        if count.numel() != 1 or mean.ndim != 1 or mean.shape != m2.shape:
            raise InputError(
                f"{source}: site {site!r} must have one count and equally many means and m2; got "
                f"shapes {tuple(count.shape)}, {tuple(mean.shape)} and {tuple(m2.shape)}. Gather "
                "the statistics again."
            )
        one = ChannelStatistics(int(count), mean.to(torch.float64), m2.to(torch.float64))
        if one.count < 1 or not (one.mean.isfinite() & (one.m2 >= 0) & one.m2.isfinite()).all():
            raise InputError(
                f"{source}: site {site!r} must have a positive count, finite means and m2 ≥ 0; got "
                f"count {one.count} and m2 from {float(one.m2.min())}. Gather the statistics again."
            )
        statistics[site] = one
    unknown = [name for name in tensors if name.rpartition(".")[2] not in _PARTS]
    if unknown:
        raise InputError(
            f"{source}: tensors must end in .count, .mean or .m2; got {unknown[0]!r}. Gather the "
            "statistics again."
        )
    return statistics
