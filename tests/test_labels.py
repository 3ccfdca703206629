"""Sampled labels: drawn as the reference draws them, and right in expectation for every loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature import CurvatureWarning, PerExampleFisher, diagonal_hessian
from lit_merge.curvature.labels import SampledLabels, inverse_cdf
from lit_merge.errors import InputError
from tests.references import (
    class_by_inverse_cdf,
    softmax_fisher_by_enumeration,
    splitmix_uniform,
    squared_gradients_by_loop,
)
from tests.tiny_models import padded_texts, tiny_bert


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear(inputs: int = 4, outputs: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs).double()


def seen_target(func: Callable[..., Tensor], *args: Any, size: int = 2, **kwargs: Any) -> Tensor:
    """Return the target that a loss function sees when it samples for ``size`` examples."""
    drawn: dict[tuple[int, int], Tensor] = {}
    with SampledLabels(0, range(size), drawn) as sampling:
        func(*args, **kwargs)
    assert sampling.calls == 1
    return torch.stack([drawn[0, i] for i in range(size)])


class TestAgainstTheReference:
    def test_classes_are_the_inverse_cdf_of_the_examples_numbers(self) -> None:
        model, x = linear(), normal(6, 4)
        ignored = torch.zeros(6, dtype=torch.long)
        estimator = PerExampleFisher(
            model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), labels="sampled", seed=5
        )
        indices = [3, 1, 40, 2, 9, 11]
        estimator.update((x, ignored), indices=indices)
        drawn = torch.tensor(
            [
                class_by_inverse_cdf(logits.tolist(), splitmix_uniform(5, 0, index, 0))
                for index, logits in zip(indices, model(x), strict=True)
            ]
        )
        assert len(drawn.unique()) > 1
        expected = squared_gradients_by_loop(
            model, [(x, drawn)], lambda m, b: F.cross_entropy(m(b[0]), b[1])
        )
        torch.testing.assert_close(estimator.sums(), expected, rtol=1e-10, atol=0)

    def test_the_loss_inside_a_transformers_model_is_sampled(self) -> None:
        model, texts = tiny_bert().double(), padded_texts((5, 3))

        def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            loss: Tensor = model(**batch).loss
            return loss

        batch = {**texts, "labels": torch.zeros(2, dtype=torch.long)}
        sums = diagonal_hessian(model, [batch], own_loss, seed=2)
        logits = model(**texts).logits
        drawn = [
            class_by_inverse_cdf(row.tolist(), splitmix_uniform(2, 0, i, 0))
            for i, row in enumerate(logits)
        ]
        expected = squared_gradients_by_loop(
            model,
            [(texts, torch.tensor(drawn))],
            lambda m, b: F.cross_entropy(m(**b[0]).logits, b[1]),
        )
        for name, squares in expected.items():
            atol = 1e-8 * float(squares.max()) + 1e-28
            torch.testing.assert_close(sums[name], squares, rtol=1e-8, atol=atol, msg=name)

    def test_tokens_have_numbers_of_their_own(self) -> None:
        logits = normal(2, 5, 3)
        target = seen_target(F.cross_entropy, logits.flatten(0, 1), torch.zeros(10).long())
        for i in range(2):
            for t in range(5):
                u = splitmix_uniform(0, 0, i, t)
                assert target[i, t] == class_by_inverse_cdf(logits[i, t].tolist(), u)

    def test_classes_in_the_second_dimension(self) -> None:
        logits = normal(2, 3, 4, 5)
        target = seen_target(F.cross_entropy, logits, torch.zeros(2, 4, 5).long())
        u = splitmix_uniform(0, 0, 1, 13)
        assert target[1].view(4, 5)[2, 3] == class_by_inverse_cdf(logits[1, :, 2, 3].tolist(), u)

    def test_each_loss_in_a_forward_has_numbers_of_its_own(self) -> None:
        logits, target = torch.zeros(40, 3), torch.zeros(40).long()
        drawn: dict[tuple[int, int], Tensor] = {}
        with SampledLabels(0, range(40), drawn):
            F.cross_entropy(logits, target)
            F.cross_entropy(logits, target)
        first, second = ([int(drawn[call, i]) for i in range(40)] for call in range(2))
        assert first != second

    def test_labels_once_drawn_are_kept_whatever_the_logits(self) -> None:
        drawn: dict[tuple[int, int], Tensor] = {}
        with SampledLabels(0, [4, 7], drawn):
            F.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())
        kept = int(drawn[0, 7])
        sure = torch.full((1, 3), 50.0)
        sure[0, kept] = -50.0
        with SampledLabels(0, [7], drawn):
            assert F.cross_entropy(sure, torch.zeros(1).long()) > 90


class TestTargets:
    def test_ignored_positions_stay_ignored(self) -> None:
        logits = normal(2, 3, 4)
        target = torch.tensor([[0, -100, 1, 2], [-100, -100, -100, 0]])
        with SampledLabels(0, [0, 1], {}):
            sampled = F.cross_entropy(logits, target, reduction="none")
        assert torch.equal(sampled == 0, target == -100)

    def test_another_ignore_index_of_nll_loss(self) -> None:
        with SampledLabels(0, [0, 1], {}):
            losses = F.nll_loss(
                normal(2, 3).log_softmax(1),
                torch.tensor([7, 0]),
                ignore_index=7,
                reduction="none",
            )
        assert losses[0] == 0
        assert losses[1] > 0

    def test_class_weights_and_smoothing_are_left_out(self) -> None:
        logits, target = normal(2, 3), torch.zeros(2).long()
        with SampledLabels(0, [0, 1], {}):
            plain = F.cross_entropy(logits, target)
        with SampledLabels(0, [0, 1], {}):
            module = nn.CrossEntropyLoss(
                torch.tensor([9.0, 1.0, 4.0]).double(), label_smoothing=0.3
            )
            assert torch.equal(module(logits, target), plain)

    def test_soft_and_missing_targets_are_replaced_by_classes(self) -> None:
        logits = normal(2, 3)
        with SampledLabels(0, [0, 1], {}):
            plain = F.cross_entropy(logits, torch.zeros(2).long())
        for target in (torch.full((2, 3), 1 / 3).double(), None):
            with SampledLabels(0, [0, 1], {}):
                assert torch.equal(F.cross_entropy(logits, target), plain)  # type: ignore[arg-type]

    def test_a_single_unbatched_example(self) -> None:
        with SampledLabels(0, [0], {}):
            loss = F.cross_entropy(torch.zeros(3), torch.tensor(1))
        assert loss.item() == pytest.approx(torch.tensor(3.0).log().item())

    @pytest.mark.parametrize("shape", [(2,), (2, 3)])
    def test_binary_targets_are_zero_or_one_in_the_predictions_type(
        self, shape: tuple[int, ...]
    ) -> None:
        logits = normal(*shape).float()
        for func, prediction in (
            (F.binary_cross_entropy_with_logits, logits),
            (F.binary_cross_entropy, logits.sigmoid()),
        ):
            target = seen_target(func, prediction, torch.zeros(shape)).view(shape)
            for place in torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(
                -1, len(shape)
            ):
                position = int(place[1]) if len(shape) == 2 else 0
                u = splitmix_uniform(0, 0, int(place[0]), position)
                assert target[tuple(place)] == (u < logits[tuple(place)].sigmoid())

    def test_the_elementwise_weight_of_a_binary_loss_stays(self) -> None:
        mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        with SampledLabels(0, [0, 1], {}):
            losses = F.binary_cross_entropy_with_logits(
                torch.zeros(2, 2), torch.zeros(2, 2), weight=mask, reduction="none"
            )
        assert torch.equal(losses > 0, mask > 0)

    def test_a_squared_loss_with_its_arguments_swapped(self) -> None:
        x = normal(4, 3)
        y = torch.zeros(4, 2, dtype=torch.float64)
        right = diagonal_hessian(linear(3, 2), [(x, y)], lambda m, b: F.mse_loss(m(b[0]), b[1]))
        swapped = diagonal_hessian(linear(3, 2), [(x, y)], lambda m, b: F.mse_loss(b[1], m(b[0])))
        assert right["weight"].sum() > 0
        torch.testing.assert_close(swapped, right)


class TestExpectations:
    """The mean over many draws for the same inputs is the exact Fisher information."""

    draws = 20_000

    def mean(self, model: nn.Module, x: Tensor, target: Tensor, loss: Any) -> dict[str, Tensor]:
        """Repeat the examples with other indices, and divide."""
        repeated = [v.repeat(self.draws, *(1,) * (v.dim() - 1)) for v in (x, target)]
        estimator = PerExampleFisher(model, lambda m, b: loss(m(b[0]), b[1]))
        estimator.probe((x[:2], target[:2]))
        estimator.update(tuple(repeated))
        return {name: squares / self.draws for name, squares in estimator.sums().items()}

    def test_cross_entropy_gives_the_softmax_fisher(self) -> None:
        model, x = linear(), normal(2, 4)
        got = self.mean(model, x, torch.zeros(2).long(), F.cross_entropy)
        for name, expected in softmax_fisher_by_enumeration(model, x, 3).items():
            torch.testing.assert_close(got[name], expected, rtol=0.04, atol=1e-4)

    @pytest.mark.parametrize("func", [F.binary_cross_entropy_with_logits, F.binary_cross_entropy])
    def test_binary_cross_entropy_gives_the_bernoulli_fisher(self, func: Any) -> None:
        model, x = linear(4, 1), normal(2, 4)
        p = model(x).sigmoid().detach()
        with_logits = func is F.binary_cross_entropy_with_logits
        loss = func if with_logits else (lambda z, y: func(z.sigmoid(), y))
        got = self.mean(model, x, torch.zeros(2, 1).double(), loss)
        expected = ((p * (1 - p)) * x**2).sum(0, keepdim=True)
        torch.testing.assert_close(got["weight"], expected, rtol=0.04, atol=1e-4)

    @pytest.mark.parametrize("outputs", [1, 5])
    def test_mean_squared_error_gives_its_own_hessian(self, outputs: int) -> None:
        model, x = linear(4, outputs), normal(2, 4)
        got = self.mean(model, x, torch.zeros(2, outputs).double(), F.mse_loss)
        hessian = (2 / outputs) * (x**2).sum(0).expand(outputs, -1)  # of mean_d (w_d·x − y_d)²
        torch.testing.assert_close(got["weight"], hessian, rtol=0.04, atol=1e-4)

    def test_a_sum_of_squares_gives_its_own_hessian(self) -> None:
        def sum_of_squares(y: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(y, target, reduction="none").sum(1).mean()

        model, x = linear(4, 3), normal(2, 4)
        got = self.mean(model, x, torch.zeros(2, 3).double(), sum_of_squares)
        hessian = 2 * (x**2).sum(0).expand(3, -1)
        torch.testing.assert_close(got["weight"], hessian, rtol=0.04, atol=1e-4)

    def test_observed_labels_give_another_number(self) -> None:
        model, x = linear(), normal(2, 4)
        observed = diagonal_hessian(
            model,
            [(x, torch.zeros(2).long())],
            lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            labels="observed",
        )
        exact = softmax_fisher_by_enumeration(model, x, 3)
        assert not torch.allclose(observed["weight"], exact["weight"], rtol=0.2)


class TestSeveralSamples:
    def sums(self, samples: int, *, seed: int = 3) -> dict[str, Tensor]:
        batch = (normal(6, 4), torch.zeros(6).long())
        return diagonal_hessian(
            linear(),
            [batch],
            lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            samples=samples,
            seed=seed,
        )

    def test_the_sums_are_the_mean_over_the_draws(self) -> None:
        model, x = linear(), normal(6, 4)
        draws = []
        for draw in range(3):
            labels = [
                class_by_inverse_cdf(row, splitmix_uniform(3, draw << 32, i, 0))
                for i, row in enumerate(model(x).tolist())
            ]
            draws.append(
                squared_gradients_by_loop(
                    model,
                    [(x, torch.tensor(labels))],
                    lambda m, b: F.cross_entropy(m(b[0]), b[1]),
                )
            )
        for name, got in self.sums(3).items():
            mean = sum(squares[name] for squares in draws) / 3
            torch.testing.assert_close(got, mean, rtol=1e-10, atol=0)

    def test_what_is_computed_one_by_one_gets_the_same_draws(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = linear()

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x, 1 * self.layer.weight, self.layer.bias)

        batch = (normal(6, 4), torch.zeros(6).long())
        estimator = PerExampleFisher(
            Scaled(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), samples=3, seed=3
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CurvatureWarning)
            estimator.update(batch)
        for name, got in self.sums(3).items():
            torch.testing.assert_close(estimator.sums()[f"layer.{name}"], got)

    def test_many_tend_to_the_expectation(self) -> None:
        exact = softmax_fisher_by_enumeration(linear(), normal(6, 4), 3)
        errors = [
            sum(
                float((self.sums(k, seed=s)[n] - exact[n]).abs().sum())
                for n in exact
                for s in (0, 1)
            )
            for k in (1, 150)
        ]
        assert errors[1] < errors[0] / 5  # 1/12 in expectation

    @pytest.mark.parametrize(("samples", "labels"), [(0, "sampled"), (2, "observed")])
    def test_a_number_that_makes_no_sense_is_refused(self, samples: int, labels: Any) -> None:
        with pytest.raises(InputError, match=f"samples: must be at least 1.*got {samples} with"):
            PerExampleFisher(linear(), F.cross_entropy, samples=samples, labels=labels)


class TestInverseCdf:
    def test_impossible_classes_are_never_drawn(self) -> None:
        logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
        u = torch.tensor([1e-300, 0.49, 0.51, 1 - 2**-53], dtype=torch.float64)
        assert inverse_cdf(logits.expand(4, -1), u).tolist() == [1, 1, 3, 3]

    def test_many_classes_in_single_precision_stay_in_range(self) -> None:
        u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
        classes = inverse_cdf(torch.zeros(3, 100_003), u)
        assert classes[0] == 0
        assert abs(int(classes[1]) - 50_001) < 20
        assert 100_000 < classes[2] <= 100_002


def test_rows_that_are_not_whole_examples_are_refused() -> None:
    with (
        SampledLabels(0, range(4), {}),
        pytest.raises(InputError, match="got 7 rows for 4 examples"),
    ):
        F.cross_entropy(torch.zeros(7, 3), torch.zeros(7).long())


def test_other_functions_are_left_alone() -> None:
    x = normal(2, 3)
    with SampledLabels(0, [0, 1], {}) as sampling:
        assert torch.equal(F.l1_loss(x, x + 1), torch.ones((), dtype=torch.float64))
        assert torch.equal(torch.relu(x), x.clamp(min=0))
    assert sampling.calls == 0
