"""What any correction must beat: a refitted head, and distilling all weights the plain way."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from correction_cases import Case
from torch import Tensor, nn

from lit_merge import MergeModule
from lit_merge.correction import linear_probe
from lit_merge.merged.muon import MuonWithAdam, hidden_matrices
from lit_merge.parameters import detect_heads

PER_STEP = 32
"""Images of each task in a step of distillation."""
TEMPERATURE = 2.0


class SharedBody(nn.Module):
    """A timm network whose tasks share all but the last layer.

    Args:
        body: The network; its own head is not used.
        heads: The last layer of each task.
    """

    def __init__(self, body: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleDict(heads)

    def features(self, inputs: Tensor) -> Tensor:
        """Return what reaches the heads, ``[B, D]``."""
        body = self.body
        return body.forward_head(body.forward_features(inputs), pre_logits=True)  # type: ignore[operator, no-any-return]

    def forward(self, inputs: Tensor, task: str) -> Tensor:
        """Return a task's logits."""
        return self.heads[task](self.features(inputs))  # type: ignore[no-any-return]


def shared_body(module: MergeModule) -> SharedBody:
    """Return the network of a merge with its heads, all of them free to learn."""
    network = copy.deepcopy(module.architecture)
    network.load_state_dict(module.network.shared_state(), strict=False)
    router = detect_heads(network)[0].rpartition(".")[0]
    heads = {}
    for task, tensors in module.network.head_state().items():
        weight, bias = tensors[f"{router}.weight"], tensors[f"{router}.bias"]
        heads[task] = nn.Linear(weight.shape[1], weight.shape[0])
        heads[task].load_state_dict({"weight": weight, "bias": bias})
    return SharedBody(network, heads)


def refitted_heads(case: Case, module: MergeModule) -> dict[str, float]:
    """Return the ratios with a logistic regression on each task's labelled images.

    Args:
        case: What is merged.
        module: A merge, whose corrections take part.
    """
    merged = module.network.eval()
    head = detect_heads(module.architecture)[0].rpartition(".")[0]
    found = {}
    for place, task in enumerate(module.tasks):
        images = case.tasks[task]
        test = zip(
            torch.split(images.test.inputs, 250), torch.split(images.test.labels, 250), strict=True
        )
        with merged.context.using(place):
            score = linear_probe(merged.network, head, [case.labelled[task]], test)
        found[task] = 100 * score / case.accuracies[task]
    return found


@torch.no_grad()
def teachers(case: Case) -> dict[str, Tensor]:
    """Return each expert's logits on its unlabelled images."""
    return {
        task: torch.cat([case.expert(task)(part) for part in torch.split(images, 256)])
        for task, images in case.unlabelled.items()
    }


def distil(
    network: SharedBody, case: Case, seconds: float, *, lr: float, muon: bool, mixup: bool = False
) -> None:
    """Fit all weights, heads too, to the experts' logits for some CPU seconds.

    AdamW, or our own Muon for the matrices of the body, with a cosine over the time; BatchNorm
    trains on mixed batches, as it does anywhere. With mixup, every image is blended with another of
    its task, and the experts answer for the blends.
    """
    begin = time.process_time()
    targets = teachers(case)
    experts = {task: case.expert(task) for task in case.unlabelled} if mixup else {}
    optimizer = _muon(network, lr) if muon else torch.optim.AdamW(network.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(case.seed)
    network.train()
    while (spent := (time.process_time() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * spent)) / 2
        chosen = {
            task: torch.randperm(len(images), generator=generator)[:PER_STEP]
            for task, images in case.unlabelled.items()
        }
        inputs = {task: case.unlabelled[task][rows] for task, rows in chosen.items()}
        wanted = {task: targets[task][rows] for task, rows in chosen.items()}
        if mixup:
            for task, images in inputs.items():
                share = torch.rand(len(images), 1, 1, 1, generator=generator)
                inputs[task] = share * images + (1 - share) * images.roll(1, 0)
                with torch.no_grad():
                    wanted[task] = experts[task](inputs[task])
        features = torch.split(network.features(torch.cat(list(inputs.values()))), PER_STEP)
        losses = [
            _divergence(network.heads[task](own), wanted[task])
            for task, own in zip(inputs, features, strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    network.eval()


def _muon(network: SharedBody, lr: float) -> torch.optim.Optimizer:
    body = dict(network.body.named_parameters())
    hidden = hidden_matrices(network.body, body) - set(detect_heads(network.body))
    matrices = [body[name] for name in hidden]
    stepped = set(map(id, matrices))
    rest = [p for p in network.parameters() if id(p) not in stepped]
    groups = [
        {"params": part, "lr": lr, "muon": muon} for part, muon in ((rest, False), (matrices, True))
    ]
    return MuonWithAdam(groups, eps=1e-6)


def _divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    student = F.log_softmax(logits / TEMPERATURE, dim=-1)
    target = F.log_softmax(teacher / TEMPERATURE, dim=-1)
    return TEMPERATURE**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)
