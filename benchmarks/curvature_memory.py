"""The memory that an engine adds at its peak, measured in a process of its own.

    python benchmarks/curvature_memory.py "MiniLM, T=64" lit-merge

The peak resident memory (Linux: VmHWM, reset before) while a fresh engine runs twice, less what is
resident with the model and the batch loaded. The C library is told to give freed blocks back
at once, so that nothing is counted twice.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from curvature_cases import Case, build, mean_loss
from curvature_engines import ENGINES

_KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_bytes(case: str, engine: str) -> int:
    """Return the bytes that an engine adds at its peak, by starting a process.

    Raises:
        RuntimeError: The process failed; with the last line of its complaint.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, case, engine],
        env={**os.environ, **_KEEP_NOTHING},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    return int(done.stdout)


def allowance(case: Case) -> int:
    """Return the bytes of one accumulator and one buffer of the size of the largest weight."""
    sizes = [p.numel() for p in case.model.parameters()]
    return 4 * (sum(sizes) + max(sizes))


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", text)
    assert match is not None
    return int(match[1]) * 1024


def _measure(case_name: str, engine: str) -> int:
    torch.set_num_threads(1)
    case = build(case_name)
    mean_loss(case.model, case.first(1)).backward()  # what torch loads at first use: not counted
    case.model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    run = ENGINES[engine](case)
    for _ in range(2):
        run(case.batch)
    return _status("VmHWM") - before


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
