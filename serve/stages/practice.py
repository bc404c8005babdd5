"""The practice stage: the champion tries earlier tasks again, and the recipes read how that went.

`distill.practice` chooses; here are the candidates (judged by a verifier of answers, not held out, without tools of a
client) and the runs. Which tasks, and the seeds, follow from what lay behind the night's line, and every try's id from
night, task and number: a stage that died goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from agent.run import run_task
from agent.state import AgentDeps
from distill.hints import Hinted, hints_of
from distill.partings import Question
from distill.practice import ArmFigures, Choice, Plan, Try, plan
from distill.recipes.dissatisfaction import unanswered
from distill.snapshot import Snapshot, judged_blindly
from memory import runs
from memory.errors import NotFoundError
from memory.night_records import Generation
from memory.records import Feedback, Purpose, StopReason, Task, Trajectory
from serve import counters, promotion
from serve.stages.material import DAYS, load_snapshot
from serve.stages.night_run import NightRun, Output
from serve.stages.training import train_config
from serve.wiring import Services

PRACTICE = "practice"
"""The stage, and the option of a night that practises: how many tasks."""

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


def practise(run: NightRun) -> Output:
    """Choose by the bandit, try each task several times at a temperature, and say why these."""
    services, ledger = run.services, run.services.ledger
    chosen = chosen_for(run, load_snapshot(run), run.night.options[PRACTICE])
    told = ", ".join(f"{arm.chosen} of {arm.workload}" for arm in chosen.arms if arm.chosen)
    arms = [arm.model_dump() for arm in chosen.arms]
    run.emit(PRACTICE, f"{len(chosen.tasks)} tasks to practise: {told or 'there is none'}", arms=arms)
    champion = ledger.generation(run.done("snapshot")["champion"])
    tasks = [*chosen.tasks, *chosen.hinted, *chosen.complained]
    tries = run.wait(_tried(run, services, champion, tasks, chosen.hints))
    counters.practised(tries)
    won = sum(one.success for one in tries)
    run.emit(PRACTICE, f"{won} of {len(tries)} tries succeeded")
    return {
        "tasks": len(tasks),
        "hinted": len(chosen.hinted),
        "complained": len(chosen.complained),
        "tries": len(tries),
        "successes": won,
        "arms": arms,
        "upto": ledger.watermark()["trajectory"],
    }


def chosen_for(run: NightRun, material: Snapshot, budget: int) -> Chosen:
    """At most `budget` tasks by the bandit, and as many again for hints and complaints, in turn."""
    ledger, settings = run.services.ledger, run.services.settings
    upto = run.done("snapshot")["upto"]["trajectory"]
    lived = runs.newest(ledger.database, (*DAYS, Purpose.PRACTICE), limit=RECENT, upto_seq=upto)
    tasks = ledger.tasks(t.task_id for t in lived)
    samples, seed = settings.night.practice_samples, settings.dataset.seed
    plan = plan_of(lived[::-1], tasks, material, budget=budget, samples=samples, seed=seed)
    hints = hints_of(material)
    complaints = unanswered(material) - set(hints) if _wants_fresh_samples(run) else set[Question]()
    hinted, complained = (
        [task for task in _to_try(material, questions) if task.id not in plan.task_ids]
        for questions in (set(hints), complaints)
    )
    in_turn = [task.id for turn in zip_longest(hinted, complained) for task in turn if task is not None][:budget]
    return Chosen(
        tasks=[tasks[id] for id in plan.task_ids],
        arms=plan.arms,
        hinted=[task for task in hinted if task.id in in_turn],
        complained=[task for task in complained if task.id in in_turn],
        hints=hints,
    )


def _wants_fresh_samples(run: NightRun) -> bool:
    """Whether tonight makes pairs of complaints."""
    recipes = run.night.options.get("recipes") or run.services.settings.night.recipes
    return "dissatisfaction" in recipes and train_config(run).dpo_epochs > 0


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
) -> list[Trajectory]:
    """Every try that came to an end, those of an interrupted stage included. Every second one sees its hints."""
    config = services.settings.night
    plain = replace(services.deps, checkpointer=None)
    ways = (plain, replace(plain, recaller=Hinted(plain.recaller, hints)))
    gate = asyncio.Semaphore(config.concurrency)
    wanted = [(task, number) for task in tasks for number in range(config.practice_samples)]
    done = 0

    async def one(task: Task, number: int) -> Trajectory | None:
        nonlocal done
        async with gate:
            made = await _try(run.night.id, services, champion, task, number, ways[number % 2])
        done += 1
        run.emit(PRACTICE, "trying", done=done, total=len(wanted))
        return made

    try:
        async with services.residency.using(champion), asyncio.TaskGroup() as group:
            running = [group.create_task(one(task, number)) for task, number in wanted]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [made for each in running if (made := each.result()) is not None]


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
