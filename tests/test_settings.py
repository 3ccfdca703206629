from __future__ import annotations

from collections.abc import Callable

import pytest

from lit_merge.errors import InputError
from lit_merge.methods import (
    TIES,
    FisherAverage,
    GradientMatching,
    MergeMethod,
    TaskArithmetic,
    WeightedAverage,
)
from lit_merge.methods.settings import per_task

NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskArithmetic(NAN), r"^TaskArithmetic\.scale: .*finite number; got nan"),
        (lambda: TaskArithmetic({"a": NAN}), r"^TaskArithmetic\.scale\['a'\]: .*got nan"),
        (lambda: TaskArithmetic("1"), r"^TaskArithmetic\.scale: .*finite number; got '1'"),  # type: ignore[arg-type]
        (lambda: TaskArithmetic(True), r"^TaskArithmetic\.scale: .*got True"),
        (lambda: TaskArithmetic({}), r"^TaskArithmetic\.scale: .*one number per task; got none"),
        (lambda: TIES(density=-0.1), r"^TIES\.density: .*between 0 and 1; got -0\.1"),
        (lambda: TIES(density=20), r"^TIES\.density: .*between 0 and 1; got 20"),
        (lambda: TIES(scale=NAN), r"^TIES\.scale: .*got nan"),
        (lambda: TIES(scope="layer"), r"^TIES\.scope: must be one of 'global', 'tensor'; got 'lay"),  # type: ignore[arg-type]
        (lambda: TIES(sign="mean"), r"^TIES\.sign: must be one of 'total', 'frequency'"),  # type: ignore[arg-type]
        (lambda: WeightedAverage([]), r"^WeightedAverage\.weights: .*got none"),
        (lambda: WeightedAverage([1, -1]), r"^WeightedAverage\.weights: must not sum to zero"),
        (lambda: WeightedAverage([0.1, 0.2, -0.3]), "must not sum to zero"),
        (lambda: WeightedAverage({"a": 0.0, "b": 0}), "must not sum to zero"),
        (lambda: WeightedAverage([1.0, NAN]), r"^WeightedAverage\.weights\[1\]: .*got nan"),
        (lambda: WeightedAverage(0.5), r"^WeightedAverage\.weights: must be a mapping"),  # type: ignore[arg-type]
        (lambda: WeightedAverage("ab"), r"^WeightedAverage\.weights: must be a mapping"),  # type: ignore[arg-type]
        (lambda: FisherAverage(floor=-1e-6), r"^FisherAverage\.floor: .*at least 0; got -1e-06"),
        (lambda: FisherAverage([1, -1, 3]), r"^FisherAverage\.weights\[1\]: .*at least 0; got -1"),
        (lambda: FisherAverage([0, 0]), r"^FisherAverage\.weights: must not sum to zero"),
        (lambda: GradientMatching(damping=-1.0), r"^GradientMatching\.damping: .*at least 0"),
        (lambda: GradientMatching(damping=NAN), r"^GradientMatching\.damping: .*got nan"),
        (lambda: GradientMatching(base_scale=-1.0), r"^GradientMatching\.base_scale: .*at least 0"),
        (lambda: GradientMatching(float("inf")), r"^GradientMatching\.scale: .*got inf"),
        (lambda: GradientMatching(guard="ignore"), r"^GradientMatching\.guard: .*'raise', 'clamp'"),  # type: ignore[arg-type]
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], MergeMethod], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (TaskArithmetic({"svhn": 1, "dtb": 1}), r"scale: .*\('svhn', 'dtd'\); got 'dtb'.*'dtd'\?"),
        (TaskArithmetic({"svhn": 1}), r"scale: .*number for every task.*got none for 'dtd'"),
        (GradientMatching({"x9": 1}), r"GradientMatching\.scale: .*got 'x9'\. Remove it"),
        (FisherAverage({"svhn": 1}), r"FisherAverage\.weights: .*got none for 'dtd'"),
        (WeightedAverage([1.0]), r"WeightedAverage\.weights: .*one number per expert, 2; got 1"),
    ],
)
def test_numbers_that_do_not_fit_the_tasks_are_refused(method: MergeMethod, message: str) -> None:
    with pytest.raises(InputError, match=message):
        method.check_tasks(("svhn", "dtd"))


def test_numbers_are_put_into_the_order_of_the_tasks() -> None:
    tasks = ("svhn", "dtd")
    assert per_task("scale", {"dtd": -1, "svhn": 2}, tasks) == (2.0, -1.0)
    assert per_task("scale", [1, 3], tasks) == (1.0, 3.0)
    assert per_task("scale", 0.5, tasks) == (0.5, 0.5)
