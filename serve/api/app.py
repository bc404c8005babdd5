"""The FastAPI application: health and the routers joined. Routes live beside their subject."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from serve.api import (
    batches,
    chat,
    dashboard,
    document,
    embeddings,
    errors,
    feedback,
    files,
    fine_tuning,
    generations,
    keys,
    knowledge,
    memory,
    middleware,
    models,
    night_reports,
    responses,
)
from serve.api.auth import Keyring
from serve.api.runs import Turnstile
from serve.night import NightSchool
from serve.replicas import Replicas
from serve.wiring import Services

ROOMS = (
    chat,
    models,
    responses,
    embeddings,
    files,
    batches,
    feedback,
    fine_tuning,
    generations,
    night_reports,
    dashboard,
    keys,
    memory,
    knowledge,
)
"""Whose routes the users' port has."""


def create_app(services: Services, nights: NightSchool, operator_token: str | None = None) -> FastAPI:
    """The app over running parts. Whoever sends `operator_token` as a key may do everything."""
    app = FastAPI(title="Nightschool", redoc_url=None)
    app.state.services = services
    app.state.nights = nights
    app.state.turnstile = Turnstile(services.settings.server)
    app.state.gate = middleware.Gate()
    app.state.routes = []
    database, config = services.ledger.database, services.settings.server
    app.state.keyring = Keyring(database, operator_token, keys_on=config.keys)
    errors.install(app)
    middleware.install(app, app.state.gate, app.state.keyring, database, config)
    for room in ROOMS:
        app.include_router(room.router)
        app.state.routes += room.router.routes
    app.get("/healthz")(healthz)
    app.get("/readyz")(readyz)
    document.install(app)
    return app


async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


def readyz(request: Request) -> JSONResponse:
    """Whether requests would be answered now, and why not. A night or a swap slows them, it refuses none."""
    services: Services = request.app.state.services
    night = request.app.state.nights.running()
    draining = request.app.state.gate.draining
    ready = services.engine.status == "ready" and not draining
    state: dict[str, Any] = {
        "status": "ready" if ready else "draining" if draining else "not ready",
        "engine": services.engine.status,
        "engine_name": services.engine.name,
        "champion": services.ledger.champion().number,
        "night": night.id if night else None,
        "index": services.index.state.split(":")[0],
        "swapping": services.residency.swapping,
        "draining": draining,
        "requests": request.app.state.gate.inside,
        "runs": request.app.state.turnstile.inside,
    }
    if isinstance(services.engine, Replicas):
        state["replicas"] = [{"url": each.base_url, "status": each.status} for each in services.engine.all]
    return JSONResponse(state, 200 if ready else 503, headers=None if ready else {"Retry-After": "10"})
