"""The teacher: another model that takes a task which the own one failed, or is expected to fail.

Owns which tasks go to it, how long it is waited for, when it is left alone for a while, and how its run is kept:
as a trajectory of purpose `teacher`, from which the night learns once something vouches for it. The budget is
counted in the ledger (`memory.escalations`); whether a run answers the client is `serve.api.runs`' decision.

What is sent: the task's messages and what the agent's tools return. Nothing from memory, so no words of other users.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from agent.llm import ChatModel, ChatReply, ChatRequest, LiteLLMModel, LLMConfig
from agent.run import run_task
from agent.state import AgentDeps, ModelRef, RunOptions
from distill.snapshot import outcome_of
from memory import escalations, runs
from memory.embed import Embedder
from memory.errors import ConfigError, NightschoolError
from memory.escalations import Budget, Escalation, Reason, Status
from memory.ledger import Ledger
from memory.predictor import PastOutcome, Predictor, fit
from memory.recall import NoMemory
from memory.records import DEFAULT_TENANT, Outcome, OutcomeSource, Purpose, StopReason, Task, Trajectory, new_id
from serve import counters

log = logging.getLogger(__name__)

PREFIX = "teacher:"
"""What the `model` of a teacher's run begins with."""

EVERY_TENANT = "*"
HISTORY = 600
"""Newest runs of a kind that predictions are made from."""

MOST_VECTORS = 20_000
"""Questions whose embedding is remembered."""

REFIT_S = 60.0
"""How old a predictor may become."""

OWN_TRIES = (Purpose.SERVE, Purpose.PRACTICE, Purpose.EVAL)
"""Runs that show what the own model can do. Examinations matter most here: what is escalated is not tried any more."""


class TeacherConfig(BaseModel):
    """Who helps out, for whom, and at what price. Without `model` nobody does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(default=None, description="LiteLLM's name, e.g. 'openai/gpt-4o'; unset: no teacher")
    base_url: str | None = Field(default=None, description="where an OpenAI-compatible server listens, if not there")
    key_variable: str | None = Field(default=None, description="environment variable that holds its API key")
    tenants: list[str] = Field(
        default=[DEFAULT_TENANT], description="whose texts may be sent to it; '*' for everybody's"
    )
    max_share: float = Field(default=0.1, ge=0, le=1, description="of the newest 1000 requests, at most this share")
    tokens_per_day: int | None = Field(default=100_000, ge=0, description="in any 24 hours; unset: no limit")
    threshold: float = Field(
        default=0.2, ge=0, le=1, description="a predicted success below it is not tried; 0: only what failed is taken"
    )
    explore: float = Field(
        default=0.1, ge=0, le=1, description="share of the tasks predicted to fail that is tried all the same"
    )
    trust: Literal["verified", "always"] = Field(
        default="verified", description="which of its runs teach: verified ones, or those that nobody judged as well"
    )
    teach: bool = Field(default=True, description="let nights learn from its runs (some providers' terms forbid it)")
    max_tokens: int = Field(default=1024, ge=16, description="completion tokens of one call")
    timeout_s: float = Field(default=60.0, gt=0, description="for a whole run of it")
    concurrency: int = Field(default=8, ge=1, description="runs of it at once; beyond, own answers stand")
    failures: int = Field(default=3, ge=1, description="in a row; then it is not asked for `pause_s`")
    pause_s: float = Field(default=60.0, gt=0, description="until it is tried again after so many failures")


def recipes_with_teacher(recipes: list[str], config: TeacherConfig) -> list[str]:
    """The night's recipes: with a teacher, `teacher` is one of them."""
    wanted = config.model is not None and config.teach and "teacher" not in recipes
    return [*recipes, "teacher"] if wanted else recipes


class Breaker:
    """Whether the teacher may be asked: after `failures` in a row not for `pause_s`, then one call decides."""

    def __init__(self, failures: int, pause_s: float) -> None:
        self._limit = failures
        self._pause_s = pause_s
        self._failed = 0
        self._again_at = 0.0

    def closed(self) -> bool:
        """Whether to ask now; where a call is to decide, the next ones wait another pause."""
        if self._failed < self._limit:
            return True
        if time.monotonic() < self._again_at:
            return False
        self._again_at = time.monotonic() + self._pause_s
        return True

    def tell(self, worked: bool) -> bool:
        """How a call went; True when it opens the breaker, which was closed before or on trial."""
        self._failed = 0 if worked else self._failed + 1
        if self._failed < self._limit:
            return False
        self._again_at = time.monotonic() + self._pause_s
        return True


@dataclass
class _Metered:
    """A model that adds up what its replies cost."""

    model: ChatModel
    tokens: int = 0
    cost_usd: float | None = None

    async def complete(self, request: ChatRequest) -> ChatReply:
        reply = await self.model.complete(request)
        self.tokens += (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
        if reply.cost_usd is not None:
            self.cost_usd = (self.cost_usd or 0.0) + reply.cost_usd
        return reply

    def stream(self, request: ChatRequest) -> AsyncIterator[str | ChatReply]:
        return self.model.stream(request)


class Foresight:
    """Predictors by tenant, from what the ledger holds; refitted once a minute at most, in a worker thread."""

    def __init__(self, ledger: Ledger, embedder: Embedder) -> None:
        self._ledger = ledger
        self._embedder = embedder
        self._guard = threading.Lock()
        self._fitted: dict[tuple[str, int], tuple[float, Predictor | None]] = {}
        self._vectors: dict[str, list[float]] = {}

    def __call__(self, task: Task, generation: int) -> float | None:
        """The chance that this generation solves the task; None while the tenant has too short a history."""
        with self._guard:
            asked, now = (task.tenant, generation), time.monotonic()
            # By age: beside a canary more than one generation answers, and those before it are asked no more.
            self._fitted = {key: fitted for key, fitted in self._fitted.items() if now - fitted[0] <= REFIT_S}
            if asked not in self._fitted:
                self._fitted[asked] = now, fit(self._history(task.tenant), generation)
            known = self._fitted[asked]
        return None if known[1] is None else known[1](self._embedder.embed([task.question])[0])

    def _history(self, tenant: str) -> list[PastOutcome]:
        ledger = self._ledger
        database = ledger.database
        tried = [
            run for purpose in OWN_TRIES for run in runs.newest(database, (purpose,), limit=HISTORY, tenant=tenant)
        ]
        said: dict[str, list[Any]] = {}
        for word in runs.feedback_on(database, (run.id for run in tried)):
            said.setdefault(word.trajectory_id, []).append(word)
        tasks = ledger.tasks(run.task_id for run in tried)
        judged = [
            (tasks[run.task_id], outcome.success, run.generation)
            for run in tried
            if run.task_id in tasks and (outcome := outcome_of(run, said.get(run.id, []))) is not None
        ]
        questions = {task.question for task, _, _ in judged}
        if len(self._vectors) > MOST_VECTORS:
            self._vectors = {}
        new = sorted(questions - self._vectors.keys())
        self._vectors |= dict(zip(new, self._embedder.embed(new), strict=True))
        return [PastOutcome(self._vectors[task.question], success, number) for task, success, number in judged]


class Teacher:
    """The configured teacher. Its methods never raise what it did wrong: then there is no run of it."""

    def __init__(self, config: TeacherConfig, ledger: Ledger, embedder: Embedder) -> None:
        """Raises ConfigError when there is no model, or no key where one is named."""
        if config.model is None:
            raise ConfigError("teacher.model is not set")
        key = os.environ.get(config.key_variable) if config.key_variable else None
        if config.key_variable and not key:
            raise ConfigError(f"teacher.key_variable names {config.key_variable}, which is not set")
        given = {"api_base": config.base_url, "api_key": key or ("none" if config.base_url else None)}
        arguments = {name: value for name, value in given.items() if value is not None}
        patience = LLMConfig(timeout_s=config.timeout_s, attempts=1)
        self.config = config
        self._name = config.model
        self._llm = LiteLLMModel(None, patience, arguments | {"drop_params": True})
        self._ledger = ledger
        self._budget = Budget(config.max_share, config.tokens_per_day)
        self._breaker = Breaker(config.failures, config.pause_s)
        self._foresight = Foresight(ledger, embedder)
        self._busy = 0
        self._later: set[asyncio.Task[Trajectory | None]] = set()

    async def warm(self) -> None:
        """Get ready, off the event loop, so that no client waits for it."""
        await self._llm.warm()

    def may_see(self, task: Task) -> bool:
        """Whether the task's tenant allows it, and it is one that can change hands.

        One with tools of the client's cannot: the conversation would go on with another model's calls.
        """
        allowed = EVERY_TENANT in self.config.tenants or task.tenant in self.config.tenants
        return allowed and not task.client_tools

    async def foreseen(self, task: Task, generation: int, run_id: str) -> float | None:
        """The chance of success, where it is so low that the own model shall not try; None: it shall.

        Of the tasks that look hopeless some are tried all the same, so that a model which has learned is noticed.
        """
        dice = int(hashlib.sha256(run_id.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF
        if self.config.threshold <= 0 or dice < self.config.explore or self._busy >= self.config.concurrency:
            return None
        try:
            if not await asyncio.to_thread(escalations.affordable, self._ledger.database, self._budget):
                return None
            chance = await asyncio.to_thread(self._foresight, task, generation)
        except NightschoolError as exc:
            log.warning("no prediction for task %s: %s", task.id, exc)
            return None
        return chance if chance is not None and chance < self.config.threshold else None

    async def run(
        self,
        task: Task,
        deps: AgentDeps,
        generation: int,
        reason: Reason,
        *,
        run_id: str | None = None,
        expected: float | None = None,
        conversation_id: str | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> Trajectory | None:
        """The teacher's run of a task, judged and not yet in the ledger; None when it may not be asked or failed."""
        if self._busy >= self.config.concurrency or not self._breaker.closed():
            return None
        begun = Escalation(
            tenant=task.tenant,
            task_id=task.id,
            generation=generation,
            reason=reason,
            expected=expected,
            teacher=self._name,
        )
        self._busy += 1
        try:
            if not await asyncio.to_thread(escalations.begin, self._ledger.database, begun, self._budget):
                return None
            await self.warm()
            started, meter = time.monotonic(), _Metered(self._llm)
            run = await self._asked(task, deps, meter, generation, run_id, conversation_id, sampling)
        finally:
            self._busy -= 1
        answered = run is not None and run.answer is not None
        ended = begun.model_copy(
            update={
                "status": Status.ANSWERED if answered else Status.UNANSWERED,
                "success": run.success if run is not None and run.outcome is not None else None,
                "tokens": meter.tokens,
                "cost_usd": meter.cost_usd,
                "seconds": time.monotonic() - started,
            }
        )
        await asyncio.to_thread(escalations.end, self._ledger.database, ended)
        counters.escalated(ended)
        return self._vouched(run, task) if run is not None and answered else None

    def afterwards(self, work: Coroutine[Any, Any, Trajectory | None]) -> None:
        """Let the teacher work for the night alone, with nobody waiting."""
        running = asyncio.create_task(work)
        self._later.add(running)
        running.add_done_callback(self._later.discard)
        running.add_done_callback(_tell_failure)

    async def _asked(
        self,
        task: Task,
        deps: AgentDeps,
        meter: _Metered,
        generation: int,
        run_id: str | None,
        conversation_id: str | None,
        sampling: dict[str, Any] | None,
    ) -> Trajectory | None:
        config = deps.config.model_copy(
            update={"constrain": False, "max_tokens": self.config.max_tokens, "temperature": 0.0}
        )
        alone = replace(deps, llm=meter, recaller=NoMemory(), config=config, checkpointer=None, withhold_share=0.0)
        failed: object = None
        run: Trajectory | None = None
        try:
            async with asyncio.timeout(self.config.timeout_s):
                run = await run_task(
                    task,
                    ModelRef(generation, self._name),
                    alone,
                    purpose=Purpose.TEACHER,
                    sampling=sampling,
                    trajectory_id=run_id or new_id("traj"),
                    options=RunOptions(conversation_id=conversation_id),
                )
        except TimeoutError:
            failed = f"no answer in {self.config.timeout_s:g} s"
        if run is not None and run.stop_reason is StopReason.ERROR:
            failed = run.error
        opened = self._breaker.tell(failed is None)
        if failed is not None:
            then = f"; not asked again for {self.config.pause_s:g} s" if opened else ""
            log.warning("teacher %s failed, the own answer stands: %s%s", self._name, failed, then)
            return None
        assert run is not None
        # Its tokens are another tokenizer's: nothing of ours may be compared with them.
        foreign = {"token_ids": None, "prompt_token_ids": None, "logprob": None}
        steps = [step.model_copy(update=foreign) for step in run.steps]
        return run.model_copy(update={"model": PREFIX + self._name, "steps": steps})

    def _vouched(self, run: Trajectory, task: Task) -> Trajectory:
        """A run of a task that nothing can judge, as the operator trusts it."""
        if task.verifier is not None or task.reference is not None or self.config.trust != "always":
            return run
        word = Outcome(score=1.0, by=OutcomeSource.TEACHER, confidence=0.5, detail="the operator trusts this teacher")
        return run.model_copy(update={"outcome": word})


def make_teacher(config: TeacherConfig, ledger: Ledger, embedder: Embedder) -> Teacher | None:
    """The teacher of the settings, if they name one. ConfigError."""
    return Teacher(config, ledger, embedder) if config.model else None


def _tell_failure(done: asyncio.Task[Trajectory | None]) -> None:
    if not done.cancelled() and done.exception() is not None:
        log.warning("a teacher's run for the night is lost: %s", done.exception())
