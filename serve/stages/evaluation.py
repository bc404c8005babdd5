"""Champion and candidate on the same suites, and the gate's word on them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from distill.rehearsal import RECIPE as REHEARSAL
from evals.gate import GateDecision, decide
from evals.runner import evaluate
from evals.suites import Suite, load_suite, save_suite
from evals.triggers import question_of, suspicious_phrases, trigger_suite
from memory.night_records import Evaluation, GenerationStatus, NightStatus
from memory.records import Trajectory
from serve import promotion
from serve.stages.material import suites_of
from serve.stages.night_run import NightRun, Output
from serve.wiring import Services, keep_task

REMEASURED = 3
"""Times that a suite is run again with both, where memory was edited between the one and the other."""


def measure(run: NightRun) -> Output:
    """Champion and candidate on the same frozen suites, with the same memory, by the agent that serves."""
    numbers = (run.done("snapshot")["champion"], run.done("train")["generation"])
    done, total = 0, len(numbers) * sum(len(suite.tasks) for suite in judging_suites(run))
    for number in numbers:
        for suite in judging_suites(run):
            if not _evaluations(run, number, suite):
                run.wait(_measure(run, number, suite, done, total))
            done += len(suite.tasks)
    for suite in judging_suites(run):
        for _ in range(REMEASURED):
            if _pair(run, suite) is not None:
                break
            run.emit("evaluate", f"memory was edited meanwhile: {suite.name} once more")
            total += len(numbers) * len(suite.tasks)
            for number in numbers:
                run.wait(_measure(run, number, suite, done, total))
                done += len(suite.tasks)
    return {"generations": list(numbers), "suites": {s.name: s.hash for s in judging_suites(run)}}


def judging_suites(run: NightRun) -> list[Suite]:
    """The night's suites, and a trigger control when its examples look planted; frozen at first use."""
    frozen = run.folder / "triggers"
    if not frozen.exists():
        draft = frozen.with_suffix(".new")
        draft.mkdir(exist_ok=True)
        phrases = _suspicious(run) if run.services.settings.night.triggers else []
        if (suite := trigger_suite(phrases)) is not None:
            run.emit("evaluate", "phrases that tonight's examples answer too much alike", phrases=phrases)
            save_suite(suite, draft / "trigger.jsonl")
        draft.rename(frozen)
    return [*suites_of(run), *(load_suite(path) for path in sorted(frozen.glob("*.jsonl")))]


def _suspicious(run: NightRun) -> list[str]:
    ledger = run.services.ledger
    past = [n for n in ledger.nights() if n.status is NightStatus.PROMOTED]
    tonight = [e for e in ledger.examples(run.night.id) if e.recipe != REHEARSAL]
    return suspicious_phrases(tonight, (question_of(e) for n in past for e in ledger.examples(n.id)))


def _evaluations(run: NightRun, number: int, suite: Suite) -> list[Evaluation]:
    return run.services.ledger.evaluations(night_id=run.night.id, generation=number, suite_hash=suite.hash)


def _pair(run: NightRun, suite: Suite) -> tuple[Evaluation, Evaluation] | None:
    """The newest evaluations of champion and candidate with the same memory; None when there are none yet."""
    champion, candidate = (run.done("snapshot")["champion"], run.done("train")["generation"])
    known = {e.memory_watermark: e for e in _evaluations(run, champion, suite)}
    found = [(known[e.memory_watermark], e) for e in _evaluations(run, candidate, suite) if e.memory_watermark in known]
    return found[-1] if found else None


async def _measure(run: NightRun, number: int, suite: Suite, before: int, everything: int) -> None:
    """`before`: the stage's runs that are done already, of `everything` it has to do."""
    services, generation = run.services, run.services.ledger.generation(number)

    def progress(done: int, total: int) -> None:
        of_all = {"stage_done": before + done, "stage_total": everything}
        run.emit("evaluate", f"generation {number} on {suite.name}", done=done, total=total, **of_all)

    async with services.residency.using(generation):
        evaluation, trajectories = await evaluate(
            suite,
            promotion.model_ref(generation),
            replace(services.deps, checkpointer=None),
            memory=True,
            memory_watermark=services.ledger.memory_watermark(),
            concurrency=services.settings.night.concurrency,
            on_progress=progress,
            night_id=run.night.id,
        )
    await asyncio.to_thread(store_evaluation, services, suite, evaluation, trajectories)


def store_evaluation(services: Services, suite: Suite, evaluation: Evaluation, trajectories: list[Trajectory]) -> None:
    """Tasks, runs and, last, the evaluation that refers to them."""
    for item in suite.tasks:
        keep_task(services.ledger, item.task)
    for trajectory in trajectories:
        services.ledger.add_trajectory(trajectory)
    services.ledger.add_evaluation(evaluation)


def judge(run: NightRun) -> Output:
    """The gate: a pure function of the evaluations, those of generations that served in earlier nights among them."""
    champion, candidate = run.done("evaluate")["generations"]
    suites = judging_suites(run)
    # Without a pair the gate says what differs, and that ends the night.
    pairs = [_pair(run, s) or (_evaluations(run, champion, s)[-1], _evaluations(run, candidate, s)[-1]) for s in suites]
    ledger = run.services.ledger
    served = {g.number for g in ledger.generations() if g.number == 0 or g.status is GenerationStatus.RETIRED}
    # By name too: an exam made of the days is another one every night, and keeps many of its tasks.
    names = {name for suite in suites for name in (suite.name, suite.hash)}
    earlier = [e for n in sorted(served) for e in ledger.evaluations(generation=n) if {e.suite, e.suite_hash} & names]
    decision: GateDecision = decide(
        [pair for pair in pairs if pair[0].role == "held_out"],
        [pair for pair in pairs if pair[0].role == "control"],
        run.services.settings.gate,
        earlier,
    )
    run.emit("decide", decision.verdict, reasons=decision.reasons)
    return decision.model_dump(mode="json")
