"""What ``lit-merge merge --json`` says: a merge, several of one reading, or a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lit_merge.merge_record import count_actions
from lit_merge.streaming import MergeResult, PlanReport


def merges_content(merges: Sequence[MergeResult]) -> dict[str, Any]:
    """Return what merges of one reading have done; that of one stands there without a list."""
    every = [_merge_content(merge) for merge in merges]
    if len(every) == 1:
        return {key: value for key, value in every[0].items() if key != "output"}
    return {
        "merges": every,
        "notes": list(dict.fromkeys(note for merge in merges for note in merge.notes)),
        "warnings": list(dict.fromkeys(text for merge in merges for text in merge.warnings)),
    }


def plan_content(plan: PlanReport) -> dict[str, Any]:
    """Return what a merge would do."""
    content = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    content["tensors"] = [
        {
            "name": tensor.name,
            "action": tensor.action,
            "reason": tensor.reason,
            "shape": tensor.info.shape,
            "dtype": str(tensor.info.dtype).removeprefix("torch."),
            "method": plan.methods.get(tensor.alias_of or tensor.name),
        }
        for tensor in plan.record
    ]
    content["output"] = content.pop("path")
    del content["record"], content["methods"]
    return content


def _merge_content(merge: MergeResult) -> dict[str, Any]:
    actions = count_actions((tensor.action, tensor.info.numel) for tensor in merge.record)
    return {
        "output": str(merge.path),
        "seconds": merge.seconds,
        "tasks": merge.tasks,
        "tensors": {
            action: {"tensors": tensors, "elements": elements}
            for action, (tensors, elements) in actions.items()
        },
        "traces": merge.traces,
        "num_bytes": merge.num_bytes,
        "notes": merge.notes,
        "warnings": merge.warnings,
    }
