from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lit_merge.checkpoint.safetensors_file import SafetensorsFile
from lit_merge.checkpoint.safetensors_writer import SafetensorsWriter, save_tensors
from lit_merge.checkpoint.tensor_source import TensorInfo
from lit_merge.errors import InputError

STATE = {
    "flag": torch.tensor([True, False, True]),
    "weight": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(9).to(torch.bfloat16),
    "count": torch.tensor(12),
    "wide": torch.randn(11, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "empty": torch.zeros(0, 3),
}
INFOS = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in STATE.items()}


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_chunks_from_several_threads_make_a_file_that_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    work = [
        (name, start, min(start + 2, value.numel()))
        for name, value in STATE.items()
        for start in range(0, max(value.numel(), 1), 2)
    ]
    random.Random(0).shuffle(work)
    with SafetensorsWriter(path, INFOS, {"format": "pt"}) as writer:

        def write(part: int) -> None:
            for name, start, stop in work[part::3]:
                writer.write(name, start, STATE[name].reshape(-1)[start:stop])

        threads = [threading.Thread(target=write, args=(part,)) for part in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_equal_states(load_file(str(path)), STATE)
    with safe_open(str(path), framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    with SafetensorsFile(path) as own:
        assert_equal_states({name: own.tensor(name) for name in own}, STATE)


def test_every_tensor_is_aligned_to_its_type(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, INFOS) as writer:
        for name, value in STATE.items():
            writer.write(name, 0, value)
    with SafetensorsFile(path) as opened:
        for name, info in opened.infos.items():
            assert opened._offsets[name] % info.dtype.itemsize == 0


def test_values_are_cast_to_the_declared_type_with_one_rounding(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 1 / 3, 1e-3, -7.77], dtype=torch.float64)
    infos = {"a": TensorInfo((2, 2), torch.bfloat16)}
    with SafetensorsWriter(tmp_path / "x.safetensors", infos) as writer:
        writer.write("a", 0, values.reshape(2, 2).T)
    found = load_file(str(tmp_path / "x.safetensors"))["a"]
    assert torch.equal(found, values.reshape(2, 2).T.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("written", "missing"), [([], 0), ([(0, 3)], 3), ([(4, 6), (0, 3)], 3), ([(0, 4), (3, 5)], 5)]
)
def test_a_gap_is_noticed_when_the_file_is_closed(
    tmp_path: Path, written: list[tuple[int, int]], missing: int
) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": TensorInfo((6,), torch.float32)})
    for start, stop in written:
        writer.write("a", start, torch.zeros(stop - start))
    with pytest.raises(RuntimeError, match=f"a: element {missing} of 6 not written"):
        writer.close()


def test_an_exception_goes_before_the_gap_it_causes(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": TensorInfo((6,), torch.float32)})
    with pytest.raises(KeyError), writer:
        writer.write("b", 0, torch.zeros(6))


def test_elements_outside_the_tensor_are_a_bug_of_the_caller(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": TensorInfo((6,), torch.float32)})
    with pytest.raises(IndexError, match="a: no elements 4:7 in 6"):
        writer.write("a", 4, torch.zeros(3))


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"must have 4,0\d\d bytes free on its disk; got 1,000"):
        SafetensorsWriter(tmp_path / "x", {"a": TensorInfo((1000,), torch.float32)})
    assert not (tmp_path / "x").exists()


def test_a_type_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    message = r"tensor 'a' must be of a type that safetensors has; got torch\.complex128"
    with pytest.raises(InputError, match=message):
        SafetensorsWriter(tmp_path / "x", {"a": TensorInfo((2,), torch.complex128)})
    with pytest.raises(InputError, match=message):
        save_tensors(tmp_path / "x", {"a": torch.zeros(2, dtype=torch.complex128)})


def test_tied_and_overlapping_tensors_are_read_back_under_every_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {**model.state_dict(), "row": table[1], "table": table, "turned": table.T}
    save_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    assert_equal_states(load_file(str(tmp_path / "x.safetensors")), tensors)


def test_saving_parameters_does_not_need_gradients_switched_off(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    save_tensors(tmp_path / "x.safetensors", {"a": parameter})
    assert torch.equal(load_file(str(tmp_path / "x.safetensors"))["a"], torch.ones(2, 2))


def test_nothing_and_sparse_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold tensors; got an empty state dict"):
        save_tensors(tmp_path / "x", {})
    with pytest.raises(
        InputError, match="entry 'a' must be a dense tensor; got a tensor of layout"
    ):
        save_tensors(tmp_path / "x", {"a": torch.eye(3).to_sparse()})
