"""What of a night its caller may see: everybody's tasks are in the totals, other tenants' workloads are not named."""

from __future__ import annotations

from collections.abc import Iterable, Set
from datetime import datetime
from functools import lru_cache
from typing import Any

from evals.gate import GateDecision
from evals.night_report import NightReport
from evals.report import Row
from memory.forget import newest_forgetting
from memory.ledger import Ledger
from memory.lineage import runs_of_tenant
from memory.night_records import Night, NightStatus
from serve.api.auth import ANYBODY, Caller

WITHHELD = "What else was said names workloads of other tenants; the operator sees it."


def sees_all(caller: Caller) -> bool:
    """Whoever works on the service's own machine, and everybody where there are no keys to tell tenants apart by."""
    return caller.operator or caller is ANYBODY


def own_workloads(ledger: Ledger, tenant: str, night: Night) -> frozenset[str]:
    """The workloads of the tenant's tasks in a night's evaluations."""
    if night.status is NightStatus.RUNNING:
        return _examined(ledger, tenant, night.id)
    # Whoever watches asks for all nights every few seconds, and of one that has ended only a forgetting changes them.
    return _examined_then(ledger, tenant, night.id, newest_forgetting(ledger.database))


@lru_cache(maxsize=4096)
def _examined_then(ledger: Ledger, tenant: str, night_id: str, _forgotten: datetime | None) -> frozenset[str]:
    return _examined(ledger, tenant, night_id)


def _examined(ledger: Ledger, tenant: str, night_id: str) -> frozenset[str]:
    outcomes = [outcome for evaluation in ledger.evaluations(night_id=night_id) for outcome in evaluation.outcomes]
    ids = {outcome.trajectory_id for outcome in outcomes if outcome.trajectory_id is not None}
    mine = runs_of_tenant(ledger.database, ids, tenant=tenant)
    return frozenset(outcome.workload for outcome in outcomes if outcome.trajectory_id in mine)


def decision_for(decision: dict[str, Any], own: Set[str]) -> dict[str, Any]:
    """The gate's word without the rows and sentences of workloads that are not the caller's."""
    table = [row for row in decision["table"] if row["workload"] is None or row["workload"] in own]
    return decision | {"table": table, "reasons": reasons_for(decision["reasons"], decision, own)}


def reasons_for(reasons: Iterable[str], decision: dict[str, Any] | None, own: Set[str]) -> list[str]:
    """The sentences that name no workload of the gate's table but the caller's, and whether there are more."""
    named = {row["workload"] for row in decision["table"]} if decision else set()
    hidden = {repr(name) for name in named - own - {None}}
    told = list(reasons)
    kept = [reason for reason in told if not any(name in reason for name in hidden)]
    return kept if len(kept) == len(told) else [*kept, WITHHELD]


def event_for(event: dict[str, Any], tenant: str, decision: dict[str, Any] | None, own: Set[str]) -> dict[str, Any]:
    """A night's event without the words of anyone's examples and without other tenants' workloads."""
    data = {name: value for name, value in event["data"].items() if name not in ("phrases", "shares")}
    message = event["message"]
    if "arms" in data:
        data["arms"] = [arm for arm in data["arms"] if arm["tenant"] == tenant]
        # Behind the colon stand the workloads that were chosen.
        message = message.partition(":")[0]
    if "reasons" in data:
        # Between the gate's word and its record nobody knows yet which sentences name whose workloads.
        early = decision is None and event["stage"] == "decide"
        data["reasons"] = [WITHHELD] if early else reasons_for(data["reasons"], decision, own)
    return event | {"message": message, "data": data}


def report_for(report: NightReport, own: Set[str]) -> NightReport:
    """The morning report with the workloads of `own` only."""
    decision = report.gate.model_dump(mode="json") if report.gate else None
    gate = GateDecision.model_validate(decision_for(decision, own)) if decision else None
    curve = [point.model_copy(update={"row": _row_for(point.row, own)}) for point in report.curve]
    update = {
        "gate": gate,
        "reasons": reasons_for(report.reasons, decision, own),
        "rows": [_row_for(row, own) for row in report.rows],
        "curve": curve,
    }
    return report.model_copy(update=update)


def _row_for(row: Row, own: Set[str]) -> Row:
    shown = {name: rate for name, rate in row["workloads"].items() if name in own}
    return {"name": row["name"], "workloads": shown, "controls": row["controls"]}
