"""What the papers and our targets claim, held against what was measured: a table of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from experiments_results import Number, Runs, accuracy, curves, nll, normalised, number

GRADIENT_MATCHING, TASK_ARITHMETIC = "gradient matching", "task arithmetic"


@dataclass(frozen=True)
class Claim:
    """A claim and what was measured.

    Attributes:
        text: The claim.
        measured: In words.
        holds: Whether the mean bears it out; None where that is within noise.
    """

    text: str
    measured: str
    holds: bool | None


def claims_of(runs: Mapping[str, Runs]) -> str:
    """Return the table of all claims that the runs say something about."""
    found: list[Claim] = []
    if "sentiment" in runs:
        found += sentiment_claims(runs["sentiment"])
    if "text" in runs:
        found += text_claims(runs["text"])
    if "vision" in runs:
        found += vision_claims(runs["vision"])
    lines = ["| claim | measured | holds here |", "|---|---|---|"]
    lines += [f"| {c.text} | {c.measured} | {VERDICTS[c.holds]} |" for c in found]
    return "\n".join(lines)


def sentiment_claims(runs: Runs) -> Iterator[Claim]:
    """Yield the claims about the scale (Daheim et al. 2024, arXiv:2310.12808)."""
    of = curves(runs)
    matching, arithmetic = of[GRADIENT_MATCHING], of[TASK_ARITHMETIC]
    ratio = runs.ratio(matching[1.0], arithmetic[1.0])
    if ratio is not None:
        yield Claim(
            "Gradient matching at α = 1 has at most 0.75 times the NLL of task arithmetic at α = 1",
            f"{ratio.text(2)} times",
            ratio.mean <= 0.75,
        )
    for models, name, wanted in (
        (matching, "Gradient matching", True),
        (arithmetic, "Task arithmetic", False),
    ):
        over = above_best(runs, models)
        yield Claim(
            f"{name} at α = 1 is {'within' if wanted else 'more than'} 15 % of the NLL at its own "
            f"best α{'' if wanted else ' away'}",
            f"{over.text(1, times=100)} % above",
            (over.mean <= 0.15) is wanted,
        )
    for other in (arithmetic[1.0], *(m for m in runs.models if m in PLAIN)):
        yield better(runs, matching[1.0], other, in_accuracy=True)
        yield better(runs, matching[1.0], other, in_accuracy=False)


VERDICTS = {True: "yes", False: "**no**", None: "within noise"}
ONE_SEED = {"a higher accuracy": 0.012, "a lower NLL": 0.01}
"""What counts as noise of one seed: two standard errors over some five thousand examples. With more
seeds it is two standard errors over these."""
PLAIN = {"average", "Fisher averaging", "fisher", "Fisher", "TIES", "ties"}


def above_best(runs: Runs, models: Mapping[float, str]) -> Number:
    """Return by what share the likelihood at α = 1 is above that at the best α, seed by seed."""
    shares = []
    for evaluation in runs.evaluations:
        values = {s: runs.line(evaluation, m).nll for s, m in models.items()}
        known = {s: value for s, value in values.items() if value is not None}
        shares.append(known[1.0] / min(known.values()) - 1)
    return number(shares)


def better(runs: Runs, model: str, other: str, *, in_accuracy: bool) -> Claim:
    """Return the claim that a model is better than another."""
    value = accuracy if in_accuracy else nll
    gains = []
    for evaluation in runs.evaluations:
        a, b = value(runs.line(evaluation, model)), value(runs.line(evaluation, other))
        assert a is not None
        assert b is not None
        gains.append(a - b if in_accuracy else b - a)
    gain = number(gains)
    what = "a higher accuracy" if in_accuracy else "a lower NLL"
    shown = f"{gain.text(1, times=100)} points" if in_accuracy else gain.text(3)
    noise = ONE_SEED[what] if gain.sd is None else 2 * gain.sd / len(gains) ** 0.5
    noise = max(noise, 0.0005)  # what is shown as 0 is no gain, however steady
    holds = None if abs(gain.mean) <= noise else gain.mean > 0
    return Claim(f"{model} has {what} than {other}", f"{shown} better", holds)


def text_claims(runs: Runs) -> Iterator[Claim]:
    """Yield our targets on text with heads of its own."""
    yield at_least(runs, "least squares, one model", 93.0)
    yield at_least(runs, "least squares + scale and shift", 97.0)
    yield at_least(runs, "least squares + learned", 99.5)
    yield from above_controls(runs, ("least squares, one model", "least squares + learned"))


def vision_claims(runs: Runs) -> Iterator[Claim]:
    """Yield claims about experts of two bases (Sharma et al. 2024, arXiv:2410.12766)."""
    average = runs.of("average, not aligned", normalised)
    if average is not None:
        yield Claim(
            "A plain average of experts of different bases is near chance",
            f"{average.text(1, times=100)} % of the experts",
            average.mean < 0.25,
        )
    yield above(runs, "average + TACT", "average + REPAIR")
    yield at_least(runs, "least squares + scale and shift", 94.0)
    yield at_least(runs, "+ learned scale and shift", 97.0)
    yield at_least(runs, "+ all weights", 98.5)
    yield from above_controls(runs, ("least squares + scale and shift", "+ all weights"))


def at_least(runs: Runs, model: str, per_cent: float) -> Claim:
    """Return the claim that a model reaches a share of the experts."""
    share = runs.of(model, normalised)
    shown = f"{share.text(1, times=100)} %" if share else "not measured"
    holds = share is not None and share.mean * 100 >= per_cent
    return Claim(f"{model}: at least {per_cent:g} % of the experts", shown, holds)


def above(runs: Runs, model: str, other: str, *, told: str = "{}") -> Claim:
    """Return the claim that a model is above another, as shares of the experts."""
    a, b = runs.of(model, normalised), runs.of(other, normalised)
    shown = f"{a.text(1, times=100)} and {b.text(1, times=100)} %" if a and b else "not measured"
    return Claim(f"{model} is above {told.format(other)}", shown, bool(a and b and a.mean > b.mean))


def above_controls(runs: Runs, models: tuple[str, ...]) -> Iterator[Claim]:
    """Yield that models are above the best of the controls."""
    shares = {m: runs.of(m, normalised) for m in runs.models if runs.kind(m) == "control"}
    known = {model: share.mean for model, share in shares.items() if share is not None}
    if known:
        best = max(known, key=lambda model: known[model])
        for model in models:
            if model in runs.models:
                yield above(runs, model, best, told="the best control ({})")
