"""What is seen on the way through a merge: traces of the Hessians, experts that change nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

from lit_merge.methods import ParameterSlice
from lit_merge.streaming.inputs import MergeInputs


@dataclass
class Findings:
    """What was seen of the merged tensors, or of a part of them.

    Attributes:
        traces: Sums of the experts' Hessians by task, one per slice; empty without curvature.
        unchanged: Tasks whose experts equal the base in all that was seen.
        equal: Pairs of tasks whose experts equal each other in all that was seen.
    """

    traces: dict[str, list[float]] = field(default_factory=dict)
    unchanged: set[str] = field(default_factory=set)
    equal: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def before(cls, inputs: MergeInputs) -> Findings:
        """Return what is true before anything has been seen."""
        return cls({}, set(inputs.tasks), set(combinations(inputs.tasks, 2)))

    def see(self, p: ParameterSlice) -> None:
        """Take in one merged slice."""
        if self.unchanged or self.equal:
            by_task = dict(zip(p.tasks, p.experts, strict=True))
            for task in list(self.unchanged):
                if p.base is None or not torch.equal(by_task[task], p.base):
                    self.unchanged.discard(task)
            for pair in list(self.equal):
                if not torch.equal(by_task[pair[0]], by_task[pair[1]]):
                    self.equal.discard(pair)
        for task, hessian in zip(p.tasks, p.hessians or (), strict=p.hessians is not None):
            total = float(hessian.sum())
            if math.isinf(total):  # of finite values: the sum has not fitted
                total = float(hessian.sum(dtype=torch.float64))
            self.traces.setdefault(task, []).append(total)

    def still(self) -> Findings:
        """Return a copy to go on with, in which nothing has been summed yet."""
        return Findings({}, set(self.unchanged), set(self.equal))

    def add(self, other: Findings) -> None:
        """Take in what was seen of other tensors."""
        for task, sums in other.traces.items():
            self.traces.setdefault(task, []).extend(sums)
        self.unchanged &= other.unchanged
        self.equal &= other.equal

    def trace_of(self, tasks: Iterable[str]) -> dict[str, float]:
        """Return the sum of each expert's Hessian, whatever the order in which it was seen."""
        return {task: math.fsum(self.traces[task]) for task in tasks if task in self.traces}

    def as_json(self) -> dict[str, Any]:
        """Return primitives of which :meth:`from_json` makes the same."""
        return {
            "traces": {task: _total(sums) for task, sums in self.traces.items()},
            "unchanged": sorted(self.unchanged),
            "equal": sorted(map(list, self.equal)),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Findings:
        """Return what :meth:`as_json` was made of, its sums added up."""
        pairs = {(str(one), str(two)) for one, two in content["equal"]}
        return cls(dict(content["traces"]), set(content["unchanged"]), pairs)


def _total(sums: list[float]) -> list[float]:
    """Return a sum and what its rounding has cut off, so that sums of sums are exact too."""
    total = math.fsum(sums)
    return [total, math.fsum([*sums, -total])]
