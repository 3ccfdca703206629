"""Several experts side by side: what would make a merge of them go wrong."""

from __future__ import annotations

from collections.abc import Sequence

from lit_merge.expert.contents import listed
from lit_merge.inspection.contents import Inspection

TRACE_RATIO = 30.0
"""Between two Hessians' traces: beyond it, one expert alone decides what is merged."""

_MODELS = ("expert", "checkpoint")


def compare(inspections: Sequence[Inspection]) -> tuple[str, ...]:
    """Return warnings about experts that were inspected together.

    Looked at are their Hessians' traces, whether two are the same, whether they began with the same
    base, and whether they have the same tensors; other things than experts are left out.
    """
    models = [one for one in inspections if one.kind in _MODELS and one.tensors]
    return (*_traces(models), *_equal(models), *_bases(models), *_shapes(models))


def _traces(models: Sequence[Inspection]) -> list[str]:
    traces = {m.path: m.curvature.trace for m in models if m.curvature and m.curvature.trace > 0}
    if len(traces) < 2:
        return []
    least, most = min(traces, key=lambda p: traces[p]), max(traces, key=lambda p: traces[p])
    ratio = traces[most] / traces[least]
    if ratio <= TRACE_RATIO:
        return []
    return [
        f"{most}: has a Hessian {ratio:,.0f} times as large as that of {least} (its trace), and "
        "will decide nearly every weight. Check the losses and the numbers of examples, or give "
        "the experts scales of their own."
    ]


def _equal(models: Sequence[Inspection]) -> list[str]:
    seen: dict[str, str] = {}
    warnings = []
    for model in models:
        if model.fingerprint is None:
            continue
        first = seen.setdefault(model.fingerprint, model.path)
        if first != model.path:
            warnings.append(f"{model.path}: has the weights of {first}. One of them is too much.")
    return warnings


def _bases(models: Sequence[Inspection]) -> list[str]:
    bases = {
        m.path: str(m.facts["base_fingerprint"]) for m in models if "base_fingerprint" in m.facts
    }
    kinds = dict.fromkeys(bases.values())
    if len(kinds) < 2:
        return []
    groups = [
        f"{listed(path for path, base in bases.items() if base == kind)} from {kind[:8]}…"
        for kind in kinds
    ]
    return [
        f"bases: must be the same for a merge of task vectors; got {'; '.join(groups)}. Give the "
        'experts in groups by base: "lit-merge merge --groups" aligns them.'
    ]


def _shapes(models: Sequence[Inspection]) -> list[str]:
    if len(models) < 2:
        return []
    first, *others = models
    warnings = []
    shapes = {tensor.name: tensor.shape for tensor in first.tensors}
    for other in others:
        own = {tensor.name: tensor.shape for tensor in other.tensors}
        odd = [n for n in (*shapes, *own) if shapes.get(n) != own.get(n)]
        odd = list(dict.fromkeys(odd))
        if odd and not own.keys() & shapes.keys():
            warnings.append(f"{other.path}: shares no tensor's name with {first.path}.")
        elif odd:
            warnings.append(
                f"{other.path}: has {len(odd)} tensors that {first.path} lacks or has in another "
                f"shape ({listed(odd)}). Heads stay with their tasks; anything else is refused."
            )
    return warnings
