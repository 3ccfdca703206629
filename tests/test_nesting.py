from __future__ import annotations

from dataclasses import replace

from lit_merge.alignment.nesting import families_inside, unmatched
from tests.hand_symmetries import mlp_symmetries, transformer_symmetries

SYMMETRIES = transformer_symmetries(depth=1, heads=3)
BY_NAME = {s.name: s for s in SYMMETRIES}


def test_counterparts_in_all_heads_are_a_family() -> None:
    families = families_inside(BY_NAME["0.qkv"], SYMMETRIES)
    assert {family.members for family in families} == {
        ("0.qkv[0].qk", "0.qkv[1].qk", "0.qkv[2].qk"),
        ("0.qkv[0].v", "0.qkv[1].v", "0.qkv[2].v"),
    }
    assert all(family.leaf for family in families)
    assert unmatched(SYMMETRIES) == frozenset()


def test_members_are_ordered_by_their_head_and_not_by_their_listing() -> None:
    shuffled = (SYMMETRIES[0], *SYMMETRIES[:0:-1])
    families = families_inside(BY_NAME["0.qkv"], shuffled)
    assert ("0.qkv[0].v", "0.qkv[1].v", "0.qkv[2].v") in {f.members for f in families}


def test_an_inner_symmetry_that_one_head_lacks_stays() -> None:
    fewer = tuple(s for s in SYMMETRIES if s.name != "0.qkv[1].v")
    assert unmatched(fewer) == {"0.qkv[0].v", "0.qkv[2].v"}
    families = families_inside(BY_NAME["0.qkv"], fewer)
    assert len(families) == 1


def test_an_inner_symmetry_outside_of_its_heads_axes_stays() -> None:
    stray = replace(BY_NAME["0.up"], name="stray", inside="0.qkv")
    assert unmatched((*SYMMETRIES, stray)) == {"stray"}


def test_plain_units_have_nothing_inside() -> None:
    symmetries = mlp_symmetries((2, 5, 4, 2))
    assert families_inside(symmetries[0], symmetries) == ()
