"""What each operation of PyTorch says about the axes of the tensors that enter it."""

from __future__ import annotations

import re

from lit_merge.alignment.call import Axes, Call, Rule, broadcast, fix_all, unify_all
from lit_merge.alignment.rearranging import REARRANGING, stretch_of
from lit_merge.alignment.units import SINGLE, Axis, Nested, Units, fix, fixed_units, unify

# What PyTorch does not tag as pointwise, though it keeps axes as they are.
_POINTWISE = frozenset(
    (
        *("_to_copy", "copy", "detach", "alias", "lift_fresh", "masked_fill", "fill", "zero"),
        *("_softmax", "_log_softmax", "_safe_softmax", "hardswish", "prelu", "_prelu_kernel"),
    )
)
_OVER_SPACE = re.compile(r"(pool|upsample_\w+?)(\d)d(_with_indices)?$")


def rule_of(call: Call) -> Rule | None:
    """Return the rule for an operation, None if there is none."""
    rule = _RULES.get(call.name)
    if rule is None and (call.pointwise or call.name in _POINTWISE):
        return _pointwise
    return _over_space if rule is None and _OVER_SPACE.search(call.name) else rule


def _pointwise(call: Call) -> list[Axes]:
    return [broadcast([call.axes_of(tensor) for tensor in call.tensors])] * len(call.outputs)


def _uniform(call: Call) -> list[Axes]:
    return [[Units(size, uniform=True) for size in call.outputs[0].shape]]


def _dims(call: Call) -> set[int]:
    rank, dims = len(call.axes("self")), call.arguments.get("dim")
    if dims is None or dims == []:
        return set(range(rank))
    return {d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)}


def _reduce(call: Call) -> list[Axes]:
    axes, dims = call.axes("self"), _dims(call)
    if call.arguments.get("keepdim"):
        kept = [SINGLE if i in dims else axis for i, axis in enumerate(axes)]
    else:
        kept = [axis for i, axis in enumerate(axes) if i not in dims]
    return [kept] * len(call.outputs)


def _reduce_by_place(call: Call) -> list[Axes]:
    """Reduce as the order on an axis says, or to a place on it, which fixes the axis."""
    axes = call.axes("self")
    if call.arguments.get("dim") is None:
        fix_all(axes)
    for dim in _dims(call):
        fix(axes[dim])
    return _reduce(call)


def _along(call: Call) -> list[Axes]:
    """Compute along axes, in the order on them; the size may change (sort, top k)."""
    axes = call.axes("self")
    dims = call.arguments.get("dims", call.arguments.get("dim"))
    for dim in [dims] if isinstance(dims, int) else dims or range(len(axes)):
        fix(axes[dim])
        axes[dim] = fixed_units(call.outputs[0].shape[dim])
    return [axes] * len(call.outputs)


def _matmul(left: Axes, right: Axes) -> Axes:
    unify(left[-1], right[-2] if len(right) > 1 else right[-1])
    unify_all(left[:-2], right[:-2])
    return [*left[:-1], *right[-1:]] if len(right) > 1 else left[:-1]


def _mm(call: Call) -> list[Axes]:
    right = "mat2" if "mat2" in call.arguments else "vec"
    return [_matmul(call.axes("self"), call.axes(right))]


def _addmm(call: Call) -> list[Axes]:
    names = [n for n in ("mat1", "batch1", "mat", "mat2", "batch2", "vec") if n in call.arguments]
    product = _matmul(call.axes(names[0]), call.axes(names[1]))
    return [broadcast([product, call.axes("self")])]


def _dot(call: Call) -> list[Axes]:
    unify_all(call.axes("self"), call.axes("tensor"))
    return [[]]


def _linear(call: Call) -> list[Axes]:
    axes, weight = call.axes("input"), call.axes("weight")
    unify(axes[-1], weight[1])
    if call.arguments["bias"] is not None:
        unify(weight[0], call.axes("bias")[0])
    return [[*axes[:-1], weight[0]]]


def _convolution(call: Call) -> list[Axes]:
    axes, weight, groups = call.axes("input"), call.axes("weight"), call.arguments["groups"]
    space = len(weight) - 2
    into, out = (weight[0], weight[1]) if call.arguments["transposed"] else (weight[1], weight[0])
    if groups > 1:
        group = Units(groups)
        if call.arguments["transposed"]:
            inner: Axis = Units(into.size // groups)
            unify(into, Nested((group, inner)))
            out = Nested((group, out))
        else:
            inner = Units(out.size // groups)
            unify(out, Nested((group, inner)))
            into = Nested((group, into))
    unify(axes[-space - 1], into)
    if call.arguments["bias"] is not None:
        unify(out, call.axes("bias")[0])
    fix_all(weight[2:])
    fix_all(axes[-space:])
    places = [fixed_units(size) for size in call.outputs[0].shape[-space:]]
    return [[*axes[: -space - 1], out, *places]]


def _over_space(call: Call) -> list[Axes]:
    found = _OVER_SPACE.search(call.name)
    space = int(found[2]) if found else 0
    axes = call.axes("self" if "self" in call.arguments else "input")
    fix_all(axes[-space:])
    places = [fixed_units(size) for size in call.outputs[0].shape[-space:]]
    return [[*axes[:-space], *places]] * len(call.outputs)


def _batch_norm(call: Call) -> list[Axes]:
    axes = call.axes("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.arguments.get(name) is not None:
            unify(axes[1], call.axes(name)[0])
    return [axes]


def _layer_norm(call: Call) -> list[Axes]:
    axes = call.axes("input")
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            axes = broadcast([axes, call.axes(name)])
    return [axes]


def _group_norm(call: Call) -> list[Axes]:
    axes, groups = call.axes("input"), call.arguments["group"]
    unify(axes[1], Nested((Units(groups), Units(axes[1].size // groups))))
    for name in ("weight", "bias"):
        if call.arguments[name] is not None:
            unify(axes[1], call.axes(name)[0])
    return [axes]


def _embedding(call: Call) -> list[Axes]:
    weight = call.axes("weight")
    fix(weight[0])
    return [[*call.axes("indices"), weight[1]]]


def _glu(call: Call) -> list[Axes]:
    axes, dim = call.axes("self"), call.dim()
    half = axes[dim].size // 2
    value, gate = stretch_of(axes, dim, 0, half), stretch_of(axes, dim, half, half)
    unify_all(value, gate)
    return [value]


_RULES: dict[str, Rule] = {
    **REARRANGING,
    "mm": _mm,
    "bmm": _mm,
    "mv": _mm,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addmv": _addmm,
    "dot": _dot,
    "linear": _linear,
    "convolution": _convolution,
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "embedding": _embedding,
    "glu": _glu,
    **dict.fromkeys(
        (
            *("native_batch_norm", "_native_batch_norm_legit_no_training"),
            *("_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm"),
        ),
        _batch_norm,
    ),
    **dict.fromkeys(
        (
            *("mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp"),
            *("prod", "any", "all", "norm", "linalg_vector_norm"),
        ),
        _reduce,
    ),
    **dict.fromkeys(("max", "min", "argmax", "argmin", "median"), _reduce_by_place),
    **dict.fromkeys(("cumsum", "cumprod", "sort", "topk", "roll", "flip"), _along),
    **dict.fromkeys(
        (
            *("zeros", "ones", "full", "zeros_like", "ones_like", "full_like"),
            *("new_zeros", "new_ones", "new_full"),
        ),
        _uniform,
    ),
}
