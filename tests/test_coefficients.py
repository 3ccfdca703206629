"""Coefficients per task and layer, against a loop over tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.merged.coefficients import LayerCoefficients, read_task_vectors
from tests.tiny_merge import CLASSES, base_net, expert_net, write_experts


def test_each_layer_goes_along_each_task_vector_by_its_own_coefficient(tmp_path: Path) -> None:
    write_experts(tmp_path)
    shared = dict(base_net().body.named_parameters(prefix="body"))
    expert = open_expert(tmp_path / "base")
    vectors = read_task_vectors(expert.weights, [tmp_path / task for task in CLASSES], shared)
    expert.close()
    assert set(vectors) == set(shared)
    coefficients = LayerCoefficients(shared, 2)
    assert coefficients.layers == ("body.0", "body.2")
    assert not coefficients.active
    coefficients.give(vectors)
    moved = coefficients.moved(shared)
    assert all(torch.equal(moved[name], shared[name]) for name in shared)
    with torch.no_grad():
        coefficients.weight.copy_(torch.tensor([[0.3, -0.2], [1.5, 0.0]]))
    moved = coefficients.moved(shared)
    for name, parameter in shared.items():
        layer = ("body.0", "body.2").index(name.rpartition(".")[0])
        expected = parameter.double()
        for number, task in enumerate(CLASSES):
            vector = expert_net(task).get_parameter(name).double() - base_net().get_parameter(name)
            expected = expected + coefficients.weight[number, layer].double().tanh() * vector
        torch.testing.assert_close(moved[name].double(), expected, rtol=1e-5, atol=1e-6)
    back = coefficients.moved(moved, sign=-1.0)
    for name in shared:
        torch.testing.assert_close(back[name], shared[name])
    coefficients.take()
    assert not coefficients.active


def test_without_a_task_vector_there_is_nothing_to_learn() -> None:
    coefficients = LayerCoefficients({"body.weight": torch.zeros(2)}, 1)
    with pytest.raises(InputError, match="coefficients: must find a task vector"):
        coefficients.give({})
