from __future__ import annotations

import itertools
import os
import pickle
import random
import resource
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from lit_merge.checkpoint.dcp import DistributedCheckpoint
from lit_merge.checkpoint.dcp_metadata import read_metadata
from lit_merge.errors import InputError
from tests.processes import on_ranks
from tests.sharded_nets import mesh_of, parallelize, shard_fully, small_transformer

STATE = {
    "fc.weight": torch.randn(6, 5, generator=torch.Generator().manual_seed(0)),
    "fc.half": torch.arange(60.0).reshape(3, 4, 5).bfloat16(),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "part": torch.arange(20.0)[5:11],
    "count": torch.tensor(7),
    "empty": torch.zeros(0, 3),
}


def saved(folder: Path, content: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is meant
        dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


def assert_reads_as(opened: DistributedCheckpoint, state: dict[str, Tensor], cut: int = 7) -> None:
    assert set(opened) == set(state)
    for name, value in state.items():
        info = opened.infos[name]
        assert (info.shape, info.dtype) == (tuple(value.shape), value.dtype)
        assert torch.equal(opened.tensor(name), value)
        flat = value.reshape(-1)
        for start in range(0, info.numel, cut):
            stop = min(start + cut, info.numel)
            assert torch.equal(opened.read(name, start, stop), flat[start:stop])


@pytest.mark.parametrize(
    ("around", "key"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state, "optimizer_0": {"state": {"x": STATE}}}, "state_dict"),
        (lambda state: {"model": state, "optim": {"lr": 0.1, "m": torch.ones(3)}}, "model"),
        (lambda state: {"app": {"model": state, "optim": {"m": torch.ones(3)}}}, "app.model"),
        (lambda state: {**state, "optimizer": {"state": {"m": torch.ones(3)}}}, ""),
        (lambda state: {"net": state, "opt": {"state": {"m": torch.ones(3)}}, "n": 3}, "net"),
        (lambda state: {"model": state, "callbacks": {"ema": {"state_dict": state}}}, "model"),
    ],
)
def test_the_model_is_found_where_people_put_it(tmp_path: Path, around: Any, key: str) -> None:
    with DistributedCheckpoint(saved(tmp_path / "c", around(dict(STATE)))) as opened:
        assert opened.metadata.get("key", "") == key
        assert_reads_as(opened, STATE)


def test_two_groups_that_could_be_the_model_are_an_error(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", {"net": dict(STATE), "other": dict(STATE)})
    with pytest.raises(InputError, match="must hold one model; got tensors under 'net', 'other'"):
        DistributedCheckpoint(folder)


def test_a_folder_without_tensors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold tensors; got none"):
        DistributedCheckpoint(saved(tmp_path / "c", {"epoch": 3}))


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["fsdp", "tensor", "both"])
def test_what_two_ranks_have_sharded_reads_as_the_whole(tmp_path: Path, layout: str) -> None:
    data, tensor = {"fsdp": (2, 1), "tensor": (1, 2), "both": (2, 2)}[layout]
    folder = tmp_path / "c"

    def save(rank: int) -> str:
        mesh = mesh_of(data, tensor)
        model = small_transformer()
        if layout != "fsdp":
            parallelize(model, mesh["tensor"])
        if layout != "tensor":
            shard_fully(model, mesh["data_parallel"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        content = {
            "model": get_model_state_dict(model),
            "optimizer_0": get_optimizer_state_dict(model, optimizer),
        }
        dcp.save(content, checkpoint_id=folder)
        return "saved"

    ranks = data * tensor
    assert on_ranks(save, world_size=ranks, folder=tmp_path) == ["saved"] * ranks
    files = list(folder.glob("*.distcp"))
    assert len(files) == ranks
    with DistributedCheckpoint(folder) as opened:
        assert_reads_as(opened, small_transformer().state_dict())
        pieces = {name: len(entry.pieces) for name, entry in opened._entries.items()}
        assert max(pieces.values()) >= 2  # there was something to put together


def cut_into(
    folder: Path, value: Tensor, blocks: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> Path:
    """Write one tensor ``x`` as DCP would, cut into the given blocks (offsets, sizes)."""
    folder.mkdir()
    pieces, storage = [], {}
    for i, (offsets, sizes) in enumerate(blocks):
        where = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
        with (folder / f"__{i}_0.distcp").open("wb") as file:
            file.write(b"before")
            torch.save(value[where].clone(), file)
            length = file.tell() - 6
        pieces.append(dcp.metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
        index = dcp.metadata.MetadataIndex("x", offsets, i)
        storage[index] = dcp.filesystem._StorageInfo(f"__{i}_0.distcp", 6, length)
    write_metadata(folder, value, pieces, storage)
    return folder


def write_metadata(folder: Path, value: Tensor, pieces: Any, storage: Any, **more: Any) -> None:
    properties = dcp.metadata.TensorProperties.create_from_tensor(value)
    tensor = dcp.metadata.TensorStorageMetadata(properties, value.shape, pieces)
    content = dcp.metadata.Metadata({"x": tensor}, storage_data=storage, **more)
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def grid(shape: tuple[int, ...], cuts: list[list[int]]) -> list[Any]:
    """Return the blocks between cuts along every axis."""
    edges = [[0, *c, n] for c, n in zip(cuts, shape, strict=True)]
    axes = [list(itertools.pairwise(e)) for e in edges]
    return [
        (tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
        for spans in itertools.product(*axes)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_any_range_of_any_grid_of_blocks_is_that_of_the_whole(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 4)))
    cuts = [sorted(rng.sample(range(1, n), rng.randint(0, min(2, n - 1)))) for n in shape]
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    folder = cut_into(tmp_path / "c", value, rng.sample(b := grid(shape, cuts), len(b)))
    flat = value.reshape(-1)
    with DistributedCheckpoint(folder) as opened:
        for _ in range(60):
            start, stop = sorted(rng.randint(0, value.numel()) for _ in range(2))
            assert torch.equal(opened.read("x", start, stop), flat[start:stop])


def test_a_range_reads_only_the_bytes_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.randn(64, 4096)
    folder = cut_into(tmp_path / "c", value, grid((64, 4096), [[32], []]))
    read = 0
    preadv = os.preadv

    def counted(descriptor: int, buffers: Any, position: int) -> int:
        nonlocal read
        count = preadv(descriptor, buffers, position)
        read += count
        return count

    with DistributedCheckpoint(folder) as opened:
        opened.read("x", 0, value.numel())
        monkeypatch.setattr(os, "preadv", counted)
        assert torch.equal(opened.read("x", 130_000, 132_000), value.view(-1)[130_000:132_000])
    assert read == 2000 * 4


def test_elements_out_of_order_are_read_from_the_whole_piece(tmp_path: Path) -> None:
    with DistributedCheckpoint(saved(tmp_path / "c", dict(STATE))) as opened:
        assert torch.equal(opened.read("turned", 2, 9), STATE["turned"].reshape(-1)[2:9])
        assert [opened._places[p] for p in opened._entries["turned"].pieces] == [None]


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("place", ["alone", "planner_data", "storage_meta", "key"])
def test_metadata_that_asks_for_code_is_refused_and_not_run(tmp_path: Path, place: str) -> None:
    trace = tmp_path / "trace"
    evil: Any = Evil(trace)
    if place == "alone":
        content = evil
    elif place == "key":
        content = dcp.metadata.Metadata({}, storage_data={(): [evil]})
    else:
        content = dcp.metadata.Metadata({}, storage_data={}, **{place: evil})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"runs no code; got (posix|nt)\.system"):
        DistributedCheckpoint(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["load", "hub.load", "nn.Module", "dtype", "os.system", "__name__"]
)
def test_only_the_types_of_torch_may_be_named(tmp_path: Path, name: str) -> None:
    (tmp_path / ".metadata").write_bytes(f"ctorch\n{name}\n.".encode())
    with pytest.raises(InputError, match=f"runs no code; got torch.{name}"):
        read_metadata(tmp_path / ".metadata")


def test_a_piece_that_asks_for_code_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = cut_into(tmp_path / "c", torch.ones(4), [((0,), (4,))])
    trace = tmp_path / "trace"
    with (folder / "__0_0.distcp").open("wb") as file:
        file.write(b"before")
        torch.save(Evil(trace), file)
        length = file.tell() - 6
    index = dcp.metadata.MetadataIndex("x", (0,), 0)
    chunk = dcp.metadata.ChunkStorageMetadata(torch.Size((0,)), torch.Size((4,)))
    storage = {index: dcp.filesystem._StorageInfo("__0_0.distcp", 6, length)}
    write_metadata(folder, torch.ones(4), [chunk], storage)
    with (
        DistributedCheckpoint(folder) as opened,
        pytest.raises(InputError, match="must hold, from byte 6 on, a piece of tensor 'x'"),
    ):
        opened.tensor("x")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("blocks", "shape"),
    [
        ([((0,), (3,))], (4,)),
        ([((0,), (3,)), ((2,), (2,))], (5,)),
        ([((0, 0), (2, 2)), ((1, 1), (2, 2)), ((0, 2), (1, 1))], (3, 3)),
    ],
)
def test_pieces_with_gaps_or_overlaps_are_refused(
    tmp_path: Path, blocks: list[Any], shape: tuple[int, ...]
) -> None:
    folder = cut_into(tmp_path / "c", torch.zeros(shape), blocks)
    with pytest.raises(InputError, match="pieces of tensor 'x' that do not cover its shape"):
        DistributedCheckpoint(folder)


def one_piece(folder: Path, **storage: Any) -> Path:
    cut_into(folder, torch.ones(4), [((0,), (4,))])
    chunk = dcp.metadata.ChunkStorageMetadata(torch.Size((0,)), torch.Size((4,)))
    index = dcp.metadata.MetadataIndex("x", (0,), 0)
    length = (folder / "__0_0.distcp").stat().st_size - 6
    info = {"relative_path": "__0_0.distcp", "offset": 6, "length": length, **storage}
    write_metadata(folder, torch.ones(4), [chunk], {index: dcp.filesystem._StorageInfo(**info)})
    return folder


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ({"relative_path": "../secret"}, r"in a file of the same folder; got '\.\./secret'"),
        ({"relative_path": "/etc/passwd"}, "in a file of the same folder; got '/etc/passwd'"),
        ({"relative_path": "other.distcp"}, "other.distcp: must exist, as .metadata names it"),
        ({"relative_path": "."}, "in a file of the same folder"),
        ({"offset": -1}, "at .* that lies nowhere"),
        ({"length": 10**9}, "must be a whole file, with tensor 'x' up to byte 1000000006; got"),
        ({"transform_descriptors": ["zstd"]}, "stored as it is; got one that went through"),
    ],
)
def test_a_piece_in_an_impossible_place_is_refused(
    tmp_path: Path, storage: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        DistributedCheckpoint(one_piece(tmp_path / "c", **storage))


def test_a_file_that_is_cut_after_opening_is_an_error(tmp_path: Path) -> None:
    folder = cut_into(tmp_path / "c", torch.ones(4000), [((0,), (4000,))])
    with DistributedCheckpoint(folder) as opened:
        opened.tensor("x")
        os.truncate(folder / "__0_0.distcp", 9000)
        with pytest.raises(InputError, match="must be whole; got the end of the file at byte 9000"):
            opened.tensor("x")


def test_a_piece_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = one_piece(tmp_path / "c")
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.seek(6)
        torch.save(torch.ones(2, 2), file)
    with (
        DistributedCheckpoint(folder) as opened,
        pytest.raises(InputError, match=r"of shape \[4\], torch.float32; got a Tensor of shape"),
    ):
        opened.tensor("x")


def test_a_memo_of_any_size_takes_no_memory(tmp_path: Path) -> None:
    # LONG_BINPUT at 2³¹: an array of that many pointers, for the unpickler in C.
    (tmp_path / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="got no state_dict_metadata"):
        read_metadata(tmp_path / ".metadata")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def mutations(content: bytes, count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            kind = rng.random()
            at = rng.randrange(len(changed))
            if kind < 0.6:
                changed[at] = rng.randrange(256)
            elif kind < 0.8:
                del changed[at : at + rng.randint(1, 9)]
            else:
                changed[at:at] = rng.randbytes(rng.randint(1, 5))
        yield bytes(changed)


def test_damaged_metadata_gives_only_our_error(tmp_path: Path) -> None:
    folder = saved(tmp_path / "c", {"model": OrderedDict(STATE), "lr": 0.1})
    path = folder / ".metadata"
    refused = 0
    for changed in mutations(path.read_bytes(), 300):
        path.write_bytes(changed)
        try:
            DistributedCheckpoint(folder).close()
        except InputError:
            refused += 1
    assert refused > 100


def test_a_module_gets_back_its_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    folder = saved(tmp_path / "c", {"model": model.state_dict()})
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    with DistributedCheckpoint(folder) as opened:
        other.load_state_dict({name: opened.tensor(name) for name in opened})
    x = torch.randn(2, 2, 5, 5)
    assert torch.equal(model.eval()(x), other.eval()(x))
