"""A few inputs for the proof of an export: a task's own, or made up for the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.errors import InputError
from lit_merge.tasks.task import Split, Task

NUM_EXAMPLES = 8

_ORDER: tuple[Split, ...] = ("train", "validation", "test")


def task_inputs(task: Task) -> Any:
    """Return the first examples of a task as one batch of inputs.

    Raises:
        InputError: The task has no examples.
    """
    for split in _ORDER:
        examples = task.split(split)
        if examples is not None:
            count = min(NUM_EXAMPLES, len(examples))
            return task.collate([examples[i] for i in range(count)])[0]
    raise InputError(
        f"{task.describe()}: must have examples for the proof of an export; got none in any split. "
        f"Give it a training split."
    )


def made_up_inputs(network: nn.Module, run: Callable[[Any], object]) -> Any:
    """Return random inputs that a network takes.

    They come from what networks say of themselves: ``example_input_array`` as Lightning has it, the
    input size of timm's, the main input and configuration of transformers'.

    Args:
        network: The network.
        run: Runs the network on inputs; what raises is no input for it.

    Raises:
        InputError: Nothing that was tried runs through the network.
    """
    for inputs in _candidates(network, torch.Generator().manual_seed(0)):
        try:
            run(inputs)
        except Exception:  # of any sort: the inputs were a guess
            continue
        return inputs
    raise InputError(
        f"examples: must be given for the proof, as nothing tells what {type(network).__name__} "
        f"takes; got none. Give the tasks as in a configuration of lit-merge correct: "
        f"--examples tasks.yaml."
    )


def num_examples(inputs: Any) -> int:
    """Return the number of examples of a batch of inputs."""
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    return len(first)


def _candidates(network: nn.Module, generator: torch.Generator) -> Iterator[Any]:
    array = getattr(network, "example_input_array", None)
    if isinstance(array, Tensor):
        yield array
    config = getattr(network, "config", None)
    main = getattr(network, "main_input_name", None)
    if main == "input_ids":
        yield from _texts(config, generator)
    if main == "pixel_values":
        image = torch.randn(NUM_EXAMPLES, *_image_size(config), generator=generator)
        yield {"pixel_values": image}
    dummy = getattr(network, "dummy_inputs", None) if main else None
    if isinstance(dummy, Mapping):
        yield dummy
    for size in _timm_sizes(network):
        yield torch.randn(NUM_EXAMPLES, *size, generator=generator)


def _texts(config: Any, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Yield random tokens: padded texts, texts of one length, and a single one."""
    vocabulary = int(getattr(config, "vocab_size", 2))
    padding = getattr(config, "pad_token_id", None)
    longest = int(getattr(config, "max_position_embeddings", None) or 16)
    length = max(1, min(12, longest - 4))
    tokens = torch.randint(vocabulary, (NUM_EXAMPLES, length), generator=generator)
    if padding is not None:
        lengths = torch.randint(max(1, length // 2), length + 1, (NUM_EXAMPLES,))
        mask = torch.arange(length) < lengths[:, None]
        tokens = tokens.where(tokens != padding, (padding + 1) % vocabulary)
        yield {"input_ids": tokens.where(mask, padding), "attention_mask": mask.long()}
    yield {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    yield {"input_ids": tokens}
    yield {"input_ids": tokens[:1]}


def _image_size(config: Any) -> tuple[int, int, int]:
    found = getattr(config, "image_size", None) or 224
    height, width = found if isinstance(found, (tuple, list)) else (found, found)
    return int(getattr(config, "num_channels", None) or 3), int(height), int(width)


def _timm_sizes(network: nn.Module) -> Iterator[tuple[int, ...]]:
    known = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    if not isinstance(known, Mapping) or "input_size" not in known:
        return
    channels, *size = known["input_size"]
    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    channels = channels if first is None else first.in_channels
    patches = getattr(getattr(network, "patch_embed", None), "img_size", None)
    if isinstance(patches, (tuple, list)):
        yield channels, *patches
    yield channels, *size
