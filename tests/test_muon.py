"""Muon: PyTorch's own, the polar factor, which weights it steps, fits of one process and two."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lit_merge.distributed import is_dtensor
from lit_merge.errors import InputError
from lit_merge.merged.muon import MuonWithAdam, hidden_matrices, orthogonalised
from lit_merge.module import MergeModule
from tests.sharded_fits import in_torchrun
from tests.test_sharded_merge import saved, sharded
from tests.tiny_fits import QUIET, tiny_trainer
from tests.tiny_merge import merge_module, tiny_data, write_experts

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*returned a view tensor"),
    *(pytest.mark.filterwarnings(line) for line in QUIET),
]

OPTIONS: dict[str, Any] = {"trainable": "all", "holdout": 0.25}  # Muon is the default
FIT: dict[str, Any] = {"max_steps": 6, "max_epochs": -1, "limit_val_batches": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path)
    return path


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(folder: Path, path: Path, **options: Any) -> MergeModule:
    module = merge_module(folder, **OPTIONS | options)
    trainer = tiny_trainer(path, enable_checkpointing=False, **FIT)
    trainer.fit(module, datamodule=tiny_data(batch_size=16))
    return module


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (6, 1)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = normal(*shape).double()
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    # Any scale, and singular values down to a hundredth of the largest.
    matrix = 1e-6 * u @ torch.diag(torch.logspace(0, -2, len(s)).double()) @ v
    inner = u.T @ orthogonalised(matrix).double() @ v.T
    assert float(inner.diagonal().min()) > 0.65
    assert float(inner.diagonal().max()) < 1.25
    assert float((inner - torch.diag(inner.diagonal())).abs().max()) < 1e-4


def test_zero_stays_zero() -> None:
    assert not orthogonalised(torch.zeros(3, 4)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs PyTorch 2.9")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_steps_are_those_of_pytorch(shape: tuple[int, int]) -> None:
    """PyTorch's iterations run in bfloat16, so that its steps are near ours and no more."""
    ours, theirs = (nn.Parameter(normal(*shape)) for _ in range(2))
    start = ours.detach().clone()
    optimizer = MuonWithAdam([{"params": [ours], "lr": 0.02, "muon": True}], eps=1e-12)
    muon = torch.optim.Muon([theirs], lr=0.04, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        ours.grad = normal(*shape, seed=step)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        muon.step()
    moved = theirs.detach() - start
    assert float((ours.detach() - theirs.detach()).norm() / moved.norm()) < 0.02
    assert float(moved.abs().mean()) > 0.01


def test_everything_else_steps_as_adam_alone() -> None:
    ours, theirs, matrix = (nn.Parameter(normal(4, 3)) for _ in range(3))
    groups = [
        {"params": [ours], "lr": 0.1, "muon": False},
        {"params": [matrix], "lr": 0.1, "muon": True},
    ]
    optimizer = MuonWithAdam(groups, eps=1e-6)
    adam = torch.optim.Adam([theirs], lr=0.1, eps=1e-6)
    for step in range(3):
        for parameter in (ours, theirs, matrix):
            parameter.grad = normal(4, 3, seed=step)
        loss = optimizer.step(lambda: 3.0)
        adam.step()
    assert loss == 3.0
    assert torch.equal(ours, theirs)
    assert not torch.equal(matrix, theirs)
    assert "exp_avg" not in optimizer.state[matrix]


@pytest.mark.parametrize(("outputs", "inputs"), [(6, 2), (24, 2)])
def test_a_convolution_is_a_matrix_in_any_memory_format(outputs: int, inputs: int) -> None:
    """Also where there are more output channels than weights of one."""
    kernel, gradient = (normal(outputs, inputs, 3, 3, seed=seed) for seed in range(2))
    size = (outputs, 9 * inputs)
    stepped = []
    for shape, order in (
        (size, torch.contiguous_format),
        (kernel.shape, torch.contiguous_format),
        (kernel.shape, torch.channels_last),
    ):
        parameter = nn.Parameter(kernel.reshape(shape).clone(memory_format=order))
        parameter.grad = gradient.reshape(shape).clone(memory_format=order)
        MuonWithAdam([{"params": [parameter], "lr": 0.1, "muon": True}], eps=1e-6).step()
        stepped.append(parameter.detach().reshape(size))
    assert torch.equal(stepped[0], stepped[1])
    torch.testing.assert_close(stepped[2], stepped[0])


def test_a_gradient_of_nothing_but_rounding_moves_nothing() -> None:
    moved = []
    for size in (1.0, 1e-9):
        parameter = nn.Parameter(torch.zeros(4, 4))
        parameter.grad = size * normal(4, 4)
        MuonWithAdam([{"params": [parameter], "lr": 0.1, "muon": True}], eps=1e-6).step()
        moved.append(float(parameter.detach().abs().mean()))
    assert moved[0] == pytest.approx(0.1 * 0.4, rel=0.3)
    assert moved[1] < 0.002 * moved[0]


class Mixed(nn.Module):
    """Everything that is a matrix in memory, and the few that are matrices in meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.fc = nn.Linear(4, 4)
        self.norm = nn.LayerNorm((2, 4))
        self.conv = nn.Conv2d(4, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.bias_table = nn.Parameter(torch.zeros(5, 2))
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.words.weight


def test_matrices_are_weights_between_features() -> None:
    network = Mixed()
    found = hidden_matrices(network, dict(network.named_parameters(remove_duplicate=False)))
    assert found == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "fc.weight",
        "conv.weight",
    }


def test_the_layer_that_reads_the_input_is_no_matrix_between_features() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    names = hidden_matrices(vit, dict(vit.named_parameters()))
    layers = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert names == {"head.weight", *(f"blocks.0.{layer}.weight" for layer in layers)}
    resnet = timm.create_model("resnet18", num_classes=3)
    convolutions = {n for n, p in resnet.named_parameters() if p.ndim == 4}
    names = hidden_matrices(resnet, dict(resnet.named_parameters()))
    assert names == (convolutions - {"conv1.weight"}) | {"fc.weight"}


def test_a_fit_steps_the_shared_matrices_by_muon_and_comes_nearer_to_the_experts(
    folder: Path, tmp_path: Path
) -> None:
    kinds: dict[str, bool] = {}
    losses: list[float] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, own: Any) -> None:
            losses.append(own.best.loss)
            names = {id(p): name for name, p in own.network.network.named_parameters()}
            for group in trainer.optimizers[0].param_groups:
                for parameter in group["params"]:
                    kinds[names.get(id(parameter), "correction")] = group["muon"]

        def on_train_end(self, trainer: Any, own: Any) -> None:
            losses.append(own.best.loss)

    module = merge_module(folder, **OPTIONS, heads="refit")
    trainer = tiny_trainer(tmp_path, Look(), enable_checkpointing=False, **FIT | {"max_steps": 20})
    trainer.fit(module, datamodule=tiny_data())
    assert {name for name, muon in kinds.items() if muon} == {"body.2.weight"}
    assert len(kinds) == 1 + 4 + 4  # corrections, the body, a head for each task
    assert losses[1] < 0.9 * losses[0]


def test_a_resumed_fit_ends_like_a_whole_one(folder: Path, tmp_path: Path) -> None:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)

    whole, resumed = (merge_module(folder, **OPTIONS) for _ in range(2))
    tiny_trainer(tmp_path, keep(), **FIT).fit(whole, datamodule=tiny_data())
    path = tmp_path / "step=3.ckpt"
    tiny_trainer(tmp_path, keep(), **FIT).fit(
        resumed, datamodule=tiny_data(), ckpt_path=path, weights_only=True
    )
    for name, value in whole.network.state_dict().items():
        torch.testing.assert_close(
            resumed.network.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name
        )


@pytest.mark.distributed
def test_two_processes_learn_like_one(folder: Path, tmp_path: Path) -> None:
    one = fitted(folder, tmp_path)
    two = merge_module(folder, **OPTIONS)
    trainer = tiny_trainer(
        tmp_path, enable_checkpointing=False, devices=2, strategy="ddp_fork", **FIT
    )
    trainer.fit(two, datamodule=tiny_data(batch_size=8))
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(
            two.network.state_dict()[name], value, rtol=1e-4, atol=2e-5, msg=name
        )


def _fit(folder: Path, path: Path, rank: int) -> bool:
    module = merge_module(folder, **OPTIONS)
    trainer = sharded(path, enable_checkpointing=False)
    trainer.fit(module, datamodule=tiny_data(batch_size=8))
    module.save_corrected(path / "two")
    return all(map(is_dtensor, module.network.parameters()))


@pytest.mark.distributed
def test_two_processes_with_a_part_each_learn_like_one(folder: Path, tmp_path: Path) -> None:
    fitted(folder, tmp_path).save_corrected(tmp_path / "one")
    run = partial(_fit, folder, tmp_path)
    assert in_torchrun(run, layout="fsdp", folder=tmp_path) == [True, True]
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert sorted(one) == sorted(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_another_optimizer_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"optimizer: must be one of muon, adam; got 'sgd'"):
        merge_module(folder, trainable="all", optimizer="sgd")
