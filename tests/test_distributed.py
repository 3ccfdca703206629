from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_merge import distributed
from lit_merge.distributed import (
    broadcast,
    failing_together,
    gather,
    is_sharded,
    sharded_parameters,
    sum_number,
    sum_over_ranks,
)
from lit_merge.errors import InputError
from tests.processes import on_ranks

CPU = torch.device("cpu")


def test_one_process_is_a_group_of_one() -> None:
    tensors = {"a": torch.ones(2)}
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert broadcast("x") == "x"
    assert gather(3) == (3,)
    assert sum_number(3) == 3
    assert sum_over_ranks(tensors, device=CPU)["a"] is tensors["a"]


def test_one_process_raises_its_own_error() -> None:
    with pytest.raises(InputError, match="mine"), failing_together():
        raise InputError("mine")


def test_an_interrupt_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt), failing_together():
        raise KeyboardInterrupt


def _sums(rank: int) -> dict[str, list[float]]:
    tensors = {"wide": torch.full((2, 3), float(rank + 1), dtype=torch.float64)}
    if rank == 1:
        tensors = {"late": torch.tensor([1.0, 2.0]), **tensors}
    sums = sum_over_ranks(tensors, device=CPU)
    return {name: [*value.flatten().tolist(), *value.shape] for name, value in sums.items()}


@pytest.mark.distributed
def test_sums_are_over_all_ranks_and_a_missing_tensor_is_zero(tmp_path) -> None:
    first, second = on_ranks(_sums, world_size=2, folder=tmp_path)
    assert first == {"wide": [3.0] * 6 + [2, 3], "late": [1.0, 2.0, 2]}
    assert second == first


def _many_sums(rank: int) -> float:
    distributed._BUCKET = 50  # so that there are several buckets, and tensors larger than one
    sizes = (7, 60, 20, 31, 1, 0, 49)
    tensors = {f"t{i}": torch.arange(n) + 0.5 * rank for i, n in enumerate(sizes)}
    before = {name: value.clone() for name, value in tensors.items()}
    sums = sum_over_ranks(tensors, device=CPU)
    unchanged = all(torch.equal(before[name], tensors[name]) for name in tensors)
    right = all(torch.equal(sums[f"t{i}"], 2 * torch.arange(n) + 0.5) for i, n in enumerate(sizes))
    return float(unchanged and right)


@pytest.mark.distributed
def test_sums_in_buckets_are_the_sums_and_leave_the_inputs(tmp_path) -> None:
    assert on_ranks(_many_sums, world_size=2, folder=tmp_path) == [1.0, 1.0]


def _unequal(rank: int) -> None:
    sum_over_ranks({"a": torch.zeros(rank + 1)}, device=CPU)


def _small_talk(rank: int) -> tuple[object, ...]:
    distributed.barrier()
    return gather(f"r{rank}"), broadcast(rank + 5), sum_number(rank + 1)


def _message(function: Callable[[int], None], rank: int) -> str:
    with pytest.raises(InputError) as caught:
        function(rank)
    return str(caught.value)


def _one_fails(rank: int) -> None:
    with failing_together():
        if rank == 1:
            raise InputError("bad example")


@pytest.mark.distributed
def test_ranks_agree(tmp_path) -> None:
    def all_of_it(rank: int) -> list[str]:
        return [repr(_small_talk(rank)), _message(_unequal, rank), _message(_one_fails, rank)]

    first, second = on_ranks(all_of_it, world_size=2, folder=tmp_path)
    assert first[0] == second[0] == "(('r0', 'r1'), 5, 3)"
    assert first[1].startswith("a: must have one shape and dtype on every rank; got")
    assert second[1] == first[1]
    assert first[2] == "rank 1: bad example"
    assert second[2] == "bad example"


def _shard(rank: int) -> tuple[object, ...]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    fully_shard(model[1], mesh=init_device_mesh("cpu", (2,)))
    return sharded_parameters(model), is_sharded(model[0].weight), is_sharded(model[1].weight)


@pytest.mark.distributed
def test_fsdp2_parameters_are_sharded(tmp_path) -> None:
    for found in on_ranks(_shard, world_size=2, folder=tmp_path):
        assert found == (("1.weight", "1.bias"), False, True)


def test_flat_and_zero3_parameters_are_sharded() -> None:
    model = nn.Linear(2, 2)
    assert sharded_parameters(model) == ()
    model.weight._is_flat_param = True
    model.bias.ds_id = 3
    assert sharded_parameters(model) == ("weight", "bias")


def test_everything_inside_an_fsdp1_wrapper_is_sharded() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2, bias=False)

    model = nn.Sequential(FullyShardedDataParallel(), nn.Linear(2, 1, bias=False))
    assert sharded_parameters(model) == ("0.inner.weight",)


def test_no_other_module_names_process_groups() -> None:
    package = Path(distributed.__file__).parent
    files = [*package.rglob("*.py"), *(package / "callbacks").glob("*.py")]
    assert len(files) > 20
    guilty = [
        file.name
        for file in files
        # The format of distributed checkpoints is read and written by one process; its metadata
        # names classes of torch's.
        if file.name not in ("distributed.py", "sharding.py", "dcp_metadata.py")
        and re.search(r"torch\.distributed(?!\.checkpoint)|DTensor", file.read_text())
    ]
    assert guilty == []
