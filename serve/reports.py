"""The morning report of a night: gathers the ledger's rows; the page and the figures are `evals`'."""

from __future__ import annotations

from pathlib import Path

from evals.gate import GateDecision
from evals.page import render_page, write_page
from evals.plot import learning_curve
from evals.report import Measured, build_report, write_report
from memory.ledger import Ledger
from memory.night_records import Evaluation, Night
from memory.records import FeedbackKind, Trust


def measured_rows(ledger: Ledger, night_id: str) -> list[Measured]:
    """A night's champion and candidate, with memory, as the gate compared them."""
    by_generation: dict[int, list[Evaluation]] = {}
    for evaluation in ledger.evaluations(night_id=night_id):
        by_generation.setdefault(evaluation.generation, []).append(evaluation)
    return [
        Measured(
            name=row_name(number, memory=True),
            held_out=[e for e in found if e.role == "held_out"],
            controls=[e for e in found if e.role == "control"],
        )
        for number, found in sorted(by_generation.items())
    ]


def row_name(generation: int, memory: bool) -> str:
    """`base`, `base+memory`, `gen-1`, `gen-1+memory`, …"""
    return ("base" if generation == 0 else f"gen-{generation}") + ("+memory" if memory else "")


def trusted_corrections(ledger: Ledger) -> int:
    """Corrections that were allowed to teach, over all nights."""
    return sum(f.kind is FeedbackKind.CORRECTION and f.trust is Trust.TRUSTED for f in ledger.feedback())


def decision_of(ledger: Ledger, night_id: str) -> GateDecision | None:
    """What the gate said; None for a night that did not get there."""
    stage = ledger.stage(night_id, "decide")
    return GateDecision.model_validate(stage.output) if stage else None


def write_night_report(ledger: Ledger, night: Night, folder: Path, model: str) -> Path:
    """`report.json`, `learning_curve.png` and `report.html` in the night's folder; returns the page's path."""
    decision = decision_of(ledger, night.id)
    measured = measured_rows(ledger, night.id)
    report = build_report(
        measured,
        decision=decision.verdict if decision else "not_enough_evidence",
        reasons=decision.reasons if decision else [],
        corrections=trusted_corrections(ledger),
        seconds={s.stage: s.seconds for s in ledger.stages(night.id)},
        engine="vllm",
        model=model,
    )
    write_report(report, folder / "report.json")
    curve = learning_curve(report["rows"], folder / "learning_curve.png", title=f"{night.id}: champion and candidate")
    page = render_page(
        report,
        title="Nightschool: the morning report",
        intro=[f"Night {night.id}: the champion against tonight's candidate on the same frozen tasks."],
        curve=curve,
        decisions=[(night.id, decision)] if decision else [],
    )
    write_page(page, folder / "report.html")
    return folder / "report.html"
