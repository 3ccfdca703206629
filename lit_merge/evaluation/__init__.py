"""What was measured: every model on every task, and the table over it.

An :class:`Evaluation` holds one :class:`EvaluationRow` per (model, task), with the accuracy as a
share in [0, 1] and the negative log-likelihood in nats per label. On a language task every token is
a label; there the perplexity, exp of the negative log-likelihood, is what people read. Each task
has at most one expert; a model's accuracy on a task divided by that expert's is its *normalised*
accuracy, and the mean of it over the tasks is the number that merging papers report. Nothing here
needs torch: the record can be read, tabulated and plotted on a machine that could not run the
models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lit_merge.errors import InputError

FORMAT_VERSION = 3
"""Version of ``evaluation.json`` that is written, and the newest that is read.

1 had no stages, 2 no perplexity.
"""

Kind = Literal["expert", "base", "control", "merged", "corrected"]
"""What a model is; the table lists the kinds in this order."""

EXPERTS = "experts"
"""Name of the table's line that holds each expert on its own task."""

STAGED: tuple[Kind, ...] = ("merged", "corrected")
"""The kinds that can be a step of a pipeline."""

_Z95 = 1.959963984540054  # the 97.5% point of the normal distribution


@dataclass(frozen=True)
class EvaluationRow:
    """One model on the test examples of one task.

    Attributes:
        model: The model's name in the table.
        kind: What the model is.
        task: The task's name.
        accuracy: Share of the test examples that were classified correctly, in [0, 1].
        num_examples: How many test examples there were, at least 1; of a language task, how many
            tokens were to be said.
        nll: Mean negative log-likelihood of the true labels in nats; None where there is none, as
            for a control without probabilities.
        stage: Which step of one pipeline a merged or corrected model is the result of, counted from
            1; None for a model that is no such step. See :meth:`Evaluation.stages`.
        perplexity: exp(nll) on a language task, at least 1; None on others.
    """

    model: str
    kind: Kind
    task: str
    accuracy: float
    num_examples: int
    nll: float | None = None
    stage: int | None = None
    perplexity: float | None = None

    def __post_init__(self) -> None:
        place = f'row (model "{self.model}", task "{self.task}")'
        _require(bool(self.model), f"{place}: model must have a name; got an empty one.")
        _require(bool(self.task), f"{place}: task must have a name; got an empty one.")
        _require(
            self.kind in get_args(Kind),
            f"{place}: kind must be one of {', '.join(get_args(Kind))}; got {self.kind!r}.",
        )
        _require(
            0.0 <= self.accuracy <= 1.0,
            f"{place}: accuracy must be a share in [0, 1]; got {self.accuracy}.",
        )
        _require(
            self.num_examples >= 1,
            f"{place}: num_examples must be at least 1; got {self.num_examples}.",
        )
        _require(
            self.nll is None or math.isfinite(self.nll),
            f"{place}: nll must be finite; got {self.nll}. The model gives NaN or infinite logits.",
        )
        _require(
            self.stage is None or self.stage >= 1,
            f"{place}: stage must count from 1; got {self.stage}.",
        )
        _require(
            self.stage is None or self.kind in STAGED,
            f"{place}: stage must be left out but for the kinds {' and '.join(STAGED)}; got "
            f"{self.stage} for kind {self.kind}.",
        )
        expected = None if self.nll is None else perplexity_of(self.nll)
        _require(
            self.perplexity is None
            or (expected is not None and math.isclose(self.perplexity, expected, rel_tol=1e-6)),
            f"{place}: perplexity must be exp(nll), {expected}; got {self.perplexity}.",
        )

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval of the accuracy."""
        return wilson_interval(self.accuracy, self.num_examples)


@dataclass(frozen=True)
class VarianceRow:
    """How much one site's activations vary in one model on one task.

    Attributes:
        model: The model's name, as in the rows of the evaluation.
        kind: What the model is.
        task: The task whose inputs went through the model.
        site: Qualified name of the module; the rows of a model keep the order of its sites.
        variance: Variance over the examples, averaged over the site's channels; at least 0.
    """

    model: str
    kind: Kind
    task: str
    site: str
    variance: float

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.variance) and self.variance >= 0,
            f'variance of "{self.site}" (model "{self.model}", task "{self.task}"): '
            f"must be finite and at least 0; got {self.variance}.",
        )


@dataclass(frozen=True)
class TableLine:
    """One line of the table: a model over all tasks.

    Attributes:
        model: The model's name; :data:`EXPERTS` for the line of the experts.
        kind: What the model is.
        cells: The rows in the order of the evaluation's tasks; None where the model was not run.
        accuracy: Mean accuracy over the tasks; None when one is missing.
        normalised: Mean over the tasks of accuracy / the expert's accuracy; None when one is
            missing.
        nll: Mean negative log-likelihood over the tasks; None when one is missing.
        perplexity: Geometric mean of the perplexities over the tasks; None when one is missing or
            no language task.
    """

    model: str
    kind: Kind
    cells: tuple[EvaluationRow | None, ...]
    accuracy: float | None
    normalised: float | None
    nll: float | None
    perplexity: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """All that was measured in one run.

    Attributes:
        rows: One per (model, task).
        variances: Activation variances by site; may be empty.
        notes: What a reader of the numbers must know.
        provenance: Versions, settings, command, fingerprints; JSON primitives only.
    """

    rows: tuple[EvaluationRow, ...]
    variances: tuple[VarianceRow, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        experts: dict[str, str] = {}
        kinds: dict[str, Kind] = {}
        stages: dict[str, int | None] = {}
        for row in self.rows:
            line = EXPERTS if row.kind == "expert" else row.model
            place = f'row (model "{row.model}", task "{row.task}")'
            _require(
                (row.model, row.task) not in seen, f"{place}: must be there once; got it twice."
            )
            seen.add((row.model, row.task))
            _require(
                kinds.setdefault(line, row.kind) == row.kind,
                f'{place}: model "{line}" must be of one kind; got {kinds[line]} and {row.kind}.',
            )
            _require(
                stages.setdefault(line, row.stage) == row.stage,
                f'{place}: model "{line}" must be of one stage; got {stages[line]} and '
                f"{row.stage}.",
            )
            if row.kind == "expert":
                first = experts.setdefault(row.task, row.model)
                _require(
                    first == row.model,
                    f'task "{row.task}": must have one expert; got "{first}" and "{row.model}".',
                )
        models: dict[int, str] = {}
        for name, stage in stages.items():
            if stage is not None:
                _require(
                    models.setdefault(stage, name) == name,
                    f"stage {stage}: must be one model; got {models[stage]!r} and {name!r}. Give "
                    "each step of the pipeline its own number.",
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks in the order of the rows."""
        return tuple(dict.fromkeys(row.task for row in self.rows))

    def expert(self, task: str) -> EvaluationRow | None:
        """Return the row of the task's expert, or None when it was not run."""
        return next((r for r in self.rows if r.kind == "expert" and r.task == task), None)

    def normalised(self, row: EvaluationRow) -> float | None:
        """Return a row's accuracy as a share of the expert's.

        None without an expert for the task, or when that expert gets nothing right.
        """
        expert = self.expert(row.task)
        if expert is None or expert.accuracy == 0.0:
            return None
        return row.accuracy / expert.accuracy

    def lines(self) -> tuple[TableLine, ...]:
        """Return the table: the experts first, then the models by kind, as they appear."""
        names: dict[str, Kind] = {}
        for row in self.rows:
            names.setdefault(EXPERTS if row.kind == "expert" else row.model, row.kind)
        order = get_args(Kind)
        return tuple(
            self._line(name, kind)
            for name, kind in sorted(names.items(), key=lambda item: order.index(item[1]))
        )

    def stages(self) -> tuple[TableLine, ...]:
        """Return the steps of one pipeline, from the plain merge to the last correction.

        They are the models with a stage, by its number. Where none has one, and one model alone is
        merged, they are that one and the corrected models as they appear. Empty when these are
        fewer than two: of several merges none is known to be the one that was corrected.
        """
        lines = [line for line in self.lines() if line.kind in STAGED]
        numbers = {row.model: row.stage for row in self.rows if row.stage is not None}
        if numbers:
            chosen = [line for line in lines if line.model in numbers]
            chosen.sort(key=lambda line: numbers[line.model])
        else:
            chosen = lines if [line.kind for line in lines].count("merged") == 1 else []
        return tuple(chosen) if len(chosen) > 1 else ()

    def _line(self, name: str, kind: Kind) -> TableLine:
        cells = tuple(
            self.expert(task)
            if kind == "expert"
            else next((r for r in self.rows if r.model == name and r.task == task), None)
            for task in self.tasks
        )
        rows = [cell for cell in cells if cell is not None]
        whole = len(rows) == len(cells)
        nll = _mean([row.nll for row in rows]) if whole else None
        language = all(row.perplexity is not None for row in rows)
        return TableLine(
            model=name,
            kind=kind,
            cells=cells,
            accuracy=_mean([row.accuracy for row in rows]) if whole else None,
            normalised=_mean([self.normalised(row) for row in rows]) if whole else None,
            nll=nll,
            perplexity=perplexity_of(nll) if nll is not None and language else None,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``evaluation.json``."""
        return {
            "format_version": FORMAT_VERSION,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "variances": [dataclasses.asdict(row) for row in self.variances],
            "notes": list(self.notes),
            "provenance": dict(self.provenance),
        }


def perplexity_of(nll: float) -> float:
    """Return exp(nll): among how many equally likely tokens a model chooses.

    Args:
        nll: Mean negative log-likelihood of a token in nats.

    >>> round(perplexity_of(math.log(50.0)), 6)
    50.0
    """
    return math.exp(min(nll, 700.0))  # the largest number is exp(709.8)


def wilson_interval(accuracy: float, num_examples: int) -> tuple[float, float]:
    r"""Return the 95% confidence interval of a share of ``num_examples`` independent trials.

    .. math:: \frac{p + z^2/2n \pm z\sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        accuracy: The observed share p, in [0, 1].
        num_examples: The number of trials n, at least 1.

    References:
        Wilson (1927), Journal of the American Statistical Association 22, 209-212.

    >>> [round(bound, 4) for bound in wilson_interval(0.5, 100)]
    [0.4038, 0.5962]
    """
    n, p = num_examples, accuracy
    centre = p + _Z95**2 / (2 * n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + _Z95**2 / (4 * n**2))
    scale = 1 + _Z95**2 / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)
