"""The probe moves what it must to the loop over single examples, and refuses what is no mean."""

from __future__ import annotations

import copy
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


class Hidden(torch.autograd.Function):
    """x @ wᵀ, in a way that shows nothing of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (g,), (x, w) = gradients, ctx.saved_tensors
        return g @ w, torch.einsum("...o,...i->oi", g, x)


def hiding(**parts: Any) -> Model:
    """A model with a layer whose weight a function hides."""
    return Model(
        lambda self, y: Hidden.apply(y, self.other.weight),
        other=nn.Linear(6, 6, bias=False),
        **parts,
    )


class TestExactFallback:
    def test_a_function_that_hides_its_weight(self) -> None:
        reason = "its fast form gives something else than the loop"
        assert_one_by_one(hiding(), normal(5, 4), {"other.weight"}, reason)

    def test_a_small_hidden_use_is_not_taken_for_rounding(self) -> None:
        model = Model(
            lambda self, y: self.other(y) + 1e-4 * Hidden.apply(y, self.other.weight),
            other=nn.Linear(6, 6, bias=False),
        )
        assert_one_by_one(model, normal(5, 4), {"other.weight"}, "its fast form gives")

    def test_examples_in_the_second_dimension(self) -> None:
        model = Model(
            lambda self, y: self.inner(y.transpose(0, 1)).tanh().transpose(0, 1),
            inner=nn.Linear(6, 6),
        )
        names = {"inner.weight", "inner.bias"}
        assert_one_by_one(model, normal(4, 6, 4), names, "its fast form gives something else")
        assert_one_by_one(model, normal(4, 5, 4), names, "5 rows for 2 examples")

    @pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
    def test_a_recurrent_network(self, kind: type[nn.RNNBase]) -> None:
        model = Model(lambda self, y: self.rnn(y)[0], rnn=kind(6, 6, bias=False, batch_first=True))
        names = {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
        reason = rf"{kind.__name__.lower()}\(\) takes it in a way without a fast form"
        assert_one_by_one(model, normal(4, 3, 4), names, reason)

    def test_bags_of_the_largest(self) -> None:
        def use(self: Any, y: Tensor) -> Tensor:
            return y + self.bag((y.detach() > 0).long())

        model = Model(use, bag=nn.EmbeddingBag(2, 6, mode="max"))
        reason = r"embedding_bag\(\) takes it in a way without a fast form"
        assert_one_by_one(model, normal(4, 4), {"bag.weight"}, reason)

    def test_what_the_probe_cannot_see_is_seen_in_a_later_batch(self) -> None:
        """Both examples of the probe send a token to the layer, of the others not all do."""

        def use(self: Any, y: Tensor) -> Tensor:
            mask, result = y[..., 0] > 0, torch.zeros_like(y)
            result[mask] = self.inner(y[mask])
            return result

        model = Model(use, inner=nn.Linear(6, 6))
        model.first.weight.data = torch.eye(6, 4, dtype=torch.float64)
        model.first.bias.data.zero_()
        x = normal(6, 2, 4)
        x[:, :, 0] = torch.tensor([[1, -1], [-1, 1], [1, 1], [1, 1], [1, 1], [-1, -1]])
        batches = [batch_of(x[:2]), batch_of(x[2:])]  # 2 rows for 2 examples, 6 rows for 4
        batches.append(batch_of(x[4:]))  # 2 rows for 2 examples, both of the first
        estimator = PerExampleFisher(model, cross_entropy, labels="observed")
        assert not estimator.probe(batches[0]).one_by_one
        with pytest.warns(CurvatureWarning, match="used on rows that the data chose"):
            estimator.update(batches[2])
        for batch in batches[:2]:
            estimator.update(batch)
        expected = squared_gradients_by_loop(model, batches, cross_entropy)
        torch.testing.assert_close(estimator.sums(), expected, rtol=1e-9, atol=1e-20)


class TestAtOnce:
    """What a form of its own is not needed for."""

    @pytest.mark.parametrize(
        ("use", "parts"),
        [
            (
                lambda self, y: F.linear(y, self.other.weight),
                {"other": nn.Linear(6, 6, bias=False)},
            ),
            (lambda self, y: y @ (self.head.weight.T @ self.head.weight), {}),
            (
                lambda self, y: self.attention(y, y, y, need_weights=False)[0],
                {"attention": nn.MultiheadAttention(6, 2, batch_first=True)},
            ),
            (
                lambda self, y: self.encoder(y),
                {"encoder": nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)},
            ),
            (
                lambda self, y: F.conv1d(self.linear(y).mT, self.linear.weight[..., None]).mT,
                {"linear": nn.Linear(6, 6, bias=False)},
            ),
            (
                lambda self, y: y + self.table(torch.arange(5)[None]).view(5, 6),
                {"table": nn.Embedding(5, 6)},
            ),
            (lambda self, y: self.norm(y).sigmoid(), {"norm": nn.LayerNorm(6)}),
            (lambda self, y: y * self.p, {"p": nn.Parameter(torch.ones(6))}),
            (lambda self, y: y * self.p, {"p": nn.Parameter(torch.ones(()))}),
            (lambda self, y: y + self.p, {"p": nn.Parameter(torch.ones(5, 6))}),
            (lambda self, y: y + self.p.tanh(), {"p": nn.Parameter(torch.ones(1, 5, 6))}),
            (
                lambda self, y: torch.cat([self.p.expand(len(y), -1, -1), y], 1),
                {"p": nn.Parameter(torch.ones(1, 1, 6))},
            ),
            (lambda self, y: y @ self.p, {"p": nn.Parameter(torch.ones(6, 6))}),
            (lambda self, y: y * self.p[:, None], {"p": nn.Parameter(torch.ones(5))}),
        ],
        ids=[
            "a weight outside its module",
            "a weight inside and outside its module",
            "attention with packed weights",
            "the encoder of torch, which has a fused way",
            "a weight shared by different functions",
            "a table that the model reshapes itself",
            "a norm with an activation",
            "vector",
            "scalar",
            "table",
            "positions",
            "token",
            "matrix",
            "vector along the second dimension",
        ],
    )
    def test_any_use_that_is_followed(self, use: Any, parts: dict[str, Any]) -> None:
        model = Model(use, **copy.deepcopy(parts))
        estimator = PerExampleFisher(model, cross_entropy, labels="observed")
        batches = [batch_of(normal(size, 5, 4)) for size in (2, 5, 4)]
        assert not estimator.probe(batches[0]).one_by_one
        for batch in batches:
            estimator.update(batch)
        expected = squared_gradients_by_loop(model, batches, cross_entropy)
        largest = max(float(squares.max()) for squares in expected.values())
        sums = estimator.sums()
        torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-15 * largest)


class TestReport:
    def test_every_parameter_is_in_one_list(self) -> None:
        model = hiding(spare=nn.Linear(2, 2))
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
            return y + sum(Hidden.apply(y, layer.weight) for layer in self.weights)

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
        with pytest.raises(
            InputError, match="a mean over the tokens of texts of different lengths"
        ):
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
        model = hiding()
        batch = (normal(2, 4).float(), torch.ones(2, dtype=torch.long))
        estimator = PerExampleFisher(self.sure(model), cross_entropy, labels=labels)
        with pytest.warns(CurvatureWarning, match=r"other\.weight"):
            assert set(estimator.probe(batch).one_by_one) == {"other.weight"}

    def test_a_loss_of_ones_own_is_judged_with_its_labels(self) -> None:
        def margin(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return (1 - model(batch[0])[:, 0] * batch[1]).clamp(min=0).mean()

        estimator = PerExampleFisher(Model(lambda self, y: y), margin, labels="observed")
        assert not estimator.probe(batch_of(normal(2, 4))).one_by_one
