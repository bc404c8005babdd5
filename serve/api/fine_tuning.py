"""Nights as OpenAI fine-tuning jobs: `/v1/fine_tuning/jobs`, over the ledger or over an uploaded file.

All routes read the ledger, and are plain functions: they run in worker threads, and hold up no stream.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill.recipes import load
from distill.uploads import Method
from memory import files
from memory.errors import ConfigError, NotEnoughExperienceError
from memory.night_records import Night, NightStatus
from memory.records import now
from serve import dry_run, promotion
from serve.api.auth import Caller, Scope, caller_of, requires
from serve.api.night_views import decision_for, event_for, own_workloads, reasons_for, sees_all
from serve.eta import Standing, standing
from serve.events import read_events
from serve.night import NightSchool
from serve.since import moment
from serve.stages.dataset import uploaded_examples
from serve.wiring import Services

router = APIRouter(dependencies=[requires(Scope.OPERATE)])

LEDGER = "ledger"
"""The `training_file` of a job over everything that was learned since the last promoted night."""

STATUS = {
    NightStatus.RUNNING: "running",
    NightStatus.PROMOTED: "succeeded",
    NightStatus.REJECTED: "succeeded",
    NightStatus.SKIPPED: "failed",
    NightStatus.FAILED: "failed",
    NightStatus.CANCELLED: "cancelled",
}


class Hyperparameters(BaseModel):
    """OpenAI's hyperparameters; "auto" stands for the service's own setting."""

    model_config = ConfigDict(extra="forbid")

    n_epochs: Literal["auto"] | int = Field(default="auto")
    batch_size: Literal["auto"] | int = Field(default="auto")
    learning_rate_multiplier: Literal["auto"] | float = Field(default="auto")

    @model_validator(mode="after")
    def _numbers_are_positive(self) -> Hyperparameters:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value != "auto" and not 0 < value <= 1000:
                raise ValueError(f"{name} must be greater than 0 and at most 1000, or 'auto'")
        return self


class DpoHyperparameters(Hyperparameters):
    """DPO's, with its temperature."""

    beta: Literal["auto"] | float = Field(default="auto")


class Supervised(BaseModel):
    """`method.supervised`."""

    model_config = ConfigDict(extra="forbid")

    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Dpo(BaseModel):
    """`method.dpo`."""

    model_config = ConfigDict(extra="forbid")

    hyperparameters: DpoHyperparameters = Field(default_factory=DpoHyperparameters)


class MethodChoice(BaseModel):
    """`method`: what is trained, and how. `dpo` over the ledger trains on its SFT examples first."""

    model_config = ConfigDict(extra="forbid")

    type: Method
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @model_validator(mode="after")
    def _only_its_own_part(self) -> MethodChoice:
        other = {"supervised": self.dpo, "dpo": self.supervised}[self.type]
        if other is not None:
            raise ValueError(f"a {self.type} job takes only method.{self.type}")
        return self


class JobRequest(BaseModel):
    """`POST /v1/fine_tuning/jobs`."""

    model_config = ConfigDict(extra="forbid")

    model: Literal["nightschool"] = "nightschool"
    training_file: str = Field(default=LEDGER, min_length=1, max_length=100)
    method: MethodChoice | None = None
    hyperparameters: Hyperparameters | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    recipes: list[str] | None = Field(default=None, min_length=1)
    since: str | None = Field(default=None, min_length=1, max_length=100)

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> JobRequest:
        if self.hyperparameters is not None and self.method is not None:
            raise ValueError("hyperparameters: give them inside method, or without one")
        if self.recipes is not None and self.training_file != LEDGER:
            raise ValueError("recipes: they read the ledger; an uploaded file is trained on as it is")
        if self.since is not None and self.training_file != LEDGER:
            raise ValueError("since: it limits what is read of the ledger; an uploaded file is trained on as it is")
        return self

    @property
    def training(self) -> dict[str, Any]:
        """The method and the hyperparameters that were given, as a night's options keep them."""
        if self.method is None and self.hyperparameters is None:
            return {}
        kind = self.method.type if self.method else "supervised"
        part = (self.method.supervised or self.method.dpo) if self.method else None
        given = part.hyperparameters if part else self.hyperparameters or Hyperparameters()
        return {"method": kind, "hyperparameters": {k: v for k, v in given.model_dump().items() if v != "auto"}}


def job_object(services: Services, night: Night, caller: Caller) -> dict[str, Any]:
    """OpenAI's `fine_tuning.job`. `succeeded` means that there is a generation and the gate gave its word on it;
    `nightschool.status` says which. Only the caller's own workloads are named."""
    status = STATUS[night.status]
    ended_well = status == "succeeded" and night.candidate is not None
    reasons, decision = night.reasons, decision_of(services, night)
    if not sees_all(caller):
        own = own_workloads(services.ledger, caller.tenant, night)
        reasons = reasons_for(reasons, decision, own)
        decision = decision_for(decision, own) if decision else None
    trained = services.ledger.stage(night.id, "train")
    kind = night.options.get("method", "supervised")
    given = night.options.get("hyperparameters", {})
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    hyperparameters = auto | ({"beta": "auto"} if kind == "dpo" else {}) | given
    progress = _progress(services, night) if status == "running" else None
    error = {"code": night.status, "message": "; ".join(reasons), "param": None}
    return {
        "id": night.id,
        "object": "fine_tuning.job",
        "created_at": int(night.created_at.timestamp()),
        "finished_at": int(night.ended_at.timestamp()) if night.ended_at else None,
        "estimated_finish": _estimated_finish(progress),
        "model": promotion.AGENT_MODEL,
        "fine_tuned_model": f"{promotion.AGENT_MODEL}:gen-{night.candidate}" if ended_well else None,
        "organization_id": "nightschool",
        "status": status,
        "hyperparameters": {k: v for k, v in hyperparameters.items() if k != "beta"},
        "method": {"type": kind, kind: {"hyperparameters": hyperparameters}},
        "training_file": night.options.get("training_file", LEDGER),
        "validation_file": None,
        "result_files": [],
        "trained_tokens": trained.output["trained_tokens"] if trained else None,
        "error": error if status == "failed" else None,
        "seed": night.options.get("seed", services.settings.train.seed),
        "integrations": [],
        "metadata": night.options.get("metadata"),
        "nightschool": {
            "status": night.status,
            "candidate": night.candidate,
            "reasons": reasons,
            "report": night.report_path if sees_all(caller) else None,
            "decision": decision,
            "progress": progress.model_dump() if progress else None,
            "stages": {s.stage: round(s.seconds, 1) for s in services.ledger.stages(night.id)},
        },
    }


def _progress(services: Services, night: Night) -> Standing:
    return standing(services.ledger, night, read_events(services.settings.night_dir(night.id)))


def _estimated_finish(progress: Standing | None) -> int | None:
    """None once the job has ended, and before there was a night to go by."""
    if progress is None or progress.night_left_s is None:
        return None
    return int(now().timestamp() + progress.night_left_s)


def decision_of(services: Services, night: Night) -> dict[str, Any] | None:
    """What the gate said, whole; None for a night that did not get there."""
    decided = services.ledger.stage(night.id, "decide")
    return decided.output if decided else None


def _parts(request: Request) -> tuple[Services, NightSchool]:
    return request.app.state.services, request.app.state.nights


def _options(services: Services, caller: Caller, body: JobRequest) -> dict[str, Any]:
    """A night's options; reads an uploaded file to its end and loads the recipes, so that a bad line or an unknown name
    is known before there is a job."""
    options: dict[str, Any] = dict(body.training)
    load(body.recipes or [])
    for name in ("recipes", "seed", "metadata"):
        if (value := getattr(body, name)) is not None:
            options[name] = value
    if body.since is not None:
        options["since"] = moment(body.since, services.ledger).isoformat()
    if body.training_file == LEDGER:
        return options
    stored = files.get(services.ledger.database, body.training_file, tenant=caller.tenant)
    if stored.purpose != "fine-tune":
        raise ConfigError(f"training_file: {stored.id} was uploaded for {stored.purpose!r}, not for 'fine-tune'")
    options |= {"method": options.get("method", "supervised"), "training_file": stored.id, "tenant": caller.tenant}
    count = sum(1 for _ in uploaded_examples(services, options))
    if count < services.settings.night.min_examples:
        raise NotEnoughExperienceError(
            f"training_file: {count} examples are too few; {services.settings.night.min_examples} are needed"
        )
    return options


@router.post("/v1/fine_tuning/jobs")
def create_job(body: JobRequest, request: Request) -> dict[str, Any]:
    """Start a night now; 409 while another one runs."""
    services, nights = _parts(request)
    caller = caller_of(request)
    return job_object(services, nights.start(_options(services, caller, body)), caller)


def owned_night(services: Services, caller: Caller, job_id: str) -> Night:
    """The job; one over another tenant's file is not found."""
    night = services.ledger.night(job_id)
    owner = night.options.get("tenant")
    if owner is not None and owner != caller.tenant:
        return services.ledger.night(f"{job_id} (of your tenant)")
    return night


def _mine(services: Services, request: Request, job_id: str) -> Night:
    return owned_night(services, caller_of(request), job_id)


@router.post("/v1/fine_tuning/jobs/estimate")
def estimate_job(body: JobRequest, request: Request) -> dict[str, Any]:
    """What a night over the ledger would do now; nothing is started and nothing written."""
    services, _ = _parts(request)
    if body.training_file != LEDGER:
        raise ConfigError("training_file: an estimate is of what the ledger holds; an uploaded file is what it is")
    if unread := body.model_fields_set - {"model", "training_file", "recipes", "since"}:
        raise ConfigError(f"{min(unread)}: an estimate goes by the settings and the last night; leave it out")
    options = _options(services, caller_of(request), body)
    return dry_run.estimate(services, options).model_dump(mode="json")


@router.get("/v1/fine_tuning/jobs")
def list_jobs(
    request: Request, after: str | None = None, limit: int = Query(default=20, ge=1, le=100)
) -> dict[str, Any]:
    """Jobs, newest first, after the job `after`; `metadata[KEY]=VALUE` keeps those that carry it."""
    services, _ = _parts(request)
    tenant = caller_of(request).tenant
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[")
    }
    if after is not None:
        _mine(services, request, after)
    nights = [
        night
        for night in reversed(services.ledger.nights())
        if night.options.get("tenant", tenant) == tenant
        and wanted.items() <= (night.options.get("metadata") or {}).items()
    ]
    if after is not None:
        nights = nights[next((i for i, night in enumerate(nights, 1) if night.id == after), len(nights)) :]
    data = [job_object(services, night, caller_of(request)) for night in nights[:limit]]
    return {"object": "list", "data": data, "has_more": len(nights) > limit}


@router.get("/v1/fine_tuning/jobs/{job_id}")
def retrieve_job(job_id: str, request: Request) -> dict[str, Any]:
    services, _ = _parts(request)
    return job_object(services, _mine(services, request, job_id), caller_of(request))


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
def cancel_job(job_id: str, request: Request) -> dict[str, Any]:
    """Ask the night to stop; 409 when it has ended."""
    services, nights = _parts(request)
    _mine(services, request, job_id)
    nights.cancel(job_id)
    return job_object(services, services.ledger.night(job_id), caller_of(request))


def _event_id(job_id: str, seq: int) -> str:
    return f"ftevent-{job_id}-{seq}"


def _seq_after(job_id: str, event_id: str) -> int:
    prefix = _event_id(job_id, 0)[:-1]
    number = event_id.removeprefix(prefix)
    if not event_id.startswith(prefix) or not number.isdecimal() or len(number) > 9:
        raise ConfigError(f"after: {event_id!r} is no event of job {job_id}")
    return int(number)


@router.get("/v1/fine_tuning/jobs/{job_id}/events")
def job_events(
    job_id: str,
    request: Request,
    after: str | None = None,
    limit: int = Query(default=20, ge=1, le=1000),
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Events, newest first as OpenAI lists them; a watcher asks for `order=asc` and what came `after` the last."""
    services, caller = request.app.state.services, caller_of(request)
    night = _mine(services, request, job_id)
    events = read_events(services.settings.night_dir(job_id))
    if not sees_all(caller):
        own, decision = own_workloads(services.ledger, caller.tenant, night), decision_of(services, night)
        events = [event_for(event, caller.tenant, decision, own) for event in events]
    if order == "desc":
        events.reverse()
    if after is not None:
        last = _seq_after(job_id, after)
        events = [e for e in events if (e["seq"] > last if order == "asc" else e["seq"] < last)]
    data = [
        {
            "object": "fine_tuning.job.event",
            "id": _event_id(job_id, event["seq"]),
            "created_at": int(datetime.fromisoformat(event["at"]).timestamp()),
            "level": "info",
            "message": event["message"],
            "type": "metrics" if event["data"].get("loss") is not None else "message",
            "data": event["data"],
            "stage": event["stage"],
        }
        for event in events[:limit]
    ]
    return {"object": "list", "data": data, "has_more": len(events) > limit}


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
def job_checkpoints(
    job_id: str, request: Request, after: str | None = None, limit: int = Query(default=10, ge=1, le=100)
) -> dict[str, Any]:
    """The one checkpoint that can be served: the adapter as it was when training ended. Earlier steps' are the
    trainer's own, to go on from after a crash."""
    services, _ = _parts(request)
    night = _mine(services, request, job_id)
    trained = services.ledger.stage(job_id, "train")
    data: list[dict[str, Any]] = []
    if trained is not None and after is None:
        generation = trained.output["generation"]
        losses = [loss for part in trained.output["losses"].values() for loss in part]
        data.append(
            {
                "object": "fine_tuning.job.checkpoint",
                "id": f"ftckpt-{night.id}-{generation}",
                "created_at": int(trained.at.timestamp()),
                "fine_tuned_model_checkpoint": f"{promotion.AGENT_MODEL}:gen-{generation}",
                "fine_tuning_job_id": night.id,
                "step_number": len(losses),
                "metrics": {"step": len(losses)} | ({"train_loss": losses[-1]} if losses else {}),
            }
        )
    first = data[0]["id"] if data else None
    return {"object": "list", "data": data[:limit], "has_more": False, "first_id": first, "last_id": first}
