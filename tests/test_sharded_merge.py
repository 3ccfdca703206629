"""MergeModule under FSDP2: two processes with a part of everything do what one process does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lit_merge.distributed import fsdp_units, is_dtensor
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.least_squares.settings import LeastSquares
from lit_merge.merged.folder import open_merged
from lit_merge.methods import TaskArithmetic
from lit_merge.module import MergeModule
from tests.sharded_fits import in_torchrun
from tests.tiny_fits import QUIET, tiny_trainer
from tests.tiny_merge import CLASSES, HEAD, base_net, merge_module, tiny_data, write_experts

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*returned a view tensor"),
    *(pytest.mark.filterwarnings(line) for line in QUIET),
]

SETTINGS: dict[str, Any] = {"max_steps": 6, "max_epochs": -1, "limit_val_batches": 0}
ALL: dict[str, Any] = {
    "trainable": "all",
    "heads": "refit",
    "surgery_rank": 3,
    "feature_weight": 0.3,
    "holdout": 0.25,
    "holdout_every": 2,
    "least_squares": LeastSquares(ridge=0.02, sensitivity=0.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path)
    return path


class Block(nn.Module):
    """A layer with a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).tanh()


class BlockNet(nn.Module):
    """Blocks that repeat, which are sharded one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x))
        return logits


def block_module(folder: Path) -> MergeModule:
    """Return a module over experts that the first call writes."""
    paths = {}
    for number, task in enumerate(("base", *CLASSES)):
        torch.manual_seed(0)
        net = BlockNet()
        torch.manual_seed(number)
        for parameter in net.blocks.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        net.head = nn.Linear(6, CLASSES.get(task, 4))
        paths[task] = str(folder / task)
        if not (folder / task).exists():
            info = ExpertInfo(task=task, head_parameters=HEAD)
            write_expert(folder / task, weights=net.state_dict(), info=info)
    base = paths.pop("base")
    return MergeModule(
        BlockNet(), paths, base=base, method=TaskArithmetic(0.5), trainable="all", holdout=0.25
    )


def _fit_blocks(folder: Path, path: Path, rank: int) -> int:
    module = block_module(folder)
    trainer = sharded(path, enable_checkpointing=False)
    trainer.fit(module, datamodule=tiny_data(batch_size=8))
    module.save_corrected(path / "two")
    return len(fsdp_units(module.network))


def test_blocks_are_sharded_one_by_one(tmp_path: Path) -> None:
    module = block_module(tmp_path)
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False, **SETTINGS)
    trainer.fit(module, datamodule=tiny_data(batch_size=16))
    module.save_corrected(tmp_path / "one")
    run = partial(_fit_blocks, tmp_path, tmp_path)
    assert in_torchrun(run, layout="fsdp", folder=tmp_path) == [4, 4]
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert sorted(one) == sorted(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-5, msg=name)


def sharded(path: Path, *callbacks: Any, tensor: int = 1, **settings: Any) -> Any:
    strategy = ModelParallelStrategy(
        data_parallel_size=2 // tensor,
        tensor_parallel_size=tensor,
        save_distributed_checkpoint=settings.pop("parts", True),
    )
    return tiny_trainer(path, *callbacks, strategy=strategy, devices=2, **SETTINGS | settings)


def saved(path: Path) -> dict[str, torch.Tensor]:
    """Return everything in a corrected folder by name."""
    with open_merged(path) as parts:
        sources = {"": parts.weights, **parts.heads}
        sources |= {"corrections": parts.corrections, "surgery": parts.surgery}
        return {
            f"{key}.{name}": source.tensor(name).clone()
            for key, source in sources.items()
            if source is not None
            for name in source
        }


def _fit(folder: Path, path: Path, options: dict[str, Any], rank: int) -> float:
    module = merge_module(folder, **options)
    trainer = sharded(path, enable_checkpointing=False)
    trainer.fit(module, datamodule=tiny_data(batch_size=8))
    assert all(map(is_dtensor, module.network.parameters()))
    trainer.test(module, datamodule=tiny_data(eval_batch_size=4), verbose=False)
    module.save_corrected(path / "two")
    return float(trainer.callback_metrics["test/nll"])


@pytest.mark.parametrize("options", [{}, ALL])
def test_two_processes_with_a_part_each_learn_like_one(
    folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    module = merge_module(folder, **options)
    trainer = tiny_trainer(tmp_path, enable_checkpointing=False, **SETTINGS)
    trainer.fit(module, datamodule=tiny_data(batch_size=16))
    trainer.test(module, datamodule=tiny_data(eval_batch_size=8), verbose=False)
    module.save_corrected(tmp_path / "one")
    run = partial(_fit, folder, tmp_path, options)
    losses = in_torchrun(run, layout="fsdp", folder=tmp_path)
    assert losses == pytest.approx([float(trainer.callback_metrics["test/nll"])] * 2, rel=1e-4)
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert sorted(one) == sorted(two)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-5, msg=name)


def _resume(folder: Path, path: Path, parts: bool, rank: int) -> float:
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(
            path / "kept", filename="{step}", every_n_train_steps=3, save_top_k=-1
        )

    modules = []
    for start in (None, path / "kept" / "step=3.ckpt"):
        module = merge_module(folder, trainable="all", holdout=0.25)
        trainer = sharded(path, keep(), parts=parts)
        trainer.fit(
            module, datamodule=tiny_data(batch_size=8), ckpt_path=start, weights_only=start and True
        )
        modules.append({n: p.detach().to_local() for n, p in module.learned.items()})
    one, two = modules
    return max(float((one[n] - two[n]).abs().max()) for n in one)


@pytest.mark.parametrize("parts", [True, False])
def test_a_resumed_fit_ends_like_a_whole_one(folder: Path, tmp_path: Path, parts: bool) -> None:
    found = in_torchrun(partial(_resume, folder, tmp_path, parts), layout="fsdp", folder=tmp_path)
    assert found == pytest.approx([0, 0], abs=1e-6)
    if not parts:
        loaded = MergeModule(base_net())
        content = torch.load(tmp_path / "kept" / "step=3.ckpt", weights_only=True)
        loaded.on_load_checkpoint(content)
        loaded.load_state_dict(content["state_dict"])
        assert loaded.network.network.body[0].weight.shape == (12, 6)


def _refused(folder: Path, path: Path, options: dict[str, Any], tensor: int, rank: int) -> None:
    trainer = sharded(path, tensor=tensor, enable_checkpointing=False)
    trainer.fit(merge_module(folder, **options), datamodule=tiny_data(batch_size=8))


@pytest.mark.parametrize(
    ("options", "tensor", "message"),
    [
        ({"coefficients": "layer"}, 1, 'coefficients: must be "none" where weights are sharded'),
        ({"elastic": 1.0, "trainable": "all"}, 1, "elastic: must be 0 where weights are sharded"),
        ({}, 2, "strategy: must not share layers between processes; got tensor_parallel_size=2"),
    ],
)
def test_what_does_not_work_with_parts_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], tensor: int, message: str
) -> None:
    run = partial(_refused, folder, tmp_path, options, tensor)
    for found in in_torchrun(run, layout="fsdp", folder=tmp_path):
        assert message in found
