"""The practice stage: the champion tries earlier tasks again, and the recipes read how that went.

`distill.practice` chooses; here are the candidates (judged by a verifier of answers, not held out, without tools of a
client) and the runs. Which tasks, and the seeds, follow from what lay behind the night's line, and every try's id from
night, task and number: a stage that died goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from agent.run import run_task
from agent.state import AgentDeps
from distill.hints import Hinted, hints_of
from distill.partings import Question
from distill.practice import ArmFigures, Choice, Plan, Try, plan
from distill.recipes.dissatisfaction import unanswered
from distill.snapshot import Snapshot, judged_blindly
from memory import runs
from memory.errors import NotEnoughExperienceError, NotFoundError
from memory.night_records import Generation
from memory.records import Feedback, Purpose, StopReason, Task, Trajectory
from serve import counters, promotion
from serve.settings import Settings
from serve.stages.budget import practice_limit
from serve.stages.material import DAYS, load_snapshot, on_trial
from serve.stages.night_run import NightRun, Output
from serve.stages.training import config_of
from serve.wiring import Services

PRACTICE = "practice"
"""The stage, and the option of a night that practises: how many tasks."""

COMPLAINTS = "complaints"
"""The option of a night without a budget for practice that makes pairs of complaints: how many it tries again."""

FEW_COMPLAINTS = 8
"""How many that are."""

RECENT = 5000
"""Newest runs that are looked at, of the days and of earlier practice each."""


@dataclass(frozen=True)
class Chosen:
    """What a night practises."""

    tasks: list[Task]
    """By the bandit."""
    arms: list[ArmFigures]
    hinted: list[Task]
    """Besides, for the hints on them."""
    complained: list[Task]
    """Besides, for a fresh sample beside the run complained about (`dissatisfaction`)."""
    hints: dict[Question, list[Feedback]]


def practice_options(settings: Settings, options: dict[str, Any]) -> dict[str, int]:
    """What a night that begins with `options` practises, to be kept among them: settings may change while it runs."""
    if "training_file" in options:
        return {}
    if settings.night.practice:
        return {PRACTICE: settings.night.practice}
    return {COMPLAINTS: FEW_COMPLAINTS} if _wants_fresh_samples(settings, options) else {}


def practise(run: NightRun) -> Output:
    """Choose by the bandit, try each task several times at a temperature, and say why these. Where the night's time is
    short, the tries that it leaves no room for are left out, the bandit's before those that users asked for.

    NotEnoughExperienceError while a canary is on trial: nothing would be trained on the tries.
    """
    services, ledger, options = run.services, run.services.ledger, run.night.options
    if reason := on_trial(run):
        raise NotEnoughExperienceError(reason)
    chosen = chosen_for(run, load_snapshot(run), options.get(PRACTICE, 0), options.get(COMPLAINTS, 0))
    told = ", ".join(f"{arm.chosen} of {arm.workload}" for arm in chosen.arms if arm.chosen)
    arms = [arm.model_dump() for arm in chosen.arms]
    run.emit(PRACTICE, f"{len(chosen.tasks)} tasks to practise: {told or 'there is none'}", arms=arms)
    champion = ledger.generation(run.done("snapshot")["champion"])
    tasks, limit = [*chosen.hinted, *chosen.complained, *chosen.tasks], practice_limit(run)
    begun = run.wait(_tried(run, services, champion, tasks, chosen.hints, limit))
    tries = [made for made in begun.values() if made is not None]
    left_out = len(tasks) * services.settings.night.practice_samples - len(begun)
    if left_out:
        told = f"night.max_seconds leaves {limit:.0f} s for practice: {left_out} tries were left out"
        run.emit(PRACTICE, told, left_out=left_out)
    counters.practised(tries)
    won = sum(one.success for one in tries)
    run.emit(PRACTICE, f"{won} of {len(tries)} tries succeeded")
    tried = {task_id for task_id, _ in begun}
    return {
        "tasks": len(tried),
        "hinted": sum(task.id in tried for task in chosen.hinted),
        "complained": sum(task.id in tried for task in chosen.complained),
        "tries": len(tries),
        "left_out": left_out,
        "successes": won,
        "arms": arms,
        "upto": ledger.watermark()["trajectory"],
    }


def chosen_for(run: NightRun, material: Snapshot, budget: int, complaints_alone: int = 0) -> Chosen:
    """At most `budget` tasks by the bandit, and as many again for hints and complaints, in turn. Without a budget,
    `complaints_alone` tasks for complaints."""
    ledger, settings = run.services.ledger, run.services.settings
    upto = run.done("snapshot")["upto"]["trajectory"]
    lived = runs.newest(ledger.database, (*DAYS, Purpose.PRACTICE), limit=RECENT, upto_seq=upto)
    tasks = ledger.tasks(t.task_id for t in lived)
    samples, seed = settings.night.practice_samples, settings.dataset.seed
    plan = plan_of(lived[::-1], tasks, material, budget=budget, samples=samples, seed=seed)
    hints = hints_of(material) if budget else {}
    wanted = _wants_fresh_samples(settings, run.night.options)
    complaints = unanswered(material) - set(hints) if wanted else set[Question]()
    hinted, complained = (
        [task for task in _to_try(material, questions) if task.id not in plan.task_ids]
        for questions in (set(hints), complaints)
    )
    in_turn = [task.id for turn in zip_longest(hinted, complained) for task in turn if task is not None]
    in_turn = in_turn[: budget or complaints_alone]
    return Chosen(
        tasks=[tasks[id] for id in plan.task_ids],
        arms=plan.arms,
        hinted=[task for task in hinted if task.id in in_turn],
        complained=[task for task in complained if task.id in in_turn],
        hints=hints,
    )


def _wants_fresh_samples(settings: Settings, options: dict[str, Any]) -> bool:
    """Whether a night with these options makes pairs of complaints."""
    recipes = options.get("recipes") or settings.night.recipes
    return "dissatisfaction" in recipes and config_of(settings.train, options).dpo_epochs > 0


def plan_of(
    lived: Sequence[Trajectory], tasks: dict[str, Task], material: Snapshot, *, budget: int, samples: int, seed: int
) -> Plan:
    """The night's plan from the runs so far; `material` knows what is held out."""
    fit = {id: task for id, task in tasks.items() if _practicable(task, material)}
    history = [
        Try((task.tenant, task.workload), task.fingerprint, t.generation, t.success)
        for t in lived
        if t.purpose is not Purpose.TEACHER and t.outcome is not None and (task := fit.get(t.task_id)) is not None
    ]
    choices = [Choice((task.tenant, task.workload), task.fingerprint, id) for id, task in fit.items()]
    return plan(choices, history, budget=budget, samples=samples, seed=seed)


def _practicable(task: Task, material: Snapshot) -> bool:
    judged = (task.verifier is not None or task.reference is not None) and not judged_blindly(task)
    return judged and not task.client_tools and material.held_out_reason(task) is None


def _to_try(material: Snapshot, questions: set[Question]) -> list[Task]:
    """A task for each of these questions that can be tried."""
    found = {
        (task.tenant, task.fingerprint): task
        for task in material.tasks.values()
        if (task.tenant, task.fingerprint) in questions and _practicable(task, material)
    }
    return [found[question] for question in sorted(found)]


async def _tried(
    run: NightRun,
    services: Services,
    champion: Generation,
    tasks: Sequence[Task],
    hints: dict[Question, list[Feedback]],
    limit: float | None,
) -> dict[tuple[str, int], Trajectory | None]:
    """Every try that was begun, by task and number, those of an interrupted stage included; None where the engine
    failed it. Every second one sees its hints. After `limit` seconds of this attempt no other one is begun."""
    config, started = services.settings.night, time.monotonic()
    plain = replace(services.deps, checkpointer=None)
    ways = (plain, replace(plain, recaller=Hinted(plain.recaller, hints)))
    gate = asyncio.Semaphore(config.concurrency)
    wanted = [(task, number) for task in tasks for number in range(config.practice_samples)]
    begun: dict[tuple[str, int], Trajectory | None] = {}
    done = 0

    async def one(task: Task, number: int) -> None:
        nonlocal done
        async with gate:
            if limit is not None and time.monotonic() - started >= limit:
                return
            begun[task.id, number] = await _try(run.night.id, services, champion, task, number, ways[number % 2])
        done += 1
        run.emit(PRACTICE, "trying", done=done, total=len(wanted))

    try:
        async with services.residency.using(champion), asyncio.TaskGroup() as group:
            for task, number in wanted:
                group.create_task(one(task, number))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return begun


async def _try(
    night_id: str, services: Services, champion: Generation, task: Task, number: int, deps: AgentDeps
) -> Trajectory | None:
    """One try, from the ledger when it was made before; None when the engine failed it."""
    digest = hashlib.sha256(f"{night_id}/{task.id}/{number}".encode()).hexdigest()
    ledger, run_id = services.ledger, f"traj_{digest[:32]}"
    try:
        return await asyncio.to_thread(ledger.get_trajectory, run_id)
    except NotFoundError:
        pass
    made = await run_task(
        task,
        promotion.model_ref(champion),
        deps,
        purpose=Purpose.PRACTICE,
        sampling={"temperature": services.settings.night.practice_temperature, "seed": int(digest[:7], 16)},
        trajectory_id=run_id,
    )
    if made.stop_reason in (StopReason.ERROR, StopReason.CANCELLED):
        return None
    await asyncio.to_thread(ledger.add_trajectory, made)
    return made
