"""Sites: the modules whose outputs are measured per channel and corrected per task.

A site is a module with one number per channel in its output. Its channel axis is the last one for
linear layers, embeddings and layer norms, ``[B, ..., C]``, and axis 1 for convolutions and the
norms that follow them, ``[B, C, ...]``. Everything else in this package moves that axis last.

Where to correct matters (measured on small models, per cent of the experts' accuracy kept by the
closed form): convolutional nets after their batch norms 40, at convolution outputs 26; vision
transformers at every linear output 50, after their layer norms 40, at block outputs 41. ``"auto"``
follows that.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from lit_merge.errors import InputError

KINDS = (
    "Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, transformers' Conv1D, Embedding, BatchNorm, "
    "InstanceNorm, GroupNorm, LayerNorm and RMSNorm (also their channels-first 2d forms)"
)


@dataclass(frozen=True)
class Site:
    """A place in a model where activations are measured and corrected.

    Attributes:
        name: Qualified name of the module whose output it is.
        num_features: Number of channels C.
        channel_dim: Axis of the channels in the output: -1 for ``[B, ..., C]``, 1 for
            ``[B, C, ...]``.
    """

    name: str
    num_features: int
    channel_dim: int


def channel_layout(module: nn.Module) -> tuple[int, int] | None:
    """Return the number of channels of a module's output and their axis, None if unknown.

    Layers of transformers and timm are recognised by their shape, so neither is imported.

    >>> channel_layout(nn.Linear(3, 5)), channel_layout(nn.Conv2d(3, 8, 1))
    ((5, -1), (8, 1))
    """
    if isinstance(module, nn.Linear):
        return module.out_features, -1
    if isinstance(module, _ConvNd):
        return module.out_channels, 1
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, -1
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return module.num_features, 1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, 1
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, nn.Parameter) else ()
    kind = type(module).__name__
    if kind == "Conv1D" and len(shape) == 2:  # transformers: a Linear stored as [in, out]
        return shape[1], -1
    if isinstance(module, nn.LayerNorm):
        shape = tuple(module.normalized_shape)  # also without an affine part
    if len(shape) == 1 and (isinstance(module, nn.LayerNorm) or _is_layer_norm(kind)):
        # The name is all that tells timm's LayerNorm2d, a subclass of LayerNorm, from its parent.
        first = "2d" in kind or getattr(module, "data_format", None) == "channels_first"
        return shape[0], 1 if first else -1
    return None


def find_sites(
    model: nn.Module,
    *,
    where: str | Sequence[str] = "auto",
    exclude: Collection[str] = (),
) -> tuple[Site, ...]:
    """Find the sites of a model, in the order in which its modules are registered.

    ``"auto"`` takes the outputs of batch, instance and group norms where a model has them
    (a group norm counts when there are convolutions), else every linear output (transformers,
    MLPs), and in a convolutional net without any norm the convolutions and linear layers.
    ``"linear"`` and ``"norm"`` take all layers of that sort. Anything else is a shell-style pattern
    over qualified module names (``*`` also crosses dots).

    A pattern may also match containers and layers without parameters (activations, dropout); these
    are passed over as long as the pattern matches a site as well.

    Note:
        The projection inside :class:`torch.nn.MultiheadAttention` is never called as a module
        (its weights are read directly), so it cannot be a site. In layers that end with their own
        activation (timm's ``BatchNormAct2d``) the site is behind the activation.

    Args:
        model: The network.
        where: ``"auto"``, ``"linear"``, ``"norm"``, a pattern, or several of these.
        exclude: Names of modules or of parameters (the task heads); sites inside are left out.

    Returns:
        The sites, each module once.

    Raises:
        InputError: Nothing was found, a pattern matched nothing, or one matched a layer with
            parameters whose output has no known channel axis.
    """
    names = {name: module for name, module in model.named_modules() if name}
    unreachable = _attention_projections(model)
    wanted = (where,) if isinstance(where, str) else tuple(where)
    chosen: set[str] = set()
    for entry in wanted:
        chosen |= _choose(entry, model, names, unreachable, exclude)
    sites = []
    for name, module in names.items():
        layout = channel_layout(module)
        if name in chosen and layout is not None and not _inside(name, exclude):
            sites.append(Site(name, *layout))
    if not sites:
        heads = f" outside {sorted(exclude)}" if exclude else ""
        raise InputError(
            f"where: must lead to at least one site of {type(model).__name__}{heads}; got "
            f"{where!r}, which leads to none. Name the layers by a pattern; known are {KINDS}."
        )
    return tuple(sites)


def _choose(
    entry: str,
    model: nn.Module,
    names: dict[str, nn.Module],
    unreachable: Collection[str],
    exclude: Collection[str],
) -> set[str]:
    usable = {name for name in names if name not in unreachable}

    def of(*tests: Callable[[nn.Module], bool]) -> set[str]:
        return {name for name in usable if any(test(names[name]) for test in tests)}

    if entry == "linear":
        return of(_is_linear)
    if entry == "norm":
        return of(_is_norm)
    if entry == "auto":
        inner = {name: m for name, m in names.items() if not _inside(name, exclude)}
        convolutional = any(isinstance(m, _ConvNd) for m in inner.values())
        if any(isinstance(m, (_BatchNorm, _InstanceNorm)) for m in inner.values()):
            return of(_is_channel_norm)
        if convolutional and any(isinstance(m, nn.GroupNorm) for m in inner.values()):
            return of(_is_channel_norm)
        if convolutional and not any(_is_norm(m) for m in inner.values()):
            return of(_is_linear, lambda m: isinstance(m, _ConvNd))
        return of(_is_linear)
    return _match(entry, model, names, unreachable)


def _match(
    pattern: str, model: nn.Module, names: dict[str, nn.Module], unreachable: Collection[str]
) -> set[str]:
    matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matched:
        near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.4) or list(names)[:5]
        raise InputError(
            f"where: must match modules of {type(model).__name__}; got {pattern!r}, which matches "
            f"none. Near it are: {', '.join(near) or 'no modules at all'}."
        )
    known = {n for n in matched if channel_layout(names[n]) and n not in unreachable}
    for name in matched:
        module = names[name]
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise InputError(
                f"where: {name!r} must have its shape; got a {type(module).__name__} that has not "
                "run yet. Run one batch through the model first."
            )
        own_parameters = any(True for _ in module.parameters(recurse=False))
        leaf = next(module.children(), None) is None
        if name not in known and (
            not known or (leaf and own_parameters and name not in unreachable)
        ):
            raise InputError(
                f"where: {name!r} must be a layer with a known channel axis that is called as a "
                f"module; got a {type(module).__name__}. Narrow {pattern!r} to {KINDS}."
            )
    return known


def _inside(name: str, exclude: Collection[str]) -> bool:
    """Return whether a module is, lies in, or owns the parameter of an excluded name."""
    return any(
        name == other or name.startswith(other + ".") or other.rpartition(".")[0] == name
        for other in exclude
    )


def _attention_projections(model: nn.Module) -> frozenset[str]:
    def projections() -> Iterator[str]:
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                yield f"{name}.out_proj" if name else "out_proj"

    return frozenset(projections())


def _is_layer_norm(kind: str) -> bool:
    return any(word in kind.lower() for word in ("rmsnorm", "layernorm", "simplenorm"))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and channel_layout(module) is not None
    )


def _is_channel_norm(module: nn.Module) -> bool:
    return isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm))


def _is_norm(module: nn.Module) -> bool:
    named = isinstance(module, nn.LayerNorm) or _is_layer_norm(type(module).__name__)
    return _is_channel_norm(module) or (named and channel_layout(module) is not None)
