from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lit_merge.errors import InputError
from lit_merge.evaluation import Evaluation, EvaluationRow, VarianceRow, wilson_interval
from lit_merge.merge_record import MergeRecord, TensorRecord
from lit_merge.report import render_report, write_report

HOSTILE = '<script>alert("x")</script> & $x^2$'
ROWS = (
    EvaluationRow("expert a", "expert", "a", 0.8, 100, 0.4),
    EvaluationRow("expert b", "expert", HOSTILE, 0.6, 50, 0.8),
    EvaluationRow("base", "base", "a", 0.2, 100, 2.0),
    EvaluationRow("base", "base", HOSTILE, 0.3, 50, 2.1),
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
    return render_report(EVALUATION, merges=[MERGE], title=f"Title {HOSTILE}")


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
    assert len(figures) == 1 + 2 + 1  # mean, two tasks, variance of one task
    ids = [
        value
        for figure in figures
        for element in ET.fromstring(figure).iter()
        if (value := element.get("id")) is not None
    ]
    assert len(ids) == len(set(ids))


def test_variance_is_also_a_table(page: Page) -> None:
    assert re.search(r"1 blocks\.0\.\S.* 2 0\.5 ", page.text)


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
