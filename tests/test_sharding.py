from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard, distribute_tensor

from lit_merge.checkpoint import load_into
from lit_merge.curvature import SquaredBatchGradient
from lit_merge.distributed import (
    in_step,
    is_sharded,
    rank,
    reshard,
    sharded_parameters,
    true_everywhere,
)
from lit_merge.errors import InputError
from lit_merge.sharding import (
    UsedParameters,
    copy_into,
    give_whole,
    local_part,
    own_part,
    reduce_scatter_into,
    sharded_as,
    whole,
    zero_everywhere,
)
from tests.processes import on_ranks
from tests.references import squared_gradients_by_loop
from tests.sharded_nets import (
    LAYOUTS,
    loss_of,
    mesh_of,
    processes_of,
    sentences,
    sharded_net,
    small_transformer,
    square_batches,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks"),
    pytest.mark.filterwarnings("ignore:.*returned a view tensor"),
]


def test_without_processes_everything_is_whole() -> None:
    model = small_transformer()
    weight = model.head.weight
    assert local_part(weight) is whole(weight) is own_part(weight, weight) is weight
    assert sharded_as(weight, weight) is weight
    total = torch.ones(2)
    reduce_scatter_into(total, torch.ones(2), used=total)
    assert total.tolist() == [2, 2]
    assert zero_everywhere({"a": torch.zeros(2), "b": torch.ones(1)}) == ("a",)
    assert list(in_step([1, 2], spare=0)) == [(1, True), (2, True)]
    with UsedParameters(model) as used:
        assert used.name_of(weight) == "head.weight"
        assert used.name_of(torch.ones(1)) is None
        assert used.by_name["head.weight"] is weight


def _parts(layout: str, rank: int) -> list[str]:
    """Return what is wrong."""
    model, plain = sharded_net(layout), small_transformer()
    wrong = []
    for (name, parameter), reference in zip(
        model.named_parameters(), plain.parameters(), strict=True
    ):
        part = local_part(parameter)
        if not torch.equal(whole(parameter), reference):
            wrong.append(f"whole {name}")
        if not torch.equal(own_part(reference.detach(), parameter), part):
            wrong.append(f"part {name}")
        again = sharded_as(part.detach() * 2, parameter)
        if is_sharded(parameter) and again.placements != parameter.placements:
            wrong.append(f"layout {name}")
        if not torch.equal(whole(again), 2 * reference):
            wrong.append(f"again {name}")
    return wrong


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["fsdp", "tensor", pytest.param("both", marks=pytest.mark.slow)])
def test_parts_and_wholes_are_each_others(tmp_path, layout: str) -> None:
    size = processes_of(layout)
    assert on_ranks(partial(_parts, layout), world_size=size, folder=tmp_path) == [[]] * size


SCATTERED = [
    ((4, 3), 0, ([2, 3], [2, 3])),
    ((5, 3), 0, ([3, 3], [2, 3])),
    ((1, 3), 0, ([1, 3], [0, 3])),
    ((3, 4, 2), 1, ([3, 2, 2], [3, 2, 2])),
    ((7,), 0, ([4], [3])),
]
"""Shape, sharded axis, and the shapes of the two parts."""


def _scattered(rank: int) -> list[Any]:
    mesh = mesh_of(2, 1)["data_parallel"]
    found = []
    for shape, dim, _ in SCATTERED:
        start = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        total = distribute_tensor(start, mesh, [Shard(dim)])
        addend = (start + 1) * 10 ** (rank + 1)
        before = addend.clone()
        reduce_scatter_into(total, addend, used=start)
        right = torch.equal(total.full_tensor(), start + (start + 1) * 110)
        found.append([right and torch.equal(addend, before), list(local_part(total).shape)])
    return found


@pytest.mark.distributed
def test_squares_of_all_ranks_meet_in_uneven_parts(tmp_path) -> None:
    for index, found in enumerate(on_ranks(_scattered, world_size=2, folder=tmp_path)):
        assert found == [[True, parts[index]] for _, _, parts in SCATTERED]


def _share(layout: str, batches: list[Any], rank: int) -> list[Any]:
    """Return what this data rank takes: the first one more than the others."""
    data, tensor = LAYOUTS[layout]
    return batches[rank // tensor :: data]


def _engine(layout: str, settings: dict[str, Any], rank: int) -> dict[str, Any]:
    model = sharded_net(layout, **settings)
    totals = {
        name: sharded_as(torch.zeros_like(local_part(parameter)), parameter)
        for name, parameter in model.named_parameters()
        if name.endswith("weight") and "norm" not in name
    }
    sizes = {name: local_part(total).numel() for name, total in totals.items()}
    words, labels = sentences(10)
    batches = [(words[i:j], labels[i:j]) for i, j in ((0, 4), (4, 7), (7, 10))]
    own = _share(layout, batches, rank)
    square_batches(model, in_step(own, spare=batches[0]), totals)
    assert {name: local_part(total).numel() for name, total in totals.items()} == sizes
    return {name: whole(total).tolist() for name, total in totals.items()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("fsdp", {}),
        ("fsdp", {"reshard_after_forward": False}),
        ("tensor", {}),
        ("both", {}),
    ],
)
def test_sharded_squares_are_those_of_a_loop_with_uneven_data(
    tmp_path, layout: str, settings: dict[str, Any]
) -> None:
    size = processes_of(layout)
    words, labels = sentences(10)
    expected = squared_gradients_by_loop(small_transformer(), [(words, labels)], loss_of)
    found = on_ranks(partial(_engine, layout, settings), world_size=size, folder=tmp_path)
    for one in found:
        assert len(one) == 7
        for name, value in one.items():
            squares = torch.tensor(value, dtype=torch.float64)
            torch.testing.assert_close(squares, expected[name], rtol=1e-5, atol=1e-9)


def _training_goes_on(rank: int) -> list[Any]:
    model = sharded_net("fsdp")
    plain = small_transformer()
    batch = sentences(6)
    totals = {"head.weight": torch.zeros_like(model.head.weight)}
    square_batches(model, [(batch, True)], totals)
    found: list[Any] = [all(map(is_sharded, model.parameters()))]
    found.append(all(parameter.grad is None for parameter in model.parameters()))
    for one in (model, plain):
        one.requires_grad_(True)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(one, batch).backward()
            optimizer.step()
    for parameter, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter), reference)
    return found


@pytest.mark.distributed
def test_training_goes_on_after_the_squares(tmp_path) -> None:
    assert on_ranks(_training_goes_on, world_size=2, folder=tmp_path) == [[True, True]] * 2


def _leaves(rank: int) -> list[float]:
    """Return the largest error of whole gradients of the used parameters, one at a time."""
    model, plain = sharded_net("fsdp"), small_transformer()
    batch = sentences(1, seed=rank)
    expected = torch.autograd.grad(loss_of(plain, batch), list(plain.parameters()))
    errors = []
    for index, name in enumerate(dict(plain.named_parameters())):
        with UsedParameters(model) as used:
            for own, parameter in model.named_parameters():
                parameter.requires_grad_(own == name)
            loss = loss_of(model, batch)
            (gradient,) = torch.autograd.grad(loss, used.by_name[name])
        errors.append(float((gradient - expected[index]).abs().max()))
    return [max(errors)]


@pytest.mark.distributed
def test_one_used_parameter_can_be_differentiated_with_another_example_per_rank(tmp_path) -> None:
    for (error,) in on_ranks(_leaves, world_size=2, folder=tmp_path):
        assert error < 1e-6


def _mixed(rank: int) -> list[str]:
    model = sharded_net("fsdp", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with UsedParameters(model) as used, torch.no_grad():
        model(sentences(2)[0])
        return [str(used.by_name["head.weight"].dtype), str(model.head.weight.dtype)]


@pytest.mark.distributed
def test_used_parameters_have_the_type_of_the_forward(tmp_path) -> None:
    found = on_ranks(_mixed, world_size=2, folder=tmp_path)
    assert found == [["torch.bfloat16", "torch.bfloat16"]] * 2


def _loaded(layout: str, rank: int) -> bool:
    model = sharded_net(layout)
    state = {f"net.{name}": value + 1 for name, value in small_transformer().state_dict().items()}
    load_into(model, state, copy=copy_into)
    names = {name: f"net.{name}" for name in model.state_dict()}
    return all(torch.equal(whole(v), state[names[n]]) for n, v in model.state_dict().items())


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["fsdp", "tensor", pytest.param("both", marks=pytest.mark.slow)])
def test_a_checkpoint_is_loaded_into_parts(tmp_path, layout: str) -> None:
    size = processes_of(layout)
    assert on_ranks(partial(_loaded, layout), world_size=size, folder=tmp_path) == [True] * size


def _after_validation(rank: int) -> list[Any]:
    model = sharded_net("fsdp")
    with torch.no_grad():
        model(sentences(2)[0])
    held = [is_sharded(model.head.weight), is_sharded(model.blocks[0].up.weight)]
    names = sharded_parameters(model)
    reshard(model)
    return [held, len(names) == len(list(model.parameters())), is_sharded(model.head.weight)]


@pytest.mark.distributed
def test_the_outer_unit_is_sharded_again_after_a_forward_alone(tmp_path) -> None:
    found = on_ranks(_after_validation, world_size=2, folder=tmp_path)
    assert found == [[[False, True], True, True]] * 2


def _steps(sizes: tuple[int, int], rank: int) -> list[Any]:
    return list(in_step(range(sizes[rank]), spare=-1))


@pytest.mark.distributed
def test_ranks_keep_in_step_and_the_spare_does_not_count(tmp_path) -> None:
    both = on_ranks(partial(_steps, (3, 1)), world_size=2, folder=tmp_path)
    assert both == [
        [(0, True), (1, True), (2, True)],
        [(0, True), (-1, False), (-1, False)],
    ]
    assert on_ranks(partial(_steps, (0, 0)), world_size=2, folder=tmp_path) == [[], []]


def _failing(here: int) -> str:
    def batches() -> Any:
        yield 1
        if rank() == 1:
            raise OSError("the disk is gone")
        yield 2
        yield 3

    steps = in_step(batches(), spare=0)
    first = next(steps)
    with pytest.raises((InputError, OSError)) as caught:
        next(steps)
    return f"{first} {type(caught.value).__name__}: {caught.value}"


@pytest.mark.distributed
def test_an_error_of_one_ranks_data_ends_all(tmp_path) -> None:
    assert on_ranks(_failing, world_size=2, folder=tmp_path) == [
        "(1, True) InputError: rank 1: the disk is gone",
        "(1, True) OSError: the disk is gone",
    ]


def _given(spoil: bool, rank: int) -> Any:
    model = sharded_net("fsdp")
    taken: dict[str, Tensor] = {}

    def take(name: str, value: Tensor) -> None:
        if spoil:
            raise InputError(f"{name}: no room")
        taken[name] = value

    if spoil:
        with pytest.raises(InputError) as caught:
            give_whole(model.state_dict(), take)
        return str(caught.value)
    give_whole(model.state_dict(), take)
    expected = small_transformer().state_dict()
    return [list(taken), all(torch.equal(value, expected[name]) for name, value in taken.items())]


@pytest.mark.distributed
def test_the_first_rank_gets_whole_tensors(tmp_path) -> None:
    names = list(small_transformer().state_dict())
    found = on_ranks(partial(_given, False), world_size=2, folder=tmp_path)
    assert found == [[names, True], [[], True]]
    found = on_ranks(partial(_given, True), world_size=2, folder=tmp_path)
    assert found == ["words.weight: no room", "rank 0: words.weight: no room"]


def _zeros(rank: int) -> tuple[str, ...]:
    weight = sharded_net("fsdp").head.weight
    first = torch.zeros_like(weight)
    if rank == 1:
        local_part(first)[0, 0] = 1.0
    return zero_everywhere({"some": first, "none": torch.zeros_like(weight)})


@pytest.mark.distributed
def test_zero_is_zero_in_every_part(tmp_path) -> None:
    assert on_ranks(_zeros, world_size=2, folder=tmp_path) == [("none",)] * 2


def _overflow(rank: int) -> list[Any]:
    """Square the parts of two steps, of which the first is not finite on the second rank."""
    agree = partial(true_everywhere, device=torch.device("cpu"))
    estimator = SquaredBatchGradient(agree=agree)
    for value in (torch.inf if rank == 1 else 1.0, 2.0):
        estimator.update({"w": torch.full((2,), value)}, num_examples=3)
    return [estimator.skipped_steps, estimator.num_examples, estimator.sums()["w"].tolist()]


@pytest.mark.distributed
def test_a_step_that_overflows_on_one_rank_is_skipped_on_all(tmp_path) -> None:
    found = on_ranks(_overflow, world_size=2, folder=tmp_path)
    assert found == [[1, 3, [36.0, 36.0]]] * 2
