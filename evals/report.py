"""The report of a demo or night as data: the rows, the gain and the decision of `report.json`.

Owns the shape of `report.json`. Owns neither page (`evals.page`) nor plot (`evals.plot`): both read
this shape only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import TypedDict

from evals.gate import pair_outcomes
from evals.stats import paired_difference, wilson
from memory.errors import ConfigError, boundary
from memory.night_records import Evaluation


class Rate(TypedDict):
    """A success rate with its Wilson interval, all in 0..1; None: nothing was measured."""

    n: int
    success: float | None
    low: float
    high: float


class Row(TypedDict):
    """What one generation did, e.g. `gen-1+memory`."""

    name: str
    workloads: dict[str, Rate]
    controls: dict[str, Rate]


class Gain(TypedDict):
    """Paired gain in percentage points with its bootstrap interval."""

    points: float
    low: float
    high: float


class Report(TypedDict):
    """`report.json`."""

    rows: list[Row]
    gain: Gain | None
    decision: str
    reasons: list[str]
    corrections: int
    seconds: dict[str, float]
    engine: str
    model: str


@dataclass(frozen=True)
class Measured:
    """The evaluations behind one row of the report."""

    name: str
    held_out: Sequence[Evaluation]
    controls: Sequence[Evaluation] = field(default_factory=list)


def build_report(
    measured: Sequence[Measured],
    *,
    decision: str,
    reasons: Sequence[str],
    corrections: int,
    seconds: dict[str, float],
    engine: str,
    model: str,
    before: str | None = None,
    after: str | None = None,
    level: float = 0.95,
) -> Report:
    """The report; its gain is from row `before` (default: the first) to row `after` (default: the last).

    Raises: ConfigError when `before` or `after` is no row, or the two are not of the same held-out tasks.
    """
    return Report(
        rows=[build_row(m, level) for m in measured],
        gain=_gain(measured, before, after, level),
        decision=decision,
        reasons=list(reasons),
        corrections=corrections,
        seconds={stage: round(s, 1) for stage, s in seconds.items()},
        engine=engine,
        model=model,
    )


def build_row(measured: Measured, level: float = 0.95) -> Row:
    """One row: held-out success per workload, control success per suite."""
    by_workload: dict[str, list[bool]] = {}
    for evaluation in measured.held_out:
        for outcome in evaluation.outcomes:
            by_workload.setdefault(outcome.workload, []).append(outcome.success)
    return Row(
        name=measured.name,
        workloads={name: rate(found, level) for name, found in by_workload.items()},
        controls={e.suite: rate([o.success for o in e.outcomes], level) for e in measured.controls},
    )


def rate(successes: Sequence[bool], level: float = 0.95) -> Rate:
    """A success rate with its Wilson interval."""
    return _rate(sum(successes), len(successes), level)


def overall(rates: dict[str, Rate], level: float = 0.95) -> Rate:
    """The rate over all tasks of several workloads."""
    n = sum(r["n"] for r in rates.values())
    return _rate(sum(round((r["success"] or 0.0) * r["n"]) for r in rates.values()), n, level)


def write_report(report: Report, path: Path) -> None:
    """Write `report.json`, whole or not at all."""
    with boundary(ConfigError, f"cannot write the report {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)


def _rate(successes: int, n: int, level: float) -> Rate:
    low, high = wilson(successes, n, level)
    return Rate(n=n, success=successes / n if n else None, low=low, high=high)


def _gain(measured: Sequence[Measured], before: str | None, after: str | None, level: float) -> Gain | None:
    if len(measured) < 2:
        return None
    names = [m.name for m in measured]
    for name in (before, after):
        if name is not None and name not in names:
            raise ConfigError(f"the report has no row {name!r}, only {', '.join(names)}")
    first = measured[0] if before is None else measured[names.index(before)]
    last = measured[-1] if after is None else measured[names.index(after)]
    of_last = {e.suite: e for e in last.held_out}
    if of_last.keys() != {e.suite for e in first.held_out}:
        raise ConfigError(f"rows {first.name!r} and {last.name!r} are not of the same held-out suites")
    pairs = [p for e in first.held_out for p in pair_outcomes(e, of_last[e.suite], same_settings=False)]
    found = paired_difference(
        [a.success for a, _ in pairs], [b.success for _, b in pairs], level, strata=[a.workload for a, _ in pairs]
    )
    return Gain(points=found.points, low=found.low, high=found.high)
