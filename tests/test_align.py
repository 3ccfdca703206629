"""Groups of experts by base, from folders to a folder."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_merge import InputError
from lit_merge.align import AlignResult, ExpertGroup, align
from lit_merge.checkpoint import fingerprint, open_checkpoint
from lit_merge.correction.sites import find_sites
from lit_merge.correction.statistics import from_tensors, gather_statistics, to_tensors
from lit_merge.expert import ExpertInfo, open_expert, write_expert
from lit_merge.report.alignment_record import read_alignment
from lit_merge.tasks import DatasetTask
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net

HEAD = ("8.weight", "8.bias")
CLASSES = {"svhn": 4, "dtd": 3, "cars": 4}
INPUTS = images(8, channels=1)


def with_head(classes: int, seed: int) -> nn.Sequential:
    net = tiny_conv_net(seed)
    torch.manual_seed(seed)
    net[-1] = nn.Linear(8, classes)
    return net


def near(net: nn.Module, seed: int) -> nn.Module:
    """Move a net a little, as fine-tuning does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return net


def planted(net: nn.Module, seed: int) -> nn.Module:
    """Permute the channels of the conv net by hand."""
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randperm(6, generator=generator), torch.randperm(8, generator=generator)
    state = net.state_dict()
    for name in state:
        layer = name.split(".")[0]
        if layer in ("0", "1") and state[name].ndim:
            state[name] = state[name][one]
        elif layer in ("3", "4") and state[name].ndim:
            state[name] = state[name][two]
    state["3.weight"] = state["3.weight"][:, one]
    state["8.weight"] = state["8.weight"][:, two]
    net.load_state_dict(state)
    return net


def write(path: Path, net: nn.Module, task: str | None = None, **options: Any) -> Path:
    sites = find_sites(net, where="norm")
    return write_expert(
        path,
        weights=net.state_dict(),
        info=ExpertInfo(task=task, head_parameters=HEAD, num_examples=10, details={"lr": 0.1}),
        hessian={name: p.detach().square() for name, p in net.named_parameters()},
        activations=to_tensors(gather_statistics(net, [INPUTS], sites)),
        **options,
    )


@pytest.fixture
def groups(tmp_path: Path) -> dict[str, ExpertGroup]:
    """Two groups in different orders, near to each other but for that, with other heads."""
    write(tmp_path / "a", with_head(4, 0))
    write(tmp_path / "b", planted(near(with_head(4, 0), 7), 1))
    experts = {
        "svhn": near(with_head(4, 0), 2),
        "dtd": planted(near(near(with_head(3, 0), 7), 3), 1),
        "cars": planted(near(near(with_head(4, 0), 7), 4), 1),
    }
    paths = {task: str(write(tmp_path / task, net, task)) for task, net in experts.items()}
    return {
        "a": ExpertGroup(str(tmp_path / "a"), {"svhn": paths["svhn"]}),
        "b": ExpertGroup(str(tmp_path / "b"), {task: paths[task] for task in ("dtd", "cars")}),
    }


def run(groups: Mapping[str, ExpertGroup], tmp_path: Path, **options: Any) -> AlignResult:
    options = {"example_inputs": INPUTS, **options}
    return align(tiny_conv_net(), groups, tmp_path / "out", **options)


def outputs(path: Path | str) -> Tensor:
    state = load_file(Path(path) / "model.safetensors")
    net = with_head(len(state["8.bias"]), 9)
    net.load_state_dict(state)
    with torch.no_grad():
        return net.eval()(INPUTS)


def task() -> DatasetTask:
    return DatasetTask([(image, 0) for image in images(40, 3, channels=1)], num_classes=4)


def test_what_is_being_done_is_shown(
    groups: dict[str, ExpertGroup],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(groups, tmp_path, tasks={"svhn": task()})
    assert capsys.readouterr().err == ""  # a short one, without a terminal
    monkeypatch.setattr("lit_merge.streaming.progress.LINE_EVERY", 0.0)
    run(groups, tmp_path, tasks={"svhn": task()}, replace=True, progress=False)
    assert capsys.readouterr().err == ""
    run(groups, tmp_path, tasks={"svhn": task()}, replace=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "Running the bases of a, b on examples of svhn"
    assert lines[-3:] == [f"Trying and writing the expert {t}" for t in ("svhn", "dtd", "cars")]
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    run(groups, tmp_path, replace=True)
    assert "Trying and writing the expert cars" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("by", ["weights", "activations", "both"])
def test_planted_orders_are_undone(groups: dict[str, ExpertGroup], tmp_path: Path, by: str) -> None:
    result = run(groups, tmp_path, by=by, tasks=None if by == "weights" else {"svhn": task()})
    assert result.alignment.by == by
    assert {s.size for s in result.symmetries} == {6, 8}
    base = load_file(tmp_path / "out" / "base" / "model.safetensors")
    first = load_file(tmp_path / "a" / "model.safetensors")
    second = near(with_head(4, 0), 7).state_dict()
    for name, value in base.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[name] + second[name]) / 2)
    cars = load_file(tmp_path / "out" / "cars" / "model.safetensors")
    expected = near(near(with_head(4, 0), 7), 4).state_dict()
    assert all(torch.equal(cars[name], expected[name]) for name in expected)


def test_by_none_leaves_every_expert_as_it_is(
    groups: dict[str, ExpertGroup], tmp_path: Path
) -> None:
    result = run(groups, tmp_path, by="none", example_inputs=None)  # nothing to trace the model for
    assert result.alignment.by == "none"
    assert result.symmetries == ()
    base = load_file(tmp_path / "out" / "base" / "model.safetensors")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    for name, value in base.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (one[name] + other[name]) / 2)
    for name in CLASSES:
        written, before = open_expert(tmp_path / "out" / name), open_expert(tmp_path / name)
        assert fingerprint(written.weights) == fingerprint(before.weights)
        assert written.hessian is not None
        written.close()
        before.close()
    record = read_alignment(tmp_path / "out" / "align.json")
    assert record.similarity() is None
    assert record.provenance["settings"]["by"] == "none"


def test_every_expert_computes_what_it_did(groups: dict[str, ExpertGroup], tmp_path: Path) -> None:
    result = run(groups, tmp_path)
    assert set(result.differences) == set(CLASSES)
    for name in CLASSES:
        torch.testing.assert_close(
            outputs(tmp_path / "out" / name), outputs(tmp_path / name), atol=1e-5, rtol=1e-5
        )
        assert result.differences[name] < 1e-10
    moved = load_file(tmp_path / "out" / "dtd" / "model.safetensors")
    before = load_file(tmp_path / "dtd" / "model.safetensors")
    assert not torch.equal(moved["0.weight"], before["0.weight"])


def test_hessian_and_statistics_belong_to_the_moved_weights(
    groups: dict[str, ExpertGroup], tmp_path: Path
) -> None:
    run(groups, tmp_path)
    expert = open_expert(tmp_path / "out" / "dtd")  # checks the fingerprint
    assert expert.hessian is not None
    assert expert.activations is not None
    for name in expert.hessian:
        torch.testing.assert_close(expert.hessian.tensor(name), expert.weights.tensor(name) ** 2)
    net = with_head(3, 9)
    net.load_state_dict({name: expert.weights.tensor(name) for name in expert.weights})
    measured = gather_statistics(net.eval(), [INPUTS], find_sites(net, where="norm"))
    stored = from_tensors({n: expert.activations.tensor(n) for n in expert.activations})
    for site, one in measured.items():
        torch.testing.assert_close(stored[site].mean, one.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stored[site].m2, one.m2, atol=1e-3, rtol=1e-4)
    expert.close()


def test_the_record_says_what_was_done(groups: dict[str, ExpertGroup], tmp_path: Path) -> None:
    result = run(groups, tmp_path)
    record = json.loads((tmp_path / "out" / "align.json").read_text())
    assert record["reference"] == "a"
    assert record["objective"]["after"] > record["objective"]["before"]
    assert record["proof"]["rejected"] == {}
    assert [s["size"] for s in record["symmetries"]] == [s.size for s in result.symmetries]
    stored = load_file(tmp_path / "out" / "permutations.safetensors")
    for symmetry in result.symmetries:
        found = result.alignment.permutations["b"][symmetry.name]
        assert torch.equal(stored[f"b/{symmetry.name}"], found)
        before, after = result.alignment.similarity["b"][symmetry.name] or (1.0, 0.0)
        assert after > 0.9 > before
    with open_checkpoint(tmp_path / "out" / "base") as base:
        assert record["written"]["base"]["fingerprint"] == fingerprint(base)
    expert = open_expert(tmp_path / "out" / "dtd")
    assert expert.info.task == "dtd"
    assert expert.info.base_fingerprint == record["written"]["base"]["fingerprint"]
    assert expert.info.fingerprint == record["written"]["dtd"]["fingerprint"]
    assert expert.info.num_examples == 10
    assert expert.info.details["lr"] == 0.1
    aligned = expert.info.details["aligned"]
    assert aligned["group"] == "b"
    assert aligned["fingerprint"] == record["written"]["dtd"]["fingerprint_before"]
    expert.close()


def test_equal_groups_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("a", "b", "svhn", "dtd"):
        write(tmp_path / name, with_head(4, 0), name)
    groups = {
        "a": ExpertGroup(str(tmp_path / "a"), {"svhn": str(tmp_path / "svhn")}),
        "b": ExpertGroup(str(tmp_path / "b"), {"dtd": str(tmp_path / "dtd")}),
    }
    result = run(groups, tmp_path)
    expected = with_head(4, 0).state_dict()
    for name in ("base", "svhn", "dtd"):
        state = load_file(tmp_path / "out" / name / "model.safetensors")
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert result.alignment.after == result.alignment.before


def test_names_and_types_of_each_file_are_kept(
    groups: dict[str, ExpertGroup], tmp_path: Path
) -> None:
    state = load_file(tmp_path / "cars" / "model.safetensors")
    path = tmp_path / "wrapped"
    write_expert(
        path,
        weights={
            f"model.{name}": v.bfloat16() if v.is_floating_point() else v
            for name, v in state.items()
        },
        info=ExpertInfo(head_parameters=tuple(f"model.{name}" for name in HEAD)),
    )
    groups["b"].experts["cars"] = str(path)
    run(groups, tmp_path)
    written = load_file(tmp_path / "out" / "cars" / "model.safetensors")
    assert set(written) == {f"model.{name}" for name in state}
    assert written["model.0.weight"].dtype == torch.bfloat16
    assert written["model.1.num_batches_tracked"].dtype == torch.int64
    expected = near(near(with_head(4, 0), 7), 4).state_dict()
    assert torch.equal(written["model.3.weight"], expected["3.weight"].bfloat16())


def test_three_groups_can_be_aligned_with_each_other(
    groups: dict[str, ExpertGroup], tmp_path: Path
) -> None:
    write(tmp_path / "c", planted(near(with_head(4, 0), 8), 5))
    write(tmp_path / "food", planted(near(with_head(4, 0), 8), 5), "food")
    groups["c"] = ExpertGroup(str(tmp_path / "c"), {"food": str(tmp_path / "food")})
    result = run(groups, tmp_path, cycle_consistent=True, curvature=True)
    food = load_file(tmp_path / "out" / "food" / "model.safetensors")
    expected = near(with_head(4, 0), 8).state_dict()
    assert all(torch.equal(food[name], expected[name]) for name in expected)
    assert set(result.alignment.similarity) == {"b", "c"}


def test_a_transformer_is_aligned_by_padded_texts(tmp_path: Path) -> None:
    def save(name: str, seed: int) -> str:
        net = near(tiny_bert(seed), 50)
        heads = ("classifier.weight", "classifier.bias")
        write_expert(
            tmp_path / name,
            weights=net.state_dict(),
            info=ExpertInfo(head_parameters=heads),
            gram={"bert.encoder.layer.0.intermediate.dense.weight": torch.eye(16)},
        )
        return str(tmp_path / name)

    groups = {
        "a": ExpertGroup(save("a", 0), {"one": save("one", 0)}),
        "b": ExpertGroup(save("b", 1), {"two": save("two", 1)}),
    }
    texts = padded_texts((5, 9, 4, 8, 7, 6))
    examples = [({key: value[i] for key, value in texts.items()}, 0) for i in range(6)]
    tasks = {"one": DatasetTask(examples, num_classes=3)}
    result = align(tiny_bert(), groups, tmp_path / "out", tasks=tasks)
    assert result.differences["two"] < 1e-10
    assert result.alignment.after > result.alignment.before
    assert any(s.inside for s in result.symmetries)


def test_a_models_own_word_on_its_inputs_is_enough(tmp_path: Path) -> None:
    for name in ("a", "b", "one", "two"):
        write_expert(tmp_path / name, weights=tiny_bert().state_dict(), info=ExpertInfo())
    groups = {
        "a": ExpertGroup(str(tmp_path / "a"), {"one": str(tmp_path / "one")}),
        "b": ExpertGroup(str(tmp_path / "b"), {"two": str(tmp_path / "two")}),
    }
    assert align(tiny_bert(), groups, tmp_path / "out").differences["two"] == 0.0


def test_input_shape_makes_random_inputs(groups: dict[str, ExpertGroup], tmp_path: Path) -> None:
    run(groups, tmp_path, example_inputs=None, input_shape=(1, 12, 12))
    assert (tmp_path / "out" / "base" / "model.safetensors").is_file()


def test_the_output_is_not_overwritten(groups: dict[str, ExpertGroup], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(InputError, match="must be empty or absent"):
        run(groups, tmp_path)
    run(groups, tmp_path, replace=True)
    assert not (tmp_path / "out" / "precious").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "x"}, "by: must be one of auto, weights, activations, both, none; got 'x'"),
        ({"by": "both"}, "tasks: must be given to match by 'both'; got none"),
        ({"batch_size": 1}, "batch_size: must be at least 2; got 1"),
        ({"calibration_examples": 0}, "calibration_examples: must be at least 2; got 0"),
        ({"example_inputs": None}, "input_shape: must say what Sequential takes"),
    ],
)
def test_bad_options_are_refused(
    groups: dict[str, ExpertGroup], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(groups, tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_architecture_is_named(
    groups: dict[str, ExpertGroup], tmp_path: Path
) -> None:
    net = with_head(4, 0)
    net[0] = nn.Conv2d(1, 6, 5)
    write_expert(tmp_path / "other", weights=net.state_dict(), info=ExpertInfo())
    groups["b"] = ExpertGroup(str(tmp_path / "other"), groups["b"].experts)
    with pytest.raises(InputError, match=r"other.*'0\.weight' must have the shape \[6, 1, 3, 3\]"):
        run(groups, tmp_path)


def test_a_missing_tensor_of_an_expert_is_named(
    groups: dict[str, ExpertGroup], tmp_path: Path
) -> None:
    state = with_head(4, 0).state_dict()
    del state["3.bias"]
    write_expert(tmp_path / "less", weights=state, info=ExpertInfo())
    groups["b"].experts["cars"] = str(tmp_path / "less")
    with pytest.raises(InputError, match=r"less.*must hold every tensor .* none for '3\.bias'"):
        run(groups, tmp_path)
    assert not (tmp_path / "out").exists()


def test_nan_in_an_expert_is_named(groups: dict[str, ExpertGroup], tmp_path: Path) -> None:
    state = with_head(4, 0).state_dict()
    state["3.bias"][2] = torch.nan
    (tmp_path / "nan").mkdir()
    torch.save(state, tmp_path / "nan" / "model.pt")
    groups["b"].experts["cars"] = str(tmp_path / "nan")
    with pytest.raises(InputError, match=r"nan.*tensor '3\.bias' must be finite"):
        run(groups, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_base_without_hessian_cannot_weight_the_matching(
    groups: dict[str, ExpertGroup], tmp_path: Path
) -> None:
    write_expert(tmp_path / "bare", weights=with_head(4, 0).state_dict(), info=ExpertInfo())
    groups["b"] = ExpertGroup(str(tmp_path / "bare"), groups["b"].experts)
    with pytest.raises(InputError, match="bare: must have a Hessian to weight the matching"):
        run(groups, tmp_path, curvature=True)


def test_a_model_without_symmetries_is_refused(
    groups: dict[str, ExpertGroup], tmp_path: Path
) -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    for name in ("x", "y"):
        write_expert(tmp_path / name, weights=net.state_dict(), info=ExpertInfo())
    groups = {
        name: ExpertGroup(str(tmp_path / name), {f"task {name}": str(tmp_path / name)})
        for name in ("x", "y")
    }
    with pytest.raises(InputError, match="model: must have permutation symmetries"):
        align(net, groups, tmp_path / "out", example_inputs=torch.randn(4, 3))
