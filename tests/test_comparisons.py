"""Experts that records name, found again, compared, or said to be gone; and how to repeat."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from lit_merge.cli.merge import merge_parser
from lit_merge.cli.parsing import instantiate, parse
from lit_merge.evaluation import Evaluation, EvaluationRow, Kind
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.merge_record import MergeRecord, read_merge_record
from lit_merge.methods import GradientMatching, TaskArithmetic
from lit_merge.overlap import expert_overlap
from lit_merge.report.comparisons import compare_experts, compare_merged
from lit_merge.report.overlap_plots import overlap_panels, overlap_table
from lit_merge.report.recorded import evaluated_merges, place_now
from lit_merge.report.repeat import evaluation_yaml, merge_yaml
from lit_merge.report.tables import experts_section, merge_sections
from lit_merge.streaming import merge

TASKS = ("svhn", "dtd")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder, with a base, two experts, and merges of them in ``out``."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def state() -> dict[str, torch.Tensor]:
        names = ("net.0.weight", "net.1.weight", "net.2.weight")
        return {name: torch.randn(4, 3, generator=generator) for name in names}

    save_file(state(), "base.safetensors")
    for task in TASKS:
        weights = state()
        hessian = {name: value.square() for name, value in weights.items()}
        write_expert(task, weights=weights, hessian=hessian, info=ExpertInfo(num_examples=10))
    for scale in (0.5, 1.0):
        merge_to(f"out/gm-{scale}", GradientMatching(scale))
    return tmp_path


def merge_to(output: str, method: GradientMatching | TaskArithmetic) -> None:
    merge("base.safetensors", {t: t for t in TASKS}, method=method, output=output, progress=False)


def records(*names: str) -> list[MergeRecord]:
    return [read_merge_record(Path("out") / name / "merge.json") for name in names]


def test_merges_of_the_same_experts_are_compared_once(root: Path) -> None:
    (one,) = compare_merged(records("gm-0.5", "gm-1.0"), progress=False)
    expected = expert_overlap("base.safetensors", {t: t for t in TASKS}, progress=False)
    assert one.overlap is not None
    assert one.overlap.total.cosine(0, 1) == expected.total.cosine(0, 1)
    assert one.name == "out/gm-0.5, out/gm-1.0"
    assert one.experts["dtd"]["num_examples"] == "10"
    assert one.experts["dtd"]["path"] == "dtd"
    assert one.notes == ()


def test_experts_are_found_from_the_folders_above_the_merge(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [read_merge_record(root / "out/gm-1.0/merge.json")]
    monkeypatch.chdir("/")
    (one,) = compare_merged(given, progress=False)
    assert one.overlap is not None
    assert place_now("dtd", root / "out/gm-1.0") == str(root / "dtd")
    assert place_now("nowhere", root / "out") == "nowhere"
    assert place_now("s3://bucket/dtd", root) == "s3://bucket/dtd"


def test_experts_that_are_gone_or_changed_are_said_to_be(root: Path) -> None:
    shutil.rmtree("dtd")
    (one,) = compare_merged(records("gm-1.0"), progress=False)
    assert one.overlap is None
    assert "not compared: dtd: must exist" in one.notes[0]
    assert one.experts["dtd"]["path"] == "dtd"  # what the record says
    shutil.copytree("svhn", "dtd")
    (one,) = compare_merged(records("gm-1.0"), progress=False)
    assert one.notes == ("The experts were not compared: dtd: changed since the merge, left out.",)
    section = experts_section(one)
    assert section["table"] is None
    assert len(section["experts"]) == 2


def test_a_record_by_hand_is_no_error() -> None:
    (one,) = compare_merged([MergeRecord("m", "X", ("a",), ())], progress=False)
    assert one.notes == ("The experts were not compared: its record is incomplete",)
    assert merge_yaml(MergeRecord("m", "X", ("a",), ())) is None


def test_expert_folders_by_themselves_are_compared_too(root: Path) -> None:
    one = compare_experts("base.safetensors", list(TASKS), progress=False)
    assert one.overlap is not None
    assert one.overlap.tasks == TASKS
    alone = compare_experts(None, list(TASKS), progress=False)
    assert "Without the base" in alone.notes[-1]


def test_maps_and_table_show_the_numbers(root: Path) -> None:
    overlap = expert_overlap("base.safetensors", {t: t for t in TASKS}, progress=False)
    table = overlap_table(overlap)
    assert [line["layer"] for line in table["lines"]] == ["net.0", "net.1", "net.2", "all layers"]
    cosine = overlap.total.cosine(0, 1)
    assert cosine is not None
    assert table["lines"][-1]["cosine"] == [f"{cosine:.2f}"]
    panels = overlap_panels(overlap, name="x")
    assert [panel.title.split(",")[0].split(":")[0] for panel in panels] == [
        "Curvature",
        "Cosine of the task vectors",
        "Cosine by layer",
        "Sign agreement by layer",
    ]
    assert f"svhn and dtd {cosine:.2f}" in panels[1].description


def test_the_repeated_merge_is_the_same_merge(root: Path) -> None:
    (record,) = records("gm-0.5")
    text = merge_yaml(record)
    assert text is not None
    Path("merge.yaml").write_text(text)
    parser = merge_parser(networks=False)
    options = instantiate(parser, parse(parser, ["--config", "merge.yaml"]))
    assert options.method == GradientMatching(0.5)
    assert (options.base, options.experts) == ("base.safetensors", {t: t for t in TASKS})
    assert options.output == "out/gm-0.5"
    before = Path("out/gm-0.5/model.safetensors").read_bytes()
    shutil.rmtree("out/gm-0.5")
    merge_to(options.output, options.method)
    assert Path("out/gm-0.5/model.safetensors").read_bytes() == before


def test_overrides_and_types_are_repeated(root: Path) -> None:
    Path("m.yaml").write_text(
        yaml.safe_dump(
            {
                "base": "base.safetensors",
                "experts": {t: t for t in TASKS},
                "method": {"class_path": "TaskArithmetic", "init_args": {"scale": 0.5}},
                "overrides": {"net.0.*": {"action": "keep"}, "net.1.*": {"scale": 0.25}},
                "dtype": "bfloat16",
                "output": "out/o",
            }
        )
    )
    from lit_merge.cli.merge import main

    assert main(["--config", "m.yaml"]) == 0
    text = merge_yaml(records("o")[0])
    assert text is not None
    Path("again.yaml").write_text(text)
    parser = merge_parser(networks=False)
    options = instantiate(parser, parse(parser, ["--config", "again.yaml"]))
    assert options.dtype == "bfloat16"
    assert options.overrides["net.0.*"].action == "keep"
    assert options.overrides["net.1.*"].scale == 0.25


def test_merges_that_treat_tensors_alike_share_one_record(root: Path) -> None:
    first, second = merge_sections(records("gm-0.5", "gm-1.0"))
    assert (len(first["record"]), first["same_as"]) == (3, "")
    assert (second["record"], second["same_as"]) == ([], "out/gm-0.5")


def test_merges_of_an_evaluation_are_found_by_its_provenance(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: dict[str, Kind] = {"gm": "merged", "gone": "merged", "e": "expert", "x": "merged"}
    rows = tuple(EvaluationRow(name, kind, "svhn", 0.5, 10) for name, kind in kinds.items())
    models = {"gm": {"path": "out/gm-1.0"}, "gone": {"path": "out/gone"}, "e": {"path": "svhn"}}
    evaluation = Evaluation(rows, provenance={"models": models})
    assert list(evaluated_merges(evaluation)) == ["gm"]
    (given,) = records("gm-1.0")
    assert evaluated_merges(evaluation, [given])["gm"] is given
    monkeypatch.chdir("/")
    beside = root / "out" / "evaluation.json"
    assert evaluated_merges(evaluation, beside=beside)["gm"].method == given.method
    assert evaluated_merges(Evaluation(rows, provenance={"models": 3})) == {}


def test_an_evaluation_is_repeated_by_its_configuration() -> None:
    assert evaluation_yaml(Evaluation((), provenance={"configuration": "a: 1\n"})) == "a: 1"
    assert evaluation_yaml(Evaluation((), provenance={"configuration": {}})) is None
