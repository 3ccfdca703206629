from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_merge.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from lit_merge.errors import InputError

HEADER = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def some_tensors() -> dict[str, torch.Tensor]:
    """Return a tensor of every type that torch can make, a scalar and an empty one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        if name == "F8_E8M0":  # safetensors.torch writes it only in newer versions
            continue
        size = 24 // dtype.itemsize * 5
        raw = torch.randint(0, 255, (5 * 24,), generator=generator).to(torch.uint8)
        if dtype == torch.bool:
            raw %= 2
        tensors[name] = raw.view(dtype)[:size].reshape(5, -1)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.zeros(0, 7)
    return tensors


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def raw_file(path: Path, header: bytes | str, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safetensors") / "all.safetensors"
    save_file(some_tensors(), str(path), metadata={"format": "pt"})
    return path


def test_every_type_is_read_as_the_library_reads_it(stored: Path) -> None:
    expected = load_file(str(stored))
    with SafetensorsFile(stored) as opened:
        assert set(opened) == set(expected)
        assert opened.metadata == {"format": "pt"}
        for name, value in expected.items():
            found = opened.tensor(name)
            assert found.dtype == value.dtype == opened.infos[name].dtype
            assert found.shape == value.shape == opened.infos[name].shape
            assert torch.equal(bits(found), bits(value))


def test_a_chunk_is_a_range_of_the_flattened_tensor(stored: Path) -> None:
    with SafetensorsFile(stored) as opened:
        for name, info in opened.infos.items():
            whole = opened.tensor(name).reshape(-1)
            for start in range(0, info.numel, 3):
                stop = min(start + 3, info.numel)
                assert torch.equal(bits(opened.read(name, start, stop)), bits(whole[start:stop]))


def test_a_buffer_is_filled_and_used_again(stored: Path) -> None:
    buffer = torch.empty(6)
    with SafetensorsFile(stored) as opened:
        whole = opened.tensor("F32").reshape(-1)
        for start in (0, 6, 12):
            opened.read_into("F32", start, buffer)
            assert torch.equal(bits(buffer), bits(whole[start : start + 6]))
        with pytest.raises(TypeError, match="must be contiguous"):
            opened.read_into("F32", 0, torch.empty(6, dtype=torch.float64))
        with pytest.raises(TypeError, match="must be contiguous"):
            opened.read_into("F32", 0, torch.empty(12)[::2])


def test_a_range_outside_the_tensor_is_a_bug_of_the_caller(stored: Path) -> None:
    with SafetensorsFile(stored) as opened:
        for start, stop in ((-1, 1), (2, 1), (0, 31)):
            with pytest.raises(IndexError, match="F32: no elements"):
                opened.read("F32", start, stop)


def test_threads_read_at_once(stored: Path) -> None:
    expected = load_file(str(stored))["F32"].reshape(-1)
    wrong: list[int] = []

    with SafetensorsFile(stored) as opened:

        def read(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(200):
                start = chance.randrange(30)
                stop = chance.randrange(start, 31)
                if not torch.equal(
                    bits(opened.read("F32", start, stop)), bits(expected[start:stop])
                ):
                    wrong.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_closed_file_cannot_be_read(stored: Path) -> None:
    opened = SafetensorsFile(stored)
    opened.close()
    opened.close()
    with pytest.raises(ValueError, match="is closed"):
        opened.read("F32", 0, 1)


def test_a_file_that_shrinks_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4096)}, str(path))
    with SafetensorsFile(path) as opened:
        with path.open("r+b") as file:
            file.truncate(4096)
        with pytest.raises(InputError, match="tensor 'a' must be whole; got the end of the file"):
            opened.tensor("a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.safetensors: must be a file that can be read"):
        SafetensorsFile(tmp_path / "none.safetensors")


def test_a_truncated_file_is_refused_when_it_is_opened(stored: Path, tmp_path: Path) -> None:
    whole = stored.read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in (0, 5, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.safetensors: must be a whole safetensors file"):
            SafetensorsFile(path)


def test_a_file_with_more_behind_the_data_is_refused(stored: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(stored.read_bytes() + b"x")
    with pytest.raises(InputError, match="must be a whole safetensors file of"):
        SafetensorsFile(path)


def entry(**changes: object) -> str:
    return json.dumps({"a": {**HEADER, **changes}})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("no json", "must have a header of JSON"),
        (b"\xff\xfe", "must have a header of JSON"),
        ("[" * 100_000, "must have a header of JSON"),
        ('{"a": 1' + "0" * 5000 + "}", "must have a header of JSON|tensor 'a' without dtype"),
        (
            f'{{"a": {json.dumps(HEADER)}, "a": {json.dumps(HEADER)}}}',
            "the name 'a' stands there twice",
        ),
        ("[]", "a header that is no JSON object"),
        ('{"__metadata__": {"x": 1}}', "__metadata__ that is not text by name"),
        ('{"__metadata__": []}', "__metadata__ that is not text by name"),
        ('{"a": []}', "tensor 'a' without dtype, shape and data_offsets"),
        ('{"a": {"dtype": "F32"}}', "tensor 'a' without dtype, shape and data_offsets"),
        (entry(dtype="F4"), "tensor 'a' must be of a type that torch .* can compute with"),
        (entry(dtype=[]), "tensor 'a' must be of a type that torch .* can compute with"),
        (entry(shape=[-2]), r"tensor 'a' with shape \[-2\]"),
        (entry(shape=[2.0]), r"tensor 'a' with shape \[2\.0\]"),
        (entry(shape=[True, 2]), r"tensor 'a' with shape \[True, 2\]"),
        (entry(shape=2), "tensor 'a' with shape 2"),
        (entry(shape=[3]), r"tensor 'a' with shape \[3\], F32, in 8 bytes"),
        (entry(shape=[2**62, 2**62]), "tensor 'a' with shape"),
        (entry(data_offsets=[8, 0]), "tensor 'a' with shape"),
        (entry(data_offsets=[0, 8, 8]), "tensor 'a' with shape"),
        (entry(data_offsets=[4, 12]), "tensor 'a' at byte 4 of the data where 0 is due"),
        (
            json.dumps({"a": HEADER, "b": {**HEADER, "data_offsets": [4, 12]}}),
            "tensor 'b' at byte 4 of the data where 8 is due",
        ),
        (
            json.dumps({"a": {**HEADER, "data_offsets": [0, 8]}, "b": {**HEADER, "shape": [1]}}),
            "tensor 'b' with shape",
        ),
        (json.dumps({"\ud800": HEADER}), "must have a header of JSON; got .* surrogates"),
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: str | bytes, message: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold tensors; got none"):
        SafetensorsFile(raw_file(tmp_path / "x.safetensors", "{}"))


def test_no_bytes_bring_out_another_error(stored: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    whole = stored.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "fuzz.safetensors"
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(header)] = chance.choice(
                (chance.randrange(256), *b'0123456789[]{}",:')
            )
        path.write_bytes(damaged[: chance.choice((len(damaged), chance.randrange(len(damaged))))])
        try:
            with SafetensorsFile(path) as opened:
                for name in opened:
                    opened.tensor(name)
        except InputError:
            refused += 1
    assert refused > 200
