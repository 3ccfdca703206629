from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

import lit_merge
from lit_merge import cli
from lit_merge.cli.commands import COMMANDS
from lit_merge.errors import InputError


def run_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Run a command whose function raises."""

    def function(argv: Sequence[str]) -> int:
        raise error

    module = types.ModuleType("failing")
    module.main = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lit_merge.cli.report", module)
    return cli.main(["report", "x"])


def test_help_of_everything_imports_nothing_heavy() -> None:
    pages = [["--help"], ["--version"], *([command.name, "--help"] for command in COMMANDS[:-1])]
    code = (
        "import sys; from lit_merge.cli import main; "
        + f"codes = [main(argv) for argv in {pages!r}]; "
        + "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse', 'rich'} & set(sys.modules); "
        + "print(repr((codes, heavy)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    codes, heavy = eval(done.stderr.strip().splitlines()[-1])
    assert set(codes) == {0}
    assert heavy == set()


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {command.name} " in listed for command in COMMANDS)
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out == listed


def test_no_command_is_an_error_that_prints_the_overview(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 2
    assert "usage: lit-merge COMMAND" in capsys.readouterr().out


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lit-merge {lit_merge.__version__}\n"


def test_help_command_prints_the_page_of_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "merge"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("usage: lit-merge merge")
    assert cli.main(["merge", "--help"]) == 0
    assert capsys.readouterr().out == page


def test_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mrege"]) == 2
    assert "got 'mrege'. Did you mean \"merge\"?" in capsys.readouterr().err
    assert cli.main(["xyzzy"]) == 2
    assert 'Run "lit-merge --help"' in capsys.readouterr().err


def test_input_error_is_one_line_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LIT_MERGE_TRACEBACK", raising=False)
    assert run_with(monkeypatch, InputError("file: must be; got not. Fix it.")) == 2
    assert capsys.readouterr().err == "lit-merge: error: file: must be; got not. Fix it.\n"


def test_traceback_of_an_input_error_is_there_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LIT_MERGE_TRACEBACK", "1")
    with pytest.raises(InputError, match="file: must be"):
        run_with(monkeypatch, InputError("file: must be; got not."))


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, ZeroDivisionError())


def test_interrupt_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (3, 3), ("message", 1)])
def test_exit_of_a_parser_becomes_the_status(
    monkeypatch: pytest.MonkeyPatch, code: int | str | None, status: int
) -> None:
    assert run_with(monkeypatch, SystemExit(code)) == status


def test_module_and_script_are_the_command() -> None:
    script = Path(lit_merge.__file__).with_name("__main__.py")
    for start in (["-m", "lit_merge"], [str(script)]):
        done = subprocess.run(
            [sys.executable, *start, "nonsense"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert "command: must be one of" in done.stderr
        assert "Traceback" not in done.stderr


def test_modules_in_the_working_folder_are_found_after_installed_ones(tmp_path: Path) -> None:
    for name in ("my_model_of_a_test", "lit_merge"):
        (tmp_path / f"{name}.py").write_text("where = 'here'\n")
    code = (
        "import sys; from lit_merge.cli import main; sys.argv = ['lit-merge', '--version']; "
        "main(); import lit_merge, my_model_of_a_test as own; "
        "print(own.where, hasattr(lit_merge, 'where'))"
    )
    isolated = [sys.executable, "-I", "-c", code]  # as a console script: without the folder
    done = subprocess.run(isolated, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "here False"


def test_reader_that_closes_the_pipe_is_no_error() -> None:
    code = (
        "import sys, types; module = types.ModuleType('m'); "
        "module.main = lambda argv: print('x' * 10**7) or 0; "
        "sys.modules['lit_merge.cli.report'] = module; "
        "from lit_merge.cli import main; sys.exit(main(['report', 'x']))"
    )
    piped = f'"{sys.executable}" -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=True)
    assert done.stdout == "x"
    assert done.stderr == ""


def test_public_names_exist_and_are_found_lazily() -> None:
    for name in lit_merge.__all__:
        assert getattr(lit_merge, name) is not None
    assert set(lit_merge.__all__) <= set(dir(lit_merge))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lit_merge.nonsense


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, lit_merge; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_inspect_of_a_missing_path_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert "none: must exist" in error
    assert "Traceback" not in error


def test_report_of_something_else_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    assert cli.main(["report", str(tmp_path / "x.json"), "--output", str(tmp_path / "r.html")]) == 2
    assert "x.json: must be the record of a merge" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
