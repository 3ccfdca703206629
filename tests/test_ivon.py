"""IVON's running Hessian, on the scale of a sum over examples, against the exact diagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature import IvonHessian, ivon_hessian
from lit_merge.errors import InputError
from tests.references import gauss_newton_diagonal, squared_gradients_by_loop

ivon = pytest.importorskip("ivon")

CURVATURES = torch.tensor([0.5, 2.0, 8.0])


class Entries(nn.Module):
    """Many weights alike for each curvature, so that their mean is nearly without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2000))


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def train(
    model: nn.Module, loss: Callable[[int], Tensor], steps: int, **settings: Any
) -> torch.optim.Optimizer:
    """Let IVON look around weights that it does not move."""
    torch.manual_seed(0)
    optimizer: torch.optim.Optimizer = ivon.IVON(model.parameters(), lr=0.0, **settings)
    for step in range(steps):
        with optimizer.sampled_params(train=True):  # type: ignore[attr-defined]
            optimizer.zero_grad()
            loss(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return optimizer


def quadratic(
    steps: int, *, slope: float = 0.0, ess: float = 1000.0, **settings: Any
) -> tuple[Entries, torch.optim.Optimizer]:
    model = Entries()

    def loss(step: int) -> Tensor:
        return (0.5 * CURVATURES[:, None] * model.weight**2 + slope * model.weight).sum()

    return model, train(model, loss, steps, ess=ess, **settings)


class TestScale:
    def test_a_quadratic_has_the_hessian_of_its_mean_times_n(self) -> None:
        model, optimizer = quadratic(300, beta2=0.99)
        got = ivon_hessian(optimizer, names_of(model), num_examples=50)
        torch.testing.assert_close(got["weight"].mean(1), 50 * CURVATURES, rtol=0.03, atol=0)

    @pytest.mark.parametrize("start", [1.0, 4.0])
    def test_what_is_left_of_the_start_is_taken_out(self, start: float) -> None:
        model, optimizer = quadratic(100, beta2=0.99999, hess_init=start)
        raw = optimizer.param_groups[0]["hess"]
        assert ((raw / start - 1).abs() < 0.2).all()  # nearly nothing else is in it
        got = ivon_hessian(optimizer, names_of(model), num_examples=1)["weight"]
        torch.testing.assert_close(got.mean(1), CURVATURES, rtol=0.03, atol=0)
        error = (got / CURVATURES[:, None] - 1).square().mean().sqrt()
        assert error.item() == pytest.approx((2 / 100) ** 0.5, rel=0.1)

    def test_it_is_too_large_by_the_stated_amount_where_the_gradient_is_not_zero(self) -> None:
        model, optimizer = quadratic(600, beta2=0.99, slope=0.1)
        got = ivon_hessian(optimizer, names_of(model), num_examples=1)["weight"].mean(1)
        excess = 0.5 * (1 - 0.99) * 1000 * 0.1**2
        # beside it, the noise of the estimate at the optimum is two squared curvatures
        torch.testing.assert_close(got, CURVATURES * 1.01 + excess, rtol=0.01, atol=0.01)

    def test_a_classifier_has_the_exact_diagonal(self) -> None:
        torch.manual_seed(0)
        model, x, y = nn.Linear(3, 2), torch.randn(40, 3), torch.arange(40) % 2
        fit = torch.optim.LBFGS(model.parameters(), max_iter=30)

        def closure() -> Tensor:
            fit.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        fit.step(closure)  # type: ignore[no-untyped-call]
        optimizer = train(
            model, lambda step: F.cross_entropy(model(x), y), 2000, ess=1e4, beta2=0.999
        )
        got = ivon_hessian(optimizer, names_of(model), num_examples=40)
        exact = gauss_newton_diagonal(model.double(), x.double(), y, F.cross_entropy)
        for name, diagonal in exact.items():  # the model is linear: this is the Hessian
            ratio = got[name].double().sum() / diagonal.sum()
            assert ratio.item() == pytest.approx(1, abs=0.1)
            torch.testing.assert_close(got[name].double(), diagonal, rtol=0.3, atol=0.0)

    def test_squared_gradients_are_the_fisher_at_any_batch_size(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2), torch.randn(4000, 3)
        y = torch.distributions.Categorical(logits=model(x).detach()).sample()
        exact = squared_gradients_by_loop(
            model, [(x[:1000], y[:1000])], lambda m, b: F.cross_entropy(m(b[0]), b[1])
        )
        traces = []
        for size in (1, 8):

            def loss(step: int, size: int = size) -> Tensor:
                rows = torch.arange(step * size, (step + 1) * size) % len(x)
                return F.cross_entropy(model(x[rows]), y[rows])

            optimizer = train(model, loss, 600, ess=1e6, beta2=0.999, hess_approx="gradsq")
            got = ivon_hessian(optimizer, names_of(model), num_examples=1000, batch_size=size)
            traces.append(float(sum(total.sum() for total in got.values())))
        total = float(sum(squares.sum() for squares in exact.values()))
        assert traces == [pytest.approx(total, rel=0.25)] * 2

    def test_no_entry_is_negative(self) -> None:
        model, optimizer = quadratic(20, beta2=0.99999)
        optimizer.param_groups[0]["hess"].fill_(0.5)  # below what is left of the start
        got = ivon_hessian(optimizer, names_of(model), num_examples=5)
        assert (got["weight"] == 0).all()


class TestParameters:
    def test_groups_shapes_and_frozen_parameters(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        model[0].bias.requires_grad_(False)
        x = torch.randn(6, 2)
        optimizer = ivon.IVON(
            [
                {"params": model[1].parameters(), "ess": 500.0},
                {"params": model[0].parameters(), "hess_init": 3.0},
            ],
            lr=0.0,
            ess=1000.0,
            beta2=0.9,
        )
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                model(x).square().mean().backward()
            optimizer.step()
        got = ivon_hessian(optimizer, names_of(model), num_examples=6)
        assert {name: tuple(total.shape) for name, total in got.items()} == {
            "1.weight": (1, 3),
            "1.bias": (1,),
            "0.weight": (3, 2),
        }
        flat = optimizer.param_groups[1]["hess"][:6].view(3, 2)
        torch.testing.assert_close(
            got["0.weight"], 6 * ((flat - 0.9**3 * 3) / (1 - 0.9**3)).clamp(min=0)
        )

    def test_the_class_reads_it_when_it_is_asked(self) -> None:
        model, optimizer = quadratic(5, beta2=0.9)
        estimator = IvonHessian(optimizer, names_of(model), num_examples=7)
        before = estimator.sums()["weight"]
        optimizer.param_groups[0]["hess"] += 10
        assert (estimator.sums()["weight"] > before).all()
        assert estimator.num_examples == 7

    def test_a_run_that_was_resumed_gives_the_number_of_its_steps(self) -> None:
        model, optimizer = quadratic(30, beta2=0.9)
        expected = ivon_hessian(optimizer, names_of(model), num_examples=1)
        resumed = ivon.IVON(model.parameters(), lr=0.0, ess=1.0)
        resumed.load_state_dict(optimizer.state_dict())
        with pytest.raises(InputError, match=r"steps: must be at least 1; .* state was loaded"):
            ivon_hessian(resumed, names_of(model), num_examples=1)
        got = ivon_hessian(resumed, names_of(model), num_examples=1, steps=30)
        torch.testing.assert_close(got, expected)


class TestRefused:
    def test_another_optimizer(self) -> None:
        model = Entries()
        optimizer = torch.optim.Adam(model.parameters())
        with pytest.raises(InputError, match=r"optimizer: must be IVON, .* got Adam"):
            ivon_hessian(optimizer, names_of(model), num_examples=1)

    def test_before_the_first_step(self) -> None:
        model, optimizer = quadratic(0)
        with pytest.raises(InputError, match="steps: must be at least 1; got an optimizer that"):
            ivon_hessian(optimizer, names_of(model), num_examples=1)

    def test_a_hessian_that_never_moves(self) -> None:
        model, optimizer = quadratic(3, beta2=1.0)
        with pytest.raises(InputError, match=r"optimizer: must have a beta2 below 1 .* got 1.0"):
            ivon_hessian(optimizer, names_of(model), num_examples=1)

    def test_numbers_that_are_missing_or_not_positive(self) -> None:
        model, optimizer = quadratic(3, hess_approx="gradsq")
        for numbers, message in (
            ({"num_examples": 0}, "num_examples: must be at least 1; got 0"),
            ({"num_examples": 1}, "batch_size: must be given for IVON .* got None"),
            ({"num_examples": 1, "batch_size": 0}, "batch_size: must be at least 1; got 0"),
        ):
            with pytest.raises(InputError, match=message):
                ivon_hessian(optimizer, names_of(model), **numbers)  # type: ignore[arg-type]
