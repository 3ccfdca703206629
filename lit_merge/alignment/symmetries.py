"""Finding the permutation symmetries of a model: one forward is followed, the result is proved.

Every axis of every parameter and buffer is followed through a forward
(:mod:`lit_merge.alignment.propagation`). Units that meet neither an input, nor an output, nor an
operation in which their order counts are a symmetry: residual streams, hidden units, channels,
attention heads. Units that always lie inside of others (the inner dimensions of heads, the channels
of a group norm's groups) have a symmetry in each of them, which is more than following one
forward says; the proof decides, and where it does not hold all are permuted alike.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_merge.alignment.generic_model import GenericModel, generic_model, run_generic
from lit_merge.alignment.proof import Proof, prove_on
from lit_merge.alignment.propagation import AxisPropagation
from lit_merge.alignment.symmetry import PermutedAxis, PermutedSite, Symmetry
from lit_merge.alignment.units import (
    Axis,
    Joined,
    Units,
    coordinates,
    fix,
    leaves,
    resolve,
    separate_fibres,
    separated,
)
from lit_merge.correction.forward import Forward, run_model
from lit_merge.errors import InputError


def find_symmetries(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward: Forward = run_model,
    protect: Collection[str] = (),
    strict: bool = False,
) -> tuple[Symmetry, ...]:
    """Return the permutation symmetries of a model that have been proved.

    Args:
        model: Any network that runs in eager mode; it is copied, and left as it is.
        example_inputs: What ``forward`` takes; two or more examples, padded as real ones are.
        forward: Runs the model; the axes of all tensors that it returns stay as they are.
        protect: Patterns of parameters and modules whose axes stay as they are.
        strict: Raise if the proof rejects a symmetry, rather than leave it out.

    Returns:
        The symmetries in the order of their first parameters, the outer before the inner.

    Raises:
        InputError: A pattern matches nothing, the outputs hide what is permuted, or ``strict``
            and there is a symmetry that the proof rejects.
    """
    return search_symmetries(
        model, example_inputs, forward=forward, protect=protect, strict=strict
    ).proved


def search_symmetries(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward: Forward = run_model,
    protect: Collection[str] = (),
    strict: bool = False,
) -> Proof:
    """Return what :func:`find_symmetries` has proved, with what was rejected."""
    generic = generic_model(model, example_inputs)
    structure = follow(generic, forward=forward, protect=protect)
    candidates = _candidates(structure, alike=frozenset())
    proof = prove_on(generic, [c.symmetry for c in candidates], forward=forward)
    alike = frozenset(
        c.units for c in candidates if c.inside_of_others and c.symmetry.name in proof.rejected
    )
    if alike:
        candidates = _candidates(structure, alike=alike)
    if alike or (strict and proof.rejected):
        symmetries = [c.symmetry for c in candidates]
        proof = prove_on(generic, symmetries, forward=forward, strict=strict)
    return proof


@dataclass(frozen=True)
class Structure:
    """What following a forward has shown.

    Attributes:
        axes: Of each parameter and buffer in the state dict.
        outputs: Of each module's output.
        unknown: Operations without a rule, whose inputs were fixed.
    """

    axes: Mapping[str, tuple[Axis, ...]]
    outputs: Mapping[str, tuple[Axis, ...]]
    unknown: frozenset[str]


@dataclass(frozen=True, eq=False)
class _Candidate:
    units: Units
    symmetry: Symmetry
    inside_of_others: bool


def follow(
    generic: GenericModel,
    *,
    forward: Forward = run_model,
    protect: Collection[str] = (),
) -> Structure:
    """Follow the axes of a generic model through one forward.

    Args:
        generic: The model, with inputs.
        forward: Runs it.
        protect: Patterns of parameters and modules whose axes are fixed.

    Raises:
        InputError: A pattern matches nothing.
    """
    mode = AxisPropagation()
    stored = generic.tensors()
    for tensor in stored.values():
        if tensor.is_floating_point():
            mode.follow(tensor, [Units(size) for size in tensor.shape])
    kept = _protected(generic, stored, protect)
    outputs: dict[str, tuple[Axis, ...]] = {}
    several: set[str] = set()

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name in outputs:
                several.add(name)
            elif isinstance(output, Tensor):
                outputs[name] = tuple(mode.axes(output))

        return hook

    with ExitStack() as stack:
        for name, module in generic.model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(record(name)).remove)

        def followed(network: nn.Module, given: Any) -> Any:
            with mode:
                return forward(network, given)

        for tensor in run_generic(generic, followed):
            for axis in mode.axes(tensor):
                fix(axis)
    axes = {name: tuple(mode.axes(t)) for name, t in stored.items()}
    for name, tensor in stored.items():
        if name in kept or id(tensor) not in mode.used:
            for axis in axes[name]:
                fix(axis)
    flat = iter(separate_fibres([axis for each in axes.values() for axis in each]))
    return Structure(
        {name: tuple(itertools.islice(flat, len(each))) for name, each in axes.items()},
        {
            name: tuple(separated(axis) for axis in each)
            for name, each in outputs.items()
            if name not in several
        },
        frozenset(mode.unknown),
    )


def _protected(
    generic: GenericModel, stored: Mapping[str, Tensor], patterns: Collection[str]
) -> set[str]:
    kept: set[str] = set()
    modules = [name for name, _ in generic.model.named_modules() if name]
    for pattern in patterns:
        inside = [f"{m}." for m in modules if fnmatch.fnmatchcase(m, pattern)]
        found = {
            name
            for name in stored
            if fnmatch.fnmatchcase(name, pattern) or name.startswith(tuple(inside))
        }
        if not found:
            raise InputError(
                f"protect: must match parameters or modules of {generic.name}; got "
                f"{pattern!r}, which matches none. Take names as in its state dict."
            )
        kept |= found
    return kept


def _candidates(structure: Structure, alike: Collection[Units]) -> list[_Candidate]:
    """Return the symmetries that a structure shows, the outer before the inner.

    Args:
        structure: Of a model.
        alike: Units that are to be permuted alike in all that they lie in.
    """
    found: dict[Units, list[tuple[str, int, Axis]]] = {}
    for name, axes in structure.axes.items():
        for number, axis in enumerate(axes):
            for units in dict.fromkeys(leaves(axis)):
                found.setdefault(units, []).append((name, number, axis))
    movable = {
        units: places
        for units, places in found.items()
        if not units.fixed
        and units.size > 1
        and all(coordinates(axis, units) is not None for _, _, axis in places)
    }
    outer = {
        units: () if units in alike else _around(units, [axis for _, _, axis in places])
        for units, places in movable.items()
    }
    order = {units: i for i, units in enumerate(movable)}
    candidates: list[_Candidate] = []
    names: dict[tuple[Units, tuple[tuple[Units, int], ...]], str] = {}
    taken: set[str] = set()
    for units in sorted(movable, key=lambda u: (len(outer[u]), order[u])):
        around = outer[units]
        for indices in itertools.product(*(range(o.size) for o in around)):
            at = tuple(zip(around, indices, strict=True))
            permuted = tuple(
                PermutedAxis(name, number, places)
                for name, number, axis in movable[units]
                if (places := _positions(axis, units, at)) is not None
            )
            name = _name(permuted[0], structure, taken)
            names[units, at] = name
            inside = next(
                (
                    parent
                    for o in sorted((o for o in around if o in outer), key=lambda o: -len(outer[o]))
                    if (parent := names.get((o, tuple(p for p in at if p[0] in outer[o]))))
                ),
                None,
            )
            sites = tuple(_sites(structure, units, at))
            symmetry = Symmetry(name, units.size, permuted, sites, inside)
            candidates.append(_Candidate(units, symmetry, bool(around)))
    return candidates


def _around(units: Units, axes: Sequence[Axis]) -> tuple[Units, ...]:
    """Return the units of which each holds all of these, wherever they are, the outermost first."""
    common: list[Units] | None = None
    for axis in axes:
        for around in _paths(axis, units, ()):
            common = list(around) if common is None else [u for u in common if u in around]
    return tuple(common or ())


def _paths(axis: Axis, units: Units, around: tuple[Units, ...]) -> Iterator[tuple[Units, ...]]:
    axis = resolve(axis)
    if isinstance(axis, Units):
        if axis is units:
            yield around
    elif isinstance(axis, Joined):
        for part in axis.parts:
            yield from _paths(part, units, around)
    else:
        for part in axis.parts:
            yield from _paths(part, units, around)
            if isinstance(part, Units):
                around = (*around, part)


def _positions(axis: Axis, units: Units, at: Sequence[tuple[Units, int]]) -> Tensor | None:
    """Return the places of each unit on an axis, ``[units, k]``, where outer units are those."""
    own = coordinates(axis, units)
    if own is None:
        return None
    for outer, index in at:
        others = coordinates(axis, outer)
        if others is None:
            return None
        own = own.where(others == index, -1)
    places = (own >= 0).nonzero().flatten()
    if not len(places) or len(places) % units.size:
        return None
    return places[own[places].argsort(stable=True)].view(units.size, -1)


def _sites(
    structure: Structure, units: Units, at: Sequence[tuple[Units, int]]
) -> Iterator[PermutedSite]:
    for name, axes in structure.outputs.items():
        dims = [i for i, axis in enumerate(axes) if any(u is units for u in leaves(axis))]
        if len(dims) != 1:
            continue
        positions = _positions(axes[dims[0]], units, at)
        if positions is not None:
            yield PermutedSite(name, dims[0] - len(axes), positions)


def _name(axis: PermutedAxis, structure: Structure, taken: set[str]) -> str:
    """Return a name that says where the units lie first: parameter, axis, stretch and width."""
    size = structure.axes[axis.name][axis.axis].size
    first, end = int(axis.positions.min()), int(axis.positions.max()) + 1
    stretch = "" if axis.positions.numel() == size else f"[{first}:{end}]"
    width = axis.positions.shape[1]
    stem = f"{axis.name}[{axis.axis}]{stretch}" + (f" by {width}" if width > 1 else "")
    names = itertools.chain([stem], (f"{stem} #{i}" for i in itertools.count(2)))
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name
