"""What ``inspect_path`` says of every kind of file, and of what is wrong with it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lit_merge.checkpoint import fingerprint, save_tensors
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.inspection import Inspection, compare, inspect_path
from lit_merge.inspection.contents import CurvatureSummary
from lit_merge.inspection.records import command_of
from lit_merge.methods import Average
from lit_merge.streaming import merge

ROOT = Path(__file__).parents[1]


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "body.weight": torch.randn(3, 4, generator=generator),
        "head.weight": torch.randn(2, 3, generator=generator),
    }


def hessian(size: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.full_like(value, size) for name, value in weights().items()}


def expert(path: Path, *, seed: int = 0, size: float = 1.0, **info: Any) -> Path:
    return write_expert(path, weights=weights(seed), info=ExpertInfo(**info), hessian=hessian(size))


def text(found: Inspection) -> str:
    return "\n".join(found.warnings)


def lightning_checkpoint(path: Path, **entries: Any) -> Path:
    state = {
        index: {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
        for index, value in enumerate(weights().values())
    }
    content = {
        "pytorch-lightning_version": "2.6.6",
        "epoch": 3,
        "global_step": 120,
        "state_dict": weights(),
        "hyper_parameters": {"lr": 1e-3, "name": "small"},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": 1.0}, "DiagonalHessian": {}},
        "optimizer_states": [{"state": state, "param_groups": [{"lr": 0.01, "params": [0, 1]}]}],
        "lr_schedulers": [{}],
        **entries,
    }
    torch.save(content, path)
    return path


def test_lightning_checkpoint_shows_where_the_run_was(tmp_path: Path) -> None:
    found = inspect_path(lightning_checkpoint(tmp_path / "last.ckpt"))
    assert (found.kind, found.source) == ("checkpoint", "lightning")
    assert found.facts["epoch"] == 3
    assert found.facts["step"] == 120
    assert found.facts["hyper_parameters"] == {"lr": 1e-3, "name": "small"}
    assert found.facts["callbacks"] == ["ModelCheckpoint", "DiagonalHessian"]
    assert found.facts["learning_rates"] == [0.01]
    parts = {part.name: part for part in found.parts}
    assert parts["optimizer"].num_elements == 2 * (12 + 6)
    assert parts["optimizer"].num_bytes == 4 * 2 * 18


def test_an_average_beside_the_trained_weights_is_shown(tmp_path: Path) -> None:
    path = lightning_checkpoint(tmp_path / "last.ckpt", current_model_state=weights(1))
    found = inspect_path(path)
    assert found.facts["weights"] == "a running average, and those that were trained"
    (other,) = [part for part in found.parts if part.name == "trained weights"]
    assert other.num_elements == 18


def test_a_file_of_torch_shows_what_lies_beside_the_weights(tmp_path: Path) -> None:
    content = {"state_dict": weights(), "arch": "vit_tiny", "epoch": 7, "scaler": {"scale": 2.0}}
    torch.save(content, tmp_path / "net.pth")
    found = inspect_path(tmp_path / "net.pth")
    assert found.source == "torch"
    assert (found.facts["arch"], found.facts["epoch"]) == ("vit_tiny", 7)
    assert found.facts["beside_the_weights"] == ["scaler"]


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "run",))

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    with pytest.raises(InputError, match=r"evil\.ckpt: must"):
        inspect_path(tmp_path / "evil.ckpt")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_counted_by_tensor(tmp_path: Path) -> None:
    broken = weights()
    broken["body.weight"][0, :2] = torch.tensor([torch.nan, -torch.inf])
    save_file(broken, tmp_path / "net.safetensors")
    found = inspect_path(tmp_path / "net.safetensors")
    assert "tensor 'body.weight' holds 2 values that are NaN or infinite" in text(found)
    assert inspect_path(tmp_path / "net.safetensors", values=False).warnings == ()


def test_matrices_with_the_same_values_are_a_note_and_ones_are_not(tmp_path: Path) -> None:
    table = torch.randn(5, 4)
    state = {"in.weight": table, "out.weight": table.clone(), "a": torch.ones(4, 4)}
    state |= {"b": torch.ones(4, 4), "other": table + 1}
    save_tensors(tmp_path / "net.safetensors", state)
    found = inspect_path(tmp_path / "net.safetensors")
    assert found.notes == ("equal, tied or stored twice: in.weight, out.weight",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.nan, "holds NaN or infinity in body.weight"),
        (-1.0, "is negative in body.weight"),
        (0.0, "is zero throughout"),
    ],
)
def test_what_a_hessian_cannot_be_is_a_warning(tmp_path: Path, value: float, message: str) -> None:
    save_tensors(tmp_path / "hessian.safetensors", {"body.weight": torch.full((3, 4), value)})
    found = inspect_path(tmp_path / "hessian.safetensors")
    assert found.kind == "hessian"
    assert f"hessian.safetensors: {message}" in text(found)


def test_a_hessian_in_half_precision_is_a_warning(tmp_path: Path) -> None:
    save_tensors(tmp_path / "hessian.safetensors", {"body.weight": torch.ones(3, 4).half()})
    found = inspect_path(tmp_path / "hessian.safetensors")
    assert "is float16 in body.weight" in text(found)
    assert found.curvature is not None
    assert found.curvature.trace == 12.0


def test_a_hessian_of_other_weights_is_a_warning_and_all_else_is_shown(tmp_path: Path) -> None:
    folder = expert(tmp_path / "expert", task="a", num_examples=4)
    save_tensors(folder / "model.safetensors", weights(1))
    found = inspect_path(folder)
    assert found.kind == "expert"
    owner, now = fingerprint(weights())[:8], fingerprint(weights(1))[:8]
    assert f"belongs to weights {owner}…, but" in text(found)
    assert now in text(found)
    assert [part.name for part in found.parts] == ["weights", "hessian"]
    assert found.facts["task"] == "a"
    assert found.curvature is not None
    assert found.curvature.mean_trace == 18 / 4
    alone = inspect_path(folder / "hessian.safetensors")
    assert f"belongs to weights {owner}…, but those beside it are {now}…" in text(alone)


def test_activation_statistics_alone(tmp_path: Path) -> None:
    statistics = {
        f"{site}.{part}": value
        for site, count in (("body", 7), ("head", 0))
        for part, value in (
            ("count", torch.tensor(count)),
            ("mean", torch.zeros(3)),
            ("m2", torch.ones(3)),
        )
    }
    save_tensors(tmp_path / "activations.safetensors", statistics)
    found = inspect_path(tmp_path / "activations.safetensors")
    assert found.kind == "activations"
    assert (found.facts["sites"], found.facts["positions_per_site"]) == (2, 7)
    assert found.facts["sites_without_data"] == "head"


def test_missing_shards_are_named_and_the_others_are_shown(tmp_path: Path) -> None:
    state = weights()
    files = {"body.weight": "model-00001.safetensors", "head.weight": "model-00002.safetensors"}
    save_tensors(tmp_path / files["body.weight"], {"body.weight": state["body.weight"]})
    index = {"metadata": {}, "weight_map": files}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = inspect_path(tmp_path)
    assert "lacks model-00002.safetensors" in text(found)
    assert found.fingerprint is None
    assert [(part.name, part.num_elements) for part in found.parts] == [("shard", 12)]


def test_adapter_is_inspected_without_its_base(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.layer.{}.lora_{}.weight"
    factors = {name.format(i, f): torch.ones(2, 2) for i in (0, 1) for f in "AB"}
    factors[name.format(1, "B")] = torch.zeros(2, 2)
    save_file(factors, tmp_path / "adapter_model.safetensors")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found = inspect_path(path)
        assert (found.kind, found.source) == ("adapter", "peft")
        assert (found.facts["rank"], found.facts["alpha"]) == (2, 4)
        assert found.facts["scaling"] == [2.0]
        assert found.facts["base_model"] == "gpt2"
        assert "B is zero in 1 of 2 modules (layer.1)" in text(found)


def test_leftovers_of_stopped_runs_are_warnings(tmp_path: Path) -> None:
    folder = expert(tmp_path / "expert")
    (tmp_path / ".expert.partial-12-0a1b").mkdir()
    (tmp_path / ".expert.unfinished-0a1b2c").mkdir()
    (tmp_path / "expert.partial").mkdir()
    (tmp_path / ".other.partial-12-0a1b").mkdir()
    (folder / ".hessian.safetensors.partial-3-ff").touch()
    found = text(inspect_path(folder))
    assert found.count("\n") == 3
    assert ".expert.partial-12-0a1b: was written by a run that was killed" in found
    assert ".expert.unfinished-0a1b2c: is a merge that was stopped" in found
    assert 'expert.partial: is a "lit-merge curvature" pass' in found
    assert ".other" not in found


def test_forecast_and_its_best_scale(tmp_path: Path) -> None:
    content = {
        "method": "TaskArithmetic(scale=0.5)",
        "weighting": "mean",
        "num_examples": {"a": 3},
        "planned": {"scale": 0.5, "total": 2.0},
        "best": {"scale": 0.3, "total": 1.5},
        "curve": [],
        "notes": ["a note"],
    }
    path = tmp_path / "forecast.json"
    path.write_text(json.dumps(content))
    found = inspect_path(path)
    assert (found.kind, found.notes) == ("forecast", ("a note",))
    assert (found.facts["best_scale"], found.facts["expected_total"]) == (0.3, 2.0)
    path.write_text(json.dumps(content | {"planned": 3}))
    with pytest.raises(InputError, match=r"forecast\.json: must hold a forecast; got a damaged"):
        inspect_path(path)


def test_evaluation_shows_models_tasks_and_accuracies(tmp_path: Path) -> None:
    row = {"model": "m", "kind": "merged", "task": "a", "accuracy": 0.5, "num_examples": 10}
    content = {"format_version": 1, "rows": [{**row, "nll": 0.7}], "notes": ["n"]}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    found = inspect_path(tmp_path / "evaluation.json")
    assert found.kind == "evaluation"
    assert (found.facts["models"], found.facts["tasks"]) == (["m"], ["a"])
    assert found.facts["accuracy"] == {"m": "50.0 %"}


def test_run_of_a_recipe_shows_its_steps(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    steps.mkdir()
    (tmp_path / "merged").mkdir()
    for name in ("01-fit", "02-merge"):
        (steps / f"{name}.yaml").write_text("# lit-merge …\n")
    (steps / "done.json").write_text(json.dumps({"01-fit": {"command": "fit", "seconds": 2.5}}))
    found = inspect_path(tmp_path)
    assert found.kind == "run"
    assert found.facts["steps"] == {"01-fit": "fit, 2.5 s", "02-merge": "not finished"}
    assert found.facts["contents"] == ["merged"]
    assert "begun and not finished: 02-merge; run the recipe again" in found.notes


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_is_known_by_its_command(path: Path) -> None:
    found = inspect_path(path)
    assert found.kind == "configuration"
    assert found.facts["command"].split()[1] == path.stem.split("_")[0]


def test_a_configuration_of_nothing_is_refused(tmp_path: Path) -> None:
    assert command_of({"colour": "red"}) is None
    (tmp_path / "x.yaml").write_text("colour: red\n")
    with pytest.raises(InputError, match=r"x\.yaml: must hold the options of a lit-merge command"):
        inspect_path(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("a: [\n")
    with pytest.raises(InputError, match=r"x\.yaml: must be YAML"):
        inspect_path(tmp_path / "x.yaml")


@pytest.mark.parametrize(("name", "content"), [("x.json", "{}"), ("notes.txt", "hello, world")])
def test_an_unknown_file_is_refused_with_what_is_known(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"must be .*evaluation\.json|Known are checkpoints"):
        inspect_path(tmp_path / name)


def test_a_record_stands_for_its_folder(tmp_path: Path) -> None:
    merge(None, {"a": expert(tmp_path / "a")}, Average(), tmp_path / "out", progress=False)
    assert inspect_path(tmp_path / "out" / "merge.json").kind == "merged"
    assert inspect_path(tmp_path / "a" / "expert.json").kind == "expert"


def test_experts_of_very_different_curvature_are_told(tmp_path: Path) -> None:
    paths = [expert(tmp_path / name, seed=i, size=s) for i, (name, s) in enumerate(SIZES.items())]
    found = compare([inspect_path(path) for path in paths])
    assert len(found) == 1
    assert "b: has a Hessian 31 times as large as that of" in found[0]
    assert compare([inspect_path(paths[0])]) == ()


SIZES = {"a": 1.0, "b": 31.0}


def test_the_same_expert_twice_and_other_bases_are_told(tmp_path: Path) -> None:
    first = expert(tmp_path / "a", base_fingerprint="a" * 64)
    second = expert(tmp_path / "b", base_fingerprint="b" * 64)
    found = compare([inspect_path(path) for path in (first, second)])
    assert "b: has the weights of" in found[0]
    assert "bases: must be the same for a merge of task vectors" in found[1]
    assert "aaaaaaaa…" in found[1]


def test_tensors_of_other_shapes_are_told(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", weights())
    save_tensors(tmp_path / "b.safetensors", weights(1) | {"head.weight": torch.randn(5, 3)})
    save_tensors(tmp_path / "c.safetensors", {"z": torch.randn(2, 3)})
    found = compare([inspect_path(tmp_path / f"{name}.safetensors") for name in "abc"])
    assert "has 1 tensors" in found[0]
    assert "(head.weight)" in found[0]
    assert "c.safetensors: shares no tensor's name with" in found[1]


def test_the_summary_of_a_hessian_without_any_record(tmp_path: Path) -> None:
    save_tensors(tmp_path / "hessian.safetensors", hessian())
    found = inspect_path(tmp_path / "hessian.safetensors")
    largest = {"body.weight": 12 / 18, "head.weight": 6 / 18}
    expected = CurvatureSummary(18.0, None, None, None, None, 0.0, largest, None)
    assert found.curvature == expected
