"""Per-task corrections of a model's activations, attached to it from outside.

A correction is any module ``factory(num_tasks, num_features)`` with ``forward(x [B, ..., C],
task [B]) -> [B, ..., C]`` that is the identity at the start. :class:`Corrections` holds one for
each site and puts them there with forward hooks: the model's own modules, names and weights stay as
they are, and a mixed-task batch passes through it once. Hooks are on the bare modules, so the model
may be wrapped by torch.compile or DistributedDataParallel, before or after.

Note:
    torch.compile looks at hooks when it compiles: attach before the compiled model first runs, or
    call ``torch.compiler.reset()`` afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_merge.correction.forward import channels_last, module_at, with_first_tensor
from lit_merge.correction.rescale import RescaleShift
from lit_merge.correction.routing import TaskContext, add_named
from lit_merge.correction.site import Site, channel_layout
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
        self._overwrites = False
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
        modules = [module_at(model, site.module) for site in self.sites]
        self._handles = [
            module.register_forward_pre_hook(_CorrectInput(self, site), with_kwargs=True)
            if site.before
            else module.register_forward_hook(
                # Layers make a new tensor, which nobody else has; blocks may return their input.
                _Correct(self, site, fresh=channel_layout(module) is not None)
            )
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
        """Return the corrected activations of a site.

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

    @contextmanager
    def overwriting(self) -> Iterator[None]:
        """Let layers' outputs be overwritten inside the block, where no gradients are recorded.

        It saves memory and time for corrections that have an ``overwrite(x, task)``. What has kept
        a layer's output from before the correction then holds the corrected one.
        """
        before, self._overwrites = self._overwrites, True
        try:
            yield
        finally:
            self._overwrites = before

    def overwrite(self, output: Any, site: Site) -> bool:
        """Correct a layer's output where it is, if that is allowed and the correction can."""
        if not self._overwrites or torch.is_grad_enabled() or not isinstance(output, Tensor):
            return False
        correction = self._modules[site.name.replace(".", "/")]
        overwrite = getattr(correction, "overwrite", None)
        if overwrite is None or output.shape[site.channel_dim] != site.num_features:
            return False
        x = output if site.channel_dim == -1 else output.movedim(site.channel_dim, -1)
        present = self.context.present
        ids = present[0] if len(present) == 1 else None
        overwrite(x, self.context.ids_for(x, where=f"site {site.name!r}") if ids is None else ids)
        return True


class _Correct:
    """The hook behind one site: an object and no closure, so that copies and pickles follow."""

    def __init__(self, corrections: Corrections, site: Site, *, fresh: bool = False) -> None:
        self.corrections = corrections
        self.site = site
        self.fresh = fresh

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.corrections.enabled:
            return None
        if self.fresh and self.corrections.overwrite(output, self.site):
            return None
        return with_first_tensor(output, self.corrected(output))

    def corrected(self, value: Any) -> Tensor:
        """Return the corrected first tensor of a module's output or arguments."""
        corrected: Tensor = self.corrections(channels_last(value, self.site), self.site)
        return corrected.movedim(-1, self.site.channel_dim)


class _CorrectInput(_Correct):
    """The hook before one site."""

    def __call__(  # torch calls it as a pre-hook with keyword arguments
        self, module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        if not self.corrections.enabled:
            return None
        if args:
            return with_first_tensor(args, self.corrected(args)), kwargs
        name = next(iter(kwargs), "")
        return args, {**kwargs, name: self.corrected(tuple(kwargs.values()))}
