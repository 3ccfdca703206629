"""Corrected folders of any network, with random heads, scales and shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_merge.checkpoint import fingerprint
from lit_merge.expert import open_expert
from lit_merge.heads import detect_heads
from lit_merge.merged.folder import CorrectionRecord, write_corrected
from lit_merge.merged.network import MergedNetwork, choose_sites

CLASSES = {"svhn": 3, "dtd": 5}


def tiny_gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=3, pad_token_id=0
    )
    model: nn.Module = GPT2ForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def save_corrected(
    model: nn.Module,
    where: str | Sequence[str],
    folder: Path,
    *,
    experts: Mapping[str, Path] | None = None,
    shifts: bool = True,
    dtype: torch.dtype | None = None,
    surgery_rank: int = 0,
) -> MergedNetwork:
    """Write a corrected folder; return the network that is in it.

    Args:
        model: The architecture with the shared weights.
        where: The sites.
        folder: The folder to write.
        experts: Folders of experts that the record of the merge shall name.
        shifts: Whether corrections shift as well.
        dtype: Type of the shared weights in the folder.
        surgery_rank: Rank of the representation surgery before the head.
    """
    generator = torch.Generator().manual_seed(1)
    names = detect_heads(model)
    if isinstance(model, nn.Sequential):  # whose layers have no names
        names = (f"{len(model) - 1}.weight", f"{len(model) - 1}.bias")
    state = model.state_dict()
    heads: dict[str, dict[str, Tensor]] = {
        task: {
            name: torch.randn((classes, *state[name].shape[1:]), generator=generator)
            for name in names
        }
        for task, classes in CLASSES.items()
    }
    sites = choose_sites(model, where, names)
    network = MergedNetwork(
        model, tuple(CLASSES), heads=heads, sites=sites, surgery_rank=surgery_rank
    )
    for value in network.final_feature.parameters():
        value.data.normal_(0, 0.5, generator=generator)
    shared = {name: value.to(dtype or value.dtype) for name, value in state.items()
              if value.is_floating_point()}  # fmt: skip
    shared = {**state, **shared}
    network.load_shared({name: value for name, value in shared.items() if name not in names})
    for site in sites:
        correction: Any = network.corrections.at(site)
        correction.weight.data.uniform_(0.5, 1.5, generator=generator)
        if shifts:
            correction.bias.data.normal_(0, 0.3, generator=generator)
    record = CorrectionRecord(
        tasks=tuple(CLASSES),
        num_classes=tuple(CLASSES.values()),
        sites=sites,
        correction="lit_merge.correction.rescale.RescaleShift",
        calibrated=True,
        surgery_rank=surgery_rank,
        merge={"experts": {task: _entry(path) for task, path in (experts or {}).items()}},
    )
    write_corrected(
        folder,
        weights={name: shared[name] for name in network.shared_state()},
        heads=network.head_state(),
        corrections=network.corrections.state_dict(),
        record=record,
        surgery=network.final_feature.state_dict(),
    )
    return network


def _entry(path: Path) -> dict[str, str]:
    with closing(open_expert(path)) as expert:
        return {"path": str(path), "fingerprint": fingerprint(expert.weights)}


@torch.no_grad()
def logits_of(network: MergedNetwork, inputs: Any, task: str) -> Tensor:
    """Return a task's own logits of the corrected network."""
    return network(inputs, network.tasks.index(task))[:, : CLASSES[task]]
