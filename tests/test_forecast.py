from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo
from lit_merge.forecast import (
    forecast_inputs,
    forecast_merge,
)
from lit_merge.methods import (
    EMR,
    TIES,
    Average,
    FisherAverage,
    GradientMatching,
    MergeMethod,
    TALLMasks,
    TaskArithmetic,
    WeightedAverage,
)
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import merge_state_dicts, pieces
from tests.forecast_experts import (
    BASE,
    COUNTS,
    EXPERTS,
    HESSIANS,
    SHAPES,
    TASKS,
    State,
    best_of,
    inputs_of,
    loop_increase,
    merged_by,
    state,
)
from tests.merge_files import save_base, save_expert, save_experts, tensors

METHODS = [
    Average(),
    WeightedAverage([1.0, 3.0, 2.0]),
    FisherAverage(),
    TaskArithmetic(0.4),
    TaskArithmetic({"svhn": 0.5, "dtd": -0.2, "cars": 1.0}),
    TIES(0.5, scale=0.7),
    TIES(0.3, scope="tensor"),
    GradientMatching(),
    GradientMatching({"svhn": 1.0, "dtd": 0.5, "cars": 0.2}, damping=3.0),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_every_tensor_costs_every_task_what_a_loop_over_the_merge_says(
    method: MergeMethod,
) -> None:
    forecast = forecast_inputs(inputs_of(), method)
    merged = merged_by(method)
    for at, task in enumerate(TASKS):
        expected = loop_increase(merged, EXPERTS[task], HESSIANS[task])
        found = {part.name: part.increases[at] for part in forecast.tensors}
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert forecast.increases[at] == pytest.approx(sum(expected.values()), rel=1e-9)
        mean = forecast.mean_increases(forecast.increases)[at]
        assert mean == pytest.approx(sum(expected.values()) / COUNTS[task], rel=1e-9)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_size_of_pieces_changes_nothing(
    method: MergeMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = forecast_inputs(inputs_of(), method)
    monkeypatch.setattr(pieces, "CHUNK", 4)
    cut = forecast_inputs(inputs_of(), method)
    assert cut.increases == pytest.approx(whole.increases, rel=1e-12)
    if whole.best is not None:
        assert best_of(cut) == pytest.approx(best_of(whole), rel=1e-12)


@pytest.mark.parametrize("method", [TIES(0.5), GradientMatching(damping=2.0)], ids=repr)
def test_the_number_of_threads_changes_no_bit(
    method: MergeMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "CHUNK", 2)
    monkeypatch.setattr(pieces, "BATCH", 3)
    found = [forecast_inputs(inputs_of(), method, threads=threads) for threads in (1, 3)]
    assert found[0] == found[1]


def test_half_precision_is_forecast_as_it_is_merged() -> None:
    base = {name: value.bfloat16() for name, value in BASE.items()}
    experts = {t: {n: v.bfloat16() for n, v in e.items()} for t, e in EXPERTS.items()}
    forecast = forecast_inputs(inputs_of(experts, base=base), TaskArithmetic(0.4))
    wide = {t: {n: v.double() for n, v in e.items()} for t, e in experts.items()}
    merged = {
        name: value.double() + 0.4 * sum(wide[t][name] - value.double() for t in TASKS)
        for name, value in base.items()
    }
    for at, task in enumerate(TASKS):
        expected = sum(loop_increase(merged, wide[task], HESSIANS[task]).values())
        assert forecast.increases[at] == pytest.approx(expected, rel=1e-5)


def orthogonal_regression(seed: int, examples: int) -> tuple[Tensor, Tensor]:
    """Return inputs with orthogonal columns, so that the Hessian is diagonal, and targets."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(examples, 6, generator=generator, dtype=torch.float64)
    columns, _ = torch.linalg.qr(noise)
    sizes = torch.rand(6, generator=generator, dtype=torch.float64) + 0.2
    return columns * sizes, torch.randn(examples, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("method", [TaskArithmetic(0.7), TIES(0.5), GradientMatching(), Average()])
def test_it_is_the_true_increase_of_a_quadratic_loss(method: MergeMethod) -> None:
    problems = {"a": orthogonal_regression(1, 9), "b": orthogonal_regression(2, 31)}
    base = {"weight": torch.full((6,), 0.1, dtype=torch.float64)}
    experts = {
        task: {"weight": torch.linalg.lstsq(x, y[:, None]).solution[:, 0]}
        for task, (x, y) in problems.items()
    }
    hessians = {task: {"weight": (x * x).sum(dim=0)} for task, (x, _) in problems.items()}

    def loss(task: str, weight: Tensor) -> float:
        x, y = problems[task]
        return 0.5 * float(((x @ weight - y) ** 2).sum())

    inputs = inputs_of(experts, hessians, base=base, counts={"a": 9, "b": 31})
    forecast = forecast_inputs(inputs, method)
    needed = hessians if "hessian" in method.needs else None
    merged = merge_state_dicts(base, experts, method, hessians=needed)["weight"]
    true = [loss(task, merged) - loss(task, experts[task]["weight"]) for task in problems]
    assert forecast.increases == pytest.approx(true, rel=1e-9)
    means = [true[0] / 9, true[1] / 31]
    assert forecast.mean_increases(forecast.increases) == pytest.approx(means, rel=1e-9)
    assert forecast.total(forecast.increases) == pytest.approx(sum(means), rel=1e-9)


def test_the_order_of_the_experts_does_not_matter() -> None:
    turned = {task: EXPERTS[task] for task in reversed(TASKS)}
    one = forecast_inputs(inputs_of(), TIES(0.5))
    other = forecast_inputs(inputs_of(turned), TIES(0.5))
    assert other.increases == pytest.approx(one.increases[::-1], rel=1e-12)
    assert best_of(other) == pytest.approx(best_of(one), rel=1e-12)


def test_one_expert_alone_costs_nothing_at_its_own_weights() -> None:
    inputs = inputs_of({"svhn": EXPERTS["svhn"]}, {"svhn": HESSIANS["svhn"]})
    forecast = forecast_inputs(inputs, TaskArithmetic(1.0))
    assert forecast.increases == (0.0,)
    assert best_of(forecast) == pytest.approx(1.0, rel=1e-15)
    assert forecast_inputs(inputs, GradientMatching()).increases == (0.0,)


def test_a_base_is_not_needed_where_the_method_needs_none() -> None:
    forecast = forecast_inputs(inputs_of(base=None), FisherAverage())
    merged = merged_by(FisherAverage(), base=None)
    for at, task in enumerate(TASKS):
        expected = sum(loop_increase(merged, EXPERTS[task], HESSIANS[task]).values())
        assert forecast.increases[at] == pytest.approx(expected, rel=1e-9)
    assert (forecast.scale, forecast.best, forecast.curve) == (None, None, ())


@pytest.mark.parametrize("action", ["keep", "average"])
def test_tensors_that_a_rule_takes_from_the_method_are_charged(action: Any) -> None:
    policy = ParametersPolicy(rules={"emb.*": action})
    forecast = forecast_inputs(inputs_of(), TaskArithmetic(0.4), policy=policy)
    merged = merge_state_dicts(BASE, EXPERTS, TaskArithmetic(0.4), policy=policy)
    for at, task in enumerate(TASKS):
        expected = loop_increase(merged, EXPERTS[task], HESSIANS[task])
        found = {part.name: part.increases[at] for part in forecast.tensors}
        assert found == pytest.approx(expected, rel=1e-9)
    assert forecast.curve[0].increases[0] > sum(
        loop_increase(merged, EXPERTS["svhn"], HESSIANS["svhn"])[name] for name in ("emb.weight",)
    )


def flat(state: State) -> list[float]:
    return torch.cat([value.flatten() for value in state.values()]).tolist()


def costs(models: Sequence[Sequence[float]]) -> list[float]:
    return [
        0.5
        * sum(
            h * (m - e) ** 2
            for h, m, e in zip(flat(HESSIANS[task]), model, flat(EXPERTS[task]), strict=True)
        )
        for task, model in zip(TASKS, models, strict=True)
    ]


def test_a_task_with_a_mask_is_charged_for_its_own_model() -> None:
    base = flat(BASE)
    vectors = [[e - b for e, b in zip(flat(EXPERTS[t]), base, strict=True)] for t in TASKS]
    for scale in (0.7, 0.2):
        shared = [scale * sum(column) for column in zip(*vectors, strict=True)]
        models = [
            [
                b + s if abs(v) > 0.4 * abs(s - v) else b
                for b, s, v in zip(base, shared, own, strict=True)
            ]
            for own in vectors
        ]
        forecast = forecast_inputs(inputs_of(), TALLMasks(0.4, scale=scale))
        assert forecast.increases == pytest.approx(costs(models), rel=1e-9)
        assert not forecast.closed_form
        assert forecast.best is not None


def test_a_task_with_a_mask_and_a_scale_is_charged_for_its_own_model() -> None:
    base = flat(BASE)
    vectors = [[e - b for e, b in zip(flat(EXPERTS[t]), base, strict=True)] for t in TASKS]
    shared = [
        max(column) if sum(column) > 0 else min(column) for column in zip(*vectors, strict=True)
    ]
    models = []
    for own in vectors:
        masked = [s if s * v > 0 else 0.0 for s, v in zip(shared, own, strict=True)]
        scale = sum(map(abs, own)) / sum(map(abs, masked))
        models.append([b + scale * m for b, m in zip(base, masked, strict=True)])
    forecast = forecast_inputs(inputs_of(), EMR(rescale="entries"))
    assert forecast.increases == pytest.approx(costs(models), rel=1e-9)


def test_tensors_of_the_tasks_own_cost_nothing() -> None:
    policy = ParametersPolicy(rules={"emb.*": "per-task"})
    forecast = forecast_inputs(inputs_of(), TaskArithmetic(0.4), policy=policy)
    assert [part.name for part in forecast.tensors] == ["blocks.0.weight", "blocks.0.bias", "top"]


def test_a_missing_number_of_examples_is_refused_for_means_only() -> None:
    inputs = inputs_of(counts={**COUNTS, "dtd": None})
    message = r"^experts\['dtd'\]: must have num_examples .* \(task 'dtd'\); got none\. .*\"sum\""
    with pytest.raises(InputError, match=message):
        forecast_inputs(inputs, TaskArithmetic())
    forecast = forecast_inputs(inputs, TaskArithmetic(), weighting="sum")
    assert [x is None for x in forecast.mean_increases(forecast.increases)] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "median"}, r"^weighting: must be one of 'mean', 'sum'; got 'median'"),
        ({"scales": []}, r"^scales: must have one number"),
        ({"scales": [0.1, float("nan")]}, r"^scales\[1\]: must be a finite number; got nan"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        forecast_inputs(inputs_of(), TaskArithmetic(), **options)


def test_files_are_forecast_like_the_merge_that_they_give(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    forecast = forecast_merge(base, experts, TaskArithmetic(0.4), progress=False)
    assert forecast.tasks == ("svhn", "dtd")
    assert forecast.num_examples == (50, 50)
    states = {task: tensors(path / "model.safetensors") for task, path in experts.items()}
    hessians = {task: tensors(path / "hessian.safetensors") for task, path in experts.items()}
    start = tensors(base)
    names = [part.name for part in forecast.tensors]
    assert set(names) == {n for n in hessians["svhn"] if not n.startswith("head")}
    merged = {
        n: start[n].double() + 0.4 * sum(s[n].double() - start[n].double() for s in states.values())
        for n in names
    }
    expected = [
        sum(loop_increase(merged, states[task], hessians[task]).values()) for task in experts
    ]
    assert forecast.increases == pytest.approx(expected, rel=1e-5)


def test_tied_tensors_are_charged_once() -> None:
    base = {**BASE, "decoder": BASE["emb.weight"]}
    experts = {task: {**e, "decoder": e["emb.weight"]} for task, e in EXPERTS.items()}
    inputs = inputs_of(experts, base=base)
    tied = {
        task: dataclasses.replace(info, tied_parameters=(("emb.weight", "decoder"),))
        for task, info in inputs.infos.items()
    }
    inputs = dataclasses.replace(inputs, infos=tied)
    plain = forecast_inputs(inputs_of(), TaskArithmetic(0.4))
    for policy in (
        ParametersPolicy(),
        ParametersPolicy(rules={"emb.*": "keep", "decoder": "keep"}),
    ):
        found = forecast_inputs(inputs, TaskArithmetic(0.4), policy=policy)
        assert [part.name for part in found.tensors] == [part.name for part in plain.tensors]
    assert forecast_inputs(inputs, TaskArithmetic(0.4)).increases == plain.increases


def test_an_expert_without_a_hessian_is_refused_whatever_the_method(tmp_path: Path) -> None:
    experts = save_experts(tmp_path)
    experts["cars"] = save_expert(tmp_path, "cars", 5, with_hessian=False)
    message = r"cars.*: must have a Hessian for a forecast \(task 'cars'\); got none\. .*curvature"
    with pytest.raises(InputError, match=message):
        forecast_merge(save_base(tmp_path), experts, Average(), progress=False)


def test_a_changed_tensor_without_an_entry_is_refused() -> None:
    lacking = {task: dict(h) for task, h in HESSIANS.items()}
    del lacking["dtd"]["emb.weight"]
    with pytest.raises(InputError, match=r"'dtd'\]: must have an entry for tensor 'emb\.weight'"):
        forecast_inputs(inputs_of(hessians=lacking), TaskArithmetic())


@pytest.mark.parametrize("action", ["merge", "keep", "average"])
def test_a_bad_value_is_named(action: Any) -> None:
    experts = {task: dict(expert) for task, expert in EXPERTS.items()}
    experts["dtd"]["blocks.0.bias"] = torch.tensor([0.0, 0.0, 0.0, float("nan"), 0.0])
    policy = ParametersPolicy(rules={"blocks.0.bias": action})
    with pytest.raises(InputError, match=r"'blocks\.0\.bias' must be finite; got nan at \[3\]"):
        forecast_inputs(inputs_of(experts), TaskArithmetic(), policy=policy)


@pytest.mark.parametrize("action", ["merge", "keep"])
def test_a_negative_hessian_is_named(action: Any) -> None:
    hessians = {task: dict(h) for task, h in HESSIANS.items()}
    hessians["dtd"]["blocks.0.bias"] = torch.tensor([1.0, -0.5, 1.0, 1.0, 1.0])
    policy = ParametersPolicy(rules={"blocks.0.bias": action})
    with pytest.raises(InputError, match=r"'blocks\.0\.bias' must not be negative; got -0\.5"):
        forecast_inputs(inputs_of(hessians=hessians), TaskArithmetic(), policy=policy)


def test_inputs_are_not_touched() -> None:
    forecast_inputs(inputs_of(), TIES(0.5))
    assert all(torch.equal(BASE[name], value) for name, value in state(0).items())
    assert inputs_of().infos["svhn"] == ExpertInfo(num_examples=10)


def test_the_content_of_the_file_is_json_and_adds_up() -> None:
    forecast = forecast_inputs(inputs_of(), TaskArithmetic(0.4), scales=[0.0, 1.0])
    content = json.loads(json.dumps(forecast.as_dict(), allow_nan=False))
    planned = content["planned"]
    assert content["method"] == "TaskArithmetic(scale=0.4)"
    assert planned["scale"] == 0.4
    assert planned["total"] == pytest.approx(sum(planned["mean_increase"].values()))
    for parts in ("tensors", "modules"):
        totals = [part["total"] for part in content[parts].values()]
        assert sum(totals) == pytest.approx(planned["total"])
    assert list(content["tensors"]) == list(SHAPES)
    assert content["best"]["closed_form"] is True
    assert [point["scale"] for point in content["curve"]] == [0.0, 1.0]
    assert content["best"]["total"] < min(point["total"] for point in content["curve"])


def test_modules_are_numbered_blocks_with_the_worst_first() -> None:
    forecast = forecast_inputs(inputs_of(), TaskArithmetic(0.4))
    modules = forecast.worst_modules()
    assert {module.name for module in modules} == {"emb", "blocks.0", "top"}
    totals = [forecast.total(module.increases) for module in modules]
    assert totals == sorted(totals, reverse=True)
    by_name = {part.name: part.increases[1] for part in forecast.tensors}
    block = next(module for module in modules if module.name == "blocks.0")
    both = by_name["blocks.0.weight"] + by_name["blocks.0.bias"]
    assert block.increases[1] == pytest.approx(both)
    largest = max(forecast.tensors, key=lambda part: forecast.total(part.increases))
    assert forecast.worst_tensors()[0] == largest
