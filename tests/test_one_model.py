"""Corrections without a site: one model for all tasks, with nothing per task but the heads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_merge import export_task
from lit_merge.errors import InputError
from lit_merge.least_squares import LeastSquares
from lit_merge.module import MergeModule
from tests.tiny_fits import QUIET, tiny_trainer
from tests.tiny_merge import CLASSES, TinyNet, base_net, merge_module, tiny_data, write_experts

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

FIT: dict[str, Any] = {"max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path)
    return path


def fitted(folder: Path, path: Path, *, steps: int, **options: Any) -> MergeModule:
    module = merge_module(folder, **{"sites": [], "holdout": 0.25} | options)
    tiny_trainer(path, max_steps=steps, **FIT).fit(module, datamodule=tiny_data())
    return module


def test_all_weights_learn_and_nothing_is_per_task(folder: Path, tmp_path: Path) -> None:
    module = fitted(
        folder, tmp_path, steps=5, trainable="all", least_squares=LeastSquares(ridge=0.02)
    )
    solved = fitted(folder, tmp_path, steps=0, least_squares=LeastSquares(ridge=0.02))
    assert not list(module.network.corrections.parameters())
    shared, before = (own.network.shared_state() for own in (module, solved))
    assert not torch.equal(shared["body.0.weight"], before["body.0.weight"])
    # It is the plain network with the shared weights and each task's head.
    inputs = torch.randn(7, 6)
    for index, (task, classes) in enumerate(CLASSES.items()):
        plain = TinyNet(classes)
        plain.load_state_dict({**shared, **module.network.head_state()[task]})
        with torch.no_grad():
            torch.testing.assert_close(
                module.network.eval()(inputs, index)[:, :classes], plain(inputs)
            )


@pytest.mark.parametrize("closed_form", ["tact", "repair", "none"])
def test_a_closed_form_has_nothing_to_set(folder: Path, tmp_path: Path, closed_form: str) -> None:
    module = fitted(folder, tmp_path, steps=0, closed_form=closed_form)
    before = merge_module(folder, sites=[])
    before.configure_model()
    found, expected = module.network.state_dict(), before.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_it_is_saved_loaded_and_exported(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = fitted(folder, tmp_path, steps=3, trainable="all")
    module.save_corrected(tmp_path / "corrected")
    loaded = MergeModule.from_folder(tmp_path / "corrected", base_net())
    inputs = torch.randn(5, 6)
    assert torch.equal(loaded(inputs, "dtd"), module.eval()(inputs, "dtd"))
    with caplog.at_level(logging.ERROR):
        export_task(
            tmp_path / "corrected",
            "dtd",
            tmp_path / "exported",
            model=TinyNet(CLASSES["dtd"]),
            examples=dict(tiny_data().tasks),
            progress=False,
        )
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_scale_and_shift_cannot_learn_without_a_site(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"correction: must leave something to learn"):
        fitted(folder, tmp_path, steps=3)
    with pytest.raises(InputError, match=r"must match modules of TinyNet; got ''"):
        fitted(folder, tmp_path, steps=3, sites="")
