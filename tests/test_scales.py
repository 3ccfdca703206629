from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_merge.checkpoint import save_tensors
from lit_merge.correction import Site
from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation, VarianceRow
from lit_merge.merged.folder import CorrectionRecord, write_corrected
from lit_merge.report.scales import (
    OCTAVES,
    CorrectionScales,
    SiteScales,
    in_forward_order,
    read_scales,
    relative_shifts,
)

TASKS = ("a", "b")
SITES = (Site("blocks.0.fc", 5, -1), Site("blocks.1.fc", 3, -1))


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for site in SITES:
        name = site.name.replace(".", "/")
        made[f"{name}.weight"] = torch.rand(2, site.num_features, generator=generator) + 0.5
        made[f"{name}.bias"] = torch.randn(2, site.num_features, generator=generator)
    return made


def write(
    path: Path, corrections: dict[str, Tensor] | None = None, sites: tuple[Site, ...] = SITES
) -> Path:
    record = CorrectionRecord(
        TASKS, (2, 2), sites, "lit_merge.correction.rescale.RescaleShift", True, {"lr": 0.01}
    )
    return write_corrected(
        path,
        weights={"fc": torch.ones(2)},
        heads={},
        corrections=tensors() if corrections is None else corrections,
        record=record,
    )


def test_a_corrected_folder_is_read_site_by_site(tmp_path: Path) -> None:
    found = read_scales(write(tmp_path / "corrected"))
    assert (found.name, found.tasks) == (str(tmp_path / "corrected"), TASKS)
    assert dict(found.settings) == {"lr": 0.01}
    assert [one.site for one in found.sites] == ["blocks.0.fc", "blocks.1.fc"]
    expected = tensors()
    assert torch.equal(found.sites[1].scale, expected["blocks/1/fc.weight"].double())
    assert torch.equal(found.sites[1].shift, expected["blocks/1/fc.bias"].double())


def test_mean_spread_and_shift_are_those_of_a_loop() -> None:
    scale = torch.tensor([[1.0, 2.0, 0.25], [4.0, -4.0, 0.0]], dtype=torch.float64)
    shift = torch.tensor([[3.0, 4.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    one = SiteScales("fc", scale, shift)
    logs = [[0.0, 1.0, -2.0], [2.0, 2.0, -OCTAVES]]  # by size; zero is cut off
    means = [sum(row) / 3 for row in logs]
    spreads = [
        math.sqrt(sum((value - mean) ** 2 for value in row) / 3)
        for row, mean in zip(logs, means, strict=True)
    ]
    assert one.mean == pytest.approx(means)
    assert one.spread == pytest.approx(spreads)
    assert one.shift_size == pytest.approx([5 / math.sqrt(3), 1.0])
    assert one.not_positive == [0, 2]
    assert one.change == pytest.approx(math.sqrt(sum(x * x for row in logs for x in row) / 6))


def at(site: str, size: float) -> SiteScales:
    return SiteScales(site, torch.full((2, 4), size, dtype=torch.float64), torch.zeros(2, 4))


def test_most_changed_sites_keep_the_order_of_the_model() -> None:
    sites = (at("s0", 1.5), at("s1", 1.0), at("s2", 0.1), at("s3", 1.1))
    found = CorrectionScales("x", TASKS, sites).most_changed(2)
    assert [one.site for one in found] == ["s0", "s2"]


def test_sites_follow_the_forward_pass_where_it_is_known() -> None:
    corrections = CorrectionScales("x", TASKS, (at("s0", 1.0), at("s1", 1.0)))
    rows = tuple(VarianceRow("e", "expert", "a", site, 1.0) for site in ("s1", "other", "s0"))
    found = in_forward_order(corrections, Evaluation((), rows))
    assert [one.site for one in found] == ["s1", "s0"]
    assert in_forward_order(corrections, Evaluation((), rows[:1])) == corrections.sites


def test_shift_is_relative_to_the_experts_std_or_unknown() -> None:
    one = SiteScales("fc", torch.ones(2, 2), torch.tensor([[3.0, 3.0], [1.0, 1.0]]))
    rows = (
        VarianceRow("e", "expert", "a", "fc", 4.0),
        VarianceRow("m", "merged", "b", "fc", 9.0),
    )
    assert relative_shifts(one, TASKS, Evaluation((), rows)) == [pytest.approx(1.5), None]


def test_a_correction_without_sites_has_no_scales(tmp_path: Path) -> None:
    assert read_scales(write(tmp_path / "heads", {}, ())).sites == ()


def test_wrong_corrections_are_refused_by_file_site_and_tensor(tmp_path: Path) -> None:
    good = tensors()
    name = "blocks/1/fc.weight"
    cases = {
        "missing": ({k: v for k, v in good.items() if k != name}, "blocks.1.fc' must have a scale"),
        "shape": (good | {name: torch.ones(2, 4)}, r"must be \[tasks, channels\] \[2, 3\]; got"),
        "nan": (good | {name: torch.full((2, 3), math.nan)}, "must be finite; got NaN"),
    }
    for case, (corrections, message) in cases.items():
        folder = write(tmp_path / case, corrections)
        with pytest.raises(InputError, match=message) as caught:
            read_scales(folder)
        assert str(folder / "corrections.safetensors") in str(caught.value)
        assert name in str(caught.value)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must have a correction\.json; got none"):
        read_scales(tmp_path)
    folder = write(tmp_path / "low-rank", {"blocks/0/fc.down": torch.ones(1)}, SITES[:1])
    record = json.loads((folder / "correction.json").read_text())
    record["correction"] = "mine.LowRank"
    (folder / "correction.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"no tensor 'blocks/0/fc\.weight' .* mine\.LowRank"):
        read_scales(folder)
    save_tensors(folder / "model.safetensors", {"fc": torch.ones(2)}, {})
