"""The state in which a model is differentiated, and its complete restoring.

The model is in eval mode, all parameters are frozen, gradients are enabled whatever the caller's
context (``no_grad``, ``inference_mode``), compiled models run eagerly, because compiled code runs
no module hooks, and random numbers are put back afterwards. ``.grad`` is never touched, because all
derivatives are taken with :func:`torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def differentiation(model: nn.Module) -> Iterator[None]:
    """Prepare the model for derivatives, and leave no trace of it.

    Args:
        model: Any module; its parameters' requires_grad is False inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_random_numbers_kept(parameter.device for parameter, _ in frozen))
        # The fused encoder of nn.Transformer runs when nothing requires a gradient, without hooks.
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        if any(is_compiled(module) for module, _ in modes):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            for parameter, _ in frozen:
                parameter.requires_grad_(False)
            yield
        finally:
            drop_caches(model)
            for parameter, required in frozen:
                parameter.requires_grad_(required)
            for module, mode in modes:
                module.training = mode


def drop_caches(model: nn.Module) -> None:
    """Let modules forget what they keep in eval mode to compute it only once.

    Some compute a table from their parameters (the attention biases of LeViT) and keep it, with the
    graph of an earlier forward or with none. By convention a change to training mode ends that.

    Args:
        model: In eval mode, now and afterwards.
    """
    if any(type(module).train is not nn.Module.train for module in model.modules()):
        model.train()
        model.eval()


@contextmanager
def requiring_grad(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let some parameters require a gradient for a while."""
    chosen = tuple(parameters)
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)


@contextmanager
def _random_numbers_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    on_cuda = {device for device in devices if device.type == "cuda"}
    state = torch.get_rng_state()
    cuda_states = {device: torch.cuda.get_rng_state(device) for device in on_cuda}
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for device, cuda_state in cuda_states.items():
            torch.cuda.set_rng_state(cuda_state, device)


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module runs code of ``torch.compile``."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
