"""Every file in configs/ is parsed by its command's parser, and what it names is made.

What would be downloaded is replaced by options on the command line, as a user would do it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from jsonargparse import ArgumentParser
from torch import nn

import lit_merge
from lit_merge.alignment.groups import ExpertGroup
from lit_merge.alignment.settings import AlignSettings
from lit_merge.cli.align import align_parser
from lit_merge.cli.correct import correct_parser
from lit_merge.cli.curvature import curvature_parser
from lit_merge.cli.evaluate import evaluate_parser
from lit_merge.cli.export import export_parser
from lit_merge.cli.fit import FitCLI
from lit_merge.cli.forecast import forecast_parser
from lit_merge.cli.merge import _outputs, merge_parser
from lit_merge.cli.parsing import instantiate, parse
from lit_merge.streaming import Override

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny encoder in place of MiniLM."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def made(parser: ArgumentParser, name: str, *options: str) -> Any:
    return instantiate(parser, parse(parser, ["--config", str(CONFIGS / name), *options]))


def test_every_config_has_a_test() -> None:
    tested = {name for name in globals() if name.startswith("test_") and name.endswith("_config")}
    assert {f"test_{path.stem}_config" for path in CONFIGS.glob("*.yaml")} == tested


def test_fit_text_config(encoder: str, tmp_path: Path) -> None:
    cli = FitCLI(
        [
            *("--config", str(CONFIGS / "fit_text.yaml")),
            *("--model.model", encoder, "--trainer.default_root_dir", str(tmp_path)),
            *("--trainer.accelerator", "cpu"),
        ]
    )
    assert isinstance(cli.model, lit_merge.TransformersClassifier)
    assert isinstance(cli.datamodule, lit_merge.TaskDataModule)
    callbacks = [type(callback).__name__ for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    assert {"DiagonalHessian", "ActivationStatistics"} <= set(callbacks)


def test_fit_vision_config(tmp_path: Path) -> None:
    cli = FitCLI(
        [
            *("--config", str(CONFIGS / "fit_vision.yaml")),
            *("--model.pretrained", "false", "--trainer.default_root_dir", str(tmp_path)),
            *("--trainer.accelerator", "cpu", "--data.num_workers", "0"),
        ]
    )
    assert isinstance(cli.model, lit_merge.TimmClassifier)
    assert isinstance(cli.datamodule.task, lit_merge.ImageTask)


def test_curvature_config(encoder: str) -> None:
    options = made(curvature_parser(), "curvature.yaml", "--model.model", encoder)
    assert isinstance(options.model, L.LightningModule)
    assert isinstance(options.data, lit_merge.TaskDataModule)
    assert options.labels == "sampled"


def test_align_config(encoder: str) -> None:
    options = made(align_parser(), "align.yaml", "--model.model", encoder)
    assert isinstance(options.model, nn.Module)
    assert options.groups == {
        "first": ExpertGroup("runs/base-a", {"trec": "runs/trec"}),
        "second": ExpertGroup("runs/base-b", {"subj": "runs/subj"}),
    }
    assert list(options.tasks) == ["trec", "subj"]
    assert (options.by, options.cycle_consistent, options.output) == ("auto", False, "aligned")


def test_merge_config() -> None:
    options = made(merge_parser(), "merge.yaml")
    assert options.method == lit_merge.GradientMatching(scale=1.0)
    assert options.policy == lit_merge.ParametersPolicy()
    assert options.experts == {"trec": "runs/trec", "subj": "runs/subj"}


def test_merge_sweep_config() -> None:
    options = made(merge_parser(), "merge_sweep.yaml")
    assert options.sweep == {"scale": [0.25, 0.5, 0.75, 1.0]}
    assert options.overrides == {
        "embeddings.*": Override(action="keep"),
        "encoder.layer.0.*": Override(method=lit_merge.Average()),
    }
    assert list(_outputs(options.as_dict())) == [
        Path("merged/sweep") / f"scale={scale}" for scale in (0.25, 0.5, 0.75, 1.0)
    ]


def test_merge_groups_config(encoder: str) -> None:
    options = made(merge_parser(), "merge_groups.yaml", "--model.model", encoder)
    assert list(options.groups) == ["first", "second"]
    assert options.groups["second"] == ExpertGroup("runs/base-b", {"subj": "runs/subj"})
    assert options.align == AlignSettings()
    assert options.experts is None
    assert isinstance(options.model, lit_merge.TransformersClassifier)
    assert [task.num_classes for task in options.tasks.values()] == [6, 2]


def test_correct_groups_config(encoder: str) -> None:
    options = made(correct_parser(), "correct_groups.yaml", "--model.model", encoder)
    assert isinstance(options.model, nn.Module)
    assert list(options.groups["first"].experts) == ["trec"]
    assert (options.align, options.aligned, options.merged) == (True, "corrected-aligned", None)
    assert options.least_squares == lit_merge.LeastSquares()
    assert options.method == lit_merge.Average()
    assert options.correction is lit_merge.RescaleShift


def test_export_config(encoder: str) -> None:
    options = made(export_parser(), "export.yaml", "--model.model", encoder)
    assert isinstance(options.model, nn.Module)
    assert (options.tasks, options.fold, options.format) == ("all", "possible", "safetensors")
    assert list(options.examples) == ["trec", "subj"]


def test_forecast_config() -> None:
    options = made(forecast_parser(), "forecast.yaml")
    assert options.method == lit_merge.TaskArithmetic(scale=0.5)
    assert options.scales == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert (options.weighting, options.output) == ("mean", "forecast.json")


def test_correct_config(encoder: str) -> None:
    options = made(correct_parser(), "correct.yaml", "--model.model", encoder)
    assert isinstance(options.model, nn.Module)
    assert {name: task.num_classes for name, task in options.tasks.items()} == {
        "trec": 6,
        "subj": 2,
    }
    assert all(task.unlabelled for task in options.tasks.values())
    assert options.trainer.max_steps == 100


def test_correct_all_config(encoder: str) -> None:
    options = made(correct_parser(), "correct_all.yaml", "--model.model", encoder)
    assert (options.trainable, options.heads, options.surgery_rank) == ("all", "refit", 16)
    assert (options.weights_lr, options.elastic, options.feature_weight) == (3e-4, 1e-3, 0.1)
    assert (options.holdout, options.patience, options.coefficients) == (0.1, 4, "none")


def test_evaluate_config(encoder: str) -> None:
    options = made(evaluate_parser(), "evaluate.yaml", "--model.model", encoder)
    assert options.models["base"].kind == "base"
    assert options.models["trec"] == "runs/trec"
    assert list(options.tasks) == ["trec", "subj"]
    assert options.linear_probe
    assert options.variance


@pytest.mark.parametrize(
    "parser", [curvature_parser, merge_parser, forecast_parser, correct_parser, evaluate_parser]
)
def test_printed_options_can_be_given_back(
    parser: Callable[[], ArgumentParser], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = f"{parser.__name__.removesuffix('_parser')}.yaml"
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--config", str(CONFIGS / name), "--print_config"])
    assert caught.value.code == 0
    (tmp_path / name).write_text(capsys.readouterr().out)
    again = parse(parser(), ["--config", str(tmp_path / name)])
    first = parse(parser(), ["--config", str(CONFIGS / name)])
    del again["config"], first["config"]
    assert again == first


def test_configs_name_only_what_their_comments_promise() -> None:
    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        command = path.stem.split("_")[0]
        assert f"lit-merge {command} --config configs/{path.name}" in text
