"""``config.json`` of a task's model: the configuration of a merge with another number of classes.

A merged folder carries its base's configuration, and a task's head can be wider or narrower than
the base's. transformers tells the width by ``id2label`` (two classes where there is none), timm by
``num_classes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_merge.checkpoint import TensorInfo

_LAST_LAYERS = frozenset(
    ("classifier", "fc", "head", "heads", "logits", "out_proj", "qa_outputs", "score")
)
_NAMES_IN_TIMM = ("label_names", "label_descriptions", "labels")


def num_classes_of(
    head: Mapping[str, TensorInfo], shared: Mapping[str, TensorInfo]
) -> tuple[int | None, bool]:
    """Return the number of classes of a head, as far as shapes and names tell.

    Args:
        head: The tensors of a task's own.
        shared: Those of the model whose configuration is at hand.

    Returns:
        The number where it is known, and whether it must be known: a head of the same shapes as the
        shared one fits the configuration as it is.

    >>> import torch
    >>> def info(*shape): return TensorInfo(shape, torch.float32)
    >>> num_classes_of({"fc.weight": info(5, 8), "fc.bias": info(5)}, {"fc.weight": info(3, 8)})
    (5, True)
    >>> num_classes_of({"fc.weight": info(3, 8)}, {"fc.weight": info(3, 8)})
    (None, False)
    """
    others = {
        name: info
        for name, info in head.items()
        if name not in shared or shared[name].shape != info.shape
    }
    if not others:
        return None, False
    widths = {
        info.shape[0]
        for name, info in others.items()
        if info.shape and (name in shared or _is_last(name))
    }
    return (widths.pop() if len(widths) == 1 else None), True


def with_classes(config: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """Return a configuration with another number of classes; their names are then numbers.

    Args:
        config: Contents of ``config.json``.
        num_classes: The number.

    >>> with_classes({"id2label": {"0": "cat"}, "hidden_size": 4}, 1)["id2label"]
    {'0': 'cat'}
    >>> with_classes({"architecture": "resnet18", "num_classes": 10}, 5)
    {'architecture': 'resnet18', 'num_classes': 5}
    """
    made = dict(config)
    if "num_classes" in made or "pretrained_cfg" in made:  # timm's
        if made.get("num_classes") == num_classes:
            return made
        made = _without_names(made) | {"num_classes": num_classes}
        for part in ("pretrained_cfg", "model_args"):
            nested = made.get(part)
            if isinstance(nested, Mapping) and "num_classes" in nested:
                made[part] = _without_names(nested) | {"num_classes": num_classes}
        return made
    named = made.get("id2label")
    if len(named if isinstance(named, Mapping) else ("LABEL_0", "LABEL_1")) != num_classes:
        made["id2label"] = {str(i): f"LABEL_{i}" for i in range(num_classes)}
        made["label2id"] = {f"LABEL_{i}": i for i in range(num_classes)}
    return made


def _is_last(name: str) -> bool:
    """Return whether a tensor is one of a layer that people give such a name to."""
    return len(parts := name.split(".")) > 1 and parts[-2] in _LAST_LAYERS


def _without_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in _NAMES_IN_TIMM}
