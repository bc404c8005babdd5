"""The night's last stages: switch or reject, and the morning report."""

from __future__ import annotations

from memory.errors import ConflictError
from memory.night_records import GenerationStatus
from serve import promotion
from serve.reports import write_night_report
from serve.stages.night_run import NightRun, Output


def publish(run: NightRun) -> Output:
    """Switch to the candidate, or reject it."""
    services, decision = run.services, run.done("decide")
    number = run.done("train")["generation"]
    if decision["verdict"] != "promote":
        if services.ledger.generation(number).status is GenerationStatus.CANDIDATE:
            services.ledger.advance_generation(number, GenerationStatus.REJECTED)
        run.emit("publish", f"generation {number} rejected: {decision['verdict']}")
        return {"promoted": False}
    if services.ledger.champion().number != number:
        why = f"night {run.night.id}: {decision['reasons'][0]}"
        try:
            run.wait(promotion.promote(services.ledger, services.residency, number, why=why, by="night"))
        except ConflictError:
            if services.ledger.champion().number != number:
                raise
    run.emit("publish", f"generation {number} is the champion")
    return {"promoted": True}


def report(run: NightRun) -> Output:
    """The morning report, as JSON and HTML."""
    path = write_night_report(run.services.ledger, run.night, run.folder, run.services.settings.model)
    run.emit("report", str(path))
    return {"path": str(path)}
