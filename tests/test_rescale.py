import pytest
import torch

from lit_merge.correction.rescale import RescaleShift
from lit_merge.errors import InputError


def filled(num_tasks: int = 3, num_features: int = 4) -> RescaleShift:
    module = RescaleShift(num_tasks, num_features)
    generator = torch.Generator().manual_seed(0)
    for task in range(num_tasks):
        scale, shift = torch.randn(2, num_features, generator=generator)
        module.set_(task, scale, shift)
    return module


def test_the_start_is_the_identity_bit_for_bit():
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0)) * 1e3
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        out = RescaleShift(2, 4)(x.to(dtype), torch.tensor([0, 1, 1, 0, 1]))
        assert out.dtype == dtype
        assert torch.equal(out, x.to(dtype))


@pytest.mark.parametrize("middle", [(), (6,), (2, 3)], ids=["vectors", "tokens", "images"])
def test_every_example_gets_its_own_tasks_scale_and_shift(middle):
    module = filled()
    task = torch.tensor([2, 0, 2, 1, 1])
    x = torch.randn(5, *middle, 4, generator=torch.Generator().manual_seed(1))
    out = module(x, task)
    for row, number in enumerate(task):
        expected = x[row] * module.weight[number] + module.bias[number]
        torch.testing.assert_close(out[row], expected)


def test_gradients_reach_only_the_tasks_of_the_batch():
    module = filled()
    module(torch.ones(3, 2, 4), torch.tensor([0, 2, 0])).sum().backward()
    assert torch.equal(module.weight.grad.sum(1), torch.tensor([16.0, 0.0, 8.0]))
    assert torch.equal(module.bias.grad.sum(1), torch.tensor([16.0, 0.0, 8.0]))


def test_setting_one_task_leaves_the_others_and_keeps_the_parameter():
    module = RescaleShift(2, 3)
    parameter = module.weight
    module.set_(1, torch.full((3,), 2.0, dtype=torch.float64), torch.full((3,), -1.0))
    assert module.weight is parameter
    assert parameter.requires_grad
    assert parameter.tolist() == [[1, 1, 1], [2, 2, 2]]
    assert module.bias.tolist() == [[0, 0, 0], [-1, -1, -1]]


def test_autocast_does_not_widen_the_activations():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = torch.nn.Linear(4, 4)(torch.ones(2, 4))
        out = filled()(hidden, torch.tensor([0, 1]))
    assert hidden.dtype == out.dtype == torch.bfloat16


def test_repr_shows_the_sizes():
    assert repr(RescaleShift(2, 3)) == "RescaleShift(num_tasks=2, num_features=3)"


@pytest.mark.parametrize(("tasks", "width", "name"), [(0, 3, "num_tasks"), (2, 0, "num_features")])
def test_sizes_below_one_are_refused(tasks, width, name):
    with pytest.raises(InputError, match=f"{name}: must be at least 1; got 0"):
        RescaleShift(tasks, width)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (3, 2, 2, 4)])
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = RescaleShift(2, 4).double()
    task = torch.tensor([1, 0, 1])

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        named = {"weight": weight, "bias": bias}
        out: torch.Tensor = torch.func.functional_call(module, named, (x, task))
        return out

    values = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, (2, 4), (2, 4))
    ]
    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overwriting_gives_what_a_forward_gives(dtype: torch.dtype) -> None:
    module = RescaleShift(3, 5)
    torch.manual_seed(0)
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
        for shape in ((4, 5), (4, 7, 5), (4, 5, 2, 3)):
            x = torch.randn(shape).to(dtype)
            x = x if shape[-1] == 5 else x.movedim(1, -1)
            for task in (torch.tensor([2, 0, 1, 2]), 1):
                ids = torch.full((4,), task) if isinstance(task, int) else task
                expected, found = module(x, ids), x.clone()
                module.overwrite(found, task)
                assert torch.equal(found, expected)
