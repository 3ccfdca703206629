from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lit_merge.checkpoint import load_into, open_checkpoint, save_tensors
from lit_merge.correction.linear_probe import linear_probe
from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation
from lit_merge.evaluation.measurement import evaluate
from lit_merge.evaluation.model_entry import ModelEntry
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.export import export_task
from lit_merge.methods import EMR, Average, MergeMethod, TALLMasks
from lit_merge.streaming import merge
from lit_merge.tasks import DatasetTask, Task

WIDTHS = {"a": 3, "b": 2}
NUM_TEST = {"a": 37, "b": 24}


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 8)
        self.fc2 = nn.Linear(8, 6)
        self.head = nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.fc2(self.fc1(x).relu()).relu())
        return logits


def task(name: str, **options: Any) -> Task:
    generator = torch.Generator().manual_seed(len(name) + WIDTHS[name])

    def examples(count: int) -> TensorDataset:
        labels = torch.randint(WIDTHS[name], (count,), generator=generator)
        inputs = torch.randn(count, 5, generator=generator) + labels[:, None]
        return TensorDataset(inputs, labels)

    return DatasetTask(
        examples(40), None, examples(NUM_TEST[name]), num_classes=WIDTHS[name], **options
    )


def trainer(root: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=root,
        **options,
    )


class World:
    """Base, experts and a merge on disk, with the tasks and the networks behind them."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        self.root = root
        self.base = Net()
        self.experts = {name: Net(width) for name, width in WIDTHS.items()}
        self.tasks = {name: task(name) for name in WIDTHS}
        save_tensors(root / "base.safetensors", self.base.state_dict())
        for name, expert in self.experts.items():
            info = ExpertInfo(task=name, head_parameters=("head.weight", "head.bias"))
            write_expert(root / name, weights=expert.state_dict(), info=info)
        merge(None, {name: root / name for name in WIDTHS}, Average(), root / "avg", progress=False)
        self.models: dict[str, str | ModelEntry] = {
            "base": str(root / "base.safetensors"),
            "a": str(root / "a"),
            "expert b": ModelEntry(str(root / "b"), task="b"),
            "average": str(root / "avg"),
        }

    def network(self, model: str, name: str) -> Net:
        """Return the plain network that a model is for a task, made without MergeModule."""
        expert = self.experts[name]
        if model in {"a", "expert b"}:
            return expert
        net = copy.deepcopy(expert)  # with this expert's head
        source = "base.safetensors" if model == "base" else "avg/model.safetensors"
        with open_checkpoint(self.root / source) as weights:
            load_into(net, weights, ignore=("head.*",))
        return net

    def held_out(self, name: str) -> tuple[Tensor, Tensor]:
        test: Any = self.tasks[name].test
        return test.tensors[0], test.tensors[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def evaluation(world: World) -> Evaluation:
    return evaluate(
        trainer(world.root),
        Net(),
        world.models,
        world.tasks,
        batch_size=8,
        probe=True,
        variance=True,
        examples=32,
    )


def test_every_model_is_tested_on_every_task_it_knows(evaluation: Evaluation) -> None:
    assert [(row.model, row.kind, row.task) for row in evaluation.rows] == [
        ("base", "base", "a"),
        ("base", "base", "b"),
        ("linear probe on base", "control", "a"),
        ("linear probe on base", "control", "b"),
        ("a", "expert", "a"),
        ("expert b", "expert", "b"),
        ("average", "merged", "a"),
        ("average", "merged", "b"),
    ]


def test_accuracy_and_loss_are_those_of_the_plain_network(
    world: World, evaluation: Evaluation
) -> None:
    measured = [row for row in evaluation.rows if row.kind != "control"]
    for row in measured:
        inputs, labels = world.held_out(row.task)
        logits = world.network(row.model, row.task)(inputs).double()
        assert row.num_examples == len(labels)
        assert row.accuracy == int((logits.argmax(1) == labels).sum()) / len(labels)
        assert row.nll == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), 1e-5)
    assert len(measured) == 6


def test_control_is_a_linear_head_on_the_features_of_the_base(
    world: World, evaluation: Evaluation
) -> None:
    for row in evaluation.rows:
        if row.kind == "control":
            train: Any = world.tasks[row.task].train
            order = _calibration_order(len(train), 32)
            batch = (train.tensors[0][order], train.tensors[1][order])
            expected = linear_probe(world.base, "head", [batch], [world.held_out(row.task)])
            assert row.accuracy == pytest.approx(expected)
            assert row.nll is None


def test_variance_is_that_of_the_first_test_examples(world: World, evaluation: Evaluation) -> None:
    assert {row.kind for row in evaluation.variances} == {"expert", "merged"}
    for row in evaluation.variances:
        inputs, _ = world.held_out(row.task)
        net = world.network(row.model, row.task)
        outputs = net.fc1(inputs[:32])
        if row.site == "fc2":
            outputs = net.fc2(outputs.relu())
        expected = outputs.double().var(dim=0, correction=0).mean().item()
        assert row.variance == pytest.approx(expected, rel=1e-5)
    assert [r.site for r in evaluation.variances if r.model == "a"] == ["fc1", "fc2"]


class Backwards(Net):
    """Calls its layers in another order than it registers them, and one of them twice."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(width)
        del self.fc1  # and register it last
        self.fc2, self.fc1 = nn.Linear(6, 6), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.fc2(self.fc2(self.fc1(x).relu()).relu()))
        return logits


def test_sites_are_in_the_order_of_the_calls_and_stages_are_kept(world: World) -> None:
    folder = world.root / "backwards"
    net = Backwards()
    assert [name for name, _ in net.named_children()] != ["fc1", "fc2", "head"]
    info = ExpertInfo(task="a", head_parameters=("head.weight", "head.bias"))
    write_expert(folder, weights=net.state_dict(), info=info)
    merge(None, {"a": folder}, Average(), world.root / "backwards-avg", progress=False)
    models: dict[str, str | ModelEntry] = {
        "average": ModelEntry(str(world.root / "backwards-avg"), stage=1)
    }
    only = {"a": world.tasks["a"]}
    found = evaluate(
        trainer(world.root), Backwards(), models, only, variance=True, sites=["fc2", "fc1"]
    )
    assert [row.site for row in found.variances] == ["fc1", "fc2"]
    assert {row.stage for row in found.rows} == {1}


def test_provenance_names_paths_and_fingerprints(world: World, evaluation: Evaluation) -> None:
    models = evaluation.provenance["models"]
    assert models["expert b"]["path"] == str(world.root / "b")
    assert models["expert b"]["tasks"] == ["b"]
    assert len({models[name]["fingerprint"] for name in world.models}) == 4
    assert set(evaluation.provenance["versions"]) >= {"lit_merge", "torch", "lightning"}


def test_base_without_experts_keeps_its_own_head(world: World) -> None:
    only = {"a": world.tasks["a"]}
    models = {"base": world.models["base"]}
    (row,) = evaluate(trainer(world.root), Net(), models, only).rows
    inputs, labels = world.held_out("a")
    right = int((world.base(inputs).argmax(1) == labels).sum())
    assert row.accuracy == right / len(labels)


def test_merged_folder_can_be_tested_as_a_control(world: World) -> None:
    models = {"control": ModelEntry(str(world.root / "avg"), kind="control")}
    found = evaluate(trainer(world.root), Net(), models, world.tasks)
    assert {row.kind for row in found.rows} == {"control"}


def test_unlabelled_examples_leave_the_control_out_with_a_note(world: World) -> None:
    tasks = {**world.tasks, "b": task("b", unlabelled=True)}
    models = {"base": world.models["base"], "a": world.models["a"], "b": str(world.root / "b")}
    found = evaluate(trainer(world.root), Net(), models, tasks, probe=True)
    assert [row.task for row in found.rows if row.kind == "control"] == ["a"]
    assert found.notes == ("linear probe: left out for b, whose examples have no labels",)


def test_control_needs_a_base(world: World) -> None:
    models = {"average": world.models["average"]}
    with pytest.raises(InputError, match="linear_probe: must have the base's features"):
        evaluate(trainer(world.root), Net(), models, world.tasks, probe=True)


def test_model_of_unknown_tasks_is_named(world: World) -> None:
    models = {"average": world.models["average"]}
    with pytest.raises(InputError, match='model "average": its tasks must be among a; got b'):
        evaluate(trainer(world.root), Net(), models, {"a": world.tasks["a"]})


def test_model_that_does_not_fit_the_network_is_named(world: World) -> None:
    with pytest.raises(InputError, match='model "average": '):
        evaluate(
            trainer(world.root),
            nn.Sequential(nn.Linear(5, 3)),
            {"average": world.models["average"]},
            world.tasks,
        )


@pytest.mark.distributed
def test_two_processes_measure_what_one_does(world: World, evaluation: Evaluation) -> None:
    two = trainer(world.root, devices=2, strategy="ddp_fork")
    found = evaluate(two, Net(), world.models, world.tasks, batch_size=8)
    expected = [row for row in evaluation.rows if row.kind != "control"]
    assert [row.accuracy for row in found.rows] == [row.accuracy for row in expected]
    for row, one in zip(found.rows, expected, strict=True):
        assert row.nll == pytest.approx(one.nll, rel=1e-6)


def _calibration_order(count: int, chosen: int) -> list[int]:
    import numpy as np

    order = np.random.default_rng(0).permutation(count)[:chosen]
    return sorted(order.tolist())


def masked_network(world: World, method: MergeMethod, name: str) -> Net:
    """Return the dense network that a merge with masks is for a task, made in float64."""
    base = world.base.state_dict()
    experts = {task: expert.state_dict() for task, expert in world.experts.items()}
    body = [tensor for tensor in base if not tensor.startswith("head")]
    vectors = {t: {n: experts[t][n].double() - base[n].double() for n in body} for t in experts}
    own = vectors[name]
    factor, unified, used = 1.0, {}, {}
    for tensor in body:
        stacked = torch.stack([vectors[task][tensor] for task in experts])
        total = stacked.sum(0)
        if isinstance(method, TALLMasks):
            unified[tensor] = total
            used[tensor] = own[tensor].abs() > method.threshold * (total - own[tensor]).abs()
        else:
            sign = torch.where(total > 0, 1.0, -1.0)
            unified[tensor] = sign * (sign * stacked).amax(0)
            used[tensor] = own[tensor] * unified[tensor] > 0
    if isinstance(method, EMR):
        factor = sum(float(own[n].abs().mean()) for n in body)
        factor /= sum(float((unified[n] * used[n]).abs().mean()) for n in body)
    net = Net(WIDTHS[name])
    state = {n: (base[n].double() + factor * used[n] * unified[n]).float() for n in body}
    head = {n: value for n, value in experts[name].items() if n.startswith("head")}
    net.load_state_dict({**state, **head})
    return net


@pytest.mark.parametrize("method", [TALLMasks(), EMR()], ids=["TALL", "EMR"])
def test_a_merge_with_masks_is_tested_as_the_model_of_each_task(
    world: World, method: MergeMethod, tmp_path: Path
) -> None:
    experts = {name: world.root / name for name in WIDTHS}
    merge(world.root / "base.safetensors", experts, method, tmp_path / "masked", progress=False)
    models: dict[str, str | ModelEntry] = {"masked": str(tmp_path / "masked")}
    found = evaluate(trainer(world.root), Net(), models, world.tasks, variance=True, examples=32)
    assert [(row.kind, row.task) for row in found.rows] == [("merged", "a"), ("merged", "b")]
    for row in found.rows:
        inputs, labels = world.held_out(row.task)
        network = masked_network(world, method, row.task)
        logits = network(inputs).double()
        assert row.accuracy == int((logits.argmax(1) == labels).sum()) / len(labels)
        assert row.nll == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), 1e-4)
        with open_checkpoint(tmp_path / "masked") as shared:
            load_into(network, shared, ignore=("head.*",))
        unmasked = nn.functional.cross_entropy(network(inputs).double(), labels).item()
        assert row.nll != pytest.approx(unmasked, 1e-3)  # what must not be shown instead
    (first, *_) = [row for row in found.variances if row.task == "b"]
    outputs = masked_network(world, method, "b").fc1(world.held_out("b")[0][:32]).double()
    assert first.variance == pytest.approx(outputs.var(dim=0, correction=0).mean().item(), 1e-4)
    described = found.provenance["models"]["masked"]
    assert described["tasks"] == ["a", "b"]
    assert len(set(described["fingerprint"].values())) == 2


def test_a_merge_with_masks_whose_base_is_gone_is_refused(world: World, tmp_path: Path) -> None:
    with open_checkpoint(world.root / "base.safetensors") as base:
        save_tensors(tmp_path / "base.safetensors", {n: base.tensor(n) for n in base})
    experts = {name: world.root / name for name in WIDTHS}
    merge(tmp_path / "base.safetensors", experts, EMR(), tmp_path / "masked", progress=False)
    (tmp_path / "base.safetensors").unlink()
    with pytest.raises(InputError, match=r'model "masked": .*must be the base.*--base PATH'):
        evaluate(trainer(world.root), Net(), {"masked": str(tmp_path / "masked")}, world.tasks)


def test_a_merge_with_masks_of_other_tasks_is_refused(world: World, tmp_path: Path) -> None:
    experts = {name: world.root / name for name in WIDTHS}
    merge(world.root / "base.safetensors", experts, EMR(), tmp_path / "masked", progress=False)
    only = {"a": world.tasks["a"]}
    with pytest.raises(InputError, match=r'"masked": its tasks must be among a; got b'):
        evaluate(trainer(world.root), Net(), {"masked": str(tmp_path / "masked")}, only)


def test_exported_models_are_tested_as_what_they_were_in_the_merge(
    world: World, tmp_path: Path
) -> None:
    experts = {name: world.root / name for name in WIDTHS}
    merge(world.root / "base.safetensors", experts, EMR(), tmp_path / "masked", progress=False)
    models: dict[str, str | ModelEntry] = {"masked": str(tmp_path / "masked")}
    for name in WIDTHS:
        export_task(tmp_path / "masked", name, tmp_path / name, progress=False)
        models[name] = str(tmp_path / name)
    found = evaluate(trainer(world.root), Net(), models, world.tasks)
    for name in WIDTHS:
        masked, alone = (row for row in found.rows if row.task == name)
        assert (masked.kind, alone.kind) == ("merged", "expert")
        assert masked.accuracy == alone.accuracy
        assert masked.nll == pytest.approx(alone.nll, 1e-6)
