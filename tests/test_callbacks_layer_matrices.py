from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lit_merge.callbacks import DiagonalHessian, InputGrams, KroneckerFactors
from lit_merge.checkpoint import Checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from tests.tiny_fits import (
    NUM_EXAMPLES,
    QUIET,
    TinyClassifier,
    assert_same,
    examples,
    fit,
    loader,
    tiny_classifier,
    tiny_trainer,
)

pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

WEIGHTS = ("model.body.weight", "model.head.weight")


def tensors_of(opened: Checkpoint | None) -> dict[str, Tensor]:
    assert opened is not None
    return {name: opened.tensor(name).clone() for name in opened}


def grams_in(folder: Path) -> dict[str, Tensor]:
    return tensors_of(open_expert(folder).gram)


def factors_in(folder: Path) -> dict[str, Tensor]:
    return tensors_of(open_expert(folder).kronecker)


def grams_by_loop(module: TinyClassifier, count: int = NUM_EXAMPLES) -> dict[str, Tensor]:
    """Return Σ x xᵀ of both layers over the first examples, in float64, one by one."""
    found = {"model.body.weight": torch.zeros(4, 4).double()}
    found["model.head.weight"] = torch.zeros(6, 6).double()
    model = nn.Sequential(*module.model).double()
    with torch.no_grad():
        for x in examples().tensors[0][:count].double():
            hidden = model[1](model[0](x))
            found["model.body.weight"] += torch.outer(x, x)
            found["model.head.weight"] += torch.outer(hidden, hidden)
    module.float()
    return found


def factors_by_loop(module: TinyClassifier) -> dict[str, Tensor]:
    """Return the factors with observed labels over all examples, in float64, one by one."""
    grams = grams_by_loop(module)
    model = nn.Sequential(*module.model).double()
    sums = [torch.zeros(6, 6).double(), torch.zeros(3, 3).double()]
    for x, label in zip(*examples().tensors, strict=True):
        body = model[0](x.double())
        head = model[2](model[1](body))
        gradients = torch.autograd.grad(cross_entropy(head, label), [body, head])
        for total, g in zip(sums, gradients, strict=True):
            total += torch.outer(g, g)
    module.float()
    found = {f"{name}.input": gram for name, gram in grams.items()}
    found |= {f"{n}.output": s / NUM_EXAMPLES for n, s in zip(WEIGHTS, sums, strict=True)}
    return found


def test_grams_are_those_of_the_trained_weights_over_all_examples(tmp_path: Path) -> None:
    module = fit(tmp_path, InputGrams(batch_size=7, task="clouds"))
    assert_same(grams_in(tmp_path / "expert"), grams_by_loop(module))
    info = open_expert(tmp_path / "expert").info
    assert (info.task, info.estimator, info.num_examples) == ("clouds", None, None)
    assert info.details["gram"]["num_examples"] == NUM_EXAMPLES
    assert info.details["gram"]["left_out"] == {}


def test_factors_are_those_of_the_trained_weights_over_all_examples(tmp_path: Path) -> None:
    module = fit(tmp_path, KroneckerFactors(labels="observed", batch_size=7))
    assert_same(factors_in(tmp_path / "expert"), factors_by_loop(module))
    details = open_expert(tmp_path / "expert").info.details["kronecker"]
    assert (details["labels"], details["num_examples"]) == ("observed", NUM_EXAMPLES)


def test_a_subset_is_scaled_to_all_examples(tmp_path: Path) -> None:
    still = tiny_classifier(lr=0.0)
    for kind in (InputGrams, KroneckerFactors):
        fit(tmp_path / kind.__name__, kind(max_examples=20, seed=5), module=still)
    grams = grams_in(tmp_path / "InputGrams" / "expert")
    factors = factors_in(tmp_path / "KroneckerFactors" / "expert")
    whole = grams_by_loop(still)
    for name, gram in grams.items():
        assert not torch.allclose(gram.double(), whole[name], rtol=1e-3)
        assert float(gram.trace()) == pytest.approx(float(whole[name].trace()), rel=0.3)
        torch.testing.assert_close(factors[f"{name}.input"], gram)
    details = open_expert(tmp_path / "InputGrams" / "expert").info.details["gram"]
    assert (details["num_seen"], details["num_examples"]) == (20, NUM_EXAMPLES)


def test_only_the_weights_that_are_asked_for_are_measured(tmp_path: Path) -> None:
    fit(tmp_path, InputGrams(parameters=["*.head.*"], precision="float64"))
    assert list(grams_in(tmp_path / "expert")) == ["model.head.weight"]


@pytest.mark.parametrize("kinds", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_all_callbacks_write_into_one_folder_in_any_order(tmp_path: Path, kinds: Any) -> None:
    every = (DiagonalHessian(), InputGrams(), KroneckerFactors())
    callbacks = [every[kind] for kind in kinds]
    fit(tmp_path, *callbacks, max_epochs=1)
    expert = open_expert(tmp_path / "expert")
    assert expert.hessian is not None
    assert set(tensors_of(expert.gram)) == set(WEIGHTS)
    assert set(tensors_of(expert.kronecker)) == {
        f"{name}.{side}" for name in WEIGHTS for side in ("input", "output")
    }
    assert expert.info.estimator == "exact"
    assert {"gram", "kronecker", "curvature"} <= set(expert.info.details)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    plain, watched = tiny_classifier(), tiny_classifier()
    torch.manual_seed(3)
    tiny_trainer(tmp_path / "plain").fit(plain, loader(generator=None))
    torch.manual_seed(3)
    callbacks = (InputGrams(), KroneckerFactors())
    tiny_trainer(tmp_path / "watched", *callbacks).fit(watched, loader(generator=None))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


def test_compiled_layers_are_stored_under_plain_names(tmp_path: Path) -> None:
    module = tiny_classifier(lr=0.0)
    expected = grams_by_loop(module)
    body = module.model.get_submodule("body")
    module.model.add_module("body", torch.compile(body, backend="eager"))  # type: ignore[arg-type]
    fit(tmp_path, DiagonalHessian(), InputGrams(), KroneckerFactors(), module=module, max_epochs=1)
    assert_same(grams_in(tmp_path / "expert"), expected)
    assert "model.body.weight.output" in factors_in(tmp_path / "expert")


class Padded(TinyClassifier):
    """Sums the layers over the tokens of a text; padded places hold large numbers."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        texts, labels = batch
        kept = texts["attention_mask"].unsqueeze(-1)
        return cross_entropy((self(texts["tokens"]) * kept).sum(1), labels)


class Texts(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        tokens, mask, label = super().__getitem__(index)  # type: ignore[no-untyped-call]
        return {"tokens": tokens, "attention_mask": mask}, label


@pytest.mark.parametrize("padding", ["skip", "count"])
def test_padding_is_skipped_or_counted(tmp_path: Path, padding: Any) -> None:
    tokens = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 4, 3, 1])[:, None]
    tokens = tokens.where(mask.unsqueeze(-1), 10.0)
    data = DataLoader(Texts(tokens, mask.long(), torch.arange(6) % 3), batch_size=2)
    torch.manual_seed(0)
    module = Padded(lr=0.0)
    callbacks = (InputGrams(padding=padding), KroneckerFactors(padding=padding))
    fit(tmp_path, *callbacks, module=module, data=data, max_epochs=1)
    rows = tokens[mask] if padding == "skip" else tokens.reshape(-1, 4)
    expected = rows.double().mT @ rows.double()
    grams = grams_in(tmp_path / "expert")["model.body.weight"]
    torch.testing.assert_close(grams, expected.float(), rtol=1e-5, atol=1e-4)
    found = factors_in(tmp_path / "expert")["model.body.weight.input"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (InputGrams, {"max_examples": 0}, r"max_examples: must be a positive integer.*got 0"),
        (InputGrams, {"largest": 0}, r"largest: must be a positive integer.*got 0"),
        (InputGrams, {"padding": "no"}, r"padding: must be one of skip, count; got 'no'"),
        (InputGrams, {"precision": "bf16"}, r"precision: must be one of float32, float64; got"),
        (KroneckerFactors, {"labels": "true"}, r"labels: must be one of sampled, observed"),
        (KroneckerFactors, {"reduction": "max"}, r"reduction: must be one of loss, mean, sum"),
        (KroneckerFactors, {"samples": 0}, r"samples: must be a positive integer"),
        (
            KroneckerFactors,
            {"samples": 2, "labels": "observed"},
            r'samples: must be 1 without labels "sampled"; got 2 with labels "observed"',
        ),
    ],
)
def test_wrong_settings_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (InputGrams(parameters=["*.boddy.*"]), r"parameters: must match trained .*'\*.boddy.\*'"),
        (InputGrams(parameters=["*.bias"]), r"parameters: must name the weight of at least one"),
        (KroneckerFactors(largest=2), r"model\.body\.weight: its matrix would have 6 rows"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(
    tmp_path: Path, callback: Any, message: str
) -> None:
    trainer = tiny_trainer(tmp_path, callback)
    with pytest.raises(InputError, match=message):
        trainer.fit(tiny_classifier(), loader())
    assert trainer.global_step == 0
    assert not (tmp_path / "expert").exists()


def test_inputs_that_are_not_finite_leave_nothing_behind(tmp_path: Path) -> None:
    inputs, labels = examples().tensors
    inputs[40, 0] = float("nan")
    data = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    with pytest.raises(InputError, match=r"model\.body\.weight: must have finite inputs"):
        fit(tmp_path, InputGrams(), module=tiny_classifier(lr=0.0), data=data, max_epochs=1)
    assert list(tmp_path.glob("*expert*")) == []


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("InputGrams", {"parameters": ["a.*"], "padding": "count", "largest": 99}),
        ("KroneckerFactors", {"labels": "observed", "precision": "float64", "weights": "best"}),
    ],
)
def test_the_callbacks_can_stand_in_yaml(name: str, settings: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.Callback, "callback")
    entry = {"class_path": f"lit_merge.callbacks.{name}", "init_args": settings}
    made = parser.instantiate_classes(parser.parse_object({"callback": entry})).callback
    assert type(made).__name__ == name
    for key, value in settings.items():
        assert getattr(made, key) == value


def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    module = tiny_classifier()
    module.model.get_submodule("body").weight._is_flat_param = True  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"InputGrams: must have whole parameters on every rank"):
        fit(tmp_path, InputGrams(), module=module)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [NUM_EXAMPLES, 1])
def test_two_processes_gather_what_one_gathers(tmp_path: Path, size: int) -> None:
    """With an odd number of examples, and with one rank that has none."""
    alone: dict[str, Any] = {"devices": 1}
    for name, settings in (("one", alone), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        callbacks = (InputGrams(), KroneckerFactors(labels="sampled", seed=2))
        data = loader(size, batch_size=4)
        still = tiny_classifier(lr=0.0)
        fit(tmp_path / name, *callbacks, module=still, data=data, max_epochs=1, **settings)
    one, two = (tmp_path / name / "expert" for name in ("one", "two"))
    for name, expected in {**grams_in(one), **factors_in(one)}.items():
        found = {**grams_in(two), **factors_in(two)}[name]
        close = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=close)
    details = [open_expert(folder).info.details["kronecker"] for folder in (one, two)]
    assert details[0]["num_seen"] == details[1]["num_seen"] == size
