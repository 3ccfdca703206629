"""What an expert teaches before it is dropped."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lit_merge.checkpoint import fingerprint
from lit_merge.correction import gather_statistics, to_tensors
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, open_expert, write_expert
from lit_merge.merged.expert_lessons import (
    ExpertLessons,
    Surroundings,
    lessons_bar,
    require_merged_expert,
    stored_statistics,
)
from lit_merge.merged.network import choose_sites
from tests.tiny_merge import HEAD, base_net, examples, expert_net, write_experts

HERE = Surroundings(place=lambda net: net, move=lambda inputs: inputs, autocast=nullcontext)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    write_experts(path)
    return path


def lessons(folder: Path, task: str) -> ExpertLessons:
    return ExpertLessons(base_net(), folder / task, task=task, head_names=HEAD, surroundings=HERE)


def test_logits_and_statistics_are_the_experts(folder):
    inputs = examples("dtd", 11, 0).tensors[0]
    sites = choose_sites(base_net(), "auto", HEAD)
    expert = lessons(folder, "dtd")
    logits = expert.logits(inputs.split(4), num_classes=3)
    with torch.no_grad():
        torch.testing.assert_close(logits, expert_net("dtd")(inputs))
    found = expert.statistics([inputs], sites)
    expected = gather_statistics(expert_net("dtd"), [inputs], sites)
    assert {name: s.mean.tolist() for name, s in found.items()} == {
        name: s.mean.tolist() for name, s in expected.items()
    }


def test_an_expert_of_other_classes_is_refused(folder):
    inputs = examples("dtd", 4, 0).tensors[0]
    with pytest.raises(InputError, match="the expert of task 'dtd' must have 5 classes; got 3"):
        lessons(folder, "dtd").logits([inputs], num_classes=5)


def test_an_expert_without_the_head_is_refused(folder):
    with pytest.raises(
        InputError, match=r"must hold the head of task 'dtd'; got no 'other.weight'"
    ):
        ExpertLessons(
            base_net(), folder / "dtd", task="dtd", head_names=("other.weight",), surroundings=HERE
        )


def test_the_expert_that_was_merged_is_told_from_others(folder):
    expert = open_expert(folder / "dtd")
    merge = {"experts": {"dtd": {"fingerprint": fingerprint(expert.weights)}}}
    expert.close()
    require_merged_expert(folder / "dtd", task="dtd", merge=merge)
    with pytest.raises(InputError, match="svhn: must be the expert of task 'dtd' that was merged"):
        require_merged_expert(folder / "svhn", task="dtd", merge=merge)


@pytest.mark.parametrize(
    "merge", [{}, {"experts": []}, {"experts": {"dtd": {}}}, {"experts": {"dtd": 1}}]
)
def test_a_merge_without_fingerprints_takes_any_expert(folder, merge):
    assert require_merged_expert(folder / "svhn", task="dtd", merge=merge) is None


def stored(path: Path, names: tuple[str, ...] = ("model.body.0", "model.body.2")) -> None:
    net = expert_net("dtd")
    inputs = examples("dtd", 11, 0).tensors[0]
    found = gather_statistics(net, [inputs], choose_sites(net, "auto", HEAD))
    tensors = {f"model.{n}": v for n, v in to_tensors(found).items()}
    kept = {n: v for n, v in tensors.items() if n.rpartition(".")[0] in names}
    write_expert(path, weights=net.state_dict(), info=ExpertInfo(), activations=kept)


def test_stored_statistics_are_found_under_their_prefix(tmp_path):
    stored(tmp_path / "dtd")
    sites = choose_sites(base_net(), "auto", HEAD)
    found = stored_statistics(tmp_path / "dtd", sites, task="dtd")
    assert list(found) == ["body.0", "body.2"]
    assert found["body.0"].count == 11


def test_missing_statistics_are_named(folder, tmp_path):
    sites = choose_sites(base_net(), "auto", HEAD)
    with pytest.raises(
        InputError, match=r'must hold activations.safetensors for statistics="stored"'
    ):
        stored_statistics(folder / "dtd", sites, task="dtd")
    stored(tmp_path / "dtd", names=("model.body.0",))
    with pytest.raises(InputError, match=r"must hold every corrected site; got none for 'body.2'"):
        stored_statistics(tmp_path / "dtd", sites, task="dtd")


def test_the_bar_shows_examples(capsys):
    with lessons_bar(10, shown=True) as advance:
        advance(10)
    assert "10/10" in capsys.readouterr().err
    with lessons_bar(10, shown=False) as advance:
        advance(10)
    assert capsys.readouterr().out == ""
