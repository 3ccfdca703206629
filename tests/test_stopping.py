"""How the command ends early: exit statuses, and SIGTERM in the middle of writing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from lit_merge import cli
from lit_merge.cli.stopping import Terminated, status_of_exit, terminating_in_order
from lit_merge.errors import InputError, NoRoomError
from lit_merge.output import full_disk

_WRITING = """
import sys, time, types
from lit_merge.output import new_folder

def run(argv):
    with new_folder(argv[0]) as folder:
        (folder / "half").write_text("x")
        print("writing", flush=True)
        time.sleep(60)

module = types.ModuleType("m")
module.main = run
sys.modules["lit_merge.cli.report"] = module
from lit_merge.cli import main
sys.exit(main(["report", sys.argv[1]]))
"""


def run_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Run a command whose function raises."""

    def function(argv: Sequence[str]) -> int:
        raise error

    module = types.ModuleType("failing")
    module.main = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lit_merge.cli.report", module)
    monkeypatch.delenv("LIT_MERGE_TRACEBACK", raising=False)
    return cli.main(["report", "x"])


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITING, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        began = time.monotonic()
        process.terminate()
        _, error = process.communicate(timeout=30)
    assert time.monotonic() - began < 30
    assert process.returncode == 143
    assert error == "lit-merge: terminated\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory")]
)
def test_lack_of_memory_has_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert run_with(monkeypatch, error) == 3
    assert "memory: must hold the models and a batch; got" in capsys.readouterr().err


def test_a_full_disk_has_the_same_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = full_disk("out", OSError(28, "No space left on device"))
    assert isinstance(error, InputError)
    assert isinstance(error, NoRoomError)
    assert run_with(monkeypatch, error) == 3
    assert "out: must have room on its disk" in capsys.readouterr().err


def test_any_other_runtime_error_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run_with(monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_the_exit_of_an_interrupted_trainer_is_an_interrupt(
    error: KeyboardInterrupt, status: int
) -> None:
    def stop_as_lightning_does() -> None:
        try:
            raise error
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit) as caught:
        stop_as_lightning_does()
    assert status_of_exit(caught.value) == status
    assert status_of_exit(SystemExit(1)) == 1


def test_the_exit_of_lightning_for_sigterm_is_no_success() -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    assert status_of_exit(SIGTERMException()) == 143


def test_the_signal_is_only_taken_while_a_command_runs() -> None:
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL:
        pytest.skip("something else takes SIGTERM here")
    with terminating_in_order():
        inside = signal.getsignal(signal.SIGTERM)
        with terminating_in_order():  # a command that runs another
            assert signal.getsignal(signal.SIGTERM) is inside
        assert signal.getsignal(signal.SIGTERM) is inside
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_of_slurm_keeps_its_own_handling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = signal.getsignal(signal.SIGTERM)
    with terminating_in_order():
        assert signal.getsignal(signal.SIGTERM) is before


def test_the_overview_says_what_the_statuses_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    page = capsys.readouterr().out
    for status in ("0 done", "1 a bug", "2 an input", "3 out of memory", "130 inter", "143 term"):
        assert status in page
