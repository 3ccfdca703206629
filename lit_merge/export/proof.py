"""The proof of an export: the corrected model and what was made of it, run side by side."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from lit_merge.correction import Site, standalone
from lit_merge.correction.folding import TOLERANCE, largest_difference
from lit_merge.correction.forward import watch_site
from lit_merge.errors import InputError

CODE = "correction.py"


def write_code(folder: Path) -> Path:
    """Write the file that puts corrections into a model with torch alone; return its path."""
    file = folder / CODE
    file.write_bytes(Path(str(standalone.__file__)).read_bytes())
    return file


def import_file(file: Path) -> ModuleType:
    """Import a Python file as a module of its own, as a user of the exported folder does."""
    spec = importlib.util.spec_from_file_location(f"exported_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def prove(
    corrected: Callable[[], Tensor],
    exported: Callable[[], Tensor],
    *,
    task: str,
    sites: Sequence[Site],
    networks: tuple[nn.Module, nn.Module],
) -> float:
    """Return how far the logits of an exported model are from those of the corrected one.

    Args:
        corrected: Runs the corrected model.
        exported: Runs the exported one on the same inputs.
        task: The task, for messages.
        sites: Where the model is corrected.
        networks: The networks inside of both, which have the sites.

    Returns:
        The largest difference, in units of the largest logit (of 1 where that is less).

    Raises:
        InputError: It is more than 1e-5, or not finite; names the site that differs most.
    """
    error = largest_difference(exported(), corrected())
    if error <= TOLERANCE:
        return error
    worst = _worst_site(sites, corrected, exported, networks)
    raise InputError(
        f"task {task!r}: the exported model must give the corrected model's logits within "
        f"{TOLERANCE:g} of the largest; got {error:.3g}, with site {worst!r} the farthest off. "
        f"Correct the merge again without that site."
    )


def _worst_site(
    sites: Sequence[Site],
    corrected: Callable[[], Tensor],
    exported: Callable[[], Tensor],
    networks: tuple[nn.Module, nn.Module],
) -> str:
    """Return the name of the site whose output differs most."""
    found: list[dict[str, Tensor]] = []
    for network, run in zip(networks, (corrected, exported), strict=True):
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for site in sites:
                # A correction that was folded into the layer is not seen before it.
                if not site.before:
                    keep = partial(_keep, seen, site.name)
                    stack.callback(watch_site(network, site, keep).remove)
            run()
        found.append(seen)
    left, right = found
    differences = {n: largest_difference(right[n], left[n]) for n in left if n in right}
    return max(differences, key=lambda name: differences[name], default="none")


def _keep(seen: dict[str, Tensor], name: str, values: Tensor) -> None:
    seen.setdefault(name, values.clone())
