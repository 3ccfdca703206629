"""The one-call form."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_merge.curvature import PerExampleFisher, diagonal_hessian
from lit_merge.errors import InputError


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(3, 4, generator=generator), torch.tensor([0, 1, 0])


def test_it_is_the_estimator_over_an_iterable_with_sampled_labels_by_default() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    estimator = PerExampleFisher(model, cross_entropy, labels="sampled", seed=4)
    for batch in batches(3):
        estimator.update(batch)
    sums = diagonal_hessian(model, batches(3), cross_entropy, seed=4)
    assert sums.keys() == {"weight", "bias"}
    for name, squares in estimator.sums().items():
        assert torch.equal(sums[name], squares)


def test_the_sum_over_twice_the_data_is_twice_the_sum() -> None:
    model = nn.Linear(4, 2)
    once = diagonal_hessian(model, batches(2), cross_entropy, labels="observed")
    twice = diagonal_hessian(model, [*batches(2), *batches(2)], cross_entropy, labels="observed")
    torch.testing.assert_close(twice, {name: 2 * squares for name, squares in once.items()})


def test_no_batches_are_refused() -> None:
    with pytest.raises(InputError, match="batches: must hold at least one example; got none"):
        diagonal_hessian(nn.Linear(4, 2), [], cross_entropy)
