"""Operations that move, split, join and choose places, and compute nothing: their rules."""

from __future__ import annotations

import torch

from lit_merge.alignment.call import Axes, Call, Rule, broadcast, unify_all
from lit_merge.alignment.units import (
    SINGLE,
    Axis,
    Units,
    fix,
    fixed_units,
    join,
    place,
    stretch,
    view,
)


def _transpose(call: Call) -> list[Axes]:
    axes = call.axes("self")
    i, j = call.dim("dim0"), call.dim("dim1")
    axes[i], axes[j] = axes[j], axes[i]
    return [axes]


def _permute(call: Call) -> list[Axes]:
    axes = call.axes("self")
    return [[axes[dim] for dim in call.arguments["dims"]]]


def _unsqueeze(call: Call) -> list[Axes]:
    axes = call.axes("self")
    axes.insert(call.dim(rank=len(axes) + 1), SINGLE)
    return [axes]


def _squeeze(call: Call) -> list[Axes]:
    axes = call.axes("self")
    dims = call.arguments.get("dim", range(len(axes)))
    dims = {d % len(axes) for d in ([dims] if isinstance(dims, int) else dims)} if axes else set()
    return [[axis for i, axis in enumerate(axes) if not (i in dims and axis.size == 1)]]


def _expand(call: Call) -> list[Axes]:
    shape = call.outputs[0].shape
    axes = [SINGLE] * (len(shape) - len(call.axes("self"))) + call.axes("self")
    return [
        [
            Units(size, uniform=True) if axis.size == 1 < size else axis
            for axis, size in zip(axes, shape, strict=True)
        ]
    ]


def _repeat(call: Call) -> list[Axes] | None:
    shape = call.outputs[0].shape
    axes = [SINGLE] * (len(shape) - len(call.axes("self"))) + call.axes("self")
    if any(a.size not in (1, size) for a, size in zip(axes, shape, strict=True)):
        return None
    return _expand(call)


def _view(call: Call) -> list[Axes]:
    return [view(call.axes("self"), call.outputs[0].shape)]


def _as_strided(call: Call) -> list[Axes] | None:
    """Only the strides of axes of size 1 change (pooling to 1 x 1 in channels-last does that)."""
    axes, expected = call.axes("self"), 1
    if [axis.size for axis in axes] != list(call.arguments["size"]):
        return None
    for axis, step in zip(reversed(axes), reversed(call.arguments["stride"]), strict=True):
        if axis.size > 1 and step != expected:
            return None
        expected *= axis.size
    return [axes]


def _select(call: Call) -> list[Axes]:
    axes, dim = call.axes("self"), call.dim()
    axis = axes.pop(dim)
    return [place(axis, call.arguments["index"] % axis.size, axes)]


def _unbind(call: Call) -> list[Axes]:
    axes, dim = call.axes("self"), call.dim()
    axis = axes.pop(dim)
    return [place(axis, index, axes) for index in range(axis.size)]


def stretch_of(axes: Axes, dim: int, start: int, size: int) -> Axes:
    """Return the axes of ``x.narrow(dim, start, size)``."""
    axis, others = axes[dim], [*axes[:dim], *axes[dim + 1 :]]
    if size == 1 < axis.size:
        others = place(axis, start, others)
        part: Axis = SINGLE
    else:
        part = stretch(axis, start, size)
    return [*others[:dim], part, *others[dim:]]


def _slice(call: Call) -> list[Axes] | None:
    axes, dim = call.axes("self"), call.dim()
    length, size = axes[dim].size, call.outputs[0].shape[dim]
    start = call.arguments["start"] or 0
    start = min(max(start + length if start < 0 else start, 0), length)
    if call.arguments["step"] != 1 and size != 1:
        fix(axes[dim])
        axes[dim] = fixed_units(size)
        return [axes]
    return [stretch_of(axes, dim, start, size)]


def _split(call: Call) -> list[Axes]:
    axes, dim, start, results = call.axes("self"), call.dim(), 0, []
    for output in call.outputs:
        results.append(stretch_of(axes, dim, start, output.shape[dim]))
        start += output.shape[dim]
    return results


def _cat(call: Call) -> list[Axes]:
    rank = call.outputs[0].ndim
    many = [call.axes_of(t) for t in call.arguments["tensors"] if t.ndim == rank]
    dim = call.dim(rank=rank)
    for axes in many[1:]:
        unify_all(
            [*many[0][:dim], *many[0][dim + 1 :]],
            [*axes[:dim], *axes[dim + 1 :]],
        )
    return [[*many[0][:dim], join([axes[dim] for axes in many]), *many[0][dim + 1 :]]]


def _stack(call: Call) -> list[Axes]:
    many = [call.axes_of(tensor) for tensor in call.arguments["tensors"]]
    for axes in many[1:]:
        unify_all(many[0], axes)
    result = list(many[0])
    result.insert(call.dim(rank=len(result) + 1), fixed_units(len(many)))
    return [result]


def _pad(call: Call) -> list[Axes]:
    axes = call.axes("self")
    pad = call.arguments["pad" if "pad" in call.arguments else "padding"]
    for i in range(len(pad) // 2):
        if pad[2 * i] or pad[2 * i + 1]:
            fix(axes[-1 - i])
            axes[-1 - i] = fixed_units(call.outputs[0].shape[-1 - i])
    return [axes]


def _index_select(call: Call) -> list[Axes]:
    axes, dim = call.axes("self"), call.dim()
    fix(axes[dim])
    axes[dim] = fixed_units(call.outputs[0].shape[dim])
    return [axes]


def _index(call: Call) -> list[Axes] | None:
    axes, indices = call.axes("self"), call.arguments["indices"]
    given = [i for i, index in enumerate(indices) if index is not None]
    if any(indices[i].dtype == torch.bool for i in given):
        return None
    for i in given:
        fix(axes[i])
    chosen = broadcast([call.axes_of(indices[i]) for i in given])
    kept = [axis for i, axis in enumerate(axes) if i not in given]
    together = given[-1] - given[0] == len(given) - 1
    at = given[0] if together else 0
    return [[*kept[:at], *chosen, *kept[at:]]]


REARRANGING: dict[str, Rule] = {
    "t": lambda call: [call.axes("self")[::-1]],
    "transpose": _transpose,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
    "as_strided": _as_strided,
    "select": _select,
    "unbind": _unbind,
    "slice": _slice,
    "cat": _cat,
    "stack": _stack,
    "index": _index,
    "index_select": _index_select,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    **dict.fromkeys(("constant_pad_nd", "reflection_pad2d", "replication_pad2d"), _pad),
}
"""Rules by the name of the operation without "aten::"."""
