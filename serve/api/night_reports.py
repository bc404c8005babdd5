"""The morning report of a night: `/v1/nights/{id}/report`, as JSON or as a page."""

from __future__ import annotations

import base64
import hashlib
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from evals.night_page import NIGHT_STYLE, render_night
from serve.api.auth import Scope, caller_of, requires
from serve.api.fine_tuning import owned_night
from serve.api.night_views import own_workloads, report_for, sees_all
from serve.reports import night_report
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.OPERATE)])


def source_of(text: str) -> str:
    """The Content-Security-Policy source that allows just this inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@router.get("/v1/nights/{night_id}/report", response_model=None)
def report(night_id: str, request: Request, format: Literal["html", "json"] = "json") -> Response | dict[str, Any]:
    """What the night learned from whom, what it cost, what was decided and why. Other tenants' examples are counted
    only, their workloads are not named, and authors are named to the operator alone."""
    services: Services = request.app.state.services
    caller = caller_of(request)
    night = owned_night(services, caller, night_id)
    told = night_report(
        services.ledger, night, services.settings.model, tenant=None if caller.operator else caller.tenant
    )
    if not sees_all(caller):
        examined = (own_workloads(services.ledger, caller.tenant, known) for known in services.ledger.nights())
        told = report_for(told, frozenset[str]().union(*examined))
    if format == "json":
        return told.model_dump(mode="json")
    policy = f"default-src 'none'; style-src {source_of(NIGHT_STYLE)}; base-uri 'none'; form-action 'none'"
    return HTMLResponse(render_night(told), headers={"Content-Security-Policy": policy})
