"""Nights as OpenAI fine-tuning jobs, and generations: `/v1/fine_tuning/jobs`, `/v1/generations`, `/v1/evaluations`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from evals.runner import evaluate
from memory.errors import ConfigError
from memory.night_records import Generation, Night, NightStatus
from serve import promotion
from serve.events import read_events
from serve.night import NightSchool
from serve.stages import store_evaluation
from serve.suites import configured_suites
from serve.wiring import Services

router = APIRouter()

_STATUS = {
    NightStatus.RUNNING: "running",
    NightStatus.PROMOTED: "succeeded",
    NightStatus.REJECTED: "succeeded",
    NightStatus.SKIPPED: "failed",
    NightStatus.FAILED: "failed",
    NightStatus.CANCELLED: "cancelled",
}


class JobRequest(BaseModel):
    """`POST /v1/fine_tuning/jobs`: a night over what was learned since the last promoted one."""

    model_config = ConfigDict(extra="forbid")

    model: Literal["nightschool"] = "nightschool"
    recipes: list[str] | None = Field(default=None, min_length=1)


class PromotionRequest(BaseModel):
    """Why somebody switches by hand."""

    model_config = ConfigDict(extra="forbid")

    why: str = Field(default="by hand", min_length=1, max_length=2000)


class EvaluationRequest(BaseModel):
    """`POST /v1/evaluations`: run suites on one generation."""

    model_config = ConfigDict(extra="forbid")

    model: str = promotion.AGENT_MODEL
    suites: list[str] | None = None
    memory: bool = True


def job_object(services: Services, night: Night) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job`. `succeeded` means the night ended by the gate's word; `nightschool.status` has it."""
    promoted = night.status is NightStatus.PROMOTED
    failed = _STATUS[night.status] == "failed"
    decided = services.ledger.stage(night.id, "decide")
    trained = services.ledger.stage(night.id, "train")
    return {
        "id": night.id,
        "object": "fine_tuning.job",
        "created_at": int(night.created_at.timestamp()),
        "finished_at": int(night.ended_at.timestamp()) if night.ended_at else None,
        "model": promotion.AGENT_MODEL,
        "fine_tuned_model": f"{promotion.AGENT_MODEL}:gen-{night.candidate}" if promoted else None,
        "organization_id": "nightschool",
        "status": _STATUS[night.status],
        "hyperparameters": {"n_epochs": services.settings.train.epochs},
        "training_file": "ledger",
        "validation_file": None,
        "result_files": [],
        "trained_tokens": trained.output["trained_tokens"] if trained else None,
        "error": {"code": night.status, "message": "; ".join(night.reasons), "param": None} if failed else None,
        "seed": services.settings.train.seed,
        "nightschool": {
            "status": night.status,
            "candidate": night.candidate,
            "reasons": night.reasons,
            "report": night.report_path,
            "decision": decided.output if decided else None,
            "stages": {s.stage: round(s.seconds, 1) for s in services.ledger.stages(night.id)},
        },
    }


def _nights(request: Request) -> tuple[Services, NightSchool]:
    return request.app.state.services, request.app.state.nights


@router.post("/v1/fine_tuning/jobs")
async def create_job(body: JobRequest, request: Request) -> dict[str, Any]:
    services, nights = _nights(request)
    options = {"recipes": body.recipes} if body.recipes else {}
    night = await asyncio.to_thread(nights.start, options)
    return job_object(services, night)


@router.get("/v1/fine_tuning/jobs")
async def list_jobs(request: Request) -> dict[str, Any]:
    services, _ = _nights(request)
    data = [job_object(services, night) for night in reversed(services.ledger.nights())]
    return {"object": "list", "data": data, "has_more": False}


@router.get("/v1/fine_tuning/jobs/{job_id}")
async def retrieve_job(job_id: str, request: Request) -> dict[str, Any]:
    services, _ = _nights(request)
    return job_object(services, services.ledger.night(job_id))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
async def cancel_job(job_id: str, request: Request) -> dict[str, Any]:
    services, nights = _nights(request)
    await asyncio.to_thread(nights.cancel, job_id)
    return job_object(services, services.ledger.night(job_id))


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
async def job_events(job_id: str, request: Request, after: int = 0) -> dict[str, Any]:
    """Events from number `after` on, oldest first (OpenAI lists the newest first; a watcher wants the order)."""
    services, _ = _nights(request)
    services.ledger.night(job_id)
    events = read_events(services.settings.night_dir(job_id), after)
    data = [{"object": "fine_tuning.job.event", "id": f"{job_id}-{e['seq']}", "level": "info", **e} for e in events]
    return {"object": "list", "data": data, "has_more": False}


def generation_object(generation: Generation) -> dict[str, Any]:
    """A generation with the name the engine serves it by."""
    return {"object": "generation", **generation.model_dump(mode="json"), "served_by": generation.served_name}


@router.get("/v1/generations")
async def list_generations(request: Request) -> dict[str, Any]:
    services, _ = _nights(request)
    return {"object": "list", "data": [generation_object(g) for g in services.ledger.generations()]}


@router.post("/v1/generations/{number}/promote")
async def promote(number: int, body: PromotionRequest, request: Request) -> dict[str, Any]:
    services, _ = _nights(request)
    done = await promotion.promote(services.ledger, services.residency, number, why=body.why, by="operator")
    return done.model_dump(mode="json")


@router.post("/v1/generations/rollback")
async def rollback(body: PromotionRequest, request: Request) -> dict[str, Any]:
    services, _ = _nights(request)
    done = await promotion.rollback(services.ledger, services.residency, why=body.why, by="operator")
    return done.model_dump(mode="json")


@router.get("/v1/evaluations")
async def list_evaluations(request: Request, night: str | None = None, generation: int | None = None) -> dict[str, Any]:
    """Stored evaluations, oldest first."""
    services, _ = _nights(request)
    found = services.ledger.evaluations(night_id=night, generation=generation)
    return {"object": "list", "data": [e.model_dump(mode="json") for e in found], "has_more": False}


@router.post("/v1/evaluations")
async def create_evaluation(body: EvaluationRequest, request: Request) -> dict[str, Any]:
    """Run the suites now; the reply comes when they are done (ledger and night use the same runs)."""
    services, _ = _nights(request)
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
        done.append(evaluation.model_dump(mode="json"))
    return {"object": "list", "data": done}
