"""The example "existing script": one import and one line, the same weights, a merge of experts."""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_merge.checkpoint import open_checkpoint
from lit_merge.cli import main
from lit_merge.expert import open_expert

FOLDER = Path(__file__).parents[1] / "examples" / "existing_script"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*logs? interval|.*logging interval"),
    pytest.mark.filterwarnings("ignore:.*TensorBoard|.*tensorboard"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def run(script: str, *arguments: str | Path) -> None:
    """Run a script of the example as a user does, in this process."""
    before = sys.argv, list(sys.path)
    sys.argv = [script, *map(str, arguments)]
    sys.path.insert(0, str(FOLDER))  # as Python does with a script's own folder
    try:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before[0], before[1]


def checkpoint_of(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("**/*.ckpt")
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_the_difference_is_an_import_and_a_line() -> None:
    before, after = (
        (FOLDER / name).read_text().splitlines() for name in ("train_before.py", "train.py")
    )
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert [line for line in changes if line[2:].strip()] == [
        "+ from lit_merge.callbacks import DiagonalHessian",
        "+         callbacks=[DiagonalHessian()],",
    ]
    assert not any("lit_merge" in line for line in before)


def test_experts_of_the_script_are_merged_and_training_stays_the_same_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run("train_before.py", "--view", "mirrored", "--output", "before", "--epochs", "1")
    run("train.py", "--view", "mirrored", "--output", "after", "--epochs", "1")
    before, after = checkpoint_of(Path("before")), checkpoint_of(Path("after"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name

    expert = open_expert("after")
    assert expert.hessian is not None
    assert set(expert.hessian) == set(before)
    assert expert.info.num_examples == 1300
    for name, value in after.items():
        assert torch.equal(expert.weights.tensor(name), value), name
    expert.close()

    # From here on as examples/existing_script/README.md has it.
    for view in ("mirrored", "upside-down"):
        where = ("--view", view, "--start", "after", "--output", f"runs/{view}")
        run("train.py", *where, "--epochs", "1")
    experts = [f"--experts.{view}=runs/{view}" for view in ("mirrored", "upside-down")]
    options = ("--base", "after", *experts, "--method", "GradientMatching")
    assert main(["merge", *options, "--output", "merged"]) == 0
    assert main(["inspect", "merged"]) == 0
    capsys.readouterr()
    run("score.py", "merged")
    assert "merged: upright" in capsys.readouterr().out
    with open_checkpoint("merged") as merged:
        assert any(not torch.equal(merged.tensor(name), before[name]) for name in merged)
