r"""Where an expert starts and what is deployed, when experts arrive one after another.

At time step :math:`t` an expert :math:`θ_t` is trained from initial weights, and a model is
deployed that is made of the experts so far. Both are a choice, and an expert is trained once,
whatever comes later (Dziadzio et al. 2024, arXiv:2412.06712, who call the two axes initialisation
and deployment, and found the running average best for both).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lit_merge.callbacks.expert_callback import require_one_of
from lit_merge.checkpoint import Checkpoint
from lit_merge.errors import InputError
from lit_merge.methods import GradientMatching, MergeMethod, TaskArithmetic, WeightedAverage
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming.provenance import method_settings

Init = Literal["fresh", "last", "ema"]
Deploy = Literal["last", "merge", "ema"]

_RUNNING = (".running_mean", ".running_var")


@dataclass(frozen=True)
class Rules:
    """The rules of a timeline.

    Attributes:
        init: What a fit starts from: "fresh", the base; "last", the last expert; "ema", the running
            average of base and experts.
        deploy: What a step ends with: "last", its expert; "merge", all experts merged by
            ``method``; "ema", the running average.
        decay: How much of the average before remains in the running average, in [0, 1).
        method: For "merge"; None for ``GradientMatching()``.
        policy: What is done with heads, buffers and tensors that rules name.

    Raises:
        InputError: A value cannot be, or does not go with another.
    """

    init: Init = "ema"
    deploy: Deploy = "ema"
    decay: float = 0.5
    method: MergeMethod | None = None
    policy: ParametersPolicy = ParametersPolicy()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        require_one_of("init", self.init, ("fresh", "last", "ema"))
        require_one_of("deploy", self.deploy, ("last", "merge", "ema"))
        if not 0 <= self.decay < 1:
            raise InputError(
                f"decay: must be in [0, 1); got {self.decay}. 0.5 gives the newest expert half."
            )
        if self.deploy != "merge" and self.method is not None:
            raise InputError(
                f'method: must be left out with deploy "{self.deploy}"; got '
                f'{type(self.method).__name__}. Say deploy: "merge".'
            )

    @property
    def averages(self) -> bool:
        """Whether a running average is kept beside what is deployed."""
        return self.init == "ema" and self.deploy != "ema"

    def deployment(self, tasks: Sequence[str]) -> MergeMethod:
        """Return the method that makes the deployed model of the experts so far, oldest first."""
        if self.deploy == "ema":
            return running_average(tasks, self.decay)
        if self.deploy == "last":
            return WeightedAverage({task: float(task == tasks[-1]) for task in tasks})
        return GradientMatching() if self.method is None else self.method

    def merges(
        self, tasks: Sequence[str], base: Checkpoint
    ) -> dict[str, tuple[MergeMethod, ParametersPolicy]]:
        """Return what a step ends with: method and policy by the name of the folder.

        The running statistics of BatchNorm are weighted as the weights are, where the last expert
        or the running average is meant; other merges take their plain mean.

        Args:
            tasks: Names of the experts so far, the oldest first.
            base: The base.
        """
        weighted = self.policy
        if self.policy.buffers == "average":
            statistics = {name: "merge" for name in base if name.endswith(_RUNNING)}
            rules: dict[str, Any] = {**self.policy.rules, **statistics}
            weighted = dataclasses.replace(self.policy, rules=rules)
        policy = self.policy if self.deploy == "merge" else weighted
        found = {"deployed": (self.deployment(tasks), policy)}
        if self.averages:
            found["average"] = (running_average(tasks, self.decay), weighted)
        return found

    def settings(self) -> dict[str, Any]:
        """Return as JSON all that decides what a timeline holds."""
        settings: dict[str, Any] = {"init": self.init, "deploy": self.deploy}
        if "ema" in (self.init, self.deploy):
            settings["decay"] = self.decay
        if self.deploy == "merge":
            settings["method"] = method_settings(self.deployment(()))
        settings["policy"] = dataclasses.asdict(self.policy)
        return dict(json.loads(json.dumps(settings)))


def running_average(tasks: Sequence[str], decay: float) -> TaskArithmetic:
    r"""Return the exponential moving average of a base and its experts as one merge.

    .. math:: a_0 = θ_0, \quad a_t = d\, a_{t-1} + (1 - d)\, θ_t
              \quad\Rightarrow\quad a_t = θ_0 + \sum_s (1 - d)\, d^{\,t-s} (θ_s - θ_0)

    In closed form nothing is rounded twice, however long the timeline is.

    Args:
        tasks: Names of the experts, the oldest first.
        decay: :math:`d`, in [0, 1).

    >>> running_average(["a", "b"], 0.5).scale
    {'a': 0.25, 'b': 0.5}
    """
    age = {task: len(tasks) - 1 - index for index, task in enumerate(tasks)}
    return TaskArithmetic({task: (1 - decay) * decay**steps for task, steps in age.items()})


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return the name of the first rule that differs, None where all agree."""
    return next((key for key in {**one, **other} if one.get(key) != other.get(key)), None)
