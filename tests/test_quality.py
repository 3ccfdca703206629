"""The comparison of two halves, against numpy and scipy on whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from lit_merge.curvature.quality import MOST, Agreement, Halves, Quality, _half, agreement


def reader(sums: Mapping[str, Tensor]):
    """Return what reads entries of sums, as an estimator does."""
    return lambda positions: torch.cat([sums[n].take(p) for n, p in positions.items()]).double()


def dealt(squares: Tensor, sizes: list[int], *, name: str = "weight") -> tuple[Halves, Quality]:
    """Deal [N, …] squares out in batches of some sizes, and compare the halves."""
    halves = Halves({name: squares[0].numel()}, seed=0)
    total = torch.zeros_like(squares[0])
    start = 0
    for size in sizes:
        total = total + squares[start : start + size].sum(0)
        start += size
        halves.add(size, reader({name: total}))
    first, second = halves.sums(reader({name: total}))
    quality = halves.compare(first, second, (halves.num_examples[0], halves.num_examples[1]))
    assert quality is not None
    return halves, quality


def random_squares(count: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(shape, generator=generator, dtype=torch.float64)
    return level * torch.randn(count, *shape, generator=generator, dtype=torch.float64).square()


def test_the_numbers_are_those_of_numpy_and_scipy_on_whole_halves() -> None:
    squares = random_squares(40, 6, 7)
    _, quality = dealt(squares, [8] * 5)
    values = squares.numpy().reshape(5, 8, 42)
    a = values[[0, 2, 4]].reshape(-1, 42).mean(0)
    b = values[[1, 3]].reshape(-1, 42).mean(0)
    assert quality.num_examples == (24, 16)
    full = values.reshape(-1, 42).mean(0)
    share = np.sqrt(24 * 16) / 40
    expected = share * np.linalg.norm(a - b) / np.linalg.norm(full)
    assert quality.overall.relative_error == pytest.approx(expected, rel=1e-12)
    assert quality.overall.rank_correlation == pytest.approx(spearmanr(a, b).statistic, rel=1e-12)
    assert quality.tensors["weight"] == quality.overall


def test_equal_halves_have_the_error_of_the_symmetric_formula() -> None:
    squares = random_squares(6, 5)
    _, quality = dealt(squares, [3, 3])
    a, b = squares[:3].sum(0), squares[3:].sum(0)
    expected = float((a - b).norm() / (a + b).norm())
    assert quality.overall.relative_error == pytest.approx(expected, rel=1e-12)


def test_identical_halves_have_no_error_and_the_same_order() -> None:
    squares = random_squares(4, 30)
    _, quality = dealt(torch.cat([squares, squares]), [4, 4])
    assert quality.overall == Agreement(pytest.approx(0.0, abs=1e-12), pytest.approx(1.0))
    assert not quality.poor


def test_halves_without_a_common_entry_have_error_one_and_are_poor() -> None:
    squares = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    _, quality = dealt(squares, [1, 1])
    assert quality.overall == Agreement(pytest.approx(1.0), pytest.approx(-1.0))
    assert quality.poor


def test_the_error_is_the_standard_error_of_the_full_sum() -> None:
    """Over many passes, its mean square is the variance of the mean over all their examples."""
    truth, found, spread = 1.0, [], []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        squares = torch.randn(64, 50, generator=generator, dtype=torch.float64).square()
        _, quality = dealt(squares, [8] * 8)
        full = squares.mean(0)
        assert quality.overall.relative_error is not None
        found.append(quality.overall.relative_error**2 * float(full.square().sum()))
        spread.append(float((full - truth).square().sum()))
    assert np.mean(found) == pytest.approx(np.mean(spread), rel=0.05)


def test_ties_share_their_ranks() -> None:
    a = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 3.0])
    b = torch.tensor([1.0, 0.0, 0.0, 5.0, 0.0, 5.0])
    expected = spearmanr(a.numpy(), b.numpy()).statistic
    assert agreement(a, b, (1, 1)).rank_correlation == pytest.approx(expected)


def test_weights_count_an_entry_several_times() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 6, generator=generator, dtype=torch.float64)
    times = torch.tensor([1, 3, 2, 1, 4, 2])
    repeated = agreement(a.repeat_interleave(times), b.repeat_interleave(times), (2, 3))
    weighted = agreement(a, b, (2, 3), weights=times)
    assert weighted.relative_error == pytest.approx(repeated.relative_error)
    assert weighted.rank_correlation == pytest.approx(repeated.rank_correlation)


def test_what_cannot_be_known_is_none() -> None:
    zeros, ones = torch.zeros(3), torch.arange(3.0)
    assert agreement(zeros, zeros, (1, 1)) == Agreement(None, None)
    assert agreement(ones, zeros, (1, 1)).rank_correlation is None
    assert agreement(ones[:1], ones[:1], (1, 1)) == Agreement(None, None)
    halves = Halves({"weight": 3}, seed=0)
    halves.add(5, reader({"weight": ones}))
    first, second = halves.sums(reader({"weight": ones}))
    assert halves.compare(first, second, (5, 0)) is None


def test_large_tensors_are_followed_at_a_sample_that_estimates_the_whole() -> None:
    squares = random_squares(20, 300, 200)
    halves, sampled = dealt(squares, [2] * 10)
    assert 0.9 * MOST < len(halves.positions["weight"]) <= MOST
    a = squares.view(10, 2, -1)[::2].reshape(10, -1).mean(0)
    b = squares.view(10, 2, -1)[1::2].reshape(10, -1).mean(0)
    whole = agreement(a, b, (10, 10))
    assert sampled.overall.relative_error == pytest.approx(whole.relative_error, rel=0.05)
    assert sampled.overall.rank_correlation == pytest.approx(whole.rank_correlation, abs=0.05)


def test_the_overall_numbers_give_every_entry_the_same_weight() -> None:
    """A small tensor that agrees does not hide a large one that does not."""
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(4, 50 * MOST, generator=generator, dtype=torch.float64)
    small = torch.ones(4, MOST, dtype=torch.float64) * torch.arange(MOST)
    small = small / small.max()
    sums = [{"large": x, "small": y} for x, y in zip(large.cumsum(0), small.cumsum(0), strict=True)]
    halves = Halves({"large": large[0].numel(), "small": MOST}, seed=1)
    for value in sums:
        halves.add(1, reader(value))
    quality = halves.compare(*halves.sums(reader(sums[-1])), (2, 2))
    assert quality is not None
    whole = agreement(
        torch.cat([large[::2].mean(0), small[0]]),
        torch.cat([large[1::2].mean(0), small[0]]),
        (2, 2),
    )
    assert quality.overall.relative_error == pytest.approx(whole.relative_error, rel=0.05)
    assert quality.overall.rank_correlation == pytest.approx(whole.rank_correlation, abs=0.05)


def test_the_same_entries_are_followed_in_every_process() -> None:
    one, other = (Halves({"a": 10**6, "b": 10**6, "c": 3}, seed=4) for _ in range(2))
    assert all(torch.equal(one.positions[name], other.positions[name]) for name in "abc")
    assert not torch.equal(one.positions["a"], one.positions["b"])
    assert one.positions["c"].tolist() == [0, 1, 2]
    assert not torch.equal(one.positions["a"], Halves({"a": 10**6}, seed=5).positions["a"])


def test_batches_alternate_and_later_in_blocks_of_equal_halves() -> None:
    halves = [_half(k) for k in range(4096)]
    assert halves[:64] == [0, 1] * 32
    assert halves[64:70] == [0, 0, 1, 1, 0, 0]
    changes = sum(a != b for a, b in pairwise(halves))
    assert changes == 64 + 6 * 32 - 1
    for end in (64, 128, 1024, 4096):
        assert sum(halves[:end]) == end // 2
    assert all(abs(end - 2 * sum(halves[:end])) <= end / 16 for end in range(64, 4096))


@pytest.mark.parametrize("batches", [1, 2, 3, 64, 65, 66, 67, 131])
def test_the_halves_are_the_same_wherever_a_pass_ends(batches: int) -> None:
    squares = random_squares(batches, 9)
    halves = Halves({"weight": 9}, seed=0)
    total = torch.zeros(9, dtype=torch.float64)
    for square in squares:
        total = total + square
        halves.add(1, reader({"weight": total}))
    first, second = halves.sums(reader({"weight": total}))
    mine = torch.tensor([_half(k) for k in range(batches)])
    torch.testing.assert_close(first, squares[mine == 0].sum(0))
    torch.testing.assert_close(second, squares[mine == 1].sum(0), atol=1e-12, rtol=1e-9)


def test_tensors_of_rounding_errors_are_not_among_the_worst() -> None:
    halves = Halves({"weight": 2, "key.bias": 2}, seed=0)
    for k in range(1, 3):
        noise = torch.tensor([1e-19, 0.0] if k == 1 else [1e-19, 1e-19])
        halves.add(1, reader({"weight": k * torch.tensor([1.0, 2.0]), "key.bias": noise}))
    read = reader({"weight": torch.tensor([2.0, 4.0]), "key.bias": torch.tensor([1e-19, 1e-19])})
    quality = halves.compare(*halves.sums(read), (1, 1))
    assert quality is not None
    assert list(quality.tensors) == ["weight"]


def test_the_report_names_the_worst_few() -> None:
    tensors = {f"t{i}": Agreement(i / 10, 1.0) for i in range(8)}
    quality = Quality((50, 50), Agreement(0.25, 0.9), tensors)
    report = quality.as_dict()
    assert report["num_examples"] == [50, 50]
    assert (report["relative_error"], report["rank_correlation"]) == (0.25, 0.9)
    assert list(report["worst"]) == ["t7", "t6", "t5", "t4", "t3"]
    assert str(quality) == (
        "relative error 25 %, rank correlation 0.90 (by halves of 50 and 50 examples)"
    )
    assert not quality.poor
    assert Quality((5, 5), Agreement(0.51, 0.9), {}).poor
    assert Quality((5, 5), Agreement(0.1, 0.6), {}).poor
    assert quality.examples_needed() == 200
    assert Quality((50, 50), Agreement(0.75, 0.9), {}).examples_needed() == 900  # (0.75 / 0.25)²
    assert str(Quality((1, 1), Agreement(None, None), {})).startswith("nothing but zeros")
