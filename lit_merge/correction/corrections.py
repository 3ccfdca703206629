"""Per-task corrections of a model's activations, attached to it from outside.

A correction is any module ``factory(num_tasks, num_features)`` with ``forward(x [B, ..., C],
task [B]) -> [B, ..., C]`` that is the identity at the start. :class:`Corrections` holds one for
each site and puts them behind the sites with forward hooks: the model's own modules, names and
weights stay as they are, and a mixed-task batch passes through it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_merge.correction.forward import channels_last, module_at
from lit_merge.correction.rescale import RescaleShift
from lit_merge.correction.routing import TaskContext, add_named
from lit_merge.correction.sites import Site
from lit_merge.errors import InputError


class Corrections(nn.Module):
    """A per-task correction at every site of a model.

    Its parameters appear as ``<site>.weight`` and so on, with the dots of the site's name as ``/``.
    Copying it together with its model (both attributes of one module, say) keeps them attached; a
    copy made of it alone is attached to nothing.

    Args:
        sites: Where to correct.
        num_tasks: Number of tasks T.
        factory: Makes the correction of one site from ``(num_tasks, num_features)``.
        context: Holds the tasks of the running batch.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        num_tasks: int,
        factory: Callable[[int, int], nn.Module] = RescaleShift,
        *,
        context: TaskContext,
    ) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.sites = tuple(sites)
        self.context = context
        self.enabled = True
        self._handles: list[RemovableHandle] = []
        for site in self.sites:
            module = factory(num_tasks, site.num_features)
            add_named(self, site.name, module, parameter="sites")

    def at(self, site: Site | str) -> nn.Module:
        """Return the correction of a site."""
        name = site if isinstance(site, str) else site.name
        return module_at(self, name.replace(".", "/"))

    @property
    def attached(self) -> bool:
        """Whether the corrections are behind the sites of a model that still exists."""
        hooks = [(handle.hooks_dict_ref() or {}, handle.id) for handle in self._handles]
        return bool(hooks) and all(key in hooks_of_site for hooks_of_site, key in hooks)

    def attach(self, model: nn.Module) -> None:
        """Put the corrections behind the sites of a model, until :meth:`detach`.

        Raises:
            InputError: They are attached already, or the model lacks a site.
        """
        if self.attached:
            raise InputError(
                "corrections: must be attached to one model at a time; got a second. Call "
                "detach() first."
            )
        modules = [module_at(model, site.name) for site in self.sites]
        self._handles = [
            module.register_forward_hook(_Correct(self, site))
            for module, site in zip(modules, self.sites, strict=True)
        ]

    def detach(self) -> None:
        """Take the corrections off the model; their parameters stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the bare model inside the block; it needs no task ids then."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def forward(self, x: Tensor, site: Site | str) -> Tensor:
        """Return the corrected output of a site.

        Args:
            x: Activations with the channels last, ``[k·B, ..., C]``.
            site: The site.

        Returns:
            ``[k·B, ..., C]``.
        """
        name = site if isinstance(site, str) else site.name
        ids = self.context.ids_for(x, where=f"site {name!r}")
        corrected: Tensor = self.at(name)(x, ids)
        return corrected


class _Correct:
    """The hook behind one site: an object and no closure, so that copies and pickles follow."""

    def __init__(self, corrections: Corrections, site: Site) -> None:
        self.corrections = corrections
        self.site = site

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not self.corrections.enabled:
            return None
        corrected: Tensor = self.corrections(channels_last(output, self.site), self.site)
        return corrected.movedim(-1, self.site.channel_dim)
