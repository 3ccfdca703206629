"""Tables of embeddings: against a loop over ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_merge.errors import InputError
from lit_merge.least_squares.embedding_table import EmbeddedRows, EmbeddingTable, solve_embedding


def tables() -> tuple[nn.Embedding, list[nn.Embedding]]:
    torch.manual_seed(0)
    merged, *experts = (nn.Embedding(7, 3).double().requires_grad_(False) for _ in range(3))
    return merged, experts


def batches(experts: list[nn.Embedding]) -> list[EmbeddedRows]:
    ids = [torch.tensor([[0, 1, 1], [2, 1, 5]]), torch.tensor([[1, 2], [2, 6]])]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])  # so that no row has the id 5
    weights = torch.tensor([1.0, 2.0, 0.5, 1.5]).double()
    return [
        EmbeddedRows(0, ids[0], experts[0](ids[0]), mask=mask),
        EmbeddedRows(1, ids[1], experts[1](ids[1]), weights=weights),
    ]


def slow(prior: Tensor, given: list[EmbeddedRows], ridge: float) -> Tensor:
    rows: list[tuple[int, int, Tensor, float]] = []
    for batch in given:
        flat, outputs = batch.ids.flatten().tolist(), batch.output.reshape(-1, 3)
        keep = [True] * len(flat) if batch.mask is None else batch.mask.flatten().bool().tolist()
        v = [1.0] * len(flat) if batch.weights is None else batch.weights.tolist()
        rows += [(batch.task, flat[n], outputs[n], v[n]) for n in range(len(flat)) if keep[n]]
    weight = {}
    for task in {row[0] for row in rows}:
        own = [(z, v) for of, _, z, v in rows if of == task]
        total = sum(v for _, v in own)
        mean = sum((v * z for z, v in own), torch.zeros(3).double()) / total
        weight[task] = 1 / sum(float(v * (z - mean).square().sum()) for z, v in own)
    counts = {i: sum(weight[t] * v for t, j, _, v in rows if j == i) for i in range(7)}
    seen = [i for i in range(7) if counts[i]]
    strength = ridge * sum(counts[i] for i in seen) / len(seen)
    table = prior.clone()
    for i in seen:
        right = sum(weight[t] * v * z for t, j, z, v in rows if j == i) + strength * prior[i]
        table[i] = right / (counts[i] + strength)
    return table


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_it_is_a_loop_over_the_ids_that_occur(ridge: float) -> None:
    merged, experts = tables()
    given, before = batches(experts), merged.weight.detach().clone()
    result = solve_embedding(EmbeddingTable("words", merged), given, 2, ridge)
    torch.testing.assert_close(merged.weight.detach(), slow(before, given, ridge))
    assert torch.equal(merged.weight[[3, 4, 5]], before[[3, 4, 5]])
    assert result.after < result.before
    assert result.ridge == ridge


def test_the_figures_are_shares_of_the_outputs_variance() -> None:
    merged, experts = tables()
    ids = torch.arange(7)[None]
    given = [EmbeddedRows(0, ids, experts[0](ids))]
    outputs, before = experts[0].weight, merged.weight.detach().clone()
    result = solve_embedding(EmbeddingTable("words", merged), given, 1, 0.0)
    variance = (outputs - outputs.mean(0)).square().sum()
    assert result.before == pytest.approx(float((outputs - before).square().sum() / variance))
    assert result.after == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(merged.weight, outputs)


def test_the_ridge_is_chosen_by_the_other_half() -> None:
    merged, experts = tables()
    ids = torch.arange(7).repeat(2)[None]  # both halves have every id, and agree
    given = [EmbeddedRows(0, ids, experts[0](ids))]
    assert solve_embedding(EmbeddingTable("words", merged), given, 1, "auto").ridge == 1e-4
    merged, experts = tables()
    noise = torch.randn(1, 14, 3).double() * 100 + merged(ids)
    noisy = [EmbeddedRows(0, ids, noise)]
    assert solve_embedding(EmbeddingTable("words", merged), noisy, 1, "auto").ridge == 0.3


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_a_table_that_does_more_than_look_up_is_found_out() -> None:
    ids = torch.tensor([[1, 2]])
    for module, fine in ((nn.Embedding(4, 3), True), (Scaled(4, 3), False)):
        assert EmbeddingTable("words", module).explains(ids, module(ids)) is fine


def test_outputs_that_are_not_finite_are_named() -> None:
    merged, experts = tables()
    experts[1].weight.data[1, 0] = float("nan")
    with pytest.raises(InputError, match=r"layer 'words': outputs.*NaN or infinity on task 1"):
        solve_embedding(EmbeddingTable("words", merged), batches(experts), 2, 0.1)
