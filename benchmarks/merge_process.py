"""Running a program and measuring it from outside, and the environment of the other program.

The process that measures must stay small: a child begins as its copy, and the peak of its memory is
never below that of its parent at that moment.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import venv
from dataclasses import dataclass
from pathlib import Path

MERGEKIT_VERSION = "0.1.5"


class Failure(Exception):
    """A program that did not end well: the reason in a few words."""


@dataclass(frozen=True)
class Cost:
    """What a run took.

    Attributes:
        cpu: Seconds, user and system, of all threads.
        wall: Seconds.
        peak: Bytes of resident memory at most.
    """

    cpu: float
    wall: float
    peak: float


def run(command: list[str], *, limit: float, own: bool = False) -> Cost:
    """Run a program to its end.

    Args:
        command: The program and its arguments.
        limit: Seconds after which it is killed.
        own: Whether it prints its own cost, as JSON in the last line.

    Raises:
        Failure: It ended with an error, or was killed.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        killer = threading.Timer(limit, child.kill)
        killer.start()
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        killer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)  # Popen cannot know: we have waited
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    cpu = usage.ru_utime + usage.ru_stime
    if wall >= limit and child.returncode < 0:
        raise Failure(f"stopped after {wall:.0f} s, {cpu:.0f} s of CPU")
    if child.returncode:
        raise Failure(f"ended with {child.returncode}: {' '.join(lines[-2:])[-200:]}")
    if own:
        return Cost(**json.loads(lines[-1]))
    return Cost(cpu, wall, usage.ru_maxrss * 1024)


def install_mergekit(folder: Path) -> None:
    """Create an environment with mergekit, which uses this one's torch rather than a second."""
    venv.create(folder, with_pip=True, clear=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(folder / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", f"mergekit=={MERGEKIT_VERSION}"], check=True
    )
    (folder / "complete").touch()


def environment() -> str:
    """Return the machine in one line."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    python = platform.python_version()
    return f"{os.cpu_count()} CPUs, load {load}, Python {python} on {sys.platform}"
