from __future__ import annotations

import torch

from lit_merge.alignment.units import (
    SINGLE,
    Axis,
    Joined,
    Nested,
    Units,
    coordinates,
    fix,
    is_fixed,
    is_uniform,
    join,
    leaves,
    place,
    resolve,
    separate_fibres,
    stretch,
    unify,
    view,
)


def sizes(axis: Axis) -> list[int]:
    return [units.size for units in leaves(axis)]


def test_a_view_that_splits_an_axis_shows_units_in_units() -> None:
    axis = Units(24)
    parts = view([Units(5), axis], (5, 3, 2, 4))
    assert [part.size for part in parts] == [5, 3, 2, 4]
    places = torch.stack(torch.meshgrid(*map(torch.arange, (3, 2, 4)), indexing="ij")).flatten(1)
    for part, expected in zip(parts[1:], places, strict=True):
        (units,) = leaves(part)
        assert torch.equal(coordinates(axis, units), expected)  # type: ignore[arg-type]


def test_a_view_back_is_the_same_axis() -> None:
    axis = Units(24)
    parts = view([axis], (3, 8))
    (back,) = view(parts, (24,))
    assert list(leaves(back)) == list(leaves(axis))


def test_a_view_that_cuts_through_units_fixes_them() -> None:
    outer, inner = Units(4), Units(6)
    (flat,) = view([outer, inner], (24,))
    assert view([flat], (3, 8))[0].size == 3
    assert outer.fixed
    assert inner.fixed


def test_unifying_finds_the_common_refinement() -> None:
    one, other = Nested((Units(6), Units(4))), Nested((Units(2), Units(12)))
    unify(one, other)
    assert sizes(one) == sizes(other) == [2, 3, 4]
    assert list(leaves(one)) == list(leaves(other))


def test_units_that_have_no_common_refinement_are_fixed() -> None:
    one, other = Nested((Units(4), Units(6))), Nested((Units(6), Units(4)))
    unify(one, other)
    assert is_fixed(one)
    assert is_fixed(other)


def test_stretches_are_cut_where_either_side_ends() -> None:
    one, other = Joined((Units(2), Units(5))), Joined((Units(4), Units(3)))
    unify(one, other)
    assert sizes(one) == sizes(other) == [2, 2, 3]
    assert list(leaves(one)) == list(leaves(other))


def test_stretches_of_one_size_against_nested_units_are_alike() -> None:
    outer, inner, first, second = Units(2), Units(3), Units(3), Units(3)
    unify(Joined((first, second)), Nested((outer, inner)))
    assert resolve(first) is resolve(second) is resolve(inner)
    assert outer.fixed
    assert not resolve(inner).fixed  # type: ignore[union-attr]


def test_what_meets_fixed_units_is_fixed() -> None:
    free, other = Units(6), Nested((Units(2), Units(3)))
    unify(free, Units(6))
    unify(free, other)
    assert not is_fixed(other)
    unify(Units(6, fixed=True), free)
    assert is_fixed(other)


def test_units_that_meet_uniform_ones_in_a_contraction_are_not_uniform() -> None:
    weights, zeros, others = Units(4), Units(4, uniform=True), Units(4, uniform=True)
    unify(others, zeros)
    assert is_uniform(others)
    unify(weights, zeros)
    assert not is_uniform(weights)
    assert not is_uniform(others)


def test_a_stretch_of_nested_units_takes_whole_units_or_fixes() -> None:
    axis = Nested((Units(4), Units(3)))
    assert stretch(axis, 3, 6).size == 6
    assert not is_fixed(axis)
    cut = Nested((Units(4), Units(3)))
    assert stretch(cut, 2, 6).size == 6
    assert is_fixed(cut)


def test_a_join_of_fixed_axes_is_one_fixed_axis() -> None:
    assert isinstance(join([Units(2, fixed=True), Units(3, fixed=True)]), Units)
    assert sizes(join([Units(2), Units(3, fixed=True)])) == [2, 3]


def test_units_nested_in_themselves_have_no_coordinates() -> None:
    units = Units(3)
    assert coordinates(Nested((units, units)), units) is None
    assert coordinates(Joined((units, units)), units).tolist() == [0, 1, 2] * 2  # type: ignore[union-attr]


def test_units_at_places_that_are_looked_at_one_by_one_are_their_own() -> None:
    axis = Units(6)
    three, two = view([axis], (3, 2))
    at = [place(three, index, [two])[0] for index in range(3)]
    unify(at[0], at[1])
    (found,) = separate_fibres([axis])
    first, third = resolve(at[0]), resolve(at[2])
    assert isinstance(first, Units)
    assert isinstance(third, Units)
    assert coordinates(found, first).tolist() == [0, 1, 0, 1, -1, -1]  # type: ignore[union-attr]
    assert coordinates(found, third).tolist() == [-1, -1, -1, -1, 0, 1]  # type: ignore[union-attr]


def test_units_that_are_also_used_without_their_places_are_fixed() -> None:
    axis, alone = Units(6), Units(2)
    three, two = view([axis], (3, 2))
    at = place(three, 0, [two])[0]
    unify(alone, two)
    separate_fibres([axis, alone])
    assert is_fixed(at)
    assert is_fixed(alone)


def test_an_axis_of_one_place_has_no_units() -> None:
    assert resolve(Units(1)) is SINGLE
    assert list(leaves(Joined((SINGLE, SINGLE)))) == []
    fix(SINGLE)
    assert is_fixed(SINGLE)
