"""Finding the head of a task in a model, without importing the library that made the model.

timm says it (``get_classifier``); a classifier of transformers has it outside its base model
(``base_model_prefix``); other models are known by the names that people give to their last layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_LAST_LAYERS = (
    "classifier",
    "classification_head",
    "head",
    "heads",
    "fc",
    "score",
    "qa_outputs",
)


def detect_heads(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of the task's head.

    A language model's output layer is no head: it speaks the vocabulary that all tasks share. A
    parameter that is also used outside the head (tied weights) is none either.

    Args:
        module: A model, or a LightningModule that holds one in any attribute.

    Returns:
        Names as in ``module.named_parameters()``, in that order; empty when nothing is recognised.
    """
    heads: set[int] = set()
    for model in module.modules():
        found = _head_of(model)
        if found is not None:
            heads = {id(p) for part in found for p in part.parameters()}
            break
    else:
        heads = {id(p) for part in _named_last_layers(module) for p in part.parameters()}
    owners = {id(p): 0 for p in module.parameters()}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        owners[id(parameter)] += 1
    return tuple(n for n, p in module.named_parameters() if id(p) in heads and owners[id(p)] == 1)


def _head_of(model: nn.Module) -> tuple[nn.Module, ...] | None:
    """Return the modules of the head if the model's library tells, else None."""
    classifier = getattr(model, "get_classifier", None)
    if callable(classifier):  # timm
        head = classifier()
        parts = head if isinstance(head, (tuple, list)) else (head,)
        return tuple(part for part in parts if isinstance(part, nn.Module))
    prefix = getattr(model, "base_model_prefix", "")
    if isinstance(prefix, str) and prefix and isinstance(getattr(model, prefix, None), nn.Module):
        output = getattr(model, "get_output_embeddings", None)
        if callable(output) and output() is not None:
            return ()
        return tuple(child for name, child in model.named_children() if name != prefix)
    return None


def _named_last_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the last layers of the module, or of the first module inside it that has some."""
    for model in module.modules():
        parts = [child for name, child in model.named_children() if name in _LAST_LAYERS]
        linear = [p for p in parts if any(isinstance(m, nn.Linear) for m in p.modules())]
        if linear:
            yield from linear
            return
