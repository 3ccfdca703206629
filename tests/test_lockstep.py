"""Forwards in step: against one big batch, and what happens when one of them fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction.lockstep import Arrival, Place, Strand, run_in_step
from lit_merge.errors import InputError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def strand(model: nn.Module, inputs: Tensor, found: list[Tensor], *places: Place) -> Strand:
    return Strand(model, lambda: found.append(model(inputs)), places)


def test_all_batches_are_at_a_layer_before_any_goes_on() -> None:
    model, batches = net(), torch.randn(7, 3).double().split([3, 3, 1])
    places = (Place("first", "0"), Place("second", "2", before=True))
    seen: list[tuple[str, list[int]]] = []
    outputs: list[Tensor] = []

    def action(key: str, arrivals: dict[int, Arrival]) -> None:
        seen.append((key, list(arrivals)))
        if key == "first":  # centre over all batches
            mean = torch.cat([a.output for a in arrivals.values()]).mean(0)
            for arrival in arrivals.values():
                arrival.output = arrival.output - mean

    run_in_step([strand(model, batch, outputs, *places) for batch in batches], action)
    hidden = model[0](torch.cat(batches))
    expected = model[2](torch.tanh(hidden - hidden.mean(0)))
    assert seen == [("first", [0, 1, 2]), ("second", [0, 1, 2])]
    torch.testing.assert_close(torch.cat(outputs), expected)


def test_a_layer_that_the_action_sets_runs_with_its_new_weights() -> None:
    model, inputs, outputs = net(), torch.randn(2, 3).double(), []
    before = [Place("first", "0", before=True)]

    def action(key: str, arrivals: dict[int, Arrival]) -> None:
        model[0].weight.zero_()

    run_in_step([strand(model, inputs, outputs, *before)], action)
    torch.testing.assert_close(outputs[0], model[2](torch.tanh(model[0].bias)).expand(2, 2))


def test_inputs_can_be_replaced_before_a_layer() -> None:
    model, outputs = net(), []

    def action(key: str, arrivals: dict[int, Arrival]) -> None:
        arrivals[0].inputs = (torch.ones(5, 3).double(),)

    place = Place("first", "0", before=True)
    run_in_step([strand(model, torch.zeros(1, 3).double(), outputs, place)], action)
    torch.testing.assert_close(outputs[0], model(torch.ones(5, 3).double()))


def test_two_models_meet_under_one_key_and_a_third_only_later() -> None:
    one, two, inputs = net(), net(), torch.randn(2, 3).double()
    met: list[tuple[str, list[int]]] = []
    outputs: list[Tensor] = []
    run_in_step(
        [
            strand(one, inputs, outputs, Place("a", "0", before=True), Place("b", "2")),
            strand(two, inputs, outputs, Place("a", "0"), Place("b", "2")),
            strand(net(), inputs, outputs, Place("b", "2")),
        ],
        lambda key, arrivals: met.append((key, list(arrivals))),
    )
    assert met == [("a", [0, 1]), ("b", [0, 1, 2])]


def test_two_places_at_one_module_are_met_in_their_order() -> None:
    met: list[str] = []
    model = net()
    places = (Place("first", "0"), Place("second", "0"))
    run_in_step(
        [strand(model, torch.randn(2, 3).double(), [], *places)],
        lambda key, arrivals: met.append(key),
    )
    assert met == ["first", "second"]


def test_stops_come_before_the_hooks_of_others() -> None:
    model, outputs = net(), []
    model[0].register_forward_hook(lambda module, args, output: output * 0)

    def action(key: str, arrivals: dict[int, Arrival]) -> None:
        assert arrivals[0].output.abs().sum() > 0

    run_in_step([strand(model, torch.randn(2, 3).double(), outputs, Place("a", "0"))], action)
    torch.testing.assert_close(outputs[0], model[2](torch.zeros(2, 4).double()))


def test_each_stretch_runs_inside_its_own_surroundings() -> None:
    model, inside, seen = net(), [], []

    @contextmanager
    def around(number: int) -> Iterator[None]:
        inside.append(number)
        yield
        inside.pop()

    model[2].register_forward_hook(lambda *_: seen.append(list(inside)))
    strands = [
        Strand(
            model,
            lambda: model(torch.randn(1, 3).double()),
            (Place("a", "0"),),
            around=lambda number=number: around(number),
        )
        for number in range(2)
    ]
    run_in_step(strands, lambda key, arrivals: seen.append(list(inside)))
    assert seen == [[], [0], [1]]


def test_no_gradients_are_recorded() -> None:
    outputs: list[Tensor] = []
    run_in_step([strand(net(), torch.randn(1, 3).double(), outputs)], lambda *_: None)
    assert not outputs[0].requires_grad


@pytest.mark.parametrize("where", ["action", "forward"])
def test_an_error_ends_all_threads_and_takes_the_stops_away(where: str) -> None:
    model = net()
    alive = threading.active_count()

    def action(key: str, arrivals: dict[int, Arrival]) -> None:
        if where == "action":
            raise ValueError("broken")

    def broken() -> None:
        model(torch.randn(1, 3).double())
        raise ValueError("broken")

    strands = [
        strand(model, torch.randn(1, 3).double(), [], Place("a", "0"), Place("b", "2")),
        Strand(model, broken, (Place("a", "0"), Place("b", "2"))),
    ]
    with pytest.raises(ValueError, match="broken"):
        run_in_step(strands, action)
    assert threading.active_count() == alive
    assert not any(module._forward_hooks for module in model.modules())


def test_forwards_that_do_not_meet_are_refused() -> None:
    one, two = net(), net()
    strands = [
        strand(one, torch.randn(1, 3).double(), [], Place("a", "0")),
        strand(two, torch.randn(1, 3).double(), [], Place("a", "0"), Place("other", "2")),
    ]
    with pytest.raises(InputError, match=r"forward 1 waiting at 'other'"):
        run_in_step(strands, lambda *_: None)


def test_a_missing_module_is_named() -> None:
    with pytest.raises(InputError, match="'9'"):
        run_in_step([strand(net(), torch.randn(1, 3), [], Place("a", "9"))], lambda *_: None)


def test_a_stop_can_come_behind_the_hooks_of_others() -> None:
    model, seen = net(), []
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    places = (Place("late", "2", before=True, last=True), Place("early", "2", before=True))

    def action(key: str, arrivals: dict[int, Arrival]) -> None:
        seen.append((key, bool(arrivals[0].inputs[0].any())))

    run_in_step([strand(model, torch.randn(2, 3).double(), [], *places)], action)
    assert seen == [("early", True), ("late", False)]
