from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import Average, ParameterSlice, RegMean, WeightedAverage

TASKS = ("a", "b")
GENERATOR = torch.Generator().manual_seed(1)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


INPUTS = [normal(20, 6), normal(9, 6)]
WEIGHTS = [normal(4, 6), normal(4, 6)]


def layer(inputs: list[Tensor] = INPUTS, shape: tuple[int, ...] = (4, 6)) -> ParameterSlice:
    return ParameterSlice(
        "fc.weight",
        TASKS,
        tuple(weight.reshape(shape) for weight in WEIGHTS),
        grams=tuple(x.T @ x for x in inputs),
    )


def least_squares(inputs: list[Tensor], weights: tuple[float, ...] = (1.0, 1.0)) -> Tensor:
    """Fit the experts' outputs on their own inputs, all rows stacked."""
    rows = [math.sqrt(c) * x for c, x in zip(weights, inputs, strict=True)]
    outputs = [x @ w.T for x, w in zip(rows, WEIGHTS, strict=True)]
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(outputs)).solution.T


def test_the_merge_is_the_least_squares_fit_of_the_experts_outputs() -> None:
    merged = RegMean(off_diagonal=1.0, ridge=0.0)(layer())
    torch.testing.assert_close(merged, least_squares(INPUTS), rtol=1e-11, atol=1e-11)


def test_weights_weigh_the_experts_errors() -> None:
    merged = RegMean(1.0, ridge=0.0, weights={"b": 3.0, "a": 0.5})(layer())
    torch.testing.assert_close(merged, least_squares(INPUTS, (0.5, 3.0)), rtol=1e-11, atol=1e-11)


def test_a_convolution_is_merged_as_the_matrix_of_its_patches() -> None:
    merged = RegMean(1.0, ridge=0.0)(layer(shape=(4, 2, 3, 1)))
    expected = least_squares(INPUTS).reshape(4, 2, 3, 1)
    torch.testing.assert_close(merged, expected, rtol=1e-11, atol=1e-11)


def test_off_diagonal_entries_are_scaled() -> None:
    p = layer()
    assert p.grams is not None
    grams = p.grams[0].clone(), p.grams[1].clone()
    for gram in grams:
        for i in range(6):
            for j in range(6):
                if i != j:
                    gram[i, j] *= 0.3
    right = WEIGHTS[0] @ grams[0] + WEIGHTS[1] @ grams[1]
    expected = right @ torch.linalg.inv(grams[0] + grams[1])
    torch.testing.assert_close(RegMean(0.3, ridge=0.0)(p), expected, rtol=1e-11, atol=1e-11)


def test_without_off_diagonal_entries_inputs_are_weighed_one_by_one() -> None:
    sizes = [x.square().sum(0) for x in INPUTS]
    expected = (WEIGHTS[0] * sizes[0] + WEIGHTS[1] * sizes[1]) / (sizes[0] + sizes[1])
    torch.testing.assert_close(RegMean(0.0, ridge=0.0)(layer()), expected)


def test_equal_grams_give_the_average() -> None:
    p = layer([INPUTS[0]] * 2)
    torch.testing.assert_close(RegMean()(p), Average()(p), rtol=1e-12, atol=1e-12)


def test_tensors_without_a_gram_are_averaged_by_weight() -> None:
    p = dataclasses.replace(layer(), grams=None)
    weights = [1.0, 4.0]
    assert torch.equal(RegMean(weights=weights)(p), WeightedAverage(weights)(p))


def test_the_ridge_ties_what_inputs_do_not_tell_to_the_mean() -> None:
    few = [x.clone()[:2] for x in INPUTS]
    for x in few:
        x[:, 5] = 0  # an input that is never there
    p = layer(few)
    with pytest.raises(InputError, match=r"^RegMean\.ridge: .*'fc\.weight'.*input \d of 6.*Raise"):
        RegMean(off_diagonal=1.0, ridge=0.0)(p)
    merged = RegMean(off_diagonal=1.0, ridge=1e-8)(p)
    mean = (WEIGHTS[0] + WEIGHTS[1]) / 2
    torch.testing.assert_close(merged[:, 5], mean[:, 5], rtol=0, atol=1e-7)
    for x, weight in zip(few, WEIGHTS, strict=True):  # 4 rows in 5 dimensions: all are fitted
        torch.testing.assert_close(x @ merged.T, x @ weight.T, rtol=0, atol=1e-5)
    torch.testing.assert_close(RegMean(ridge=1e9)(p), mean, rtol=0, atol=1e-7)


def test_float32_grams_of_few_examples_can_be_solved_with_the_default_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    size, shift = 256, 3.0  # inputs with a common direction a thousand times the others
    grams, weights = [], []
    for _ in TASKS:
        x = shift + torch.randn(100, size, generator=generator)
        grams.append(sum(((row[None].T @ row[None]) for row in x), torch.zeros(size, size)))
        weights.append(torch.randn(8, size, generator=generator))
    p = ParameterSlice("fc.weight", TASKS, tuple(weights), grams=tuple(grams))
    for off_diagonal in (0.9, 1.0):
        merged = RegMean(off_diagonal)(p)
        assert float(merged.abs().max()) < 10 * float(weights[0].abs().max())


def test_a_gram_of_another_layer_is_refused() -> None:
    p = dataclasses.replace(layer(), grams=(torch.eye(6), torch.eye(5)))
    message = r"^Gram matrix of 'fc\.weight': must be \[6, 6\] .* \[4, 6\]; got \[5, 5\]"
    with pytest.raises(InputError, match=message):
        RegMean()(p)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"off_diagonal": 1.1}, r"^RegMean\.off_diagonal: .*between 0 and 1; got 1\.1"),
        ({"ridge": -1.0}, r"^RegMean\.ridge: .*at least 0"),
        ({"weights": [-1.0, 2.0]}, r"^RegMean\.weights\[0\]: .*at least 0"),
        ({"weights": [0.0, 0.0]}, r"^RegMean\.weights: must not sum to zero"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RegMean(**settings)  # type: ignore[arg-type]


def test_weights_must_fit_the_tasks() -> None:
    with pytest.raises(InputError, match=r"^RegMean\.weights: .*got none for 'b'"):
        RegMean(weights={"a": 1.0}).check_tasks(TASKS)
