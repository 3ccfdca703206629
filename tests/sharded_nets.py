"""A small transformer, ways to shard it, and a squared-gradient engine of a few lines for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.overrides import TorchFunctionMode

from lit_merge.sharding import UsedParameters, operand, own_rows, reduce_scatter_into

VOCABULARY, WIDTH, CLASSES = 11, 6, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class SmallTransformer(nn.Module):
    """Its 11 words, 5 classes and odd widths give uneven parts, some of them empty."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)
        self.scale = nn.Linear(1, 1, bias=False)  # fewer entries than ranks

    def forward(self, words: Tensor) -> Tensor:
        logits = self.head(self.blocks(self.words(words)).mean(1))
        return self.scale(logits[..., None]).squeeze(-1)


def small_transformer() -> SmallTransformer:
    torch.manual_seed(0)
    return SmallTransformer()


def shard_fully(model: SmallTransformer, mesh: DeviceMesh, **settings: Any) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)


def parallelize(model: SmallTransformer, mesh: DeviceMesh) -> None:
    plan: dict[str, Any] = {
        "words": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in (i for i, block in enumerate(model.blocks) if isinstance(block, Block)):
        plan |= {f"blocks.{i}.up": ColwiseParallel(), f"blocks.{i}.down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)


def mesh_of(data: int, tensor: int) -> DeviceMesh:
    return init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data_parallel", "tensor"))


LAYOUTS = {"fsdp": (2, 1), "tensor": (1, 2), "both": (2, 2)}
"""The ranks with different data, and the ranks that share a layer."""


def processes_of(layout: str) -> int:
    data, tensor = LAYOUTS[layout]
    return data * tensor


def sharded_net(layout: str, **settings: Any) -> SmallTransformer:
    model = small_transformer()
    mesh = mesh_of(*LAYOUTS[layout])
    if layout != "fsdp":
        parallelize(model, mesh["tensor"])
    if layout != "tensor":
        shard_fully(model, mesh["data_parallel"], **settings)
    return model


def sentences(size: int, *, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, VOCABULARY, (size, 7), generator=generator)
    return words, torch.randint(0, CLASSES, (size,), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class TinyEngine(TorchFunctionMode):
    """Sums of squared gradients of Linear and Embedding weights, by the calls with them.

    Every weight is used once. Parameters are frozen, and one anchor makes the backward run.
    """

    def __init__(self, used: UsedParameters, totals: dict[str, Tensor], *, counts: bool) -> None:
        super().__init__()
        self.used, self.totals, self.counts = used, totals, counts
        self.anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        y = function(*args, **(kwargs or {}))
        if function not in (F.linear, F.embedding):
            return y
        x, weight = args[:2]
        name = self.used.name_of(weight)
        if name not in self.totals:
            return y
        if not y.requires_grad:
            y = y + self.anchor * 0
        y.register_hook(lambda g: self.arrive(function, name, x.detach(), weight, g))
        return y

    @torch.no_grad()
    def arrive(self, function: Any, name: str, x: Tensor, weight: Tensor, g: Tensor) -> None:
        g = operand(g, weight, {0: -1} if function is F.linear else {1: -1})
        x = operand(x, weight, {1: -1} if function is F.linear else {})
        if function is F.embedding:
            rows = own_rows(weight)
            x = (x[..., None] == torch.arange(rows.start, rows.stop)).to(g.dtype)
            gradients = torch.einsum("n...i,n...o->nio", x, g)
        else:
            gradients = torch.einsum("n...i,n...o->noi", x, g)
        squares = gradients.square().sum(0) * self.counts
        reduce_scatter_into(self.totals[name], squares, used=weight)


def square_batches(
    model: nn.Module, batches: Iterable[tuple[Any, bool]], totals: dict[str, Tensor]
) -> None:
    """Add the squared per-example gradients of batches, of which some do not count."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with UsedParameters(model) as used:
        for batch, counts in batches:
            with TinyEngine(used, totals, counts=counts) as engine:
                loss = loss_of(model, batch) * len(batch[1])
            torch.autograd.grad(loss, engine.anchor)
