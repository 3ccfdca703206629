r"""A fused GPU kernel for :math:`Σ_n (Σ_t l_{nt} r_{nt}^⊤)^2`.

Each program keeps one tile of the result in registers, forms the tile of every example's gradient
on tensor cores, and squares and adds it there: no gradient of an example reaches memory, so the
traffic is that of the factors, not of B weights. Needs Triton, which comes with PyTorch for CUDA on
Linux.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds, Windows, macOS
    triton = None

_TILE = {"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_T": 32}


@functools.cache
def is_usable(device: torch.device) -> bool:
    """Return whether the kernel gives the right numbers on a device, tried once.

    Args:
        device: With its index.
    """
    if triton is None or device.type != "cuda":
        return False
    left = torch.linspace(-1, 1, 3 * 2 * 5 * 17, device=device).view(3, 2, 5, 17)
    right = torch.linspace(1, -1, 3 * 2 * 5 * 33, device=device).view(3, 2, 5, 33)
    total = torch.zeros(2, 17, 33, device=device)
    try:
        add_squared_outer(total, left, right, square=1.0)
    except Exception:  # a driver, an architecture or a version of Triton that it does not suit
        return False
    expected = torch.matmul(left.mT.double(), right.double()).square().sum(0)
    return torch.allclose(total.double(), expected, rtol=1e-2, atol=1e-2)


def add_squared_outer(total: Tensor, left: Tensor, right: Tensor, *, square: float) -> None:
    """Add Σ_n (Σ_t l rᵀ)² to a total in place.

    Args:
        total: [G, O, I], contiguous, float32.
        left: [B, G, T, O], float32, with any strides.
        right: [B, G, T, I], likewise.
        square: What the squares are multiplied with.
    """
    batch_size, groups, places, rows = left.shape
    columns = right.shape[-1]
    grid = (triton.cdiv(rows, _TILE["BLOCK_O"]), triton.cdiv(columns, _TILE["BLOCK_I"]), groups)
    exact = not torch.backends.cuda.matmul.allow_tf32
    _kernel[grid](
        total,
        left,
        right,
        batch_size,
        places,
        rows,
        columns,
        *left.stride(),
        *right.stride(),
        square,
        PRECISION="ieee" if exact else "tf32",
        **_TILE,
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        total,
        left,
        right,
        batch_size,
        places,
        rows,
        columns,
        left_n,
        left_g,
        left_t,
        left_o,
        right_n,
        right_g,
        right_t,
        right_i,
        square,
        BLOCK_O: tl.constexpr,
        BLOCK_I: tl.constexpr,
        BLOCK_T: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        group = tl.program_id(2).to(tl.int64)
        o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
        i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
        t = tl.arange(0, BLOCK_T)
        squares = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        for n in range(batch_size):
            own_left = left + n * left_n + group * left_g
            own_right = right + n * right_n + group * right_g
            gradient = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
            for start in range(0, places, BLOCK_T):
                here = start + t
                a = tl.load(
                    own_left + here[None, :] * left_t + o[:, None] * left_o,
                    mask=(here[None, :] < places) & (o[:, None] < rows),
                    other=0.0,
                )
                b = tl.load(
                    own_right + here[:, None] * right_t + i[None, :] * right_i,
                    mask=(here[:, None] < places) & (i[None, :] < columns),
                    other=0.0,
                )
                gradient = tl.dot(a, b, gradient, input_precision=PRECISION)
            squares += gradient * gradient
        where = total + group * rows * columns + o[:, None] * columns + i[None, :]
        inside = (o[:, None] < rows) & (i[None, :] < columns)
        tl.store(where, tl.load(where, mask=inside, other=0.0) + square * squares, mask=inside)
