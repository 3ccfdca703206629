"""Networks with what is hard about sharded curvature, and the exact engine on them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from lit_merge.curvature.sharded import ShardedFisher
from lit_merge.distributed import in_step, sum_over_ranks
from lit_merge.sharding import local_part, sharded_as, whole
from tests.sharded_nets import (
    CLASSES,
    LAYOUTS,
    VOCABULARY,
    WIDTH,
    Block,
    SmallTransformer,
    loss_of,
    mesh_of,
    parallelize,
    sentences,
    shard_fully,
)


class Scaled(Block):
    """A block with a convolution, and a scale that a derivation goes before."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x.mT).mT * self.scale.square().view(1, 1, -1)
        return super().forward(x)


class Bare(SmallTransformer):
    """Has bare parameters: a class token, positions, a table of biases, scales."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Scaled(), Scaled())
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH) / 3)
        self.places = nn.Parameter(torch.randn(8, WIDTH) / 3)
        self.table = nn.Parameter(torch.randn(15, 1) / 3)
        self.unused = nn.Linear(2, 2)
        self.back = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, words: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(words), -1, -1), self.words(words)], 1)
        x = x + self.places
        steps = torch.arange(8)
        bias = self.table[steps[:, None] - steps + 7].permute(2, 0, 1)
        x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], bias)[:, 0]
        x = self.blocks(x)
        return self.head(x[:, 0]) + self.back(x[:, 1])[:, :CLASSES]


class Tied(Bare):
    """Its head has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.back.weight = self.words.weight


class Recurrent(SmallTransformer):
    """A layer that takes one example at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), nn.GRU(WIDTH, WIDTH, batch_first=True))

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(words))[0].mean(1))


class Recomputing(SmallTransformer):
    """Its blocks run again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*map(Recomputed, (Scaled(), Scaled())))


class Recomputed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return result


class Sequence(SmallTransformer):
    """Takes six words, and puts together what its ranks have each of a part of them."""

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words[:, :6])
        return self.scale(self.head(self.last(self.blocks(x)).mean(1))[..., None]).squeeze(-1)

    def last(self, x: Tensor) -> Tensor:
        return x


def sequence_parallel() -> SmallTransformer:
    """Return a transformer on two ranks of which each computes norms for half of the words."""
    model = net("sequence")
    mesh = mesh_of(1, 2)["tensor"]
    plan: dict[str, Any] = {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(len(model.blocks)):
        plan |= {
            f"blocks.{i}.norm": SequenceParallel(),
            f"blocks.{i}.up": ColwiseParallel(input_layouts=Shard(1)),
            f"blocks.{i}.down": RowwiseParallel(output_layouts=Shard(1)),
        }
    parallelize_module(model, mesh, plan)

    def last(x: Tensor) -> Tensor:
        part = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Shard(1)])
        return part.redistribute(placements=[Replicate()]).to_local()

    model.last = last
    return model


def hybrid_sharded(name: str) -> SmallTransformer:
    """Return a net on four ranks, of which two have one half of the parameters each."""
    model = net(name)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    shard_fully(model, mesh)
    return model


SIZES = {**LAYOUTS, "four": (4, 1)}
"""The ranks with different data, and the ranks that share a layer."""

NETS: dict[str, type[SmallTransformer]] = {
    "transformer": SmallTransformer,
    "bare": Bare,
    "tied": Tied,
    "recurrent": Recurrent,
    "recomputing": Recomputing,
    "sequence": Sequence,
}


def net(name: str, dtype: torch.dtype = torch.float64) -> SmallTransformer:
    torch.manual_seed(0)
    return NETS[name]().to(dtype)


def sharded_copy(
    name: str, layout: str, dtype: torch.dtype = torch.float64, **settings: Any
) -> SmallTransformer:
    model = net(name, dtype)
    mesh = mesh_of(*LAYOUTS[layout])
    if layout != "fsdp":
        parallelize(model, mesh["tensor"])
    if layout != "tensor":
        shard_fully(model, mesh["data_parallel"], **settings)
    return model


def share(layout: str, rank: int, cuts: tuple[tuple[int, int], ...]) -> list[Any]:
    """Return this rank's batches, with their indices: every second one with two data ranks."""
    data, tensor = SIZES[layout]
    words, labels = sentences(max(stop for _, stop in cuts))
    batches = [(range(i, j), (words[i:j], labels[i:j])) for i, j in cuts]
    return batches[rank // tensor :: data]


def measured(
    model: nn.Module, layout: str, rank: int, cuts: tuple[tuple[int, int], ...], **settings: Any
) -> dict[str, Any]:
    """Return the sums over all examples, the report, and what is not as it should be."""
    flags = [p.requires_grad for p in model.parameters()]
    estimator = ShardedFisher(model, settings.pop("loss", loss_of), **settings)
    two = sentences(2)
    report = estimator.probe(two)
    for (indices, batch), counts in in_step(share(layout, rank, cuts), spare=(range(2), two)):
        estimator.update(batch, indices=indices, counts=counts)
    sums = estimator.sums()
    sizes = {n: local_part(p).numel() for n, p in model.named_parameters() if n in sums}
    wrong = [n for n, total in sums.items() if local_part(total).numel() != sizes[n]]
    own = {name: local_part(sums[name]) for name in estimator.own_sums}
    data, tensor = SIZES[layout]
    if own and data > 1:
        group = mesh_of(data, tensor)["data_parallel"].get_group()
        own = sum_over_ranks(own, device=torch.device("cpu"), group=group)
    sums |= {name: sharded_as(part, sums[name]) for name, part in own.items()}
    if flags != [p.requires_grad for p in model.parameters()]:
        wrong.append("requires_grad")
    if any(p.grad is not None for p in model.parameters()):
        wrong.append("grad")
    return {
        "sums": {name: whole(total).tolist() for name, total in sums.items()},
        "wrong": wrong,
        "examples": estimator.num_examples,
        "one_by_one": dict(report.one_by_one),
        "unused": report.unused,
    }
