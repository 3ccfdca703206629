"""Every file in configs/ is parsed by its command's parser, and what it names is made.

What would be downloaded is replaced by options on the command line, as a user would do it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
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
from lit_merge.recipe import Step, plan
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


def steps_of(name: str, folder: Path, **variables: Any) -> tuple[Step, ...]:
    """Return a recipe's steps, each parsed by its command where that makes nothing of it yet."""
    content = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    steps = plan(content["steps"], {**content["variables"], **variables})
    parsers = {"merge": merge_parser, "correct": correct_parser, "evaluate": evaluate_parser}
    for step in steps:
        if step.command in parsers:
            (folder / "step.yaml").write_text(yaml.safe_dump(dict(step.options), sort_keys=False))
            parse(parsers[step.command](), ["--config", str(folder / "step.yaml")])
    return steps


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


def test_run_sentiment_config(tmp_path: Path) -> None:
    for sets, dataset in (("hub", "SetFit/sst2"), ("local", "mine/sst2")):
        steps = steps_of("run_sentiment.yaml", tmp_path, sets=sets, data="mine")
        assert [step.command for step in steps] == [
            *["fit"] * 5,
            *["merge"] * 4,
            "evaluate",
            "report",
        ]
        options = steps[9].options
        assert list(options["tasks"]) == ["imdb", "amazon", "mr", "sst2", "yelp"]
        assert options["tasks"]["sst2"]["init_args"]["dataset"] == dataset
        assert len(options["models"]) == 1 + 5 + 3 + 3 * 8


def test_run_text_config(tmp_path: Path) -> None:
    for sets, dataset in (("hub", "SetFit/subj"), ("local", "mine/subj")):
        steps = steps_of("run_text.yaml", tmp_path, sets=sets, data="mine")
        assert [step.command for step in steps] == [
            *["fit"] * 4,
            *["merge"] * 4,
            *["correct"] * 5,
            "evaluate",
            "report",
        ]
        options = steps[13].options
        assert options["tasks"]["subj"]["init_args"]["dataset"] == dataset
        assert not options["tasks"]["subj"]["init_args"].get("unlabelled", False)
        assert all(t["init_args"]["unlabelled"] for t in steps[8].options["tasks"].values())


def test_run_vision_config(tmp_path: Path) -> None:
    for sets, count in (("hub", 110), ("local", 262)):
        steps = steps_of("run_vision.yaml", tmp_path, sets=sets, data="mine")
        commands = [*["fit"] * 4, *["merge"] * 4, *["correct"] * 10, "evaluate", "report"]
        assert [step.command for step in steps] == commands
        assert steps[0].options["model"]["init_args"]["num_classes"] == count
        joined = steps[0].options["data"]["init_args"]["task"]["init_args"]["tasks"]
        assert sum(one["init_args"]["num_classes"] for one in joined) == count
        place = {"path": "mine/mnist.npz"} if sets == "local" else {"dataset": "ylecun/mnist"}
        found = steps[18].options["tasks"]["mnist"]["init_args"]
        assert place.items() <= found.items()
        assert not found.get("unlabelled", False)
        assert all(t["init_args"]["unlabelled"] for t in steps[8].options["tasks"].values())
    published = steps_of("run_vision.yaml", tmp_path, pretrain=False, base="hf://timm/it/model")
    assert published[0].options["model"]["init_args"]["checkpoint"] == "hf://timm/it/model"


def test_run_vision_nonlocal_config(tmp_path: Path) -> None:
    steps = steps_of("run_vision_nonlocal.yaml", tmp_path, sets="local", data="mine", seed=3)
    commands = [*["fit"] * 5, "merge", "align", *["merge"] * 4, *["correct"] * 10]
    assert [step.command for step in steps] == [*commands, "evaluate", "report"]
    bases = [step.options for step in steps if step.title.startswith("Pretrain")]
    assert len({str(base["seed_everything"]) for base in bases}) == 2
    assert steps[6].options["groups"] == {
        "first": {
            "base": "runs/vision-nonlocal/first/last.ckpt",
            "experts": {
                "mnist": "runs/vision-nonlocal/mnist/expert",
                "fashion": "runs/vision-nonlocal/fashion/expert",
            },
        },
        "second": {
            "base": "runs/vision-nonlocal/second/last.ckpt",
            "experts": {"kmnist": "runs/vision-nonlocal/kmnist/expert"},
        },
    }
    stages = [m["stage"] for m in steps[21].options["models"].values() if "stage" in m]
    assert stages == [1, 2, 3, 4]


def test_run_lora_config(tmp_path: Path) -> None:
    steps = steps_of("run_lora.yaml", tmp_path)
    assert [step.command for step in steps] == [
        *["fit"] * 2,
        *["curvature"] * 2,
        *["merge"] * 2,
        *["export"] * 2,
        *["merge"] * 5,
        "evaluate",
        "report",
    ]
    measured = steps[2].options
    assert measured["checkpoint"] == measured["output"] == "runs/lora/trec/adapter"
    assert (steps[12].options["format"], steps[12].options["rank"]) == ("adapter", 16)


def test_run_temporal_config(tmp_path: Path) -> None:
    steps = steps_of("run_temporal.yaml", tmp_path)
    assert [step.command for step in steps] == [*["fit"] * 13, "evaluate", "report"]
    found = [step.options["trainer"]["callbacks"] for step in steps[1:13]]
    assert [len(callbacks) for callbacks in found] == 4 * [2] + 8 * [1]
    options = [callbacks[-1]["init_args"] for callbacks in found]
    assert [one["task"] for one in options] == 3 * ["amazon", "mr", "sst2", "yelp"]
    assert [(one["init"], one["deploy"]) for one in options[::4]] == [
        ("fresh", "merge"),
        ("last", "last"),
        ("ema", "ema"),
    ]
    assert len(steps[13].options["models"]) == 1 + 5 + 3 * 4


def test_run_atm_config(tmp_path: Path) -> None:
    steps = steps_of("run_atm.yaml", tmp_path)
    rounds = [*["fit"] * 4, "merge"]
    assert [step.command for step in steps] == [
        *["fit"] * 5,
        *["merge"] * 2,
        *rounds * 8,
        "evaluate",
        "report",
    ]
    one_shot, tuned = steps[1].options["trainer"], steps[7].options["trainer"]
    assert one_shot["max_steps"] == 8 * tuned["max_steps"]
    assert steps[12].options["model"]["init_args"]["checkpoint"] == "runs/atm/round-1/merged"


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


def test_run_language_config(tmp_path: Path) -> None:
    for sets, dataset in (("hub", "fancyzhx/ag_news"), ("local", "mine/agnews")):
        steps = steps_of("run_language.yaml", tmp_path, sets=sets, data="mine")
        assert [step.command for step in steps] == [
            *["fit"] * 5,
            *["merge"] * 6,
            "evaluate",
            "report",
        ]
        task = steps[2].options["data"]["init_args"]["task"]["init_args"]
        assert (task["dataset"], task["where"]) == (dataset, {"label": 1})
        assert len(steps[11].options["models"]) == 1 + 4 + 1 + 2 * 4 + 3
        assert steps[7].options["method"]["init_args"]["scale"] == {"all": 1.0, "gone": -1.0}
