"""The completion scripts, run by the shell that they are for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lit_merge.cli import main
from lit_merge.cli.commands import COMMANDS
from lit_merge.cli.completion import words_of
from lit_merge.cli.completion_scripts import SCRIPTS

_BY_NAME = {command.name: command for command in COMMANDS}
_BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def words() -> dict[str, dict[str, tuple[str, ...]]]:
    return {name: words_of(_BY_NAME[name]) for name in ("merge", "fit", "inspect", "completion")}


@pytest.fixture(scope="module")
def script(
    words: dict[str, dict[str, tuple[str, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("completion") / "lit-merge.bash"
    path.write_text(SCRIPTS["bash"](words) + "\n")
    return path


def completed(script: Path, *typed: str) -> list[str]:
    """Return what bash offers for the last of the words that are typed."""
    assert _BASH is not None
    line = " ".join(f"'{word}'" for word in ("lit-merge", *typed))
    code = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(typed)}; _lit_merge; "
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run([_BASH, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


bash_only = pytest.mark.skipif(_BASH is None, reason="bash is not installed")


@bash_only
def test_commands_are_completed(script: Path) -> None:
    assert completed(script, "me") == ["merge"]
    assert completed(script, "help", "ins") == ["inspect"]


@bash_only
def test_options_are_those_of_the_command(script: Path) -> None:
    assert completed(script, "merge", "--meth") == [
        "--method",
        *sorted(option for option in completed(script, "merge", "--method.")),
    ]
    assert "--method.density" in completed(script, "merge", "--method.d")
    assert completed(script, "inspect", "--tens") == ["--tensors"]
    assert completed(script, "inspect", "--method") == []


@bash_only
@pytest.mark.parametrize(
    "typed", [("--method", "TI"), ("--method", "=", "TI"), ("--scale", "0.1", "--method", "TI")]
)
def test_class_names_are_completed(script: Path, typed: tuple[str, ...]) -> None:
    assert completed(script, "merge", *typed) == ["TIES"]


@bash_only
def test_values_of_a_choice_and_callbacks_are_completed(script: Path) -> None:
    assert completed(script, "merge", "--format", "") == [
        *("safetensors", "lightning", "distributed", "adapter")
    ]
    found = completed(script, "fit", "--trainer.callbacks+", "=", "D")
    assert found == ["DeviceStatsMonitor", "DiagonalHessian"]
    assert "CSVLogger" in completed(script, "fit", "--trainer.logger", "C")
    assert completed(script, "completion", "z") == ["zsh"]


@bash_only
def test_anything_else_is_left_to_the_completion_of_files(script: Path) -> None:
    assert completed(script, "merge", "--base", "ru") == []
    assert completed(script, "inspect", "ru") == []
    assert "-o default -F _lit_merge lit-merge" in script.read_text()


def test_options_for_fit_are_those_of_its_own_parser(
    words: dict[str, dict[str, tuple[str, ...]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--help_all"]) == 0
    full = capsys.readouterr().out
    own = {option for option in words["fit"] if option.count(".") < 2 and "model." not in option}
    own -= {option for option in own if option.startswith("--data.")}
    assert len(own) > 30
    unknown = [option for option in own - {"--help_all"} if option.rstrip("+") not in full]
    assert unknown == []


def test_scripts_of_the_other_shells_have_the_same_words(
    words: dict[str, dict[str, tuple[str, ...]]],
) -> None:
    fish = SCRIPTS["fish"](words)
    assert "__fish_seen_subcommand_from merge' -l method -x -a 'Average" in fish
    assert "-l base -r" in fish
    zsh = SCRIPTS["zsh"](words)
    assert "bashcompinit" in zsh
    assert SCRIPTS["bash"](words).partition("\n")[2] in zsh


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
