"""Correction: what a few unlabelled examples of each task repair in a merged model.

``sites`` and ``statistics`` measure activations; ``routing`` sends each example of a mixed batch
to its own task and ``heads`` gives every task its own head; ``rescale`` and ``corrections`` put a
scale and shift per task behind the sites; ``tact`` fits them in closed form (``repair`` one for all
tasks, the control) and ``batch_norm`` measures running statistics anew, in a ``site_pass``;
``linear_probe`` is the control that they must beat.
"""

from lit_merge.correction.batch_norm import reestimate_batch_norm
from lit_merge.correction.corrections import Corrections
from lit_merge.correction.forward import attention_mask_of, run_model
from lit_merge.correction.heads import install_heads
from lit_merge.correction.linear_probe import head_inputs, linear_probe
from lit_merge.correction.repair import fit_repair
from lit_merge.correction.rescale import RescaleShift
from lit_merge.correction.routing import TaskContext, TaskRouter
from lit_merge.correction.sites import Site, find_sites
from lit_merge.correction.statistics import (
    ChannelStatistics,
    from_tensors,
    gather_statistics,
    merge_moments,
    to_tensors,
    variance_by_site,
)
from lit_merge.correction.tact import fit_tact, match_statistics

__all__ = [
    "ChannelStatistics",
    "Corrections",
    "RescaleShift",
    "Site",
    "TaskContext",
    "TaskRouter",
    "attention_mask_of",
    "find_sites",
    "fit_repair",
    "fit_tact",
    "from_tensors",
    "gather_statistics",
    "head_inputs",
    "install_heads",
    "linear_probe",
    "match_statistics",
    "merge_moments",
    "reestimate_batch_norm",
    "run_model",
    "to_tensors",
    "variance_by_site",
]
