"""Models inside wrappers: names and modules as they are without torch.compile and data parallelism.

``torch.compile(model)`` puts a model, or any part of one, below ``_orig_mod``, and
DistributedDataParallel below ``module``. Sites are named as in the bare model, so that statistics
and corrections fit whatever the model is wrapped in. FSDP2 and ``module.compile()`` change no
names.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def bare(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers around it, itself where there are none.

    >>> layer = nn.Linear(2, 3)
    >>> bare(nn.DataParallel(layer)) is layer
    True
    """
    while True:
        children = dict(module.named_children())
        if isinstance(module, _PARALLEL):
            module = children["module"]
        elif "_orig_mod" in children:
            module = children["_orig_mod"]
        else:
            return module


def named_bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model under their names without wrappers, each once, the model first.

    A module that is registered under several names comes under the first, as in
    ``named_modules``.
    """
    for name, module in bare(model).named_modules():
        if bare(module) is module:
            yield bare_name(name), module


def bare_name(name: str) -> str:
    """Return the name of a module or parameter without the parts that torch.compile adds.

    >>> bare_name("blocks.0._orig_mod.mlp.weight")
    'blocks.0.mlp.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def bare_module_at(model: nn.Module, name: str) -> nn.Module:
    """Return the bare module of that name.

    Args:
        model: The model, wrapped or not.
        name: Its name without wrappers; "" is the model.

    Raises:
        AttributeError: There is none.
    """
    module = bare(model)
    for part in name.split(".") if name else ():
        module = bare(module.get_submodule(part))
    return module
