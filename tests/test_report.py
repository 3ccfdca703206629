from __future__ import annotations

import math
import re
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation, EvaluationRow, VarianceRow, wilson_interval
from lit_merge.merge_record import MergeRecord, TensorRecord
from lit_merge.overlap import Overlap, OverlapSums
from lit_merge.report import render_report, write_report
from lit_merge.report.alignment_record import AlignedUnits, AlignmentRecord
from lit_merge.report.comparisons import ComparedExperts
from lit_merge.report.forecast_record import ForecastRecord
from lit_merge.report.scales import CorrectionScales, SiteScales
from lit_merge.report.tables import alignment_section

HOSTILE = '<script>alert("x")</script> & $x^2$'
ROWS = (
    EvaluationRow("expert a", "expert", "a", 0.8, 100, 0.4),
    EvaluationRow("expert b", "expert", HOSTILE, 0.6, 50, 0.8),
    EvaluationRow("base", "base", "a", 0.2, 100, 2.0),
    EvaluationRow("base", "base", HOSTILE, 0.3, 50, 2.1),
    EvaluationRow("probe", "control", "a", 0.4, 100),
    EvaluationRow("probe", "control", HOSTILE, 0.3, 50),
    EvaluationRow("average", "merged", "a", 0.6, 100, 1.2),
    EvaluationRow("average", "merged", HOSTILE, 0.3, 50, 1.6),
    EvaluationRow(f"fit {HOSTILE}", "corrected", "a", 0.76, 100, 0.5),
    EvaluationRow(f"fit {HOSTILE}", "corrected", HOSTILE, 0.57, 50, 0.9),
)
VARIANCES = tuple(
    VarianceRow(model, kind, "a", f"blocks.{site}.{HOSTILE}", value / (site + 1))
    for model, kind, value in (("expert a", "expert", 2.0), ("average", "merged", 0.5))
    for site in range(3)
)
EVALUATION = Evaluation(
    ROWS,
    VARIANCES,
    (f"note {HOSTILE}",),
    {"command": f"lit-merge {HOSTILE}", "versions": {"a": "1"}},
)
MERGE = MergeRecord(
    name=f"runs/{HOSTILE}",
    method="TIES(density=0.2)",
    tasks=("a", HOSTILE),
    tensors=(
        TensorRecord("fc.weight", "merge", f"reason {HOSTILE}", (3, 4), "float32"),
        TensorRecord("fc.bias", "merge", "same", (3,), "float32"),
        TensorRecord(f"{HOSTILE}.count", "keep", "integer", (), "int64"),
    ),
    traces={"a": 40.0, HOSTILE: 10.0},
    warnings=(f"warning {HOSTILE}",),
    provenance={"versions": {"torch": HOSTILE}},
)
CORRECTION = CorrectionScales(
    name=f"runs/fit {HOSTILE}",
    tasks=("a", HOSTILE),
    sites=tuple(
        SiteScales(
            f"blocks.{site}.{HOSTILE}",
            torch.tensor([[0.5, 2.0, 2.0], [1.0, 4.0, -1.0]], dtype=torch.float64),
            torch.tensor([[1.0, 1.0, 1.0], [0.0, 3.0, 4.0]], dtype=torch.float64),
        )
        for site in range(2)
    ),
    settings={"lr": 0.01, "note": HOSTILE},
)
ALIGNMENT = AlignmentRecord(
    name=f"aligned {HOSTILE}",
    reference="left",
    groups={"left": ("a",), f"right {HOSTILE}": (HOSTILE,)},
    before=12.5,
    after=99.25,
    units=(
        AlignedUnits(f"fc.{HOSTILE}", 16, "right", 15, 0.125, 0.75),
        AlignedUnits("fc2.weight[0]", 4, "right", 0, None, None),
    ),
    provenance={"settings": {"by": HOSTILE}},
)


def merged_with(scale: float) -> MergeRecord:
    method = {"class_path": "lit_merge.methods.TaskArithmetic", "init_args": {"scale": scale}}
    provenance = {"method": method, "experts": {"a": {"path": HOSTILE}}, "base": None}
    return MergeRecord(
        f"runs/{scale}",
        f"TaskArithmetic(scale={scale})",
        ("a",),
        MERGE.tensors,
        {},
        (),
        (),
        provenance,
    )


SUMS = OverlapSums(
    4,
    torch.tensor([[4.0, 1.0], [1.0, 1.0]], dtype=torch.float64),
    torch.tensor([[4.0, 3.0], [3.0, 4.0]], dtype=torch.float64),
    torch.full((2, 2), 4.0, dtype=torch.float64),
    torch.tensor([40.0, 4.0], dtype=torch.float64),
)
COMPARED = ComparedExperts(
    f"merges {HOSTILE}",
    {
        task: {
            "path": f"runs/{HOSTILE}",
            "estimator": "exact",
            "labels": "sampled",
            "num_examples": "3000",
            "fingerprint": "0123456789abcdef",
        }
        for task in ("a", HOSTILE)
    },
    Overlap(("a", HOSTILE), {f"net.0.{HOSTILE}": SUMS, "net.1": SUMS}),
    (f"experts {HOSTILE}",),
)
SWEPT = Evaluation(
    (
        *ROWS[:2],
        EvaluationRow("low", "merged", "a", 0.7, 100, 0.5),
        EvaluationRow("high", "merged", "a", 0.6, 100, 0.9),
    ),
    provenance={"configuration": f"model: {HOSTILE}"},
)
EVALUATED = {"low": merged_with(0.5), "high": merged_with(1.0)}
FORECAST = ForecastRecord(
    f"forecast {HOSTILE}",
    "TaskArithmetic(scale=0.5)",
    ("a",),
    0.5,
    0.4,
    {0.4: (0.01,), 0.5: (0.02,), 1.0: (0.03,)},
    {f"net {HOSTILE}": (6.0,), "other": (2.0,)},
    (f"noted {HOSTILE}",),
)


@pytest.fixture(scope="module")
def swept() -> Page:
    """Return a page of a sweep, its forecast, its experts and its merges."""
    return Page(
        render_report(
            SWEPT,
            merges=list(EVALUATED.values()),
            forecasts=[FORECAST],
            experts=[COMPARED],
            evaluated=EVALUATED,
        )
    )


def test_curves_stand_beside_the_best_and_the_untuned_scale(swept: Page) -> None:
    assert "Over the scale α" in swept.text
    assert re.search(r"TaskArithmetic 0\.5 – 1 – – – – – – –", swept.text)  # one task is missing
    whole = Page(render_report(Evaluation(SWEPT.rows[2:]), evaluated=EVALUATED)).text
    assert "TaskArithmetic 0.5 – 1 70.0 0.5 60.0 0.500 0.5 0.900 1.80" in whole


def test_forecast_stands_beside_what_was_measured(swept: Page) -> None:
    assert "The smallest expected total is at a scale of 0.4." in swept.text
    assert re.search(r"low a 0\.5 0\.02 \+0\.100 high a 1 0\.03 \+0\.500", swept.text)
    assert "75.0 %" in swept.text  # of the first module


def test_experts_are_shown_by_layer_and_pair(swept: Page) -> None:
    assert "exact, sampled 3000 0123456789ab" in swept.text
    assert re.search(r"net\.1 4 10 1 1 0\.5 ", swept.text)  # curvature, then sizes
    assert re.search(r"net\.1 0\.50 0\.75 ", swept.text)  # cosine and sign agreement
    assert re.search(r"all layers 8 10 1 1 0\.5 ", swept.text)


def test_merges_can_be_repeated_and_their_tensors_filtered(swept: Page) -> None:
    assert "class_path: lit_merge.methods.TaskArithmetic" in swept.text
    assert "Every tensor was treated as in runs/0.5" in swept.text
    radios = [value for tag, name, value in swept.attributes if tag == "input" and name == "class"]
    assert radios == ["pick-0", "pick-1"]
    shown = [value for tag, name, value in swept.attributes if tag == "tr" and name == "class"]
    assert [value for value in shown if value.startswith("act")] == ["act-0", "act-0", "act-1"]
    assert "lit-merge evaluate --config evaluate.yaml" in swept.text


def test_hostile_names_of_the_new_parts_are_escaped(swept: Page) -> None:
    assert "script" not in swept.tags
    assert swept.text.count('<script>alert("x")</script> & $x^2$') >= 12


def test_perplexity_is_shown_where_a_task_has_one() -> None:
    rows = tuple(
        EvaluationRow("m", "merged", task, 0.5, 10, nll, perplexity=math.exp(nll))
        for task, nll in (("a", 1.0), ("b", 3.0))
    )
    text = Page(render_report(Evaluation(rows))).text
    assert "NLL perplexity m merged" in text
    assert re.search(r" 2\.000 7\.389 ", text)  # the means: exp of the mean
    assert re.search(r"m 2\.718 1\.000 20\.09 3\.000", text)
    assert "perplexity" not in Page(render_report(EVALUATION)).text.replace("perplexity is", "")


def test_large_report_is_made_in_seconds_and_is_small() -> None:
    tensors = tuple(
        TensorRecord(f"encoder.layer.{i}.weight", "merge", "weights", (768, 768), "float32")
        for i in range(200)
    )
    rows = [EvaluationRow(f"expert {t}", "expert", f"task {t}", 0.9, 500, 0.3) for t in range(4)]
    records = {}
    for index in range(30):
        name = f"model {index}"
        rows += [
            EvaluationRow(name, "merged", f"task {t}", 0.5 + index / 100, 500, 1 + index / 30)
            for t in range(4)
        ]
        one = merged_with(0.1 * (1 + index))
        records[name] = MergeRecord(name, one.method, one.tasks, tensors, provenance=one.provenance)
    began = time.process_time()
    page = render_report(Evaluation(tuple(rows)), merges=list(records.values()), evaluated=records)
    assert time.process_time() - began < 12  # about four on a busy machine
    assert len(page) < 3e6


def test_groups_that_were_not_permuted_have_no_table() -> None:
    record = AlignmentRecord("midpoint", "left", {"left": ("a",), "right": ("b",)}, 0.0, 0.0, ())
    section = alignment_section(record)
    assert section["sentence"] == "2 groups as they are, not permuted (left: a; right: b)."
    assert (section["objective"], section["similarity"], section["lines"]) == ("", "", [])


class Page(HTMLParser):
    """Collects the tags, their attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def source() -> str:
    return render_report(
        EVALUATION,
        merges=[MERGE],
        corrections=[CORRECTION],
        alignments=[ALIGNMENT],
        title=f"Title {HOSTILE}",
    )


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_names_from_files_never_become_markup(source: str, page: Page) -> None:
    assert "script" not in page.tags
    assert "<script" not in source
    # title, task, model, note, command, site, merge, reason, tensor, warning: all are shown
    assert page.text.count('<script>alert("x")</script> & $x^2$') >= 10


def test_page_is_one_file_without_anything_to_fetch(source: str, page: Page) -> None:
    assert not {"img", "link", "script", "iframe", "object", "embed", "base"} & set(page.tags)
    references = [
        value
        for _, name, value in page.attributes
        if name in {"src", "href", "xlink:href", "srcset", "action", "data"}
    ]
    assert all(value.startswith("#") for value in references)
    assert not re.search(r"@import|url\((?!#)", source)


def test_policy_of_the_page_forbids_scripts_and_the_network(source: str) -> None:
    assert "Content-Security-Policy\" content=\"default-src 'none'" in source


def test_page_is_made_for_phones_dark_screens_and_paper(source: str) -> None:
    assert '<meta name="viewport" content="width=device-width' in source
    assert "@media (prefers-color-scheme: dark)" in source
    assert "@media print" in source


def test_table_shows_accuracy_interval_normalised_mean_and_loss(page: Page) -> None:
    low, high = wilson_interval(0.6, 100)
    assert f"{100 * low:.1f}–{100 * high:.1f}" in page.text
    assert f"{100 * (0.6 / 0.8 + 0.3 / 0.6) / 2:.1f}" in page.text
    assert "1.400" in page.text  # mean loss of the average


def test_best_of_each_kind_is_said_in_words(page: Page) -> None:
    assert "Best merged model: average, 62.5% of the experts." in page.text
    assert "95.0% of the experts." in page.text


def test_merge_shows_traces_actions_and_tensors(page: Page) -> None:
    assert "2 experts" in page.text
    assert "TIES(density=0.2)" in page.text
    assert "25.0 %" in page.text  # of the largest trace
    assert re.search(r"merge 2 15 keep 1 1", page.text)
    assert "fc.weight merge 3 × 4 float32" in page.text


def test_figures_are_whole_and_their_ids_unique(source: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    # Steps and bars: the mean and two tasks each; the variance of one task and three keys; the
    # mean, spread and shift of the scales and the channels of two sites.
    assert len(figures) == 3 + 3 + 1 + 2 + 5
    ids = [
        value
        for figure in figures
        for element in ET.fromstring(figure).iter()
        if (value := element.get("id")) is not None
    ]
    assert len(ids) == len(set(ids))


def test_variance_is_also_a_table(page: Page) -> None:
    assert re.search(r"1 blocks\.0\.\S.* 2 0\.5 ", page.text)


def test_steps_stand_beside_their_controls(page: Page) -> None:
    assert "What each step brings" in page.text
    assert re.search(r"\bA probe: 50\.0 %", page.text)  # (0.4 / 0.8 + 0.3 / 0.6) / 2


def test_correction_shows_scales_and_shifts_by_site_and_task(page: Page) -> None:
    assert "2 sites, 2 tasks" in page.text
    # number, module, task, channels, mean, spread, how many are not positive, shift, in stds
    assert re.search(r"1 blocks\.0\.\S.* a 3 1\.26 1\.92 0 1 0\.71 1 ", page.text)
    assert re.search(r" 3 1\.59 1\.92 1 2\.89 – ", page.text)
    assert "lr: 0.01" in page.text


def test_alignment_shows_the_similarity_before_and_after(page: Page) -> None:
    assert "2 groups in the order of left" in page.text
    assert "Objective: 12.5 → 99.25. Mean similarity of the units: 0.12 → 0.75." in page.text
    assert re.search(r"right 16 15 0\.12 0\.75", page.text)
    assert "fc2.weight[0] right 4 0 – –" in page.text


def test_correction_without_sites_says_so() -> None:
    heads = CorrectionScales("heads", ("a",), ())
    text = Page(render_report(corrections=[heads])).text
    assert "only heads or weights were fitted" in text
    assert "1 correction" in text


def test_report_of_merges_alone_has_no_table_of_accuracies() -> None:
    text = Page(render_report(merges=[MERGE])).text
    assert "Accuracy per task" not in text
    assert "TIES(density=0.2)" in text


def test_report_of_experts_alone_draws_no_bars() -> None:
    source = render_report(Evaluation(ROWS[:2]))
    assert "Accuracy per task" in source
    assert "<svg" not in source


def test_written_report_replaces_an_older_one_only_when_told(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", merges=[MERGE])
    before = path.read_text(encoding="utf-8")
    with pytest.raises(InputError, match=r"report\.html"):
        write_report(path, EVALUATION)
    assert path.read_text(encoding="utf-8") == before
    write_report(path, EVALUATION, replace=True)
    assert "average" in path.read_text(encoding="utf-8")
