"""The FastAPI application: health and the routers joined. Routes live beside their subject."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from serve.api import chat, errors, feedback, jobs
from serve.api.runs import Turnstile
from serve.night import NightSchool
from serve.wiring import Services


def create_app(services: Services, nights: NightSchool) -> FastAPI:
    """The app over running parts."""
    app = FastAPI(title="Nightschool", redoc_url=None)
    app.state.services = services
    app.state.nights = nights
    app.state.turnstile = Turnstile(services.settings.server)
    errors.install(app)
    for router in (chat.router, feedback.router, jobs.router):
        app.include_router(router)
    app.get("/healthz")(healthz)
    app.get("/readyz")(readyz)
    return app


async def healthz() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


async def readyz(request: Request) -> JSONResponse:
    """Whether requests would be answered now, and why not."""
    services: Services = request.app.state.services
    night = request.app.state.nights.running()
    state: dict[str, Any] = {
        "engine": services.engine.status,
        "engine_name": services.engine.name,
        "champion": services.ledger.champion().number,
        "night": night.id if night else None,
    }
    ready = services.engine.status == "ready"
    return JSONResponse({"status": "ready" if ready else "not ready", **state}, 200 if ready else 503)
