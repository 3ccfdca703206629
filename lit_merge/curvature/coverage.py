"""Which parameters of a model are wanted, where they are, and which way each is computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from lit_merge.curvature.capture import Site
from lit_merge.curvature.layers import layer_of
from lit_merge.errors import InputError

Owners: TypeAlias = Mapping[str, tuple[tuple[nn.Module, str], ...]]
"""For each parameter name, all modules that hold it, and the attribute's name there."""


@dataclass(frozen=True)
class Coverage:
    """Which parameter is computed how; every wanted one is in exactly one of the four.

    Attributes:
        sites: Supported modules, whose parameters are computed at their calls.
        layouts: Bare parameters that are replaced by copies per example, and the copies' layouts.
        one_by_one: Parameters computed by a loop over the examples, with the reason.
        unused: Parameters that have had no gradient so far; watched in case they get one.
    """

    sites: tuple[Site, ...] = ()
    layouts: Mapping[str, int] = field(default_factory=dict)
    one_by_one: Mapping[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()

    @property
    def at_once(self) -> frozenset[str]:
        """The parameters computed for all examples of a batch at once."""
        return frozenset(name for site in self.sites for name in site.names) | set(self.layouts)

    def moved(self, reasons: Mapping[str, str]) -> Coverage:
        """Return the coverage that computes some parameters one by one, for the given reasons."""
        rest = self._without(reasons)
        return replace(rest, one_by_one={**rest.one_by_one, **reasons})

    def resting(self, unused: Collection[str]) -> Coverage:
        """Return the coverage that only watches some parameters."""
        return replace(self._without(unused), unused=self.unused | set(unused))

    def with_site(self, site: Site) -> Coverage:
        """Return the coverage that computes the site's parameters there."""
        rest = self._without(site.names)
        return replace(rest, sites=(*rest.sites, site))

    def with_copies(self, names: Collection[str], layout: int) -> Coverage:
        """Return the coverage that computes some parameters from copies per example."""
        rest = self._without(names)
        return replace(rest, layouts={**rest.layouts, **dict.fromkeys(names, layout)})

    def _without(self, names: Collection[str]) -> Coverage:
        sites = (
            replace(
                site,
                weight=None if site.weight in names else site.weight,
                bias=None if site.bias in names else site.bias,
            )
            for site in self.sites
        )
        return Coverage(
            tuple(site for site in sites if site.names),
            {name: layout for name, layout in self.layouts.items() if name not in names},
            {name: reason for name, reason in self.one_by_one.items() if name not in names},
            self.unused - set(names),
        )


def wanted_parameters(
    model: nn.Module, selection: Collection[str] | None
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, tied ones once under their first name.

    Args:
        model: The model.
        selection: Names or patterns (``*.weight``); None for all.

    Raises:
        InputError: Nothing is trainable, a name matches nothing, or a parameter is sharded or was
            made in inference mode.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise InputError(
            f"{type(model).__name__}: must have trainable parameters; got none with requires_grad. "
            "Unfreeze those whose curvature is wanted."
        )
    for name, parameter in trainable.items():
        if hasattr(parameter, "placements"):
            raise InputError(
                f"{name}: must be a whole tensor for the exact pass; got one that is sharded over "
                "devices. Run the pass on the unsharded model, or use the squared batch gradient."
            )
        if parameter.is_inference():
            raise InputError(
                f"{name}: must be a tensor that can be differentiated; got one made in inference "
                "mode. Build the model, and move or convert it, outside of torch.inference_mode()."
            )
    if selection is None:
        return trainable
    if isinstance(selection, str):
        raise InputError(
            f"parameters: must be a list of names; got {selection!r}. Put it in a list."
        )
    for pattern in selection:
        if not any(fnmatchcase(name, pattern) for name in trainable):
            known = ", ".join(list(trainable)[:4])
            raise InputError(
                f"parameters: every entry must match a trainable parameter; got {pattern!r}. "
                f"The model has {known}, …"
            )
    return {
        name: parameter
        for name, parameter in trainable.items()
        if any(fnmatchcase(name, pattern) for pattern in selection)
    }


def owners_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Owners:
    """Return where in the model each parameter is held."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in parameters}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                owners[names[id(parameter)]].append((module, attribute))
    return {name: tuple(places) for name, places in owners.items()}


def supported_coverage(owners: Owners) -> Coverage:
    """Return the coverage by what is known of module types, before anything is tried."""
    kinds: dict[str, set[str]] = {name: set() for name in owners}
    roles: dict[nn.Module, dict[str, str]] = {}
    layers = {module: layer_of(module) for places in owners.values() for module, _ in places}
    reasons: dict[str, str] = {}
    for name, places in owners.items():
        for module, attribute in places:
            layer = layers[module]
            if layer is None or attribute not in ("weight", "bias"):
                reasons[name] = f"{type(module).__name__} is not a module type with a fast form"
                break
            kinds[name].add(layer.kind if attribute == "weight" else "values")
        if len(kinds[name]) > 1 and kinds[name] != {"matrix", "rows"}:
            reasons[name] = "it is shared by modules of different types"
        if name not in reasons:
            for module, attribute in places:
                roles.setdefault(module, {})[attribute] = name
    sites = []
    for module, names in roles.items():
        layer = layers[module]
        assert layer is not None
        sites.append(Site(module, layer, names.get("weight"), names.get("bias")))
    return Coverage(tuple(sites), one_by_one=reasons)
