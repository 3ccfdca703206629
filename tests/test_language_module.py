"""Language models through the whole of lit-merge: trained, measured, merged, tested, corrected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lit_merge
from lit_merge.callbacks import DiagonalHessian
from lit_merge.curvature import PerExampleFisher
from lit_merge.errors import InputError
from lit_merge.evaluation.measurement import evaluate
from lit_merge.evaluation.model_entry import ModelEntry
from lit_merge.expert import open_expert
from lit_merge.least_squares import LeastSquares
from lit_merge.methods import Average, GradientMatching
from lit_merge.module import MergeModule
from lit_merge.tasks import (
    LanguageTask,
    MultiTaskDataModule,
    TaskDataModule,
    TransformersCausalLM,
)
from lit_merge.terminal import evaluation_table
from tests.tiny_language import CONFIG, tiny_model, tiny_task

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with texts of two topics, a tokenizer, a base and an expert per topic."""
    place = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    base = tiny_model()
    with torch.no_grad():
        for parameter in base.parameters():  # the default, 0.02, leaves nothing to measure
            parameter.add_(0.3 * torch.randn_like(parameter))
    base.model.save_pretrained(place / "base")
    for label, topic in enumerate(("sports", "business")):
        task = tiny_task(place, where={"label": label})
        trainer = L.Trainer(
            **QUIET,
            max_steps=4,
            default_root_dir=place / topic,
            callbacks=[DiagonalHessian(output=str(place / topic / "expert"), reduction="sum")],
            enable_checkpointing=False,
        )
        module = TransformersCausalLM(str(place / "base"), lr=5e-2)
        trainer.fit(module, TaskDataModule(task, batch_size=4))
    return place


def tasks(folder: Path, **options: Any) -> dict[str, LanguageTask]:
    names = ("sports", "business")
    return {n: tiny_task(folder, where={"label": i}, **options) for i, n in enumerate(names)}


def loss_of_transformers(
    network: nn.Module, task: LanguageTask, split: str = "test"
) -> list[float]:
    """Return each block's loss as the library computes it: it shifts the labels itself."""
    losses = []
    examples = task.split(split)  # type: ignore[arg-type]
    assert examples is not None
    for block, labels in (examples[i] for i in range(len(examples))):
        tokens = torch.tensor([[*block, labels[-1]]])
        with torch.no_grad():
            losses.append(float(network(input_ids=tokens, labels=tokens).loss))
    return losses


def loaded(path: Path) -> nn.Module:
    """Return the network of an expert folder or of the base."""
    if (path / "config.json").exists():
        return TransformersCausalLM(str(path)).eval().model
    return TransformersCausalLM("tiny", config=CONFIG, checkpoint=str(path)).eval().model


def test_the_loss_is_that_of_transformers(folder: Path) -> None:
    task = tiny_task(folder)
    module = TransformersCausalLM(str(folder / "base")).eval()
    assert task.test is not None
    batch = task.collate([task.test[i] for i in range(len(task.test))])
    expected = sum(loss_of_transformers(module.model, task)) / len(task.test)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert float(module.training_step(batch, 0).detach()) == pytest.approx(expected, rel=1e-6)
    assert module(batch[0]).shape == (*batch[1].shape, CONFIG["vocab_size"])


def test_a_test_logs_nll_perplexity_and_the_accuracy_of_the_next_token(folder: Path) -> None:
    task = tiny_task(folder)
    module = TransformersCausalLM(str(folder / "base"))
    trainer = L.Trainer(**QUIET)
    trainer.test(module, TaskDataModule(task, batch_size=3), verbose=False)
    losses = loss_of_transformers(module.model, task)
    nll = sum(losses) / len(losses)
    assert float(trainer.callback_metrics["test/nll"]) == pytest.approx(nll, rel=1e-5)
    perplexity = torch.tensor(nll).exp()
    assert float(trainer.callback_metrics["test/perplexity"]) == pytest.approx(float(perplexity))
    assert task.test is not None
    right = [
        module.model(input_ids=torch.tensor(block)[None]).logits[0].argmax(-1).numpy() == labels
        for block, labels in (task.test[i] for i in range(len(task.test)))
    ]
    mean = sum(one.mean() for one in right) / len(right)
    assert float(trainer.callback_metrics["test/accuracy"]) == pytest.approx(mean)


def test_a_checkpoint_loads_without_the_folder_that_it_came_from(
    folder: Path, tmp_path: Path
) -> None:
    trainer = L.Trainer(**QUIET, max_steps=1, default_root_dir=tmp_path)
    module = TransformersCausalLM(str(folder / "base"), lr=1e-3)
    trainer.fit(module, TaskDataModule(tiny_task(folder), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = TransformersCausalLM.load_from_checkpoint(
        tmp_path / "last.ckpt", model="gone", weights_only=True
    )
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert (again.lr, again.num_classes) == (1e-3, CONFIG["vocab_size"])


def squares(network: nn.Module, task: LanguageTask, *, mean: bool) -> dict[str, Tensor]:
    """Return Σ over blocks of the squared gradient of the block's loss, one by one in float64."""
    network = network.double()
    named = dict(network.named_parameters())
    totals = {name: torch.zeros_like(value) for name, value in named.items()}
    assert task.train is not None
    for block, labels in (task.train[i] for i in range(len(task.train))):
        logits = network(input_ids=torch.tensor(block)[None]).logits[0]
        terms = -logits.log_softmax(-1)[torch.arange(len(labels)), torch.tensor(labels)]
        loss = terms.mean() if mean else terms.sum()
        for name, grad in zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True):
            totals[name] += grad.square()
    return totals


@pytest.mark.parametrize("reduction", ["loss", "mean", "sum"])
def test_the_curvature_has_a_block_for_an_example(folder: Path, reduction: Any) -> None:
    task = tiny_task(folder)
    module = TransformersCausalLM(str(folder / "base")).double().eval()

    def loss(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        logits = model(batch[0]).flatten(0, -2)
        return nn.functional.cross_entropy(logits, batch[1].flatten())

    fisher = PerExampleFisher(module, loss, labels="observed", reduction=reduction)
    assert task.train is not None
    examples = [task.train[i] for i in range(len(task.train))]
    for start in range(0, len(examples), 5):
        batch = task.collate(examples[start : start + 5])
        fisher.update(batch, indices=range(start, start + len(batch[1])))
    expected = squares(module.model, task, mean=reduction != "sum")
    found = fisher.sums()
    assert {name.removeprefix("model.") for name in found} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], value, rtol=1e-8, atol=1e-12)


def test_the_callback_counts_blocks_and_covers_tied_weights(folder: Path) -> None:
    expert = open_expert(folder / "sports" / "expert")
    task = tasks(folder)["sports"]
    assert task.train is not None
    assert expert.info is not None
    assert expert.info.num_examples == len(task.train)
    assert expert.hessian is not None
    assert float(expert.hessian.tensor("model.transformer.wte.weight").min()) > 0
    expert.close()


def merged(folder: Path, name: str, experts: dict[str, Path], scale: Any) -> Path:
    output = folder / name
    lit_merge.merge(
        folder / "base",
        experts,
        method=GradientMatching(scale=scale, damping=0.0),
        output=output,
        replace=True,
    )
    return output


def test_taking_an_expert_out_of_a_merge_leaves_the_merge_of_the_others(folder: Path) -> None:
    experts = {name: folder / name / "expert" for name in ("sports", "business")}
    everything = merged(folder, "all", experts, 1.0)
    rest = merged(
        folder,
        "rest",
        {"all": everything, "gone": experts["sports"]},
        {"all": 1.0, "gone": -1.0},
    )
    gone, left = (open_expert(experts[name]) for name in ("sports", "business"))
    result = open_expert(rest)
    assert gone.hessian is not None
    assert left.hessian is not None
    for name in gone.hessian:
        value = result.weights.tensor(name.removeprefix("model."))
        # One expert alone is merged into itself. What is lost in float32 grows with what is taken
        # out: where the expert that left was by far the surer one, little is known of the others.
        expected, own = left.weights.tensor(name), left.hessian.tensor(name)
        grows = 1 + gone.hessian.tensor(name) / own.clamp(min=1e-30)  # zero: an unseen position
        size = max(expected.abs().max(), gone.weights.tensor(name).abs().max())
        assert bool(((value - expected).abs() <= 4e-7 * size * grows).all()), name
    for expert in (gone, left, result):
        expert.close()


def test_evaluation_measures_perplexity_of_every_model_on_every_topic(folder: Path) -> None:
    known = tasks(folder)
    experts = {name: folder / name / "expert" for name in known}
    everything = merged(folder, "both", experts, 1.0)
    # Its experts' names are no tasks: it is one model for all of them.
    renamed = merged(folder, "renamed", {"a": experts["sports"], "b": experts["business"]}, 0.5)
    found = evaluate(
        L.Trainer(**QUIET),
        tiny_model(),
        {
            "base": ModelEntry(str(folder / "base"), "base"),
            "sports": str(experts["sports"]),
            "business": str(experts["business"]),
            "both": str(everything),
            "renamed": str(renamed),
        },
        known,
        batch_size=3,
        probe=True,
    )
    paths = {"base": folder / "base", **experts, "both": everything, "renamed": renamed}
    rows = {(row.model, row.task): row for row in found.rows}
    assert set(rows) == {
        *((model, task) for model in ("base", "both", "renamed") for task in known),
        *((task, task) for task in known),
    }
    for (model, task), row in rows.items():
        losses = loss_of_transformers(loaded(paths[model]), known[task])
        nll = torch.tensor(losses, dtype=torch.float64).mean()
        assert row.nll == pytest.approx(float(nll), rel=1e-5)
        assert row.perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
        assert row.num_examples == 8 * len(losses)
    assert "linear probe: left out for sports, a language task" in found.notes[0]
    line = next(line for line in found.lines() if line.model == "both")
    product = rows["both", "sports"].perplexity * rows["both", "business"].perplexity  # type: ignore[operator]
    assert line.perplexity == pytest.approx(product**0.5)
    table = evaluation_table(found)
    assert [column.header for column in table.columns][-1] == "perplexity"


def test_an_expert_alone_is_solved_by_least_squares_for_itself(folder: Path) -> None:
    task = tasks(folder)["sports"]
    expert = folder / "sports" / "expert"
    module = MergeModule(
        tiny_model(), {"sports": str(expert)}, method=Average(), least_squares=LeastSquares()
    )
    trainer = L.Trainer(**QUIET, max_steps=0, enable_checkpointing=False)
    trainer.fit(module, datamodule=MultiTaskDataModule({"sports": task}, batch_size=4))
    assert module.solved
    assert task.test is not None
    inputs, _ = task.collate([task.test[i] for i in range(len(task.test))])
    with torch.no_grad():
        expected = loaded(expert)(**inputs).logits
        torch.testing.assert_close(module(inputs, "sports"), expected, rtol=1e-3, atol=1e-3)


def test_a_learned_fit_takes_the_tokens_for_labels(folder: Path) -> None:
    known = tasks(folder)
    experts = {name: str(folder / name / "expert") for name in known}
    options = {"base": str(folder / "base"), "method": Average(), "holdout": 0.0}

    def fit(steps: int, **more: Any) -> float:
        torch.manual_seed(0)
        module = MergeModule(tiny_model(), experts, **{**options, **more})
        data = MultiTaskDataModule(known, batch_size=4)  # type: ignore[arg-type]
        L.Trainer(**QUIET, max_steps=steps, enable_checkpointing=False).fit(module, data)
        trainer = L.Trainer(**QUIET)
        trainer.test(module, data, verbose=False)
        return float(trainer.callback_metrics["test/nll"])

    before = fit(0, closed_form="none")
    assert fit(0, closed_form="tact") != before
    assert fit(20, closed_form="none", teacher="labels", trainable="all", weights_lr=1e-2) < before
    with pytest.raises(
        InputError, match='teacher: must be "labels" for the language task \'sports'
    ):
        fit(1)


@pytest.mark.parametrize(
    ("options", "task", "message"),
    [
        (
            {"config": {**CONFIG, "vocab_size": 99}},
            {},
            "tokenizer must be the model's, which has 99",
        ),
        ({"config": CONFIG}, {"block_length": 17}, "block_length: must be at most .* 16; got 17"),
    ],
)
def test_tokens_and_blocks_that_do_not_fit_the_model_are_refused(
    folder: Path, options: dict[str, Any], task: dict[str, Any], message: str
) -> None:
    module = TransformersCausalLM("tiny", **options)
    trainer = L.Trainer(**QUIET, max_steps=1, enable_checkpointing=False)
    with pytest.raises(InputError, match=message):
        trainer.fit(module, TaskDataModule(tiny_task(folder, **task)))
    with pytest.raises(InputError, match=message):
        trainer.test(module, TaskDataModule(tiny_task(folder, **task)), verbose=False)


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"model: must be .* with a causal language model, or"):
        TransformersCausalLM("no/such/folder")
