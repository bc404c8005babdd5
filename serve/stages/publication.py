"""The night's last stages: switch or reject, and the morning report."""

from __future__ import annotations

from memory.night_records import GenerationStatus
from serve import promotion
from serve.reports import write_night_report
from serve.stages.night_run import CancelledNightError, NightRun, Output


def publish(run: NightRun) -> Output:
    """Switch to the candidate, at once or by a canary; or reject it."""
    services, decision = run.services, run.done("decide")
    number = run.done("train")["generation"]
    if decision["verdict"] != "promote":
        if services.ledger.generation(number).status is GenerationStatus.CANDIDATE:
            services.ledger.advance_generation(number, GenerationStatus.REJECTED)
        run.emit("publish", f"generation {number} rejected: {decision['verdict']}")
        return {"promoted": False}
    # A night that was killed behind its switch finds no candidate, and leaves alone what the watch did since.
    if services.ledger.generation(number).status is GenerationStatus.CANDIDATE:
        try:
            run.wait(_switch(run, number, f"night {run.night.id}: {decision['reasons'][0]}"))
        except CancelledNightError:
            # The wish may have come behind the switch.
            if services.ledger.generation(number).status is GenerationStatus.CANDIDATE:
                raise
    generation = services.ledger.generation(number)
    share = generation.metrics["canary"]["share"] if generation.status is GenerationStatus.CANARY else None
    told = f"gets {share:.0%} of the users first" if share else "is the champion"
    run.emit("publish", f"generation {number} {told}")
    return {"promoted": True, "canary": share}


async def _switch(run: NightRun, number: int, why: str) -> None:
    services, share = run.services, run.services.settings.watch.canary
    ledger, residency = services.ledger, services.residency
    told = {"why": why, "by": "night", "expected_from": run.done("snapshot")["champion"]}
    if share:
        await promotion.begin_canary(ledger, residency, number, share, **told)
    else:
        await promotion.promote(ledger, residency, number, **told)


def report(run: NightRun) -> Output:
    """The morning report, as JSON and HTML."""
    path = write_night_report(run.services.ledger, run.night, run.folder, run.services.settings.model)
    run.emit("report", str(path))
    return {"path": str(path)}
