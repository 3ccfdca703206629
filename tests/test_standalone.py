"""correction.py, the file that exported models bring along: it needs torch alone."""

from __future__ import annotations

import ast
import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_merge.correction import RescaleShift, standalone
from lit_merge.correction.surgery import RepresentationSurgery


def test_it_imports_torch_and_the_standard_library_only() -> None:
    roots = set()
    for node in ast.walk(ast.parse(Path(str(standalone.__file__)).read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(str(node.module).split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch"}


def test_it_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randn(2).half(),
        "d": torch.tensor(3),
        "e": torch.empty(0, 2),
        "f": torch.tensor([True, False, True]),
        "g": torch.randn(3, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "t.safetensors", {"about": "ä"})
    found, metadata = standalone.read_safetensors(tmp_path / "t.safetensors")
    assert metadata == {"about": "ä"}
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.requires_grad_(False)


TASK = torch.tensor([1, 0, 2])


def test_a_correction_is_rescale_shift() -> None:
    reference = randomised(RescaleShift(3, 4))
    x = torch.randn(3, 4, 5, 2)
    made = standalone.Correction(dict(reference.named_parameters()), 1)
    expected = reference(x.movedim(1, -1), TASK).movedim(-1, 1)
    torch.testing.assert_close(made(x, TASK), expected)
    alone = reference(x.movedim(1, -1), torch.tensor([2, 2, 2])).movedim(-1, 1)
    torch.testing.assert_close(made(x, torch.tensor(2)), alone)


def test_a_correction_is_representation_surgery() -> None:
    reference = randomised(RepresentationSurgery(3, 4, 2))
    made = standalone.Correction(dict(reference.named_parameters()), -1)
    for x in (torch.randn(3, 4), torch.randn(3, 5, 4)):
        torch.testing.assert_close(made(x, TASK), reference(x, TASK))


def test_a_correction_keeps_the_type_of_the_values() -> None:
    made = standalone.Correction({"weight": torch.ones(1, 4), "bias": torch.ones(1, 4)}, -1)
    assert made(torch.zeros(3, 4).bfloat16(), torch.tensor(0)).dtype == torch.bfloat16


class Block(nn.Module):
    """Returns a tuple, as blocks of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, *, x: Tensor) -> tuple[Tensor, str]:
        return self.inner(x), "more"


class Net(nn.Module):
    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x=x)[0])


def test_hooks_correct_first_arguments_and_first_outputs_until_they_are_removed(
    tmp_path: Path,
) -> None:
    net, x = randomised(Net()), torch.randn(3, 4)
    names = ("block", "block:input", "block.inner")
    tensors = {f"{n}/{k}": torch.randn(1, 4) for n in names for k in ("weight", "bias")}
    sites = [{"name": n, "channel_dim": -1, "tensors": ["weight", "bias"]} for n in names]
    save_file(tensors, tmp_path / "c.safetensors", {"sites": json.dumps(sites)})
    plain = net(x)
    handles = standalone.apply(net, tmp_path / "c.safetensors")

    def at(name: str, z: Tensor) -> Tensor:
        return z * tensors[f"{name}/weight"] + tensors[f"{name}/bias"]

    layer: Any = net.block.inner
    inner = at("block.inner", nn.functional.linear(at("block:input", x), layer.weight, layer.bias))
    expected = nn.functional.linear(at("block", inner), net.head.weight, net.head.bias)
    torch.testing.assert_close(net(x), expected)
    for handle in handles:
        handle.remove()
    assert torch.equal(net(x), plain)


@pytest.fixture
def multi(tmp_path: Path) -> tuple[standalone.MultiTask, dict[str, Net]]:
    """A network for two tasks without corrections, and the networks of the tasks."""
    shared = randomised(Net())
    alone = {}
    tensors = {f"shared/{n}": v for n, v in shared.state_dict().items() if "head" not in n}
    for index, (task, classes) in enumerate((("svhn", 3), ("dtd", 5))):
        torch.manual_seed(index)
        alone[task] = Net(classes)
        alone[task].block.load_state_dict(shared.block.state_dict())
        own = alone[task].head.state_dict()
        tensors |= {f"heads/{index}/head.{name}": value for name, value in own.items()}
    about = {"tasks": ["svhn", "dtd"], "num_classes": [3, 5], "sites": []}
    save_file(tensors, tmp_path / "m.safetensors", {"multi_task": json.dumps(about)})
    return standalone.load_multi_task(Net(7), tmp_path / "m.safetensors"), alone


@torch.no_grad()
def test_each_example_gets_the_logits_of_its_own_task(
    multi: tuple[standalone.MultiTask, dict[str, Net]],
) -> None:
    model, alone = multi
    x = torch.randn(4, 4)
    tasks = ["dtd", "svhn", "svhn", "dtd"]
    mixed = model(x, task=tasks)
    assert torch.equal(mixed, model(x, task=torch.tensor([1, 0, 0, 1])))
    for row, task in enumerate(tasks):
        expected = alone[task](x[row : row + 1])[0]
        torch.testing.assert_close(mixed[row, : len(expected)], expected)
        assert bool((mixed[row, len(expected) :] == -torch.inf).all())
    for index, (task, net) in enumerate(alone.items()):
        model.set_task(task)
        torch.testing.assert_close(model(x), net(x))
        torch.testing.assert_close(model(x, task=index), net(x))
        torch.testing.assert_close(copy.deepcopy(model)(x), net(x))


def test_a_task_must_be_chosen_and_known(
    multi: tuple[standalone.MultiTask, dict[str, Net]],
) -> None:
    model, _ = multi
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="choose one, by set_task"):
        model(x)
    with pytest.raises(ValueError, match="must be one of svhn, dtd; got 'cars'"):
        model.set_task("cars")
    with pytest.raises(ValueError, match="one per example; got 3 for 4 rows"):
        model(x, task=["svhn", "dtd", "svhn"])
    with pytest.raises(ValueError, match="call the MultiTask itself"):
        model.model(x)


def test_a_head_that_is_a_convolution_is_widened_in_its_channels(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Identity(), nn.Conv2d(4, 2, 1))
    heads = [nn.Conv2d(4, width, 1) for width in (1, 3)]
    tensors = {
        f"heads/{index}/1.{name}": value
        for index, head in enumerate(heads)
        for name, value in head.state_dict().items()
    }
    about = {"tasks": ["a", "b"], "num_classes": [1, 3], "sites": []}
    save_file(tensors, tmp_path / "m.safetensors", {"multi_task": json.dumps(about)})
    model = standalone.load_multi_task(net, tmp_path / "m.safetensors")
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        mixed = model(x, task=["a", "b"])
        torch.testing.assert_close(mixed[:1, :1], heads[0](x[:1]))
        torch.testing.assert_close(mixed[1:], heads[1](x[1:]))
        assert bool((mixed[0, 1:] == -torch.inf).all())
