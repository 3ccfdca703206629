"""The GPU kernel, run by Triton's interpreter on the CPU; and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_merge.curvature import fused

ROOT = Path(__file__).parent.parent

COMPARE = """
import torch
from lit_merge.curvature.fused import add_squared_outer

generator = torch.Generator().manual_seed(0)
for batch, groups, places, rows, columns in SHAPES:
    left = torch.randn(batch, places, groups, rows, generator=generator).transpose(1, 2)
    right = torch.randn(batch, groups, places, columns, generator=generator)
    total = torch.ones(groups, rows, columns)
    add_squared_outer(total, left, right, square=4.0)
    exact = torch.matmul(left.double().mT, right.double()).square().sum(0)
    torch.testing.assert_close(total.double(), 1 + 4 * exact, rtol=1e-5, atol=1e-4)
print("equal")
"""


def test_the_kernel_equals_the_formula_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA on Linux")
    shapes = [(3, 1, 5, 7, 9), (2, 2, 40, 70, 65), (4, 3, 1, 16, 16)]
    code = COMPARE.replace("SHAPES", str(shapes))
    # Triton decides when it is imported whether it interprets: a process of its own.
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_it_is_not_used_without_a_gpu() -> None:
    assert not fused.is_usable(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_is_used_on_a_gpu() -> None:
    assert fused.is_usable(torch.device("cuda", torch.cuda.current_device()))
