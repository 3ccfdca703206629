"""All tasks of a corrected folder in one file, against the corrected network."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction import standalone
from lit_merge.errors import InputError
from lit_merge.export.multi_task import export_multi_task
from lit_merge.export.proof import import_file
from lit_merge.tasks import DatasetTask
from tests.corrected_folders import CLASSES, logits_of, save_corrected
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_vit

TEXTS = padded_texts((7, 3, 5, 4))
IMAGES = images(4, 5)


def loaded(model: nn.Module, folder: Path) -> Any:
    return import_file(folder / "correction.py").load_multi_task(
        model, folder / "multi_task.safetensors"
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "inputs", "where"),
    [(tiny_vit, IMAGES, "auto"), (tiny_bert, TEXTS, ["norm", "*.query:input"])],
    ids=["vit", "bert"],
)
def test_one_file_gives_every_task_its_logits_alone_and_mixed(
    tmp_path: Path, make: Any, inputs: Any, where: Any
) -> None:
    network = save_corrected(make(), where, tmp_path / "c")
    result = export_multi_task(tmp_path / "c", tmp_path / "o", model=make(1))
    assert result.error is not None
    assert result.error <= 1e-5
    assert result.task == "svhn, dtd"
    model = loaded(make(2), tmp_path / "o")  # whose own weights and classes do not matter
    arguments = inputs if isinstance(inputs, dict) else {"x": inputs}
    for task in CLASSES:
        model.set_task(task)
        output = model(**arguments)
        torch.testing.assert_close(getattr(output, "logits", output), logits_of(network, inputs, task))  # fmt: skip  # noqa: E501
    output = model(**arguments, task=["dtd", "svhn", "svhn", "dtd"])
    mixed = getattr(output, "logits", output)
    torch.testing.assert_close(mixed, network(inputs, torch.tensor([1, 0, 0, 1])))


def test_the_shared_weights_are_in_the_file_once(tmp_path: Path) -> None:
    network = save_corrected(tiny_vit(), "auto", tmp_path / "c")
    export_multi_task(tmp_path / "c", tmp_path / "o", model=tiny_vit())
    tensors, metadata = standalone.read_safetensors(tmp_path / "o" / "multi_task.safetensors")
    shared = {n.removeprefix("shared/"): v for n, v in tensors.items() if n.startswith("shared/")}
    expected = network.shared_state()
    assert shared.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in shared.items())
    about = json.loads(metadata["multi_task"])
    assert about["tasks"] == list(CLASSES)
    assert about["num_classes"] == list(CLASSES.values())
    record = json.loads((tmp_path / "o" / "export.json").read_text())
    assert record["format"] == "multi_task"
    assert list(record["tasks"]) == list(CLASSES)
    assert record["error"] <= 1e-5


def test_some_tasks_in_another_order_keep_their_own_numbers(tmp_path: Path) -> None:
    network = save_corrected(tiny_vit(), "auto", tmp_path / "c")
    export_multi_task(tmp_path / "c", tmp_path / "o", model=tiny_vit(), tasks=["dtd"])
    model = loaded(tiny_vit(1), tmp_path / "o")
    assert model.tasks == ("dtd",)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES, task="dtd"), logits_of(network, IMAGES, "dtd"))
    export_multi_task(tmp_path / "c", tmp_path / "p", model=tiny_vit(), tasks=["dtd", "svhn"])
    model = loaded(tiny_vit(1), tmp_path / "p")
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES, task="svhn"), logits_of(network, IMAGES, "svhn"))


def test_the_file_works_where_there_is_no_lit_merge(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    network = save_corrected(net, ["0", "2"], tmp_path / "c")
    points = {
        task: DatasetTask([(torch.randn(6), 0) for _ in range(9)], num_classes=classes)
        for task, classes in CLASSES.items()
    }
    export_multi_task(tmp_path / "c", tmp_path / "o", model=net, examples=points)
    inputs = torch.randn(5, 6)
    torch.save(net, tmp_path / "net.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    script = (
        "import sys; sys.modules['lit_merge'] = None; sys.path.insert(0, '.')\n"
        "import torch, correction\n"
        "net = torch.load('../net.pt', weights_only=False)\n"
        "model = correction.load_multi_task(net, 'multi_task.safetensors')\n"
        "model.set_task('dtd')\n"
        "torch.save(model(torch.load('../inputs.pt')), '../found.pt')\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path / "o")
    found = torch.load(tmp_path / "found.pt").detach()
    torch.testing.assert_close(found, logits_of(network, inputs, "dtd"))


def test_a_site_that_is_not_per_example_forbids_mixed_batches_alone(tmp_path: Path) -> None:
    network = save_corrected(tiny_bert(), "*.position_embeddings", tmp_path / "c")
    result = export_multi_task(tmp_path / "c", tmp_path / "o", model=tiny_bert())
    assert result.notes[0].startswith("every batch must be of one task: site 'bert.embeddings.pos")
    model = loaded(tiny_bert(1), tmp_path / "o")
    with torch.no_grad():
        found = model(**TEXTS, task="svhn").logits
    torch.testing.assert_close(found, logits_of(network, TEXTS, "svhn"))


def test_an_inexact_file_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_corrected(tiny_vit(), "auto", tmp_path / "c")
    module: ModuleType = importlib.import_module("lit_merge.export.multi_task")
    read = module.tensors_by_name

    def wrong(corrections: Any) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = read(corrections)
        return {name: value.flip(0) for name, value in tensors.items()}  # of the other task

    monkeypatch.setattr(module, "tensors_by_name", wrong)
    with pytest.raises(InputError, match="task 'svhn': the exported model must give"):
        export_multi_task(tmp_path / "c", tmp_path / "o", model=tiny_vit())
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_folder_that_is_not_corrected_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a corrected folder for an export of several"):
        export_multi_task(tmp_path, tmp_path / "o", model=tiny_vit())


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    save_corrected(tiny_vit(), "auto", tmp_path / "c")
    with pytest.raises(InputError, match="task: must be one of svhn, dtd"):
        export_multi_task(tmp_path / "c", tmp_path / "o", model=tiny_vit(), tasks=["cars"])
