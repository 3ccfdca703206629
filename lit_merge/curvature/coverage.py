"""Which parameters of a model are wanted, and which way each is computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from lit_merge.errors import InputError


@dataclass(frozen=True)
class Coverage:
    """Which parameter is computed how; every wanted one is in exactly one of the three.

    Attributes:
        at_once: Parameters computed for all examples of a batch at once.
        one_by_one: Parameters computed by a loop over the examples, with the reason.
        unused: Parameters that have had no gradient so far; watched in case they get one.
    """

    at_once: frozenset[str] = frozenset()
    one_by_one: Mapping[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()

    def moved(self, reasons: Mapping[str, str]) -> Coverage:
        """Return the coverage that computes some parameters one by one, for the given reasons."""
        return Coverage(
            self.at_once - set(reasons),
            {**self.one_by_one, **reasons},
            self.unused - set(reasons),
        )


def wanted_parameters(
    model: nn.Module, selection: Collection[str] | None, *, sharded: bool = False
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters, tied ones once under their first name.

    Args:
        model: The model.
        selection: Names or patterns (``*.weight``); None for all.
        sharded: Whether they may be sharded.

    Raises:
        InputError: Nothing is trainable, a name matches nothing, or a parameter is sharded, complex
            or was made in inference mode.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise InputError(
            f"{type(model).__name__}: must have trainable parameters; got none with requires_grad. "
            "Unfreeze those whose curvature is wanted."
        )
    for name, parameter in trainable.items():
        if hasattr(parameter, "placements") and not sharded:
            raise InputError(
                f"{name}: must be a whole tensor for the exact pass; got one that is sharded over "
                "devices. Use ShardedFisher, the squared batch gradient, or the unsharded model."
            )
        if parameter.is_complex():
            raise InputError(
                f"{name}: must be real; got {parameter.dtype}. Make its real and imaginary parts "
                "the parameter (torch.view_as_real), and use torch.view_as_complex in the forward."
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
