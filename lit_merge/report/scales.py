"""The scales and shifts of a corrected model, as the report shows them.

Notation: T tasks, C channels of a site. Scales are looked at in log2, where doubling and halving
are equally far from the identity; a mean of logarithms is shown as the factor that it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation

if TYPE_CHECKING:
    from torch import Tensor

CORRECTION_FILE = "correction.json"
OCTAVES = 6.0
"""Where log2 of a scale is cut off: scales below 1/64, zero among them, count as 1/64."""

_FIX = 'Give what "lit-merge correct" wrote, or leave the folder out.'


@dataclass(frozen=True, eq=False)
class SiteScales:
    """The correction of one site.

    Attributes:
        site: Qualified name of the module.
        scale: Scale per task and channel, float64 ``[T, C]``.
        shift: Shift per task and channel, float64 ``[T, C]``.
    """

    site: str
    scale: Tensor
    shift: Tensor

    @property
    def log2(self) -> Tensor:
        """Log2 of the scales' sizes, ``[T, C]``, cut off at ± :data:`OCTAVES`."""
        return self.scale.abs().log2().clamp(-OCTAVES, OCTAVES)

    @property
    def mean(self) -> list[float]:
        """Mean over the channels of log2 of the scale, by task."""
        means: list[float] = self.log2.mean(dim=1).tolist()
        return means

    @property
    def spread(self) -> list[float]:
        """Standard deviation over the channels of log2 of the scale, by task."""
        spreads: list[float] = self.log2.std(dim=1, correction=0).tolist()
        return spreads

    @property
    def shift_size(self) -> list[float]:
        """Root mean square over the channels of the shift, by task, in the activations' unit."""
        sizes: list[float] = self.shift.square().mean(dim=1).sqrt().tolist()
        return sizes

    @property
    def not_positive(self) -> list[int]:
        """How many channels have a scale of zero or less, by task."""
        counts: list[int] = (self.scale <= 0).sum(dim=1).tolist()
        return counts

    @property
    def change(self) -> float:
        """Root mean square of log2 of the scale over tasks and channels: 0 for the identity."""
        return float(self.log2.square().mean().sqrt())


@dataclass(frozen=True)
class CorrectionScales:
    """The corrections of a corrected folder.

    Attributes:
        name: What to call them: the folder.
        tasks: Names of the tasks.
        sites: One entry per site; may be empty, where only heads or weights were fitted.
        settings: How they were fitted.
        configuration: The YAML that makes them again; None where it was not recorded.
    """

    name: str
    tasks: tuple[str, ...]
    sites: tuple[SiteScales, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    configuration: str | None = None

    def most_changed(self, count: int) -> tuple[SiteScales, ...]:
        """Return the sites that are farthest from the identity, in the order of the model."""
        chosen = sorted(self.sites, key=lambda one: one.change, reverse=True)[:count]
        return tuple(one for one in self.sites if one in chosen)


def read_scales(folder: str | Path) -> CorrectionScales:
    """Read the scales and shifts of a corrected folder.

    Raises:
        InputError: It is no corrected folder, its corrections are no scale and shift, or a site's
            are missing, of another shape, or not finite.
    """
    import torch

    from lit_merge.merged.folder import CORRECTIONS, open_merged

    if not (Path(folder) / CORRECTION_FILE).is_file():
        raise InputError(f"{folder}: must have a {CORRECTION_FILE}; got none. {_FIX}")
    file = Path(folder) / CORRECTIONS
    with open_merged(folder) as parts:
        record, tensors = parts.record, parts.corrections
        assert record is not None  # open_merged has read correction.json
        sites: list[SiteScales] = []
        for site in record.sites:
            shape = (len(record.tasks), site.num_features)
            found: list[Tensor] = []
            for part in ("weight", "bias"):
                name = f"{site.name.replace('.', '/')}.{part}"
                if tensors is None or name not in tensors:
                    raise InputError(
                        f"{file}: site {site.name!r} must have a scale and a shift; got no tensor "
                        f"{name!r} in corrections by {record.correction}. {_FIX}"
                    )
                tensor = tensors.tensor(name)
                if tuple(tensor.shape) != shape:
                    raise InputError(
                        f"{file}: tensor {name!r} must be [tasks, channels] {list(shape)}; got "
                        f"{list(tensor.shape)}. {_FIX}"
                    )
                if not tensor.isfinite().all():
                    raise InputError(
                        f"{file}: tensor {name!r} must be finite; got NaN or infinity. Correct the "
                        "merged model again."
                    )
                found.append(tensor.to(torch.float64))
            sites.append(SiteScales(site.name, *found))
        settings, made = dict(record.settings), record.configuration
        return CorrectionScales(str(folder), record.tasks, tuple(sites), settings, made)


def in_forward_order(
    corrections: CorrectionScales, evaluation: Evaluation
) -> tuple[SiteScales, ...]:
    """Return the sites as the evaluation met them in a forward pass, if it has met all of them."""
    met = {site: place for place, site in enumerate(dict.fromkeys(_sites_of(evaluation)))}
    if any(one.site not in met for one in corrections.sites):
        return corrections.sites
    return tuple(sorted(corrections.sites, key=lambda one: met[one.site]))


def expert_stds(evaluation: Evaluation, task: str) -> dict[str, float]:
    """Return the root of the expert's variance by site, where the evaluation has measured it."""
    return {
        row.site: row.variance**0.5
        for row in evaluation.variances
        if row.kind == "expert" and row.task == task and row.variance > 0
    }


def relative_shifts(
    one: SiteScales, tasks: Sequence[str], evaluation: Evaluation
) -> list[float | None]:
    """Return a site's shifts in standard deviations of the expert's activations, by task.

    None where the evaluation has no variance of the task's expert at the site.
    """
    units = [expert_stds(evaluation, task).get(one.site) for task in tasks]
    return [
        None if unit is None else size / unit
        for size, unit in zip(one.shift_size, units, strict=True)
    ]


def _sites_of(evaluation: Evaluation) -> list[str]:
    """Return the sites of the rows, those of the experts first."""
    rows = sorted(evaluation.variances, key=lambda row: row.kind != "expert")
    return [row.site for row in rows]
