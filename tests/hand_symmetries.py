"""Tensors with permutation symmetries that are written down by hand, also nested ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.alignment.symmetry import PermutedAxis, PermutedSite, Symmetry


def plain(size: int) -> Tensor:
    """Return the positions of units that are single channels."""
    return torch.arange(size)[:, None]


def moved(
    tensors: Mapping[str, Tensor],
    symmetries: Sequence[Symmetry],
    permutations: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return permuted tensors, position by position: the slow oracle."""
    out = {name: value.clone() for name, value in tensors.items()}
    for symmetry in symmetries:
        for axis in symmetry.axes:
            if axis.name not in out or symmetry.name not in permutations:
                continue
            before = out[axis.name].clone()
            for place, unit in enumerate(permutations[symmetry.name].tolist()):
                for k in range(axis.positions.shape[1]):
                    to, source = int(axis.positions[place, k]), int(axis.positions[unit, k])
                    out[axis.name].select(axis.axis, to).copy_(before.select(axis.axis, source))
    return out


def random_permutations(symmetries: Sequence[Symmetry], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randperm(s.size, generator=generator) for s in symmetries}


def inner_product(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return float(sum((one[name].double() * other[name].double()).sum() for name in one))


def mlp(widths: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Return the weights of an MLP, named as in nn.Sequential with activations between."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer, (n, m) in enumerate(itertools.pairwise(widths)):
        found[f"{2 * layer}.weight"] = torch.randn(m, n, generator=generator)
        found[f"{2 * layer}.bias"] = torch.randn(m, generator=generator)
    return found


def mlp_symmetries(widths: Sequence[int]) -> tuple[Symmetry, ...]:
    """Return the hidden units' symmetries of such an MLP."""
    return tuple(
        Symmetry(
            f"hidden{layer}",
            width,
            (
                PermutedAxis(f"{2 * layer}.weight", 0, plain(width)),
                PermutedAxis(f"{2 * layer}.bias", 0, plain(width)),
                PermutedAxis(f"{2 * layer + 2}.weight", 1, plain(width)),
            ),
            (PermutedSite(f"{2 * layer}", -1, plain(width)),),
        )
        for layer, width in enumerate(widths[1:-1])
    )


def transformer(
    seed: int, *, width: int = 12, heads: int = 3, size: int = 4, hidden: int = 10, depth: int = 2
) -> dict[str, Tensor]:
    """Return weights with the shapes of a transformer's: fused qkv, output, two-layer MLP."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    found = {"embedding": random(7, width)}
    for layer in range(depth):
        found[f"{layer}.qkv"] = random(3 * heads * size, width)
        found[f"{layer}.out"] = random(width, heads * size)
        found[f"{layer}.up"] = random(hidden, width)
        found[f"{layer}.down"] = random(width, hidden)
    return found


def transformer_symmetries(
    *, width: int = 12, heads: int = 3, size: int = 4, hidden: int = 10, depth: int = 2
) -> tuple[Symmetry, ...]:
    """Return the stream, hidden units, heads, and in each head the q/k and the v dimensions."""
    stream = [PermutedAxis("embedding", 1, plain(width))]
    found = []
    head = torch.arange(heads * size).reshape(heads, size)
    whole = heads * size
    for layer in range(depth):
        qkv, out, up, down = (f"{layer}.{name}" for name in ("qkv", "out", "up", "down"))
        stream += [PermutedAxis(name, 1, plain(width)) for name in (qkv, up)]
        stream += [PermutedAxis(name, 0, plain(width)) for name in (out, down)]
        hidden_axes = (PermutedAxis(up, 0, plain(hidden)), PermutedAxis(down, 1, plain(hidden)))
        found.append(Symmetry(up, hidden, hidden_axes))
        rows = torch.cat([head, head + whole, head + 2 * whole], 1)
        found.append(Symmetry(qkv, heads, (PermutedAxis(qkv, 0, rows), PermutedAxis(out, 1, head))))
        for unit in range(heads):
            keys = torch.stack([head[unit], head[unit] + whole], 1)
            values = head[unit][:, None]
            found.append(
                Symmetry(f"{qkv}[{unit}].qk", size, (PermutedAxis(qkv, 0, keys),), inside=qkv)
            )
            axes = (PermutedAxis(qkv, 0, values + 2 * whole), PermutedAxis(out, 1, values))
            found.append(Symmetry(f"{qkv}[{unit}].v", size, axes, inside=qkv))
    return (Symmetry("stream", width, tuple(stream)), *found)
