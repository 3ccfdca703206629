"""Experts merged in memory, as the parts of a merged model: without a folder in between."""

from __future__ import annotations

from collections.abc import Mapping

from lit_merge.checkpoint import open_state_dict
from lit_merge.errors import InputError
from lit_merge.merged.folder import MergedParts
from lit_merge.methods import MergeMethod
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import merge_in_memory
from lit_merge.streaming.provenance import method_settings


def merge_parts(
    base: str | None,
    experts: Mapping[str, str],
    method: MergeMethod,
    *,
    policy: ParametersPolicy,
    base_hessian: str | None,
) -> MergedParts:
    """Merge experts' files and return what the merged model consists of.

    Args:
        base: Path of what the experts were fine-tuned from; None for methods without.
        experts: Path of each task's expert.
        method: How to merge.
        policy: What happens to tensors that are no ordinary weights.
        base_hessian: Hessian of the base, for methods that use one.

    Raises:
        InputError: If the files are not as they should be.
    """
    made = merge_in_memory(base, dict(experts), method, policy=policy, base_hessian=base_hessian)
    record = {
        "tasks": list(made.tasks),
        "method": method_settings(method),
        "traces": dict(made.traces),
        "notes": list(made.notes),
        "warnings": list(made.warnings),
    }
    weights = open_state_dict(made.state, path=f"merge of {', '.join(made.tasks)}")
    return MergedParts(weights, made.heads, made.tasks, record)


def require_one_model(method: MergeMethod) -> None:
    """Check that a method gives one model for all tasks.

    Raises:
        InputError: If it gives each task its own.
    """
    if method.masks:
        raise InputError(
            f"method: must give one model for all tasks; got {type(method).__name__}, which gives "
            "each its own. Merge into a folder, and evaluate or export that."
        )
