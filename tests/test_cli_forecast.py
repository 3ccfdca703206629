from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_merge.cli import main
from lit_merge.cli.forecast import forecast_parser
from lit_merge.cli.parsing import instantiate, parse
from lit_merge.forecast import forecast_merge
from lit_merge.methods import GradientMatching, TaskArithmetic
from tests.merge_files import save_base, save_expert, save_experts

CONFIGS = Path(__file__).parents[1] / "configs"


def config_of(folder: Path, **changes: Any) -> Path:
    """Write small experts and the YAML of a merge of them; return the YAML's path."""
    experts = {task: str(path) for task, path in save_experts(folder).items()}
    content = {
        "base": str(save_base(folder)),
        "experts": experts,
        "method": {"class_path": "TaskArithmetic", "init_args": {"scale": 0.4}},
        "output": str(folder / "merged"),
        **changes,
    }
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("lit-merge: error: ") :]


def test_the_yaml_of_a_merge_is_taken_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, dtype="bfloat16", replace=True, sweep=None, threads=1)
    before = sorted(tmp_path.rglob("*"))
    assert main(["forecast", "--config", str(config)]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    printed = capsys.readouterr().out
    assert "Forecast of TaskArithmetic(scale=0.4)" in printed
    assert "in closed form" in printed


def test_the_merge_config_of_the_repository_is_taken() -> None:
    parser = forecast_parser()
    options = instantiate(parser, parse(parser, ["--config", str(CONFIGS / "merge.yaml")]))
    assert options.method == GradientMatching(scale=1.0)


def test_what_is_written_is_the_forecast_of_the_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)
    output, plot = tmp_path / "forecast.json", tmp_path / "forecast.svg"
    options = ["--output", str(output), "--plot", str(plot), "--weighting", "sum"]
    assert main(["forecast", "--config", str(config), "--scales", "[0,0.5]", *options]) == 0
    expected = forecast_merge(
        tmp_path / "base.safetensors",
        {task: tmp_path / task for task in ("svhn", "dtd")},
        TaskArithmetic(0.4),
        weighting="sum",
        scales=[0.0, 0.5],
        progress=False,
    )
    assert json.loads(output.read_text()) == json.loads(json.dumps(expected.as_dict()))
    assert "summed losses" in capsys.readouterr().out
    assert "<svg" in plot.read_text()
    assert main(["forecast", "--config", str(config), *options]) == 2
    assert "forecast.json" in error_of(capsys)
    assert main(["forecast", "--config", str(config), *options, "--replace"]) == 0


def test_json_is_printed_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    output = tmp_path / "forecast.json"
    assert main(["forecast", "--config", str(config), "--json", "--output", str(output)]) == 0
    printed, written = json.loads(capsys.readouterr().out), json.loads(output.read_text())
    assert {key: printed[key] for key in written} == written
    assert (printed["command"], printed["output"]) == ("forecast", str(output))
    assert printed.keys() - written.keys() == {"command", "output", "seconds", "warnings", "plot"}


def test_only_the_first_of_several_processes_forecasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert main(["forecast", "--config", str(config)]) == 0
    assert capsys.readouterr().out == ""


def test_an_expert_without_curvature_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)
    bare = save_expert(tmp_path / "bare", "dtd", 2, with_hessian=False)
    assert main(["forecast", "--config", str(config), "--experts.dtd", str(bare)]) == 2
    error = error_of(capsys)
    assert "must have a Hessian for a forecast (task 'dtd'); got none." in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weighting", "median"), "weighting"),
        (("--plot", "forecast.txt"), "forecast.txt: must end in .png, .svg, .pdf for a plot"),
        (("--method", "Average", "--scale", "1"), "scale: must name a setting of Average"),
        (("--sweep", "{scale: [0.1, 0.2]}"), "sweep: must be left out of a forecast"),
        (("--method", "GradientMatch"), 'Did you mean "GradientMatching"?'),
    ],
)
def test_a_mistake_is_one_clear_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["forecast", "--config", str(config_of(tmp_path)), *options]) == 2
    error = error_of(capsys)
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "forecast.txt").exists()


def test_the_scale_of_a_merge_is_the_planned_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["forecast", "--config", str(config_of(tmp_path)), "--scale", "0.3"]) == 0
    assert "Forecast of TaskArithmetic(scale=0.3)" in capsys.readouterr().out
