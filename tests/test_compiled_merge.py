"""A merged network under torch.compile: the same numbers, under the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_merge.module import MergeModule
from tests.tiny_fits import QUIET, tiny_trainer
from tests.tiny_merge import CLASSES, merge_module, tiny_data, write_experts

pytestmark = [
    pytest.mark.slow,
    # torch.compile looks at .grad of every tensor where a graph breaks.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    *(pytest.mark.filterwarnings(line) for line in QUIET),
]

OPTIONS: dict[str, Any] = {"surgery_rank": 2, "trainable": "all", "holdout": 0.25}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    yield
    torch.compiler.reset()


def fit(module: Any, folder: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "max_epochs": -1, "limit_val_batches": 0}
    trainer = tiny_trainer(folder, enable_checkpointing=False, **settings)
    trainer.fit(module, datamodule=tiny_data())


def assert_alike(one: MergeModule, other: MergeModule) -> None:
    found, expected = other.network.state_dict(), one.network.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    inputs = torch.randn(5, 6)
    for task in CLASSES:
        torch.testing.assert_close(
            other.predict_task(inputs, task), one.predict_task(inputs, task), rtol=1e-4, atol=1e-5
        )


def test_a_compiled_network_learns_like_a_plain_one(tmp_path: Path) -> None:
    write_experts(tmp_path)
    plain, compiled = (merge_module(tmp_path, **OPTIONS) for _ in range(2))
    compiled.configure_model()
    compiled.network.compile(backend="aot_eager")
    for module in (plain, compiled):
        fit(module, tmp_path)
    assert_alike(plain, compiled)
