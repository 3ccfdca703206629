"""One merge by the library, with what it cost beside its imports.

    python benchmarks/merge_library.py OPTIONS

OPTIONS is JSON: ``method`` (a class of lit_merge.methods), ``arguments`` of it, and ``base``,
``experts``, ``output`` for :func:`lit_merge.merge`. Printed is JSON: CPU seconds of all threads,
wall seconds, and the bytes by which the peak of the resident memory grew.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import lit_merge
from lit_merge import methods


def peak_bytes() -> int:
    """Return the most memory that this process has had resident so far."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    options = json.loads(sys.argv[1])
    method = getattr(methods, options["method"])(**options["arguments"])
    merge = lit_merge.merge
    before = peak_bytes()
    cpu, wall = time.process_time(), time.perf_counter()
    merge(
        options["base"],
        options["experts"],
        method=method,
        output=options["output"],
        progress=False,
    )
    print(
        json.dumps(
            {
                "cpu": time.process_time() - cpu,
                "wall": time.perf_counter() - wall,
                "peak": peak_bytes() - before,
            }
        )
    )


if __name__ == "__main__":
    main()
