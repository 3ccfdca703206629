"""Slow, independent, dense versions in float64 of what the library computes: the tests' oracles."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn


def joint_quadratic_optimum(
    base: Tensor,
    base_hessian: Tensor,
    optima: Sequence[Tensor],
    hessians: Sequence[Tensor],
    scales: Sequence[float],
) -> tuple[list[Tensor], Tensor]:
    """Train experts and the joint model on quadratic losses by solving their normal equations.

    Loss t is ½(θ−m_t)ᵀH_t(θ−m_t) with dense H_t [D, D]; each fit adds ½(θ−θ₀)ᵀH₀(θ−θ₀).

    Returns:
        The experts' optima, and the optimum of the losses weighed with ``scales``.
    """
    experts = [
        torch.linalg.solve(base_hessian + h, base_hessian @ base + h @ m)
        for h, m in zip(hessians, optima, strict=True)
    ]
    left, right = base_hessian.clone(), base_hessian @ base
    for h, m, scale in zip(hessians, optima, scales, strict=True):
        left = left + scale * h
        right = right + scale * (h @ m)
    return experts, torch.linalg.solve(left, right)


def ties_by_sorting(
    base: Sequence[float],
    experts: Sequence[Sequence[float]],
    *,
    density: float,
    scale: float,
    frequency: bool,
) -> list[float]:
    """TIES on one flat vector, entry by entry on Python numbers, trimming by a full sort."""
    size = len(base)
    trimmed = []
    for expert in experts:
        vector = [e - b for e, b in zip(expert, base, strict=True)]
        kept = set(sorted(range(size), key=lambda i: -abs(vector[i]))[: int(density * size)])
        trimmed.append([vector[i] if i in kept else 0.0 for i in range(size)])
    merged = []
    for i in range(size):
        column = [vector[i] for vector in trimmed]
        votes = [math.copysign(1, x) for x in column if x != 0] if frequency else column
        sign = 1 if sum(votes) >= 0 else -1
        agreeing = [x for x in column if x * sign > 0]
        merged.append(base[i] + scale * (sum(agreeing) / len(agreeing) if agreeing else 0.0))
    return merged


def gradient_matching_by_entries(
    base: Sequence[float],
    experts: Sequence[Sequence[float]],
    hessians: Sequence[Sequence[float]],
    base_hessian: Sequence[float],
    scales: Sequence[float],
) -> list[float]:
    """The diagonal merge rule in exact rational arithmetic, entry by entry."""
    merged = []
    for i, origin in enumerate(base):
        h0 = Fraction(base_hessian[i])
        precision = h0 + sum(
            Fraction(a) * Fraction(h[i]) for a, h in zip(scales, hessians, strict=True)
        )
        result = Fraction(origin)
        for a, h, expert in zip(scales, hessians, experts, strict=True):
            weight = (h0 + Fraction(h[i])) / precision if precision else Fraction(1)
            result += Fraction(a) * weight * (Fraction(expert[i]) - Fraction(origin))
        merged.append(float(result))
    return merged


# --- correction ---------------------------------------------------------------------------------


def moments_by_loop(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of rows [n, C], one number after the other."""
    table = rows.double().tolist()
    count, width = len(table), len(table[0])
    means = [sum(row[c] for row in table) / count for c in range(width)]
    m2 = [sum((row[c] - means[c]) ** 2 for row in table) for c in range(width)]
    return count, torch.tensor(means, dtype=torch.float64), torch.tensor(m2, dtype=torch.float64)


def tact_by_passes(
    merged: list[tuple[Tensor, Tensor]], expert: list[tuple[Tensor, Tensor]], inputs: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """TACT for a chain of (weight, bias) layers with ReLU between: a whole pass for every site."""

    def outputs(layers: list[tuple[Tensor, Tensor]], fits: list[tuple[Tensor, Tensor]]) -> Tensor:
        x = inputs.double()
        for number, (weight, bias) in enumerate(layers):
            x = (x.relu() if number else x) @ weight.double().T + bias.double()
            if number < len(fits):
                x = fits[number][0] * x + fits[number][1]
        return x

    fits: list[tuple[Tensor, Tensor]] = []
    for depth in range(1, len(merged) + 1):
        goal, now = outputs(expert[:depth], []), outputs(merged[:depth], fits)
        scale = goal.std(0, correction=0) / now.std(0, correction=0)
        fits.append((scale, goal.mean(0) - scale * now.mean(0)))
    return fits


def reference_fingerprint(state: dict[str, Tensor]) -> str:
    """The fingerprint of a state dict whose names share no prefix, byte by byte."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        digest.update(f"{name}\0{list(value.shape)}\0{value.dtype}\0".encode())
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        size, width = value.numel(), value.dtype.itemsize
        if size <= 1024:
            digest.update(raw)
            continue
        for block in range(16):
            first = block * (size - 64) // 15
            digest.update(raw[first * width : (first + 64) * width])
    return digest.hexdigest()


def softened_divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) of softmaxes at temperature T, by its definition; ``[B]``."""
    losses = []
    for own, other in zip(logits.double(), teacher.double(), strict=True):
        p, q = (x.div(temperature).exp() for x in (other, own))
        p, q = p / p.sum(), q / q.sum()
        losses.append(temperature**2 * (p * (p / q).log()).sum())
    return torch.stack(losses)


def squared_gradients_by_loop(
    model: nn.Module, batches: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """Sum squared gradients over examples: float64, one backward per example, nothing clever.

    Args:
        model: Copied, not changed.
        batches: Pairs (inputs, labels), inputs a tensor or a dict of tensors.
        loss: The mean over a batch.
    """
    copied = copy.deepcopy(model).double().eval()
    sums = {name: torch.zeros_like(p) for name, p in copied.named_parameters() if p.requires_grad}
    for inputs, labels in batches:
        for i in range(len(labels)):
            copied.zero_grad()
            one = (
                {k: _as_double(v[i : i + 1]) for k, v in inputs.items()}
                if isinstance(inputs, dict)
                else _as_double(inputs[i : i + 1])
            )
            loss(copied, (one, _as_double(labels[i : i + 1]))).backward()
            for name, parameter in copied.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad**2
    return sums


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def splitmix_uniform(seed: int, stream: int, index: int, position: int) -> float:
    """Hash an address to a number in (0, 1) with Python's unbounded integers."""
    return ((_splitmix_word(seed, stream, index, position) >> 12) + 0.5) / 2**52


def splitmix_signs(seed: int, stream: int, index: int, count: int) -> list[int]:
    """Return −1 or 1 for every bit of the hashes of the positions, the lowest bit first."""
    words = (_splitmix_word(seed, stream, index, position) for position in range(count))
    return [2 * (word >> bit & 1) - 1 for word in words for bit in range(64)][:count]


def splitmix_set(numbers: Sequence[int]) -> int:
    """Hash a set of numbers, in ascending order, to one."""
    key = 0
    for number in sorted(numbers):
        key = _splitmix(key * _GOLDEN + number + 1)
    return key


_GOLDEN = 0x9E3779B97F4A7C15


def _splitmix(z: int) -> int:
    mask = (1 << 64) - 1
    z &= mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def _splitmix_word(seed: int, stream: int, index: int, position: int) -> int:
    key = _splitmix(_splitmix(seed * _GOLDEN) + (stream + 1) * _GOLDEN)
    example = _splitmix(key + (index + 1) * _GOLDEN)
    return _splitmix(example + (position + 1) * _GOLDEN)


def class_by_inverse_cdf(logits: Sequence[float], u: float) -> int:
    """Return the class in whose share of the unit interval u lies."""
    weights = [math.exp(value - max(logits)) for value in logits]
    passed = 0.0
    for label, weight in enumerate(weights):
        passed += weight / sum(weights)
        if u < passed:
            return label
    raise AssertionError("u must be below 1")


def softmax_fisher_by_enumeration(
    model: nn.Module, inputs: Tensor, num_classes: int
) -> dict[str, Tensor]:
    """Return Σ_n Σ_y p(y | x_n) (∇ log p(y | x_n))², the diagonal Fisher information."""
    copied = copy.deepcopy(model).double().eval()
    sums = {name: torch.zeros_like(p) for name, p in copied.named_parameters()}
    for row in inputs.double():
        for label in range(num_classes):
            log_p = copied(row[None]).log_softmax(-1)[0, label]
            gradients = torch.autograd.grad(log_p, list(copied.parameters()))
            for name, gradient in zip(sums, gradients, strict=True):
                sums[name] += log_p.exp().detach() * gradient**2
    return sums


def gauss_newton_diagonal(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return Σ_n diag(JᵀHJ): J the Jacobian of an example's outputs, H the loss's Hessian in them.

    Args:
        model: In float64 and eval mode; not changed.
        inputs: One row per example.
        targets: One per example.
        loss: The mean over a batch, of outputs and targets.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row, target in zip(inputs, targets, strict=True):

        def outputs(values: dict[str, Tensor], row: Tensor = row) -> Tensor:
            return torch.func.functional_call(model, values, (row[None],))[0]

        def loss_of(z: Tensor, target: Tensor = target) -> Tensor:
            return loss(z[None], target[None])

        z = outputs(parameters).detach()
        hessian = torch.func.hessian(loss_of)(z)
        for name, jacobian in torch.func.jacrev(outputs)(parameters).items():
            sums[name] += torch.einsum("o...,op,p...->...", jacobian, hessian, jacobian)
    return sums
