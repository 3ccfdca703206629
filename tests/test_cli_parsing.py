from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from jsonargparse import ArgumentParser

from lit_merge.cli.parsing import (
    add_switch,
    command_parser,
    given_options,
    instantiate,
    is_first_process,
    parse,
)
from lit_merge.errors import InputError
from lit_merge.methods import Average, MergeMethod


@dataclass(frozen=True)
class Size:
    width: int = 1

    def __post_init__(self) -> None:
        if self.width < 0:
            raise InputError("width: must be at least 0.")


def work(
    name: str,
    size: Size = Size(),
    method: MergeMethod = Average(),  # noqa: B008
    how: Literal["fast", "slow"] = "fast",
    count: int = 1,
) -> None:
    """Do nothing."""


@pytest.fixture
def parser() -> ArgumentParser:
    made = command_parser("work", "Do nothing.")
    made.add_function_arguments(work)
    add_switch(made, "loud", "Make noise.")
    return made


def test_options_come_from_files_then_from_the_command_line(
    parser: ArgumentParser, tmp_path: Path
) -> None:
    (tmp_path / "one.yaml").write_text("name: a\ncount: 2\nsize: {width: 3}\n")
    (tmp_path / "two.yaml").write_text("count: 5\n")
    files = ["--config", str(tmp_path / "one.yaml"), "-c", str(tmp_path / "two.yaml")]
    options = instantiate(parser, parse(parser, [*files, "--name", "b"]))
    assert (options.name, options.count, options.size) == ("b", 5, Size(3))


@pytest.mark.parametrize(
    ("argv", "loud"),
    [
        ([], False),
        (["--loud"], True),
        (["--loud", "true"], True),
        (["--loud=false"], False),
        (["--loud", "--count", "2"], True),
    ],
)
def test_switch_is_off_unless_given(parser: ArgumentParser, argv: list[str], loud: bool) -> None:
    assert parse(parser, ["--name", "a", *argv]).loud is loud


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nmae", "a"], r'unrecognized arguments: --nmae a\. Did you mean "--name"\?'),
        (["--xyzzy=1"], r'--xyzzy=1\. Run "lit-merge work --help_all" for the options\.'),
        (["--nam", "a"], r'Did you mean "--name"\?'),
        (["--name", "a", "b"], "Give files before the options, and a value to each option"),
        ([], "name"),
        (["--name", "a", "--how", "well"], "how: must be one of 'fast', 'slow'; got well"),
        (["--name", "a", "--count", "x"], "count: must be of type int; got x"),
        (["--name", "a", "--method", "Averag"], r'got Averag\. Did you mean "Average"\?'),
        (["--name", "a", "--method", "xyzzy"], r"or the path of your own: my_package\.MyClass"),
        (
            ["--name", "a", "--method", "TIES", "--method.densty", "1"],
            r"Option 'densty' is not accepted\. Did you mean \"density\"\?",
        ),
        (["--config", "/none.yaml"], r"/none\.yaml"),
    ],
)
def test_mistake_is_one_line_with_what_was_probably_meant(
    parser: ArgumentParser, argv: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse(parser, argv)
    assert "\n" not in str(caught.value)


def test_unknown_key_of_a_file_is_answered_with_the_nearest(
    parser: ArgumentParser, tmp_path: Path
) -> None:
    (tmp_path / "one.yaml").write_text("nmae: a\n")
    with pytest.raises(
        InputError, match=r"Option 'nmae' is not accepted\. Did you mean \"name\"\?"
    ):
        parse(parser, ["--config", str(tmp_path / "one.yaml")])


def test_file_that_is_no_yaml_is_refused(parser: ArgumentParser, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match="config"):
        parse(parser, ["--config", str(tmp_path / "one.yaml")])


def test_error_of_a_class_is_its_own(parser: ArgumentParser) -> None:
    config = parse(parser, ["--name", "a", "--size.width", "-1"])
    with pytest.raises(InputError, match="width: must be at least 0"):
        instantiate(parser, config)


def test_given_options_are_yaml_that_can_be_given_again(
    parser: ArgumentParser, tmp_path: Path
) -> None:
    config = parse(parser, ["--name", "a", "--method", "TIES", "--method.density", "0.5"])
    (tmp_path / "again.yaml").write_text(given_options(parser, config))
    again = parse(parser, ["--config", str(tmp_path / "again.yaml")])
    assert again.method == config.method
    assert again.name == "a"


@pytest.mark.parametrize(
    ("environment", "first"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "3"}, False), ({"SLURM_PROCID": "1"}, False)],
)
def test_first_process_is_told_by_the_launcher(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], first: bool
) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() is first
