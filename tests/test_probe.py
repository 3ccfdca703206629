"""The probe moves what it must to the loop over single examples, and refuses what is no mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_merge.curvature import CurvatureWarning, PerExampleFisher, diagonal_hessian
from lit_merge.errors import InputError
from tests.references import squared_gradients_by_loop
from tests.tiny_models import images, tiny_vit


def cross_entropy(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.arange(len(x)) % 3


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Model(nn.Module):
    """A linear layer, what a test does with it, and a head."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self.use = use
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.use(self, self.first(x)))
        return y if y.dim() == 2 else y.mean(tuple(range(1, y.dim() - 1)))


def assert_one_by_one(model: nn.Module, x: Tensor, names: set[str], reason: str) -> None:
    """Check that these parameters, and no others, go through the loop, and that all is exact."""
    estimator = PerExampleFisher(model, cross_entropy, labels="observed")
    with pytest.warns(CurvatureWarning, match=reason):
        report = estimator.probe(batch_of(x[:2]))
    assert set(report.one_by_one) == names
    estimator.update(batch_of(x))
    expected = squared_gradients_by_loop(model, [batch_of(x)], cross_entropy)
    sums = estimator.sums()
    for name, squares in expected.items():
        atol = 1e-9 * float(squares.max()) + 1e-28
        torch.testing.assert_close(sums[name], squares, rtol=1e-9, atol=atol, msg=name)


class TestExactFallback:
    def test_a_weight_used_outside_its_module(self) -> None:
        model = Model(lambda self, y: F.linear(y, self.other.weight), other=nn.Linear(6, 6))
        model.other.bias = None
        names = {"other.weight"}
        assert_one_by_one(model, normal(5, 4), names, "in another way than by calls of its module")

    def test_a_weight_used_inside_and_outside_its_module(self) -> None:
        model = Model(
            lambda self, y: F.linear(self.first(y[..., :4]), self.head.weight.T @ self.head.weight)
        )
        assert_one_by_one(model, normal(5, 4), {"head.weight"}, "head.weight: computed one example")

    def test_a_small_use_is_not_taken_for_rounding(self) -> None:
        model = Model(
            lambda self, y: y + 1e-4 * F.linear(y, self.other.weight),
            other=nn.Linear(6, 6, bias=False),
        )
        assert_one_by_one(model, normal(5, 4), {"other.weight"}, "in another way")

    def test_attention_with_packed_weights(self) -> None:
        model = Model(
            lambda self, y: self.attention(y, y, y, need_weights=False)[0],
            attention=nn.MultiheadAttention(6, 2, batch_first=True),
        )
        weights = ("in_proj_weight", "out_proj.weight", "out_proj.bias")
        names = {f"attention.{name}" for name in weights}
        assert_one_by_one(model, normal(4, 5, 4), names, r"^attention\.")

    def test_the_encoder_of_torch_does_not_take_its_fused_way(self) -> None:
        encoder = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
        model = Model(lambda self, y: self.encoder(y.detach()), encoder=encoder)
        estimator = PerExampleFisher(model, cross_entropy, labels="observed")
        with pytest.warns(CurvatureWarning, match="self_attn"):
            report = estimator.probe(batch_of(normal(2, 5, 4)))
        assert {"encoder.linear1.weight", "encoder.norm2.bias"} <= set(report.at_once)

    def test_examples_in_the_second_dimension(self) -> None:
        model = Model(
            lambda self, y: self.inner(y.transpose(0, 1)).tanh().transpose(0, 1),
            inner=nn.Linear(6, 6),
        )
        names = {"inner.weight", "inner.bias"}
        assert_one_by_one(model, normal(4, 6, 4), names, "in another way")
        assert_one_by_one(model, normal(4, 5, 4), names, "5 rows for 2 examples")

    def test_a_module_shared_by_different_types(self) -> None:
        model = Model(
            lambda self, y: self.conv(self.linear(y)[..., None])[..., 0],
            linear=nn.Linear(6, 6, bias=False),
            conv=nn.Conv1d(6, 6, 1, bias=False),
        )
        model.conv.weight = model.linear.weight
        model.conv._conv_forward = lambda x, w, b: F.conv1d(x, w[..., None], b)
        assert_one_by_one(model, normal(4, 4), {"linear.weight"}, "shared by modules of different")

    def test_a_table_that_the_model_reshapes_itself(self) -> None:
        model = Model(
            lambda self, y: y + self.table(torch.arange(5)[None]).view(5, 6),
            table=nn.Embedding(5, 6),
        )
        assert_one_by_one(model, normal(4, 5, 4), {"table.weight"}, "the model fails otherwise")

    def test_a_recurrent_network(self) -> None:
        model = Model(
            lambda self, y: self.rnn(y)[0], rnn=nn.GRU(6, 6, bias=False, batch_first=True)
        )
        names = {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
        assert_one_by_one(model, normal(4, 3, 4), names, "GRU is not a module type")

    def test_a_norm_that_applies_an_activation_itself(self) -> None:
        class NormAct(nn.BatchNorm1d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).sigmoid()

        model = Model(lambda self, y: self.norm(y), norm=NormAct(6))
        assert_one_by_one(model, normal(4, 4), {"norm.weight", "norm.bias"}, "in another way")


class TestCopies:
    @pytest.mark.parametrize(
        ("parameter", "use"),
        [
            (torch.ones(6), lambda self, y: y * self.p),
            (torch.ones(()), lambda self, y: y * self.p),
            (torch.ones(5, 6), lambda self, y: y + self.p),
            (torch.ones(1, 5, 6), lambda self, y: y + self.p.tanh()),
            (torch.ones(1, 1, 6), lambda self, y: torch.cat([self.p.expand(len(y), -1, -1), y], 1)),
            (torch.ones(6, 6), lambda self, y: y @ self.p),
        ],
        ids=["vector", "scalar", "table", "positions", "token", "matrix"],
    )
    def test_bare_parameters_are_computed_at_once(self, parameter: Tensor, use: Any) -> None:
        model = Model(use, p=nn.Parameter(parameter))
        estimator = PerExampleFisher(model, cross_entropy, labels="observed")
        batch = batch_of(normal(4, 5, 4))
        assert "p" in estimator.probe(batch).at_once
        estimator.update(batch)
        expected = squared_gradients_by_loop(model, [batch], cross_entropy)
        torch.testing.assert_close(estimator.sums(), expected, rtol=1e-9, atol=1e-20)

    def test_a_layout_that_only_a_square_batch_allows_is_rejected(self) -> None:
        model = Model(lambda self, y: y * self.p[:, None], p=nn.Parameter(torch.ones(6, 1)))
        model.use = lambda self, y: (y.transpose(1, 2) * self.p).transpose(1, 2)
        estimator = PerExampleFisher(model, cross_entropy, labels="observed")
        batch = batch_of(normal(4, 2, 4))
        estimator.update(batch)
        expected = squared_gradients_by_loop(model, [batch], cross_entropy)
        torch.testing.assert_close(estimator.sums(), expected, rtol=1e-9, atol=1e-20)

    def test_a_vector_along_the_second_dimension_goes_through_the_loop(self) -> None:
        model = Model(lambda self, y: y * self.p[:, None], p=nn.Parameter(torch.ones(5)))
        assert_one_by_one(model, normal(4, 5, 4), {"p"}, "Model is not a module type")


class TestReport:
    def test_every_parameter_is_in_one_list(self) -> None:
        model = Model(
            lambda self, y: F.linear(y, self.other.weight),
            other=nn.Linear(6, 6, bias=False),
            spare=nn.Linear(2, 2),
        )
        with pytest.warns(
            CurvatureWarning, match="The curvature is exact, but every example costs"
        ):
            report = PerExampleFisher(model, cross_entropy).probe(batch_of(normal(2, 4)))
        assert report.num_examples == 2
        assert report.at_once == ("first.weight", "first.bias", "head.weight", "head.bias")
        assert set(report.one_by_one) == {"other.weight"}
        assert report.unused == ("spare.weight", "spare.bias")
        assert str(report) == "4 parameters at once, 1 one example at a time, 2 unused"

    def test_a_long_list_of_names_is_shortened(self) -> None:
        weights = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(23))

        def use(self: Any, y: Tensor) -> Tensor:
            return y + sum(F.linear(y, layer.weight) for layer in self.weights)

        estimator = PerExampleFisher(Model(use, weights=weights), cross_entropy)
        with pytest.warns(CurvatureWarning, match=r"weights\.19\.weight and 3 more: computed"):
            assert len(estimator.probe(batch_of(normal(2, 4))).one_by_one) == 23

    def test_one_example_is_probed_and_the_first_larger_batch_again(self) -> None:
        model = Model(
            lambda self, y: self.inner(y.transpose(0, 1)).tanh().transpose(0, 1),
            inner=nn.Linear(6, 6),
        )
        single, batch = batch_of(normal(1, 6, 4)), batch_of(normal(4, 6, 4))
        estimator = PerExampleFisher(model, cross_entropy, labels="observed")
        assert estimator.probe(single).num_examples == 1
        estimator.update(single)
        with pytest.warns(CurvatureWarning, match=r"inner\.weight"):
            estimator.update(batch)
        expected = squared_gradients_by_loop(model, [single, batch], cross_entropy)
        torch.testing.assert_close(estimator.sums(), expected, rtol=1e-9, atol=1e-20)

    def test_half_precision_is_compared_with_its_own_tolerance(self) -> None:
        def autocast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return cross_entropy(model, batch)

        report = PerExampleFisher(tiny_vit(), autocast).probe(batch_of(images(2)))
        assert not report.one_by_one

    def test_single_precision_rounding_is_not_taken_for_an_error(self) -> None:
        report = PerExampleFisher(tiny_vit(), cross_entropy).probe(batch_of(images(2)))
        assert not report.one_by_one


class TestRefusals:
    @pytest.mark.parametrize(
        "loss",
        [
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="sum"),
            lambda model, batch: F.cross_entropy(model(batch[0] - batch[0].mean(0)), batch[1]),
            lambda model, batch: (
                F.cross_entropy(model(batch[0])[batch[0][:, 0] > -1], batch[1][batch[0][:, 0] > -1])
                * batch[0][:, 0].abs().sum()
            ),
        ],
        ids=["sum", "between examples", "other weights"],
    )
    def test_a_loss_that_is_no_mean_over_the_examples(self, loss: Any) -> None:
        x = torch.tensor([[0.1, 1.0, 2.0, 0.0], [0.5, -1.0, 0.3, 1.0]], dtype=torch.float64)
        estimator = PerExampleFisher(Model(lambda self, y: y), loss, labels="observed")
        with pytest.raises(
            InputError, match=r"loss: must be the mean over the examples.*a sum inst"
        ):
            estimator.update(batch_of(x))

    def test_a_mean_over_tokens_of_texts_of_different_lengths(self) -> None:
        def tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(model.head(model.first(batch[0])).mT, batch[1])

        labels = torch.tensor([[0, 1, 2], [1, -100, -100]])
        estimator = PerExampleFisher(Model(lambda self, y: y), tokens, labels="observed")
        with pytest.raises(InputError, match="a mean over tokens of texts of different lengths"):
            estimator.probe((normal(2, 3, 4), labels))

    def test_batch_norm_without_running_statistics(self) -> None:
        norm = nn.BatchNorm1d(6, track_running_stats=False)
        model = Model(lambda self, y: self.norm(y), norm=norm)
        with pytest.raises(
            InputError, match="on a batch of one example; got ValueError: Expected more"
        ):
            diagonal_hessian(model, [batch_of(normal(4, 4))], cross_entropy)

    def test_a_random_loss(self) -> None:
        def noisy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            x = batch[0] + torch.randn_like(batch[0])
            return F.cross_entropy(model(x), batch[1])

        estimator = PerExampleFisher(Model(lambda self, y: y), noisy, labels="observed")
        with pytest.raises(InputError, match="random numbers in the forward"):
            estimator.update(batch_of(normal(2, 4)))

    def test_reentrant_checkpointing(self) -> None:
        model = Model(
            lambda self, y: checkpoint(self.inner, y, use_reentrant=True), inner=nn.Linear(6, 6)
        )
        with pytest.raises(InputError, match="reentrant checkpointing"):
            diagonal_hessian(model, [batch_of(normal(4, 4))], cross_entropy)

    def test_a_loss_without_gradient(self) -> None:
        model = Model(lambda self, y: y)

        def detached(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return cross_entropy(model, batch).detach()

        with pytest.raises(InputError, match="loss: must depend on the trainable parameters"):
            diagonal_hessian(model, [batch_of(normal(4, 4))], detached)

    def test_a_gradient_that_is_not_finite(self) -> None:
        model = Model(lambda self, y: y + 0 * (0 * self.p).sqrt(), p=nn.Parameter(torch.ones(1)))
        with pytest.raises(InputError, match="p: must have a finite gradient; got NaN or Inf"):
            diagonal_hessian(model, [batch_of(normal(4, 4))], cross_entropy)


class TestSureModels:
    """Where a model is sure and right, gradients are rounding or zero, and compare nothing."""

    @staticmethod
    def sure(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            model.head.bias[1] += 200.0
        return model.float()

    @pytest.mark.parametrize("labels", ["sampled", "observed"])
    def test_a_sure_model_is_covered_like_any_other(self, labels: Any) -> None:
        batch = (images(4), torch.ones(4, dtype=torch.long))
        estimator = PerExampleFisher(self.sure(tiny_vit()), cross_entropy, labels=labels)
        assert not estimator.probe(batch).one_by_one
        estimator.update(batch)
        assert all((squares == 0).all() for squares in estimator.sums().values())

    @pytest.mark.parametrize("labels", ["sampled", "observed"])
    def test_a_wrong_parameter_of_a_sure_model_is_found(self, labels: Any) -> None:
        model = Model(
            lambda self, y: F.linear(y, self.other.weight), other=nn.Linear(6, 6, bias=False)
        )
        batch = (normal(2, 4).float(), torch.ones(2, dtype=torch.long))
        estimator = PerExampleFisher(self.sure(model), cross_entropy, labels=labels)
        with pytest.warns(CurvatureWarning, match=r"other\.weight"):
            assert set(estimator.probe(batch).one_by_one) == {"other.weight"}

    def test_a_loss_of_ones_own_is_judged_with_its_labels(self) -> None:
        def margin(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return (1 - model(batch[0])[:, 0] * batch[1]).clamp(min=0).mean()

        estimator = PerExampleFisher(Model(lambda self, y: y), margin, labels="observed")
        assert not estimator.probe(batch_of(normal(2, 4))).one_by_one
