"""The floor: read files into one buffer per thread, and write as many bytes as a merge writes.

    python benchmarks/merge_floor.py OUTPUT BYTES INPUT [INPUT ...]

Two threads, blocks of 1 MiB, nothing computed, nothing synced. Run as a process of its own, so that
its CPU time is measured as that of the others is.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

BLOCK = 1 << 20
THREADS = 2


def copy(output: str, size: int, inputs: Sequence[str]) -> None:
    """Read all inputs, and write an output of a size."""
    sources = [(os.open(path, os.O_RDONLY), os.stat(path).st_size) for path in inputs]  # noqa: PTH116
    target = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    os.truncate(target, size)

    def work(first: int) -> None:
        buffer = memoryview(bytearray(BLOCK))
        longest = max(size, *(length for _, length in sources))
        for position in range(first * BLOCK, longest, THREADS * BLOCK):
            for source, length in sources:
                if position < length:
                    os.preadv(source, [buffer], position)
            if position < size:
                os.pwrite(target, buffer[: size - position], position)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    copy(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
