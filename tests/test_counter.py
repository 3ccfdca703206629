"""The counter-based random numbers against unbounded integers, and their distribution."""

from __future__ import annotations

import pytest
import torch

from lit_merge.counter import combined, kept, key_of, normals, signs, uniforms, uniforms_from
from tests.references import splitmix_set, splitmix_signs, splitmix_uniform

CPU = torch.device("cpu")


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (-3, 1), (2**70, 5)])
def test_numbers_are_the_hash_of_their_address(seed: int, stream: int) -> None:
    indices = [0, 7, 10**12]
    expected = [[splitmix_uniform(seed, stream, i, j) for j in range(3)] for i in indices]
    assert uniforms(seed, stream, indices, 3).tolist() == expected


def test_an_example_has_the_same_numbers_in_every_batch() -> None:
    together = uniforms(1, 0, [4, 2, 9], 5)
    assert torch.equal(together[1], uniforms(1, 0, [2], 8)[0, :5])


def test_seeds_streams_examples_and_positions_give_different_numbers() -> None:
    numbers = [uniforms(s, t, range(10), 10) for s in range(3) for t in range(3)]
    assert torch.cat(numbers).unique().numel() == 900


def test_uniform_numbers_are_uniform_inside_the_open_interval() -> None:
    u = uniforms(0, 0, range(1000), 100)
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=5e-3)
    assert torch.histc(u, 10, 0, 1).tolist() == pytest.approx([1e4] * 10, rel=0.05)


def test_neighbouring_numbers_are_uncorrelated() -> None:
    u = uniforms(0, 0, range(1000), 100)
    along, across = torch.corrcoef(u[:, :2].T)[0, 1], torch.corrcoef(u[:2])[0, 1]
    assert along.abs() < 0.1
    assert across.abs() < 0.3


def test_normal_numbers_have_mean_zero_and_variance_one() -> None:
    z = normals(0, 0, range(1000), 100)
    assert z.isfinite().all()
    assert z.mean().item() == pytest.approx(0, abs=0.01)
    assert z.var().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_signs_are_the_bits_of_the_hashes(count: int) -> None:
    for seed, stream, index in ((0, 0, 0), (-3, 1, 2**63 + 5)):
        expected = splitmix_signs(seed, stream, index, count)
        assert signs(seed, stream, index, count, CPU).tolist() == expected


def test_signs_are_fair_and_independent() -> None:
    rows = torch.stack([signs(0, s, i, 20_000, CPU) for s in range(3) for i in range(3)]).double()
    correlation = rows @ rows.T / 20_000
    assert (rows.mean(1).abs() < 5 / 20_000**0.5).all()
    assert ((correlation - torch.eye(9)).abs() < 5 / 20_000**0.5).all()


def test_a_set_has_one_number_whatever_its_order() -> None:
    assert combined([3, 1, 2**70]) == combined([2**70, 3, 1]) == splitmix_set([1, 3, 2**70])
    assert len({combined(numbers) for numbers in ([], [0], [0, 0], [1], [0, 1], [2])}) == 6


@pytest.mark.parametrize(("start", "count"), [(0, 0), (0, 7), (1, 1), (5, 10), (2**33 + 1, 4)])
def test_positions_have_their_numbers_in_every_range(start: int, count: int) -> None:
    expected = [splitmix_bits(99, position) for position in range(start, start + count)]
    uniform = uniforms_from(99, start, count, CPU)
    assert uniform.tolist() == [(bits >> 8) / 2**24 for bits in expected]
    for share in (0.25, 0.5, 0.9):
        # as signed numbers, the bits are compared with the share's place among them
        signed = [bits - 2**32 if bits >= 2**31 else bits for bits in expected]
        wanted = [int(bits < share * 2**32 - 2**31) for bits in signed]
        assert kept(99, start, count, share, CPU).tolist() == wanted


def test_shares_of_nothing_and_of_all_are_exact() -> None:
    assert kept(1, 0, 1000, 0.0, CPU).sum() == 0
    assert kept(1, 0, 1000, 1.0, CPU).sum() == 1000


def test_keys_differ_by_seed_names_and_their_order() -> None:
    keys = {key_of(s, a, b) for s in (0, 1, -1) for a in ("x", "xy") for b in ("y", "yy", "x")}
    assert len(keys) == 18
    assert all(0 <= key < 2**64 for key in keys)


def splitmix_bits(key: int, position: int) -> int:
    """The 32 bits of a position on unbounded integers: half of the hash of its pair's address."""
    mask = 2**64 - 1

    def finalised(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    word = finalised((finalised(key) + (position // 2 + 1) * 0x9E3779B97F4A7C15) & mask)
    return word >> 32 if position % 2 else word & 0xFFFFFFFF
