from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from lit_merge.checkpoint import fingerprint, save_tensors
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.inspection import inspect_path
from lit_merge.merged.folder import CorrectionRecord, write_corrected
from lit_merge.methods import EMR, Average, GradientMatching, TaskArithmetic
from lit_merge.streaming import Override, merge
from lit_merge.terminal import print_inspection


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "body.weight": torch.randn(3, 4, generator=generator),
        "body.steps": torch.tensor(7),
        "head.weight": torch.randn(2, 3, generator=generator),
    }


HESSIAN = {
    "body.weight": torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0] * 4, [4.0] * 4]),
    "head.weight": torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
}


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    info = ExpertInfo(
        task="svhn",
        estimator="exact",
        labels="sampled",
        num_examples=10,
        head_parameters=("head.weight",),
    )
    statistics = {
        "body.count": torch.tensor(5),
        "body.mean": torch.zeros(3),
        "body.m2": torch.ones(3),
    }
    path = tmp_path / "run" / "expert"
    return write_expert(path, weights=weights(), info=info, hessian=HESSIAN, activations=statistics)


def test_expert_is_summed_up_with_its_curvature(expert: Path) -> None:
    found = inspect_path(expert)
    assert (found.kind, found.source) == ("expert", "safetensors")
    assert found.fingerprint == fingerprint(weights())
    assert found.facts["task"] == "svhn"
    assert found.curvature is not None
    assert found.curvature.trace == 24.0
    assert found.curvature.mean_trace == 2.4
    assert found.curvature.zero_share == 9 / 18
    assert found.curvature.estimator == "exact"
    assert dict(found.curvature.largest) == {"body.weight": 22 / 24, "head.weight": 2 / 24}


def test_parts_count_tensors_elements_and_bytes(expert: Path) -> None:
    parts = {part.name: part for part in inspect_path(expert).parts}
    assert list(parts) == ["weights", "hessian", "activations"]
    assert parts["weights"].num_elements == 12 + 1 + 6
    assert parts["weights"].num_bytes == 4 * 18 + 8
    assert parts["weights"].dtypes == {"float32": 2, "int64": 1}
    assert parts["hessian"].file == "hessian.safetensors"


def test_run_folder_shows_the_expert_in_it(expert: Path) -> None:
    found = inspect_path(expert.parent)
    assert found.kind == "expert"
    assert found.parts[0].file == str(Path("expert") / "model.safetensors")


def test_tensors_have_their_own_traces(expert: Path) -> None:
    tensors = {tensor.name: tensor for tensor in inspect_path(expert).tensors}
    assert tensors["body.weight"].trace == 22.0
    assert tensors["body.weight"].shape == (3, 4)
    assert tensors["body.steps"].trace is None
    assert tensors["body.steps"].dtype == "int64"


@pytest.mark.parametrize(("values", "num_bytes"), [(False, 18 * 4), (True, 18 * 4 + 18 * 4 + 8)])
def test_progress_ends_at_the_size_of_what_is_read(
    expert: Path, values: bool, num_bytes: int
) -> None:
    seen: list[tuple[int, int]] = []
    inspect_path(expert, advance=lambda done, total: seen.append((done, total)), values=values)
    assert seen[-1] == (num_bytes, num_bytes)


QUALITY = {
    "num_examples": [5, 5],
    "relative_error": 0.125,
    "rank_correlation": None,
    "worst": {"head.weight": {"relative_error": 0.5, "rank_correlation": 0.1}},
}


def test_the_quality_of_the_estimate_is_shown_in_words(tmp_path: Path) -> None:
    info = ExpertInfo(details={"curvature": {"seed": 3, "quality": QUALITY}})
    write_expert(tmp_path / "expert", weights=weights(), info=info, hessian=HESSIAN)
    found = inspect_path(tmp_path / "expert")
    assert found.curvature is not None
    assert found.curvature.quality == QUALITY
    assert found.facts["details"]["curvature"] == {"seed": 3}  # it stands with the curvature only
    stream = io.StringIO()
    print_inspection(found, console=Console(file=stream, width=80))
    assert "quality       relative error 12 % (by halves of 5 and 5 examples)" in stream.getvalue()
    assert "least sure    head.weight 50.0 %" in stream.getvalue()


@pytest.mark.parametrize("quality", [3, {"relative_error": 1.0}, None])
def test_a_quality_of_another_form_is_shown_as_it_is(tmp_path: Path, quality: object) -> None:
    info = ExpertInfo(details={"curvature": {"quality": quality}})
    write_expert(tmp_path / "expert", weights=weights(), info=info, hessian=HESSIAN)
    found = inspect_path(tmp_path / "expert")
    assert found.curvature is not None
    assert found.curvature.quality is None
    assert found.facts["details"]["curvature"] == {"quality": quality}


def test_bare_checkpoint_is_no_expert(tmp_path: Path) -> None:
    save_tensors(tmp_path / "net.safetensors", weights())
    found = inspect_path(tmp_path / "net.safetensors")
    assert (found.kind, found.curvature, dict(found.facts)) == ("checkpoint", None, {})
    assert found.parts[0].file == "net.safetensors"


def test_bare_folder_with_a_hessian_is_taken_with_a_note(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", weights())
    save_tensors(tmp_path / "hessian.safetensors", HESSIAN)
    found = inspect_path(tmp_path)
    assert found.kind == "expert"
    assert found.curvature is not None
    assert found.curvature.mean_trace is None
    assert any("no expert.json" in note for note in found.notes)


def test_a_hessian_that_is_not_finite_is_a_warning_and_the_rest_is_summed(tmp_path: Path) -> None:
    save_tensors(tmp_path / "model.safetensors", weights())
    broken = {"body.weight": torch.ones(3, 4)}
    broken["body.weight"][0, :2] = torch.tensor([torch.nan, torch.inf])
    save_tensors(tmp_path / "hessian.safetensors", broken)
    found = inspect_path(tmp_path)
    assert found.curvature is not None
    assert found.curvature.trace == 10.0
    assert "hessian.safetensors: holds NaN or infinity in body.weight" in found.warnings[0]


def test_merged_folder_shows_tasks_method_and_heads(tmp_path: Path, expert: Path) -> None:
    save_tensors(tmp_path / "base.safetensors", weights(1))
    merge(
        tmp_path / "base.safetensors",
        {"svhn": expert},
        GradientMatching(),
        tmp_path / "merged",
        progress=False,
    )
    found = inspect_path(tmp_path / "merged")
    assert found.kind == "merged"
    assert found.facts["tasks"] == ["svhn"]
    assert found.facts["method"].startswith("GradientMatching(")
    assert found.facts["traces"] == {"svhn": 22.0}
    assert [part.name for part in found.parts] == ["weights", "head svhn", "hessian"]
    assert found.curvature is not None
    assert found.curvature.trace == 22.0  # the head's is not the merge's
    assert {t.name: t.trace for t in found.tensors} == {
        "body.weight": 22.0,
        "body.steps": None,
        "head.weight": None,
    }


def test_masked_folder_shows_how_much_each_task_uses(tmp_path: Path) -> None:
    base, body = weights(1), torch.zeros(3, 4)
    save_tensors(tmp_path / "base.safetensors", {**base, "body.weight": body})
    changes = {"a": [1.0, 3.0, 1.0, -9.0], "b": [2.0, -1.0, 1.0, -1.0]}
    for task, row in changes.items():  # elected: plus, plus, plus, minus
        own = {**base, "body.weight": torch.tensor([row, [0.0] * 4, [0.0] * 4])}
        write_expert(
            tmp_path / task,
            weights=own,
            info=ExpertInfo(task=task, head_parameters=("head.weight",)),
        )
    experts = {task: tmp_path / task for task in changes}
    merge(tmp_path / "base.safetensors", experts, EMR(), tmp_path / "out", progress=False)
    found = inspect_path(tmp_path / "out")
    assert found.kind == "merged"
    names = [part.name for part in found.parts]
    assert names == ["weights", "head a", "head b", "mask a", "mask b"]
    assert found.parts[-1].file == str(Path("masks") / "b.safetensors")
    assert found.facts["mask_shares"] == {"a": 4 / 12, "b": 3 / 12}
    # Unified: 2, 3, 1, -9. Task a: (1 + 3 + 1 + 9) / 15; task b: (2 + 1 + 1 + 1) / (2 + 1 + 9).
    assert found.facts["mask_scales"] == pytest.approx({"a": 14 / 15, "b": 5 / 12})
    stream = io.StringIO()
    print_inspection(found, console=Console(file=stream, width=80))
    assert "mask shares  a: 0.333333, b: 0.25" in stream.getvalue()


def test_shards_are_counted(tmp_path: Path, expert: Path) -> None:
    merge(None, {"svhn": expert}, Average(), tmp_path / "out", shard_bytes=8, progress=False)
    parts = inspect_path(tmp_path / "out").parts
    assert parts[0].file == "2 shards"
    assert parts[0].num_elements == 13


def test_what_is_special_about_a_merge_is_shown(tmp_path: Path, expert: Path) -> None:
    save_tensors(tmp_path / "base.safetensors", weights(1))
    write_expert(
        tmp_path / "dtd",
        weights=weights(2),
        info=ExpertInfo(task="dtd", head_parameters=("head.weight",)),
    )
    base, both = tmp_path / "base.safetensors", {"svhn": expert, "dtd": tmp_path / "dtd"}
    merge(base, both, Average(), tmp_path / "both", progress=False)
    merge(
        base,
        {"both": tmp_path / "both", "svhn2": expert},
        TaskArithmetic(0.3),
        tmp_path / "out",
        overrides={
            "body.weight": Override(method=TaskArithmetic(1.0)),
            "body.steps": Override(action="keep"),
        },
        dtype="bfloat16",
        accumulate="float64",
        progress=False,
    )
    facts = inspect_path(tmp_path / "out").facts
    assert facts["experts_in_all"] == 3
    assert facts["overrides"] == {
        "body.weight": "TaskArithmetic(scale=1.0)",
        "body.steps": "keep",
    }
    assert (facts["dtype"], facts["accumulate"]) == ("bfloat16", "float64")
    plain = inspect_path(tmp_path / "both").facts
    assert not plain.keys() & {"experts_in_all", "overrides", "dtype", "accumulate"}


@pytest.mark.parametrize("changes", [{"overrides": 3}, {"leaves": []}, {"method": "TIES"}])
def test_a_damaged_record_of_a_merge_is_named(
    tmp_path: Path, expert: Path, changes: dict[str, object]
) -> None:
    merge(None, {"svhn": expert}, Average(), tmp_path / "out", progress=False)
    file = tmp_path / "out" / "merge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match=r"out: must hold the record of a merge; got a damaged"):
        inspect_path(tmp_path / "out")


def test_corrected_folder_shows_its_corrections(tmp_path: Path) -> None:
    record = CorrectionRecord(
        tasks=("a",),
        num_classes=(2,),
        sites=(),
        correction="RescaleShift",
        calibrated=True,
        merge={"notes": ["from the merge"]},
    )
    write_corrected(
        tmp_path / "out",
        weights=weights(),
        heads={"a": {"head.weight": torch.zeros(2, 3)}},
        corrections={},
        record=record,
    )
    found = inspect_path(tmp_path / "out")
    assert found.kind == "corrected"
    assert found.facts["correction"] == "RescaleShift"
    assert found.facts["sites"] == 0
    assert found.notes == ("from the merge",)


def test_inspection_is_json(expert: Path) -> None:
    content = json.loads(json.dumps(inspect_path(expert).as_dict()))
    assert content["curvature"]["trace"] == 24.0
    assert len(content["tensors"]) == 3


def test_nothing_at_the_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: must exist"):
        inspect_path(tmp_path / "none")
