"""Merging: from files to folders in constant memory, or in memory.

The same steps in either case: open the inputs under one set of names
(:mod:`lit_merge.streaming.inputs`), decide what happens to each tensor
(:mod:`lit_merge.streaming.plan`), and stream the data through the method
(:mod:`lit_merge.streaming.stream`). Sums are made in float32, in float64 for tensors of float64,
and rounded once to the type that is written.
"""

from lit_merge.streaming.dry_run import PlanReport
from lit_merge.streaming.files import merge, merge_all, plan_all
from lit_merge.streaming.memory import MergedTensors, merge_in_memory, merge_state_dicts
from lit_merge.streaming.overrides import Override
from lit_merge.streaming.result import MergeResult, MergeWarning

__all__ = [
    "MergeResult",
    "MergeWarning",
    "MergedTensors",
    "Override",
    "PlanReport",
    "merge",
    "merge_all",
    "merge_in_memory",
    "merge_state_dicts",
    "plan_all",
]
