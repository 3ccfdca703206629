"""Expected labels give the diagonal of the generalised Gauss-Newton matrix, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature import CurvatureWarning, PerExampleFisher, diagonal_hessian
from lit_merge.errors import InputError
from tests.references import gauss_newton_diagonal, softmax_fisher_by_enumeration
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net

Loss = Callable[[Tensor, Tensor], Tensor]


def mlp(outputs: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def expected(
    model: nn.Module, x: Tensor, y: Tensor | None, loss: Loss, **settings: Any
) -> dict[str, Tensor]:
    """Give the examples in two batches of different size."""
    estimator = PerExampleFisher(
        model, lambda m, b: loss(m(b[0]), b[1]), labels="expected", **settings
    )
    for part in (slice(0, 3), slice(3, len(x))):
        estimator.update((x[part], None if y is None else y[part]))
    return estimator.sums()


def summed_squares(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y, target, reduction="none").sum(1).mean()


def all_squares(y: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(y, target, reduction="sum")


def summed_binary(z: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, target, reduction="sum") / len(z)


def of_probabilities(z: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy(z.sigmoid(), target)


def of_log_probabilities(z: Tensor, target: Tensor) -> Tensor:
    return F.nll_loss(z.log_softmax(-1), target)


class TestAgainstTheDenseMatrix:
    @pytest.mark.parametrize(
        ("loss", "outputs", "scale"),
        [
            (F.cross_entropy, 4, 1.0),
            (of_log_probabilities, 4, 1.0),
            (F.mse_loss, 3, 1.0),
            (summed_squares, 3, 1.0),
            (F.binary_cross_entropy_with_logits, 1, 1.0),
            (of_probabilities, 1, 1.0),
            (summed_binary, 3, 1.0),
            (F.binary_cross_entropy_with_logits, 3, 1 / 3),  # an average of likelihoods
        ],
    )
    def test_it_is_the_diagonal(self, loss: Loss, outputs: int, scale: float) -> None:
        model, x = mlp(outputs), normal(7, 4)
        classes = loss in (F.cross_entropy, of_log_probabilities)
        y = torch.arange(7) % outputs if classes else normal(7, outputs, seed=1).sigmoid()
        dense = gauss_newton_diagonal(model, x, y, loss)
        for name, sums in expected(model, x, y, loss).items():
            torch.testing.assert_close(sums, scale * dense[name], rtol=1e-9, atol=1e-15)

    @pytest.mark.parametrize(
        ("loss", "reduction", "reduced"),
        [
            (F.mse_loss, "sum", summed_squares),
            (all_squares, "mean", F.mse_loss),
            (F.binary_cross_entropy_with_logits, "sum", summed_binary),
        ],
    )
    def test_another_reduction_is_that_of_the_loss_that_has_it(
        self, loss: Loss, reduction: Any, reduced: Loss
    ) -> None:
        model, x, y = mlp(3), normal(7, 4), normal(7, 3, seed=1).sigmoid()
        dense = gauss_newton_diagonal(model, x, y, reduced)
        for name, sums in expected(model, x, y, loss, reduction=reduction).items():
            torch.testing.assert_close(sums, dense[name], rtol=1e-9, atol=1e-15)

    def test_a_convolutional_network(self) -> None:
        model, x = tiny_conv_net().double(), images(5, channels=1).double()
        dense = gauss_newton_diagonal(model, x, torch.zeros(5).long(), F.cross_entropy)
        for name, sums in expected(model, x, torch.ones(5).long(), F.cross_entropy).items():
            torch.testing.assert_close(sums, dense[name], rtol=1e-8, atol=1e-14, msg=name)

    def test_the_loss_inside_a_transformers_model(self) -> None:
        model, texts = tiny_bert().double(), padded_texts((5, 3, 4))
        batch = {**texts, "labels": torch.zeros(3, dtype=torch.long)}
        sums = diagonal_hessian(model, [batch], lambda m, b: m(**b).loss, labels="expected")

        class OfRows(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, index: Tensor) -> Tensor:
                return self.model(**{k: v[index.long()] for k, v in texts.items()}).logits

        fisher = softmax_fisher_by_enumeration(OfRows(), torch.arange(3.0), 3)
        for name, squares in sums.items():
            exact = fisher[f"model.{name}"]
            atol = 1e-8 * float(exact.max()) + 1e-28
            torch.testing.assert_close(squares, exact, rtol=1e-7, atol=atol, msg=name)

    @pytest.mark.parametrize(
        "loss", [F.cross_entropy, of_probabilities, F.binary_cross_entropy_with_logits, F.mse_loss]
    )
    def test_half_precision_is_right_to_its_own_precision(self, loss: Loss) -> None:
        model = mlp(3)
        with torch.no_grad():
            model[2].bias += torch.tensor([0.0, 3.0, -3.0]).double()  # sure of two outputs
        model, x = model.bfloat16(), normal(7, 4).bfloat16()
        half = expected(model, x, None, loss)
        double = expected(model.double(), x.double(), None, loss)
        for name, sums in half.items():
            error = (sums.double() - double[name]).abs().sum() / double[name].sum()
            assert error < 0.03, name

    def test_two_heads_have_the_sum_of_their_diagonals(self) -> None:
        model, x = mlp(5), normal(7, 4)
        y = torch.zeros(7).long()

        def first(z: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(z[:, :3], target)

        def second(z: Tensor, target: Tensor) -> Tensor:
            return 0.5 * F.mse_loss(z[:, 3:], torch.zeros_like(z[:, 3:]))

        both = expected(model, x, y, lambda z, target: first(z, target) + second(z, target))
        dense = [gauss_newton_diagonal(model, x, y, loss) for loss in (first, second)]
        for name, sums in both.items():
            # a factor of a loss is squared with its gradients, and the matrix has it once
            torch.testing.assert_close(sums, dense[0][name] + 0.5 * dense[1][name])


def test_a_parameter_first_used_after_the_probe_is_exact_in_every_round() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.late = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y + self.late(x) if (x.abs() > 5).any() else y

    torch.manual_seed(0)
    model, x = Late().double(), normal(6, 4)
    x[3:, 0] += 10
    with pytest.warns(CurvatureWarning, match="not used by the examples of the probe"):
        sums = expected(model, x, None, F.cross_entropy)
    zeros = {"late.weight": torch.zeros(3, 4).double(), "late.bias": torch.zeros(3).double()}
    early = zeros | softmax_fisher_by_enumeration(model.layer, x[:3], 3)
    late = softmax_fisher_by_enumeration(model, x[3:], 3)
    for name, squares in late.items():
        before = early[name.removeprefix("layer.")]
        torch.testing.assert_close(sums[name], before + squares, rtol=1e-9, atol=1e-20)


class TestAgainstSamples:
    @pytest.mark.parametrize(
        "loss", [F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits]
    )
    @pytest.mark.parametrize("reduction", ["loss", "mean", "sum"])
    def test_it_is_what_samples_tend_to(self, loss: Loss, reduction: Any) -> None:
        torch.manual_seed(0)
        model, x, y = nn.Linear(4, 3).double(), normal(4, 4), None
        exact = expected(model, x, y, loss, reduction=reduction)
        repeats = 6000
        sampled = PerExampleFisher(
            model, lambda m, b: loss(m(b[0]), b[1]), labels="sampled", reduction=reduction
        )
        sampled.update((x.repeat(repeats, 1), y))
        for name, sums in sampled.sums().items():
            torch.testing.assert_close(sums / repeats, exact[name], rtol=0.08, atol=1e-4)

    def test_observed_labels_do_not_matter(self) -> None:
        model, x = mlp(3), normal(7, 4)
        one, other = (expected(model, x, y, F.cross_entropy) for y in (torch.ones(7).long(), None))
        torch.testing.assert_close(one, other)

    def test_ignored_examples_do_not_count_under_a_mean_per_example(self) -> None:
        model, x = mlp(3), normal(7, 4)
        y = torch.tensor([0, 0, -100, 0, 0, 0, -100])
        some = expected(model, x, y, F.cross_entropy, reduction="mean")
        kept = softmax_fisher_by_enumeration(model, x[y == 0], 3)
        for name, sums in some.items():
            torch.testing.assert_close(sums, kept[name])


class TestRefused:
    def test_several_labels_per_example(self) -> None:
        model, x = nn.Linear(4, 3).double(), normal(2, 5, 4)

        def per_token(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(m(batch[0]).flatten(0, 1), batch[1].flatten())

        with pytest.raises(InputError, match=r'"expected" and 5 rows per example. Use .*"sampled"'):
            diagonal_hessian(model, [(x, torch.zeros(2, 5).long())], per_token, labels="expected")

    def test_more_outputs_than_are_worth_it(self) -> None:
        with pytest.raises(InputError, match=r"more than 128 outputs .* got 129. Use labels"):
            expected(mlp(129), normal(5, 4), torch.zeros(5).long(), F.cross_entropy)

    @pytest.mark.parametrize(
        "loss",
        [
            lambda z, y: F.cross_entropy(z, y) + z.square().mean(),
            lambda z, y: F.cross_entropy(z, y) ** 2,
        ],
    )
    def test_a_loss_that_is_more_than_torchs_losses(self, loss: Loss) -> None:
        with pytest.raises(InputError, match="more than a weighted sum of losses of torch"):
            expected(mlp(3), normal(5, 4), torch.zeros(5).long(), loss)
