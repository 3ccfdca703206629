"""The exact pass against a loop over single examples, on real architectures and in any context."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from lit_merge.curvature import CurvatureWarning, PerExampleFisher, diagonal_hessian
from lit_merge.errors import InputError
from tests.references import squared_gradients_by_loop
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_vit


def cross_entropy(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    inputs, labels = batch
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return F.cross_entropy(getattr(output, "logits", output), labels)


def with_labels(*inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    doubles = [x.double() if x.is_floating_point() else x for x in inputs]
    return [(x, torch.arange(len(x)) % 3) for x in doubles]


def assert_exact(model: nn.Module, batches: Sequence[Any], *, rtol: float = 1e-9) -> None:
    """Compare with the loop; entries far below a parameter's largest are rounding."""
    model = model.double()
    sums = diagonal_hessian(model, batches, cross_entropy, labels="observed")
    expected = squared_gradients_by_loop(model, batches, cross_entropy)
    assert sums.keys() == expected.keys()
    for name, squares in expected.items():
        atol = max(rtol * float(squares.max()), 1e-28)  # 1e-28: the bias of attention keys
        torch.testing.assert_close(sums[name], squares, rtol=rtol, atol=atol, msg=name)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).double()


def rows(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64)


class TestArchitectures:
    def test_a_perceptron_with_relu_in_place(self) -> None:
        assert_exact(mlp(), with_labels(rows(5), rows(3)))

    def test_a_residual_network_with_batch_norm_and_relu_in_place(self) -> None:
        torch.manual_seed(0)
        model = timm.create_model(
            "resnet18", num_classes=5, channels=(8, 12, 16, 20), stem_width=8, drop_path_rate=0.2
        )
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
        assert_exact(model, with_labels(images(3), images(2)))

    def test_a_vision_transformer_with_bare_tokens_and_positions(self) -> None:
        assert_exact(tiny_vit(), with_labels(images(4), images(1), images(3)))

    def test_a_vision_transformer_with_layer_scale_and_register_tokens(self) -> None:
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            depth=2,
            embed_dim=32,
            num_heads=2,
            num_classes=5,
            init_values=0.3,
            reg_tokens=2,
        )
        assert_exact(model, with_labels(images(4)))

    def test_bert_with_padding(self) -> None:
        batches = [(padded_texts((7, 3, 5)), torch.tensor([0, 2, 1]))]
        batches.append((padded_texts((2, 4), seed=1), torch.tensor([1, 1])))
        assert_exact(tiny_bert(), batches)

    def test_gpt2_for_classification(self) -> None:
        config = GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=16,
            num_labels=3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
        torch.manual_seed(0)
        texts = padded_texts((6, 4, 5))
        assert_exact(GPT2ForSequenceClassification(config), [(texts, torch.tensor([0, 2, 1]))])

    def test_gpt2_with_its_tied_embedding_and_head(self) -> None:
        config = GPT2Config(
            vocab_size=30,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=16,
            bos_token_id=1,
            eos_token_id=1,
        )
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double()

        def next_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            logits = model(input_ids=batch[0]).logits[:, :-1]
            return F.cross_entropy(logits.mT, batch[0][:, 1:])

        ids = torch.randint(30, (4, 6))
        sums = diagonal_hessian(model, [(ids, ids)], next_tokens, labels="observed")
        expected = squared_gradients_by_loop(model, [(ids, ids)], next_tokens)
        assert "lm_head.weight" not in sums
        for name, squares in expected.items():
            atol = 1e-9 * float(squares.max()) + 1e-28
            torch.testing.assert_close(sums[name], squares, rtol=1e-9, atol=atol, msg=name)

    def test_a_module_used_twice_is_summed_before_squaring(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 4)
                self.norm = nn.LayerNorm(4)
                self.head = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                x = self.norm(self.layer(x)).tanh()
                return self.head(self.norm(self.layer(x)))

        assert_exact(Twice(), with_labels(rows(5)))

    def test_a_second_use_without_gradient_adds_nothing(self) -> None:
        class Auxiliary(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                aside = self.layer(2 * x)  # not in the loss
                with torch.no_grad():
                    shift = self.layer(3 * x)
                return self.layer(x) + shift + 0 * aside.detach()

        assert_exact(Auxiliary(), with_labels(rows(5)))

    def test_weights_shared_by_two_modules_are_summed_before_squaring(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Embedding(9, 4)
                self.mix = nn.Linear(4, 4)
                self.again = nn.Linear(4, 4)
                self.again.weight = self.mix.weight
                self.head = nn.Linear(4, 9, bias=False)
                self.head.weight = self.embed.weight

            def forward(self, tokens: Tensor) -> Tensor:
                x = self.embed(tokens)
                return self.head(x + self.again(self.mix(x).tanh())).mean(1)

        tokens = torch.tensor([[1, 2, 2], [0, 1, 0], [5, 5, 5]])
        assert_exact(Tied(), with_labels(tokens))

    def test_positions_embedded_once_for_all_examples(self) -> None:
        class Positions(nn.Module):
            def __init__(self, rank: int) -> None:
                super().__init__()
                self.tokens = nn.Embedding(9, 4)
                self.places = nn.Embedding(8, 4)
                self.refine = nn.Linear(4, 4)
                self.head = nn.Linear(4, 3)
                self.rank = rank

            def forward(self, tokens: Tensor) -> Tensor:
                places = torch.arange(tokens.shape[1]).view((1,) * (self.rank - 1) + (-1,))
                where = self.places(places)
                if self.rank == 2:
                    where = self.refine(where)
                return self.head((self.tokens(tokens) + where).tanh()).mean(1)

        tokens = torch.arange(18).view(3, 6) % 9
        assert_exact(Positions(rank=2), with_labels(tokens))  # [1, T] → [1, T, D]
        assert_exact(Positions(rank=1), with_labels(tokens))  # [T] → [T, D]

    def test_activation_checkpointing(self) -> None:
        model = tiny_vit()
        model.set_grad_checkpointing(True)
        assert_exact(model, with_labels(images(4)))

    @pytest.mark.parametrize("in_place", [False, True])
    def test_a_compiled_model(self, in_place: bool) -> None:
        model: Any = mlp()
        if in_place:
            model.compile(backend="eager")
        else:
            model = torch.compile(model, backend="eager")
        batches = with_labels(rows(4))
        sums = diagonal_hessian(model, batches, cross_entropy, labels="observed")
        expected = diagonal_hessian(mlp(), batches, cross_entropy, labels="observed")
        for got, want in zip(sums.values(), expected.values(), strict=True):
            assert torch.equal(got, want)


class TestBatching:
    @pytest.mark.parametrize("labels", ["sampled", "observed"])
    def test_the_sums_do_not_depend_on_the_batch_size(self, labels: Any) -> None:
        model = tiny_vit().double()
        ((x, y),) = with_labels(images(14))
        results = []
        for size in (1, 4, 7, 14):
            batches = zip(x.split(size), y.split(size), strict=True)
            results.append(diagonal_hessian(model, batches, cross_entropy, labels=labels))
        for other in results[1:]:
            for name, squares in results[0].items():
                atol = 1e-9 * float(squares.max()) + 1e-28
                torch.testing.assert_close(other[name], squares, rtol=1e-9, atol=atol, msg=name)

    def test_indices_make_the_labels_independent_of_order_and_ranks(self) -> None:
        ((x, y),) = with_labels(rows(6))
        straight = PerExampleFisher(mlp(), cross_entropy, seed=3)
        straight.update((x, y), indices=range(6))
        shared = {name: torch.zeros_like(p) for name, p in straight.sums().items()}
        for rank in range(2):
            part = PerExampleFisher(mlp(), cross_entropy, seed=3)
            part.update((x[rank::2].flip(0), y[rank::2]), indices=[*range(rank, 6, 2)][::-1])
            for name, squares in part.sums().items():
                shared[name] += squares
        for name, squares in straight.sums().items():
            torch.testing.assert_close(shared[name], squares, rtol=1e-10, atol=0)

    def test_other_seeds_draw_other_labels(self) -> None:
        batches = with_labels(rows(6))
        a, b = (diagonal_hessian(mlp(), batches, cross_entropy, seed=seed) for seed in (0, 1))
        assert not torch.allclose(a["0.weight"], b["0.weight"], rtol=1e-2)

    def test_examples_are_counted_on_without_indices(self) -> None:
        ((x, y),) = with_labels(rows(6))
        whole, parts = (PerExampleFisher(mlp(), cross_entropy) for _ in range(2))
        whole.update((x, y), indices=range(6))
        parts.update((x[:2], y[:2]))
        parts.update((x[2:], y[2:]))
        assert parts.num_examples == whole.num_examples == 6
        torch.testing.assert_close(parts.sums(), whole.sums())

    def test_before_the_first_batch_the_sums_are_zero(self) -> None:
        estimator = PerExampleFisher(mlp(), cross_entropy)
        assert estimator.num_examples == 0
        assert all((squares == 0).all() for squares in estimator.sums().values())

    def test_sums_are_copies(self) -> None:
        estimator = PerExampleFisher(mlp(), cross_entropy)
        estimator.update(with_labels(rows(3))[0])
        estimator.sums()["0.weight"].zero_()
        assert estimator.sums()["0.weight"].sum() > 0

    def test_indices_must_match_the_batch(self) -> None:
        estimator = PerExampleFisher(mlp(), cross_entropy)
        with pytest.raises(InputError, match="one per example of the batch; got 2 for 3 examples"):
            estimator.update(with_labels(rows(3))[0], indices=[0, 1])


class TestSelection:
    def test_frozen_parameters_are_left_out(self) -> None:
        model = mlp()
        model[0].requires_grad_(False)
        sums = diagonal_hessian(model, with_labels(rows(4)), cross_entropy, labels="observed")
        expected = squared_gradients_by_loop(model, with_labels(rows(4)), cross_entropy)
        assert list(sums) == ["2.weight", "2.bias"]
        torch.testing.assert_close(sums, expected)

    def test_selected_parameters_are_the_same_as_among_all(self) -> None:
        batches = with_labels(rows(4))
        every = diagonal_hessian(mlp(), batches, cross_entropy)
        some = diagonal_hessian(mlp(), batches, cross_entropy, parameters=["0.bias", "2.*"])
        assert list(some) == ["0.bias", "2.weight", "2.bias"]
        for name, squares in some.items():
            assert torch.equal(squares, every[name])

    def test_unused_parameters_are_zero(self) -> None:
        model = mlp()
        model.spare = nn.LSTM(2, 2).double()
        model.forward = lambda x: model[2](model[1](model[0](x)))
        sums = diagonal_hessian(model, with_labels(rows(4)), cross_entropy)
        assert (sums["spare.weight_ih_l0"] == 0).all()
        assert sums["0.weight"].sum() > 0


class Late(nn.Module):
    """Uses some parameters only when an example is large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.late = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if (x.abs() > 100).any():
            y = y + self.late(x / 100) * self.scale
        return y


class TestSafety:
    def test_parameters_first_used_after_the_probe_are_exact(self) -> None:
        torch.manual_seed(0)
        model = Late().double()
        small, large = rows(3), rows(3, seed=1) + 1000.0
        batches = with_labels(small, large, large)
        with pytest.warns(CurvatureWarning, match=r"late\.bias.*not used by the examples of the"):
            sums = diagonal_hessian(model, batches, cross_entropy, labels="observed")
        expected = squared_gradients_by_loop(model, batches, cross_entropy)
        assert expected["late.weight"].sum() > 0
        torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-20)

    def test_calls_that_cannot_be_told_apart_in_a_later_batch_are_exact(self) -> None:
        class Packed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                kept = x.flatten(0, 1)[(x != 0).any(-1).flatten()]  # no padding
                where = (x != 0).any(-1).nonzero()[:, 0]
                return x.new_zeros(len(x), 3).index_add(0, where, self.layer(kept).tanh())

        torch.manual_seed(0)
        full = rows(8).view(4, 2, 4)
        cut = full.clone()
        cut[1, 1] = 0
        batches = with_labels(full, cut)
        with pytest.warns(CurvatureWarning, match="used on rows that the data chose"):
            sums = diagonal_hessian(
                model := Packed().double(), batches, cross_entropy, labels="observed"
            )
        expected = squared_gradients_by_loop(model, batches, cross_entropy)
        torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-20)

    def test_an_input_changed_in_place_after_the_call_fails_as_in_training(self) -> None:
        class Overwriting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                x = 1 * x
                y = self.layer(x)
                if (x > 100).any():
                    x.zero_()
                return y

        estimator = PerExampleFisher(Overwriting().double(), cross_entropy, labels="observed")
        estimator.update(with_labels(rows(4))[0])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            estimator.update(with_labels(rows(4) + 1000)[0])

    def test_biases_alone_need_no_inputs(self) -> None:
        model = mlp()
        model[0].weight.requires_grad_(False)
        model[2].weight.requires_grad_(False)
        assert_exact(model, with_labels(rows(4)))

    def test_a_loss_that_is_not_finite_is_refused(self) -> None:
        estimator = PerExampleFisher(mlp(), cross_entropy, labels="observed")
        estimator.update(with_labels(rows(3))[0])
        broken = rows(2)
        broken[1, 0] = float("nan")
        with pytest.raises(InputError, match="loss: must be finite; got nan on the examples 3, 4"):
            estimator.update(with_labels(broken)[0])

    def test_squares_that_overflow_are_refused_by_name(self) -> None:
        def mean_output(model: nn.Module, batch: Tensor) -> Tensor:
            return model(batch).mean()

        estimator = PerExampleFisher(nn.Linear(4, 3), mean_output, labels="observed")
        estimator.update(torch.ones(2, 4))
        estimator.update(torch.full((2, 4), 1e25))  # finite loss and gradients
        with pytest.raises(InputError, match="weight: must have finite squared gradients; got NaN"):
            estimator.sums()

    def test_half_precision_gradients_are_squared_in_single_precision(self) -> None:
        def tiny(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return 1e-12 * model(batch[0]).float().square().mean()

        model = mlp().float()
        sums = diagonal_hessian(model, [(rows(4).float(), torch.zeros(4))], tiny, labels="observed")
        expected = squared_gradients_by_loop(
            model, [(rows(4), torch.zeros(4))], lambda m, b: 1e-12 * m(b[0]).square().mean()
        )
        assert sums["0.weight"].dtype == torch.float32
        for name, squares in expected.items():
            assert squares.max() < 1e-20
            torch.testing.assert_close(
                sums[name].double(), squares, rtol=0.1, atol=0.05 * float(squares.max())
            )


class TestLeavesNoTrace:
    def test_the_model_is_as_it_was(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        ).double()
        model.train()
        model[1].eval()
        model[0].bias.requires_grad_(False)
        cross_entropy(model, with_labels(rows(4))[0]).backward()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        identities = [(id(p), p.requires_grad) for p in model.parameters()]
        modes = [module.training for module in model.modules()]
        random = torch.get_rng_state()
        diagonal_hessian(model, with_labels(rows(5), rows(2)), cross_entropy)
        assert [(id(p), p.requires_grad) for p in model.parameters()] == identities
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
        assert not any(module._forward_hooks for module in model.modules())
        assert {n for n, p in model.named_parameters() if p.grad is not None} == grads.keys()
        for name, parameter in model.named_parameters():
            if name in grads:
                assert torch.equal(parameter.grad, grads[name])
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])

    def test_the_model_is_as_it_was_after_an_error(self) -> None:
        model = tiny_vit().train()

        def failing(model: nn.Module, batch: Any) -> Tensor:
            if len(batch[0]) == 3:
                cross_entropy(model, batch)
                raise KeyError("the user's own")
            return cross_entropy(model, batch)

        estimator = PerExampleFisher(model, failing)
        estimator.probe((images(2), torch.zeros(2).long()))
        with pytest.raises(KeyError, match="the user's own"):
            estimator.update((images(3), torch.zeros(3).long()))
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
        assert isinstance(model.cls_token, nn.Parameter)

    @pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
    def test_it_works_where_gradients_are_off(self, context: Any) -> None:
        model = tiny_vit().double()
        expected = diagonal_hessian(model, with_labels(images(3)), cross_entropy)
        with context():
            batches = with_labels(images(3) + 0)
            estimator = PerExampleFisher(model, cross_entropy)
            estimator.update(batches[0])
            sums = estimator.sums()
            assert torch.is_grad_enabled() is False
        for name, squares in expected.items():
            assert not sums[name].is_inference()
            assert torch.equal(sums[name], squares)

    def test_hooks_of_the_user_see_and_change_outputs_as_always(self) -> None:
        model = mlp()
        model[0].register_forward_hook(lambda module, args, output: 2 * output)
        assert_exact(model, with_labels(rows(4)))

    def test_nothing_is_warned_about_a_covered_model(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            diagonal_hessian(mlp(), with_labels(rows(4)), cross_entropy)
        assert [w for w in caught if issubclass(w.category, CurvatureWarning)] == []
