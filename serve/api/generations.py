"""Generations, their evaluations and where they come from: `/v1/generations`, `/v1/evaluations`, `/v1/lineage`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from evals.runner import evaluate
from memory import escalations
from memory.errors import ConfigError
from memory.lineage import runs_of_tenant
from memory.night_records import Evaluation, Generation
from serve import diff, lineage, promotion, watching
from serve.api.auth import Caller, Scope, caller_of, requires
from serve.api.night_views import sees_all
from serve.stages.evaluation import store_evaluation
from serve.suites import configured_suites
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.OPERATE)])

Number = Annotated[int, Path(ge=0, lt=2**31)]
"""A generation's; what no integer column could hold is refused as what it is."""


class PromotionRequest(BaseModel):
    """Why somebody switches by hand, and for which share of the users."""

    model_config = ConfigDict(extra="forbid")

    why: str = Field(default="by hand", min_length=1, max_length=2000)


class SwitchRequest(PromotionRequest):
    """`POST /v1/generations/{number}/promote`."""

    canary: float | None = Field(default=None, gt=0, lt=1)
    """A share of the users, the same ones every time; None = all."""


class EvaluationRequest(BaseModel):
    """`POST /v1/evaluations`: run suites on one generation."""

    model_config = ConfigDict(extra="forbid")

    model: str = promotion.AGENT_MODEL
    suites: list[str] | None = None
    memory: bool = True


def _services(request: Request) -> Services:
    return request.app.state.services


def generation_object(generation: Generation) -> dict[str, Any]:
    """A generation with the name the engine serves it by."""
    return {"object": "generation", **generation.model_dump(mode="json"), "served_by": generation.served_name}


def evaluation_object(services: Services, evaluation: Evaluation, caller: Caller) -> dict[str, Any]:
    """An evaluation as its caller may see it: outcomes of its own tenant's tasks, and a `summary` of all.

    Whoever works on the service's own machine sees the record as it is.
    """
    record = evaluation.model_dump(mode="json")
    if caller.operator:
        return record
    names = {o.trajectory_id for o in evaluation.outcomes if o.trajectory_id is not None}
    mine = runs_of_tenant(services.ledger.database, names, tenant=caller.tenant)
    tasks = len(evaluation.outcomes)
    summary = {
        "tasks": tasks,
        "successes": sum(o.success for o in evaluation.outcomes),
        "prompt_tokens": sum(o.prompt_tokens for o in evaluation.outcomes) / tasks if tasks else None,
    }
    outcomes = [outcome for outcome in record["outcomes"] if outcome["trajectory_id"] in mine]
    return record | {"outcomes": outcomes, "summary": summary}


@router.get("/v1/generations")
def list_generations(request: Request) -> dict[str, Any]:
    """All of them; `escalation`: how much of a teacher's help each needed, null for one that needed none."""
    ledger = _services(request).ledger
    helped = {f.generation: f.model_dump() for f in escalations.figures(ledger.database)}
    found = [generation_object(g) | {"escalation": helped.get(g.number)} for g in ledger.generations()]
    return {"object": "list", "data": found}


@router.post("/v1/generations/{number}/promote")
async def promote(number: int, body: SwitchRequest, request: Request) -> dict[str, Any]:
    """Serve a generation to all, or with `canary` to a share of the users: then the reply is the generation."""
    services, by = _services(request), caller_of(request).name
    parts = (services.ledger, services.residency, number)
    if body.canary is not None:
        return generation_object(await promotion.begin_canary(*parts, body.canary, why=body.why, by=by))
    return (await promotion.promote(*parts, why=body.why, by=by)).model_dump(mode="json")


@router.get("/v1/watch")
def watch(request: Request) -> dict[str, Any]:
    """The generations on probation, and what live outcomes say of them so far."""
    services, caller = _services(request), caller_of(request)
    tenant = None if sees_all(caller) else caller.tenant
    return {"object": "list", "data": watching.standing(services.ledger, services.settings.watch, tenant)}


@router.post("/v1/generations/rollback")
async def rollback(body: PromotionRequest, request: Request) -> dict[str, Any]:
    services = _services(request)
    done = await promotion.rollback(services.ledger, services.residency, why=body.why, by=caller_of(request).name)
    return done.model_dump(mode="json")


@router.get("/v1/generations/{number}/diff/{other}")
def compare(
    number: Number, other: Number, request: Request, suite: str | None = None, unchanged: bool = False
) -> dict[str, Any]:
    """Both generations on the same tasks, from stored evaluations: the caller's own ones, and counts of all.

    `unchanged`: list also the tasks that both did equally well.
    """
    caller = caller_of(request)
    asked = {"tenant": caller.tenant, "suite": suite, "unchanged": unchanged}
    found = diff.compare(_services(request).ledger, number, other, **asked)
    return (found if sees_all(caller) else diff.of_tenant(found)).model_dump(mode="json")


@router.get("/v1/lineage/{record_id}")
def trace(record_id: str, request: Request, limit: int = Query(default=20, ge=1, le=1000)) -> dict[str, Any]:
    """Where a reply came from and what it taught; `limit`: examples listed for each generation behind it."""
    found = lineage.trace(_services(request).ledger, record_id, tenant=caller_of(request).tenant, limit=limit)
    return found.model_dump(mode="json")


@router.get("/v1/evaluations")
def list_evaluations(request: Request, night: str | None = None, generation: int | None = None) -> dict[str, Any]:
    """Stored evaluations, oldest first; outcomes of the caller's tenant only."""
    services, caller = _services(request), caller_of(request)
    found = services.ledger.evaluations(night_id=night, generation=generation)
    shown = [evaluation_object(services, evaluation, caller) for evaluation in found]
    return {"object": "list", "data": shown, "has_more": False}


@router.post("/v1/evaluations")
async def create_evaluation(body: EvaluationRequest, request: Request) -> dict[str, Any]:
    """Run the suites now; the reply comes when they are done (ledger and night use the same runs)."""
    services = _services(request)
    _, generation = promotion.resolve(services.ledger, body.model)
    suites = await asyncio.to_thread(configured_suites, services.settings, services.ledger)
    known = {suite.name: suite for suite in suites}
    for name in body.suites or []:
        if name not in known:
            raise ConfigError(f"unknown suite {name!r}; there are: {', '.join(sorted(known))}")
    done = []
    for suite in [known[name] for name in body.suites] if body.suites else suites:
        async with services.residency.using(generation):
            evaluation, trajectories = await evaluate(
                suite,
                promotion.model_ref(generation),
                replace(services.deps, checkpointer=None),
                memory=body.memory,
                memory_watermark=services.ledger.memory_watermark(),
                concurrency=services.settings.night.concurrency,
                on_progress=lambda _done, _total: None,
            )
        await asyncio.to_thread(store_evaluation, services, suite, evaluation, trajectories)
        done.append(await asyncio.to_thread(evaluation_object, services, evaluation, caller_of(request)))
    return {"object": "list", "data": done}
