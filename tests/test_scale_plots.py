from __future__ import annotations

import re

import pytest
import torch

from lit_merge.evaluation import Evaluation, VarianceRow
from lit_merge.report.drawing import HEAT_LEVELS
from lit_merge.report.heat_map import heat_level
from lit_merge.report.scale_plots import scale_panels, short_names
from lit_merge.report.scales import CorrectionScales, SiteScales

TASKS = ("a", "b")


def corrections(num_sites: int, num_channels: int = 4, *, spread: float = 0.3) -> CorrectionScales:
    generator = torch.Generator().manual_seed(0)
    sites = [
        SiteScales(
            f"net.layer{index}.fc",
            (spread * torch.randn(2, num_channels, generator=generator)).exp2().double(),
            torch.randn(2, num_channels, generator=generator).double(),
        )
        for index in range(num_sites)
    ]
    return CorrectionScales("x", TASKS, tuple(sites))


EXPERTS = Evaluation(
    (),
    tuple(
        VarianceRow(f"expert {task}", "expert", task, f"net.layer{index}.fc", 4.0)
        for task in TASKS
        for index in range(3)
    ),
)


def texts(svg: str) -> list[str]:
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def test_every_cell_holds_the_geometric_mean_of_its_scales() -> None:
    found = corrections(3)
    mean, spread, *_ = scale_panels(found, Evaluation(()), name="c")
    expected = [
        f"{float(torch.prod(one.scale[task])) ** (1 / 4):.2f}"
        for one in found.sites
        for task in range(2)
    ]
    assert [t for t in texts(mean.svg) if re.fullmatch(r"\d\.\d\d", t)][:6] == expected
    deviations = [
        f"{2 ** float(one.scale[task].log2().std(correction=0)):.2f}"
        for one in found.sites
        for task in range(2)
    ]
    assert [t for t in texts(spread.svg) if re.fullmatch(r"\d\.\d\d", t)][:6] == deviations
    assert {"layer0.fc", "layer1.fc", "layer2.fc", "a", "b"} <= set(texts(mean.svg))


def test_shift_has_a_map_where_the_experts_are_known() -> None:
    found = corrections(3)
    titles = [panel.title for panel in scale_panels(found, Evaluation(()), name="c")]
    assert not [title for title in titles if title.startswith("Shift")]
    (shift,) = [p for p in scale_panels(found, EXPERTS, name="c") if p.title.startswith("Shift")]
    expected = [
        f"{float(one.shift[task].square().mean().sqrt()) / 2:.2f}"
        for one in found.sites
        for task in range(2)
    ]
    assert [t for t in texts(shift.svg) if re.fullmatch(r"\d\.\d\d", t)][:6] == expected


def test_channels_are_drawn_for_the_most_changed_sites() -> None:
    found = corrections(6)
    found.sites[4].scale[:] = 8.0
    found.sites[1].scale[:] = 0.2
    found.sites[2].scale[:] = 0.5
    panels = scale_panels(found, Evaluation(()), name="c")
    assert [p.title for p in panels if "per channel" in p.title] == [
        f"Scale per channel: net.layer{index}.fc" for index in (1, 2, 4)
    ]


def test_identity_has_one_colour_and_growth_and_shrinking_have_the_two_others() -> None:
    one = SiteScales("fc", torch.ones(2, 3).double(), torch.zeros(2, 3).double())
    mean = scale_panels(CorrectionScales("x", TASKS, (one,)), Evaluation(()), name="c")[0]
    cells, bar = mean.svg.split('id="c-mean-axes_2"')
    assert set(re.findall(r"fill: var\((--heat-[mp]?\d)\)", cells)) == {"--heat-0"}
    assert len(set(re.findall(r"fill: var\((--heat-[mp]?\d)\)", bar))) == 2 * HEAT_LEVELS + 1
    one.scale[0], one.scale[1] = 2.0, 0.5
    mean = scale_panels(CorrectionScales("x", TASKS, (one,)), Evaluation(()), name="c")[0]
    cells = mean.svg.split('id="c-mean-axes_2"')[0]
    assert set(re.findall(r"fill: var\((--heat-[mp]?\d)\)", cells)) == {"--heat-m6", "--heat-p6"}


def test_wide_and_deep_models_stay_small_and_are_said_to_be_drawn_coarsely() -> None:
    panels = scale_panels(corrections(80, 1000), Evaluation(()), name="c")
    assert "1000 channels, 7 to a column" in panels[-1].svg
    assert sum(len(panel.svg) for panel in panels) < 400_000
    assert len([t for t in texts(panels[0].svg) if t.startswith("layer")]) == 40


def test_without_sites_there_are_no_maps() -> None:
    assert scale_panels(CorrectionScales("x", TASKS, ()), Evaluation(()), name="c") == ()


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (("model.a.x", "model.b.x"), ("a.x", "b.x")),
        (("model.a", "model.a.b"), ("a", "a.b")),
        (("x", "y"), ("x", "y")),
        (("a.b" * 20, "c"), ("…" + ("a.b" * 20)[-23:], "c")),
    ],
)
def test_names_lose_what_all_have_in_front_and_are_cut_at_the_left(
    sites: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    assert short_names(sites) == expected


def test_levels_are_even_and_end_at_the_limit() -> None:
    assert [heat_level(v, 0.6) for v in (-2.0, -0.6, -0.1, 0.04, 0.1, 0.6)] == [-6, -6, -1, 0, 1, 6]
