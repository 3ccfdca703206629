from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lit_merge.curvature import PerExampleFisher
from lit_merge.curvature.sharded import ShardedFisher
from lit_merge.errors import InputError
from lit_merge.sharding import local_part, own_entries, sharded_as, whole
from tests.processes import on_ranks
from tests.references import squared_gradients_by_loop
from tests.sharded_curvature_nets import (
    hybrid_sharded,
    measured,
    net,
    sequence_parallel,
    sharded_copy,
)
from tests.sharded_nets import LAYOUTS, loss_of, processes_of, sentences

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks"),
    pytest.mark.filterwarnings("ignore:.*returned a view tensor"),
    pytest.mark.filterwarnings("ignore::lit_merge.curvature.CurvatureWarning"),
]

CUTS = ((0, 4), (4, 7), (7, 10))
"""The batches: the first data rank has one more than the second."""


def _measured(name: str, layout: str, options: dict[str, Any], rank: int) -> dict[str, Any]:
    sharding = options.get("sharding", {})
    cuts = options.get("cuts", CUTS)
    settings = {k: v for k, v in options.items() if k not in ("sharding", "cuts")}
    return measured(sharded_copy(name, layout, **sharding), layout, rank, cuts, **settings)


def run(tmp_path: Any, name: str, layout: str, **options: Any) -> list[dict[str, Any]]:
    size = processes_of(layout)
    found = on_ranks(partial(_measured, name, layout, options), world_size=size, folder=tmp_path)
    assert not any(isinstance(one, str) for one in found), found
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare to a share of each tensor's largest entry."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        error = (torch.tensor(found[name], dtype=torch.float64) - value).abs().max()
        assert error <= tolerance * value.abs().max(), name


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "layout", "sharding"),
    [
        ("transformer", "fsdp", {}),
        ("transformer", "fsdp", {"reshard_after_forward": False}),
        ("transformer", "tensor", {}),
        pytest.param("transformer", "both", {}, marks=slow),
        ("bare", "tensor", {}),
        pytest.param("bare", "both", {}, marks=slow),
        ("tied", "fsdp", {}),
        pytest.param("tied", "fsdp", {"reshard_after_forward": False}, marks=slow),
        ("recomputing", "fsdp", {}),
    ],
)
def test_a_sharded_pass_finds_what_a_loop_finds_in_one_process(
    tmp_path, name: str, layout: str, sharding: dict[str, Any]
) -> None:
    expected = squared_gradients_by_loop(net(name), [sentences(10)], loss_of)
    ranks = run(tmp_path, name, layout, labels="observed", sharding=sharding)
    for found in ranks:
        assert_same(found["sums"], expected, 1e-9)
        assert not found["wrong"]
        assert not found["one_by_one"]
    seen = [found["examples"] for found in ranks]
    data, tensor = LAYOUTS[layout]
    assert seen == [n for n in ([10] if data == 1 else [7, 3]) for _ in range(tensor)]


@pytest.mark.parametrize("layout", ["fsdp", "tensor", pytest.param("both", marks=slow)])
def test_what_has_no_fast_form_is_computed_one_example_at_a_time(tmp_path, layout: str) -> None:
    expected = squared_gradients_by_loop(net("recurrent"), [sentences(10)], loss_of)
    for found in run(tmp_path, "recurrent", layout, labels="observed"):
        assert len(found["one_by_one"]) == 4
        assert all(name.startswith("blocks.1.") for name in found["one_by_one"])
        assert_same(found["sums"], expected, 1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"labels": "sampled", "samples": 2, "seed": 3},
        {"labels": "expected"},
        {"labels": "observed", "parameters": ["head.*", "blocks.0.*"]},
    ],
)
def test_labels_and_choices_are_those_of_one_process(tmp_path, settings: dict[str, Any]) -> None:
    alone = PerExampleFisher(net("bare"), loss_of, **settings)
    for start, stop in ((0, 6), (6, 10)):
        words, labels = sentences(10)
        batch = (words[start:stop], labels[start:stop])
        alone.update(batch, indices=range(start, stop))
    for found in run(tmp_path, "bare", "fsdp", **settings):
        assert_same(found["sums"], alone.sums(), 1e-9)


def test_a_rank_may_have_no_examples_at_all(tmp_path) -> None:
    expected = squared_gradients_by_loop(net("transformer"), [sentences(4)], loss_of)
    ranks = run(tmp_path, "transformer", "fsdp", labels="observed", cuts=((0, 4),))
    assert [found["examples"] for found in ranks] == [4, 0]
    for found in ranks:
        assert_same(found["sums"], expected, 1e-9)


def _sequence(rank: int) -> dict[str, Any]:
    return measured(sequence_parallel(), "tensor", rank, CUTS, labels="observed")


def test_parts_of_a_sequence_are_put_together(tmp_path) -> None:
    expected = squared_gradients_by_loop(net("sequence"), [sentences(10)], loss_of)
    for found in on_ranks(_sequence, world_size=2, folder=tmp_path):
        assert not found["one_by_one"]
        assert_same(found["sums"], expected, 1e-9)


def _hybrid(rank: int) -> dict[str, Any]:
    return measured(hybrid_sharded("bare"), "four", rank, CUTS, labels="observed")


@pytest.mark.slow
def test_shards_that_several_ranks_have_are_summed_over_all(tmp_path) -> None:
    expected = squared_gradients_by_loop(net("bare"), [sentences(10)], loss_of)
    ranks = on_ranks(_hybrid, world_size=4, folder=tmp_path)
    assert [found["examples"] for found in ranks] == [4, 3, 3, 0]
    for found in ranks:
        assert_same(found["sums"], expected, 1e-9)


def _half(rank: int) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded_copy("tied", "fsdp", dtype=torch.float32, mp_policy=policy)
    return measured(model, "fsdp", rank, CUTS, labels="observed")


def test_half_precision_in_the_forward_is_summed_in_single(tmp_path) -> None:
    expected = squared_gradients_by_loop(net("tied", torch.float32), [sentences(10)], loss_of)
    for found in on_ranks(_half, world_size=2, folder=tmp_path):
        assert_same(found["sums"], expected, 0.1)
        assert not found["wrong"]


def _single(rank: int) -> dict[str, Any]:
    model = sharded_copy("transformer", "fsdp", dtype=torch.float32)
    return measured(model, "fsdp", rank, CUTS, labels="observed")


def test_single_precision_is_as_good_as_in_one_process(tmp_path) -> None:
    expected = squared_gradients_by_loop(
        net("transformer", torch.float32), [sentences(10)], loss_of
    )
    for found in on_ranks(_single, world_size=2, folder=tmp_path):
        assert_same(found["sums"], expected, 1e-6)


def _goes_on(rank: int) -> list[Any]:
    """Train after a pass, and without one; return what differs."""
    measured_one, plain = sharded_copy("tied", "fsdp"), sharded_copy("tied", "fsdp")
    measured(measured_one, "fsdp", rank, CUTS)
    words, labels = sentences(8)
    batch = (words[rank::2], labels[rank::2])
    for model in (measured_one, plain):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    pairs = zip(measured_one.named_parameters(), plain.parameters(), strict=True)
    return [name for (name, one), other in pairs if not torch.equal(whole(one), whole(other))]


def test_training_after_a_pass_is_what_it_would_have_been(tmp_path) -> None:
    assert on_ranks(_goes_on, world_size=2, folder=tmp_path) == [[], []]


class Trigger(nn.Module):
    """Fails on the example with a certain label, in the middle of the forward."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner = inner
        self.how = how
        self.bad = False

    def forward(self, x: Tensor) -> Tensor:
        if self.bad and self.how == "error":
            raise ValueError("no such word")
        y = self.inner(x)
        return y * torch.nan if self.bad and self.how == "nan" else y


def _failing(how: str, layout: str, rank: int) -> str:
    model = sharded_copy("transformer", layout)
    trigger = Trigger(model.blocks[0], how)
    model.blocks[0] = trigger
    data = rank // LAYOUTS[layout][1]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        trigger.bad = data == 1 and len(batch[1]) == 3
        if trigger.bad and how == "batch":
            return loss_of(model, (batch[0], batch[1][:2]))
        return loss_of(model, batch)

    with pytest.raises((InputError, ValueError)) as caught:
        measured(model, layout, rank, CUTS, labels="observed", loss=loss)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("error", "no such word"),
        ("nan", "loss: must be finite; got nan on the examples 4, 5, 6"),
        ("batch", "Expected input batch_size (3) to match target batch_size (2)"),
    ],
)
@pytest.mark.parametrize("layout", ["fsdp", pytest.param("both", marks=slow)])
def test_what_fails_on_one_rank_is_raised_on_all(
    tmp_path, how: str, message: str, layout: str
) -> None:
    size = processes_of(layout)
    for found in on_ranks(partial(_failing, how, layout), world_size=size, folder=tmp_path):
        assert message in found
    assert "rank" not in found  # the last one has raised it itself


class Routed(nn.Module):
    """Gives a layer the words that a mask chooses: as many of every example, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 5)
        self.uneven = False

    def forward(self, words: Tensor) -> Tensor:
        x = self.first(words)
        chosen = words % 2 == 0 if self.uneven else torch.ones_like(words).bool()
        places = chosen.nonzero()[:, 0]
        return x.new_zeros(len(x), 5).index_add(0, places, self.layer(x[chosen]).tanh())


def _routed(rank: int) -> str:
    torch.manual_seed(0)
    model = Routed()
    fully_shard(model.layer)
    fully_shard(model)
    estimator = ShardedFisher(model, loss_of, labels="observed")
    estimator.probe(sentences(2))
    model.uneven = True
    try:
        estimator.update(sentences(4))
    except InputError as error:
        return str(error)
    return str(sorted(estimator._coverage.one_by_one))


def test_rows_that_the_data_chose_are_not_taken_for_those_of_the_examples(tmp_path) -> None:
    for found in on_ranks(_routed, world_size=2, folder=tmp_path):
        assert "layer.weight" in found


def _differing(rank: int) -> str:
    model = sharded_copy("transformer", "fsdp")
    estimator = ShardedFisher(model, loss_of, labels="observed", parameters=["head.*", "scale.*"])
    estimator.probe(sentences(2))
    if rank == 1:
        model.head.forward = lambda x: x[:, :5]
    with pytest.raises(InputError) as caught:
        estimator.update(sentences(3))
    return str(caught.value)


def test_another_forward_on_another_rank_is_an_error(tmp_path) -> None:
    for found in on_ranks(_differing, world_size=2, folder=tmp_path):
        assert "must use the same parameters in the same order on every rank" in found


def _unprobed(rank: int) -> str:
    estimator = ShardedFisher(sharded_copy("transformer", "fsdp"), loss_of)
    with pytest.raises(InputError) as caught:
        estimator.update(sentences(3))
    return str(caught.value)


def test_a_pass_without_a_probe_is_refused(tmp_path) -> None:
    for found in on_ranks(_unprobed, world_size=2, folder=tmp_path):
        assert found.startswith("update: must come after a probe where parameters are sharded")


def _refused(rank: int) -> str:
    with pytest.raises(InputError) as caught:
        PerExampleFisher(sharded_copy("transformer", "fsdp"), loss_of)
    return str(caught.value)


def test_the_estimator_of_one_process_refuses_shards(tmp_path) -> None:
    for found in on_ranks(_refused, world_size=2, folder=tmp_path):
        assert "must be a whole tensor for the exact pass" in found
        assert "Use ShardedFisher" in found


def _entries(layout: str, rank: int) -> list[str]:
    """Return the parameters of which the entries are not where they should be."""
    model = sharded_copy("transformer", layout)
    estimator = ShardedFisher(model, loss_of)
    estimator.sums()
    plain = dict(net("transformer").named_parameters())
    wrong = []
    for name, parameter in model.named_parameters():
        estimator._totals[name] = sharded_as(local_part(parameter.detach()), parameter)
        positions = {name: torch.arange(0, plain[name].numel(), 2)}
        expected = plain[name].detach().flatten()[::2]
        held = estimator.holders(positions).bool()
        found = estimator.entries(positions)
        if not torch.equal(found[held], expected[held]) or found[~held].any():
            wrong.append(name)
        box = [len(entries) for entries in own_entries(parameter)]
        if box != list(local_part(parameter).shape):
            wrong.append(f"{name} {box}")
    return wrong


@pytest.mark.parametrize("layout", ["fsdp", "tensor", pytest.param("both", marks=slow)])
def test_entries_are_found_in_the_parts(tmp_path, layout: str) -> None:
    size = processes_of(layout)
    assert on_ranks(partial(_entries, layout), world_size=size, folder=tmp_path) == [[]] * size


def _memory(rank: int) -> list[int]:
    """Return the largest numbers of whole elements that the sums and their buffers had at once."""
    from lit_merge.curvature.sharded_capture import ShardedCapture

    model = sharded_copy("transformer", "fsdp")
    most = 0
    settle = ShardedCapture._settle

    def watching(self: ShardedCapture, name: str) -> None:
        nonlocal most
        most = max(most, len(self._rooms))
        settle(self, name)

    ShardedCapture._settle = watching  # type: ignore[method-assign]
    measured(model, "fsdp", rank, CUTS, labels="observed")
    return [most]


def test_one_buffer_is_held_at_a_time(tmp_path) -> None:
    assert on_ranks(_memory, world_size=2, folder=tmp_path) == [[1], [1]]
