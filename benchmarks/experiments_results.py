"""From the evaluations of several seeds to tables, pictures and claims.

A number is the mean over the seeds ± their standard deviation (n − 1); of one seed it stands alone.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_merge.evaluation import Evaluation, TableLine
from lit_merge.evaluation.file import read_evaluation
from lit_merge.report.figures import alpha_curve, stage_bars

_SCALED = re.compile(r"^(?P<method>.*?)[, ]+(?:α = )?(?P<scale>-?\d+(?:\.\d+)?)$")


@dataclass(frozen=True)
class Number:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        sd: The standard deviation; None of one seed.
    """

    mean: float
    sd: float | None = None

    def text(self, digits: int, *, times: float = 1.0) -> str:
        """Return mean ± sd."""
        mean = f"{self.mean * times:.{digits}f}"
        return mean if self.sd is None else f"{mean} ± {self.sd * times:.{digits}f}"

    def pair(self, times: float = 1.0) -> tuple[float, float]:
        """Return mean and standard deviation, as the figures take them."""
        return self.mean * times, (self.sd or 0.0) * times


def number(values: Iterable[float]) -> Number:
    """Return the mean of some seeds."""
    found = list(values)
    return Number(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class Runs:
    """One experiment with several seeds.

    Attributes:
        evaluations: Per seed.
        folders: Of the same runs.
    """

    evaluations: tuple[Evaluation, ...]
    folders: tuple[Path, ...]

    @property
    def models(self) -> list[str]:
        """The models of every seed, in the order of the first."""
        known = [{line.model for line in e.lines()} for e in self.evaluations]
        first = [line.model for line in self.evaluations[0].lines()]
        return [model for model in first if all(model in models for models in known)]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks."""
        return self.evaluations[0].tasks

    def of(self, model: str, value: Callable[[TableLine], float | None]) -> Number | None:
        """Return a value of a model's line; None where a seed lacks it."""
        if model not in self.models:
            return None
        found = [value(self.line(e, model)) for e in self.evaluations]
        known = [v for v in found if v is not None]
        return number(known) if len(known) == len(found) else None

    def line(self, evaluation: Evaluation, model: str) -> TableLine:
        """Return a model's line in one seed."""
        return next(line for line in evaluation.lines() if line.model == model)

    def kind(self, model: str) -> str:
        """Return what a model is."""
        return self.line(self.evaluations[0], model).kind

    def ratio(self, model: str, other: str) -> Number | None:
        """Return the ratio of two models' likelihoods, seed by seed."""
        pairs = [(self.line(e, model).nll, self.line(e, other).nll) for e in self.evaluations]
        known = [a / b for a, b in pairs if a is not None and b is not None]
        return number(known) if len(known) == len(pairs) else None

    def seconds(self) -> Number:
        """Return how long a run took, on one thread."""
        return number(
            sum(
                step["seconds"] for step in json.loads((f / "steps/done.json").read_text()).values()
            )
            for f in self.folders
        )


def read_runs(folders: Sequence[Path]) -> Runs | None:
    """Return the runs that are there, or None."""
    there = [folder for folder in folders if (folder / "evaluation.json").is_file()]
    found = tuple(read_evaluation(folder / "evaluation.json") for folder in there)
    return Runs(found, tuple(there)) if found else None


def accuracy(line: TableLine) -> float | None:
    """Return the mean accuracy."""
    return line.accuracy


def normalised(line: TableLine) -> float | None:
    """Return the mean share of the experts' accuracies."""
    return line.normalised


def nll(line: TableLine) -> float | None:
    """Return the mean negative log-likelihood."""
    return line.nll


def table(runs: Runs, *, shares: bool) -> str:
    """Return all models of an experiment.

    Args:
        runs: The experiment.
        shares: Whether accuracies are compared with the experts'.
    """
    head = ["model", *(["% of experts"] if shares else ["mean accuracy"]), *runs.tasks, "NLL"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    swept = {m for of in curves(runs).values() for scale, m in of.items() if scale != 1.0}
    for model in runs.models:
        if model in swept:
            continue
        first = runs.of(model, normalised if shares else accuracy)
        cells = [
            runs.of(model, lambda line, place=place: _cell(line, place))  # type: ignore[misc]
            for place in range(len(runs.tasks))
        ]
        likelihood = runs.of(model, nll)
        name = f"*control:* {model}" if runs.kind(model) == "control" else model
        texts = [first.text(1, times=100) if first else "–"]
        texts += [cell.text(1, times=100) if cell else "–" for cell in cells]
        texts.append(likelihood.text(3) if likelihood else "–")
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _cell(line: TableLine, place: int) -> float | None:
    cell = line.cells[place]
    return None if cell is None else cell.accuracy


def curves(runs: Runs) -> dict[str, dict[float, str]]:
    """Return the models of each method by scale."""
    found: dict[str, dict[float, str]] = {}
    for model in runs.models:
        if match := _SCALED.match(model):
            found.setdefault(match["method"], {})[float(match["scale"])] = model
    return {method: dict(sorted(of.items())) for method, of in found.items() if len(of) > 1}


def curve_table(runs: Runs) -> str:
    """Return accuracy and likelihood over the scale."""
    of = curves(runs)
    scales = sorted({scale for models in of.values() for scale in models})
    lines = [f"| | {' | '.join(f'α = {s:g}' for s in scales)} |", "|" + "---|" * (len(scales) + 1)]
    for title, value, digits, times in (("accuracy", accuracy, 1, 100.0), ("NLL", nll, 3, 1.0)):
        for method, models in of.items():
            numbers = [runs.of(models[s], value) if s in models else None for s in scales]
            texts = [n.text(digits, times=times) if n else "–" for n in numbers]
            lines.append(f"| {method}, {title} | {' | '.join(texts)} |")
    return "\n".join(lines)


def draw_curves(runs: Runs, path: Path) -> None:
    """Draw the curve over the scale (Daheim et al. 2024, figure 2)."""
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    levels: dict[str, dict[str, tuple[float, float]]] = {}
    plain = [m for m in runs.models if runs.kind(m) == "merged" and not _SCALED.match(m)]
    for title, value, times in (("mean accuracy, %", accuracy, 100.0), ("mean NLL", nll, 1.0)):
        panels[title] = {
            method: [
                (scale, *n.pair(times))
                for scale, model in models.items()
                if (n := runs.of(model, value)) is not None
            ]
            for method, models in curves(runs).items()
        }
        levels[title] = {
            model: n.pair(times) for model in plain if (n := runs.of(model, value)) is not None
        }
    seeds = len(runs.evaluations)
    told = "one seed" if seeds == 1 else f"{seeds} seeds, mean and deviation"
    title = f"MiniLM, five sentiment sets, {told}"
    alpha_curve(path, panels, levels=levels, title=title, replace=True)


def draw_stages(of: Mapping[str, Runs], path: Path) -> None:
    """Draw what each step of the correction brings, and the two best controls."""
    panels, controls = {}, {}
    for title, runs in of.items():
        steps = [line.model for line in runs.evaluations[0].stages()]
        extra = [m for m in runs.models if m == "average + TACT"]
        chosen = [*steps[:1], *extra, *steps[1:]]
        panels[title] = _shares(runs, chosen)
        found = _shares(runs, [m for m in runs.models if runs.kind(m) == "control"])
        best = sorted(found, key=lambda model: -found[model][0])[:2]
        controls[title] = {model: found[model] for model in best}
    stage_bars(path, panels, controls=controls, replace=True)


def _shares(runs: Runs, models: Sequence[str]) -> dict[str, tuple[float, float]]:
    found = {model: runs.of(model, normalised) for model in models}
    return {model: n.pair(100) for model, n in found.items() if n is not None}


def write_section(page: Path, name: str, text: str) -> None:
    """Put a text between the marks of its name in a Markdown page, at its end without marks."""
    begin, end = f"<!-- experiments: {name} -->", f"<!-- end: {name} -->"
    block = f"{begin}\n{text.strip()}\n{end}"
    content = page.read_text() if page.is_file() else "# Results\n"
    if begin in content:
        before, _, rest = content.partition(begin)
        content = before + block + rest.partition(end)[2]
    else:
        content = f"{content.rstrip()}\n\n{block}\n"
    page.write_text(content)


def experts_line(runs: Runs) -> str:
    """Return in a sentence what was run."""
    counts = {row.task: row.num_examples for row in runs.evaluations[0].rows}
    told = ", ".join(f"{task} {count}" for task, count in counts.items())
    seeds = len(runs.evaluations)
    said = "One seed" if seeds == 1 else f"{seeds} seeds, mean ± standard deviation"
    return (
        f"{said}; all test examples ({told}); "
        f"{runs.seconds().text(0)} s a seed on one thread, from training to the report."
    )


def write_results(
    folders: Mapping[str, Sequence[Path]],
    benchmarks: Path,
    *,
    claims: Callable[[Mapping[str, Runs]], str],
) -> None:
    """Write the sections of what was run, and the pictures.

    Args:
        folders: The runs of each experiment.
        benchmarks: Where the page and the pictures are.
        claims: Returns the table of claims of what was run.
    """
    page, plots = benchmarks / "RESULTS.md", benchmarks / "plots"
    plots.mkdir(exist_ok=True)
    runs = {name: found for name, of in folders.items() if (found := read_runs(of)) is not None}
    if sentiment := runs.get("sentiment"):
        draw_curves(sentiment, plots / "alpha.svg")
        write_section(
            page,
            "sentiment",
            f"{experts_line(sentiment)}\n\n![accuracy and likelihood over the scale]"
            f"(plots/alpha.svg)\n\n{curve_table(sentiment)}\n\n{table(sentiment, shares=False)}",
        )
    staged = {
        title: runs[name]
        for name, title in (("text", "MiniLM, four tasks"), ("vision", "ViT, two bases"))
        if name in runs
    }
    if staged:
        draw_stages(staged, plots / "stages.svg")
    for name in ("text", "vision"):
        if found := runs.get(name):
            text = f"{experts_line(found)}\n\n{table(found, shares=True)}"
            if name == list(runs)[-1]:  # one picture for both, below the last
                text += "\n\n![per cent of the experts by step](plots/stages.svg)"
            write_section(page, name, text)
    write_section(page, "claims", claims(runs))
