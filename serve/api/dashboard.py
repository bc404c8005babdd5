"""For people and machines that watch: the dashboard's page (`/`), `/metrics`, and the newest runs as they ended.

The page holds no data: it asks the API with the key that its reader enters.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel

from evals.night_page import NIGHT_STYLE
from memory.records import Purpose
from serve import metrics
from serve.api.auth import Scope, caller_of, requires
from serve.api.night_reports import source_of
from serve.wiring import Services

router = APIRouter()
PAGE = Path(__file__).parent / "dashboard.html"


class RunBody(BaseModel):
    """A run as it ended, without its texts."""

    id: str
    object: str = "run"
    workload: str
    generation: int
    stop_reason: str
    score: float | None
    recalled: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    started_at: str


@cache
def page() -> tuple[str, dict[str, str]]:
    """The page and its headers: its own script and style, and the reports' style, are all that may run or be shown."""
    text = PAGE.read_text(encoding="utf-8")
    parts = {tag: re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("script", "style")}
    scripts = " ".join(map(source_of, parts["script"]))
    styles = " ".join(map(source_of, [*parts["style"], NIGHT_STYLE]))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


@router.get("/", include_in_schema=False)
@router.get("/dashboard", include_in_schema=False)
def dashboard() -> HTMLResponse:
    """The same for everybody, hence without a key."""
    text, headers = page()
    return HTMLResponse(text, headers=headers)


@router.get("/metrics", dependencies=[requires(Scope.OPERATE)])
def scrape(request: Request) -> Response:
    """Prometheus' text."""
    text = metrics.exposition(request.app.state.services, request.app.state)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/runs", dependencies=[requires(Scope.OPERATE)])
def newest_runs(request: Request, limit: int = Query(default=50, ge=1, le=500)) -> dict[str, Any]:
    """The tenant's newest runs, newest first: how they ended, not what they said."""
    services: Services = request.app.state.services
    tenant = caller_of(request).tenant
    found = services.ledger.trajectories(purpose=Purpose.SERVE, tenant=tenant, limit=limit, newest_first=True)
    data = [
        RunBody(
            id=run.id,
            workload=run.workload,
            generation=run.generation,
            stop_reason=run.stop_reason,
            score=run.outcome.score if run.outcome else None,
            recalled=sum(not item.withheld for item in run.recalled),
            prompt_tokens=sum(step.prompt_tokens or 0 for step in run.steps[run.inherited_steps :]),
            completion_tokens=sum(step.completion_tokens or 0 for step in run.steps[run.inherited_steps :]),
            seconds=round(run.seconds, 3),
            started_at=run.started_at.isoformat(),
        ).model_dump()
        for run in found
    ]
    return {"object": "list", "data": data}
