"""What Prometheus is told: what this process counted (`serve.counters`), how service, engine and night stand now."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memory.night_records import Night, NightStatus
from serve import eta
from serve.counters import COUNTED, LATENCY, REQUESTS
from serve.events import read_events
from serve.replicas import Replicas
from serve.stages import STAGES
from serve.wiring import Services

OTHER = "other"
"""The route of a request that matches none."""


class Metered:
    """Counts every request and times it; the outermost layer, so that refusals are counted too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            method, route = _named(scope)
            REQUESTS.labels(method, route, str(status)).inc()
            LATENCY.labels(method, route).observe(time.perf_counter() - started)


def _named(scope: Scope) -> tuple[str, str]:
    """Method and route as the app declares them: what a client makes up must not become a label."""
    route = scope.get("route")
    if route is None and "app" in scope:
        # Refused before it was routed.
        routes = scope["app"].state.routes
        route = next((r for r in routes if r.matches(scope)[0] is Match.FULL), None)
    path = getattr(route, "path", OTHER)
    return (scope["method"] if path != OTHER else OTHER), path


def exposition(services: Services, state: Any) -> bytes:
    """The text that Prometheus scrapes; `state` is the app's."""
    disable_created_metrics()  # a second series for each, that nobody asks for
    now = CollectorRegistry()
    now.register(_Standing(services, state))  # pyright: ignore[reportArgumentType]
    return generate_latest(COUNTED) + generate_latest(now)


class _Standing:
    """How things are at this moment, as a collector."""

    def __init__(self, services: Services, state: Any) -> None:
        self._services = services
        self._state = state

    def collect(self) -> Iterator[GaugeMetricFamily]:
        services, ledger = self._services, self._services.ledger
        limit = services.settings.server.max_concurrent
        inside = self._state.turnstile.inside
        yield _gauge("requests_inside", "Requests being answered.", self._state.gate.inside)
        yield _gauge("runs_going_on", "Agent runs that have a place.", min(inside, limit))
        yield _gauge("runs_waiting", "Agent runs that wait for a place.", max(0, inside - limit))
        yield _gauge("engine_ready", "Whether the engine answers.", services.engine.status == "ready")
        if isinstance(services.engine, Replicas):
            family = GaugeMetricFamily("nightschool_replica_ready", "Whether this engine serves.", labels=["url"])
            for replica in services.engine.all:
                family.add_metric([replica.base_url], replica.status == "ready")
            yield family
        yield _gauge("engine_swapping", "Whether an adapter is being loaded.", services.residency.swapping)
        yield _gauge("index_ready", "Whether memory's index is whole.", services.index.state.startswith("ready"))
        yield _gauge("memory_items_active", "Items that can be recalled.", ledger.count_active())
        yield _gauge("champion_generation", "The generation that serves.", ledger.serving().number)
        nights = ledger.nights()
        family = GaugeMetricFamily("nightschool_nights", "Nights by how they ended.", labels=["status"])
        for status in NightStatus:
            family.add_metric([status.value], sum(night.status is status for night in nights))
        yield family
        running = next((night for night in reversed(nights) if night.status is NightStatus.RUNNING), None)
        yield _gauge("night_running", "Whether a night is going on.", running is not None)
        if running is not None:
            yield from self._night(running)

    def _night(self, night: Night) -> Iterator[GaugeMetricFamily]:
        events = read_events(self._services.settings.night_dir(night.id))
        told, where = standing(events), eta.standing(self._services.ledger, night, events)
        family = GaugeMetricFamily("nightschool_night_stage", "The stage a night is in.", labels=["stage"])
        at = told.get("stage", next(iter(STAGES)))
        for stage in dict.fromkeys((*STAGES, at)):
            family.add_metric([stage], stage == at)
        yield family
        for name, what in FIGURES.items():
            if name in told:
                yield _gauge(f"night_{name}", what, told[name])
        for name, (what, value) in _progress(where).items():
            if value is not None:
                yield _gauge(f"night_{name}", what, value)


FIGURES = {
    "step": "Training steps done.",
    "steps": "Training steps planned.",
    "loss": "The last training step's loss.",
    "tokens": "Tokens trained on.",
    "tokens_per_s": "The trainer's pace.",
}


def _progress(where: eta.Standing) -> dict[str, tuple[str, float | None]]:
    return {
        "stage_done": ("Steps or runs of the stage done.", where.done),
        "stage_total": ("Steps or runs that the stage has to do.", where.total),
        "eta_s": ("Seconds left of the stage.", where.left_s),
        "left_s": (
            "Seconds left of the whole night, by how long the stages to come took last time.",
            where.night_left_s,
        ),
    }


def standing(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Where a night is by its events: its `stage`, and the newest of each of `FIGURES`."""
    told: dict[str, Any] = {}
    for event in events:
        told["stage"] = event["stage"]
        known = {name: event["data"].get(name) for name in FIGURES}
        told |= {name: value for name, value in known.items() if value is not None}
    return told


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"nightschool_{name}", what, value=float(value))


def is_open(scope: Scope, allowed: bool) -> bool:
    """Whether this is a scrape that needs no key: allowed by the settings, and straight from this machine.

    A request that a proxy passed on came from elsewhere, whatever its socket says.
    """
    if not allowed or scope["path"] != "/metrics":
        return False
    headers = Headers(scope=scope)
    host = (scope.get("client") or ("",))[0]
    forwarded = any(name in headers for name in ("x-forwarded-for", "forwarded", "x-real-ip"))
    return host in ("127.0.0.1", "::1") and not forwarded
