"""A night reads little of a large ledger, and comes to what it would come to if it read all of it."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.prompts import compose
from agent.verify import verify
from distill.credit import credit
from distill.dataset import DatasetConfig, build, write
from distill.snapshot import Snapshot, praise_of
from evals.suites import EvalTask, Suite, save_suite
from memory import approvals, forget
from memory.ledger import Ledger
from memory.night_records import Night, NightStatus, StageRun
from memory.recall import NoMemory
from memory.records import (
    Feedback,
    FeedbackKind,
    MemoryKind,
    Outcome,
    OutcomeSource,
    Principle,
    Purpose,
    Recalled,
    Step,
    StopReason,
    Task,
    Trajectory,
    Trust,
    now,
)
from serve import lessons, promotion
from serve.stages.material import DAYS, judge_feedback, load_snapshot, snapshot, suites_of
from serve.stages.night_run import NightRun
from serve.wiring import open_ledger
from tests.memory import samples
from tests.serve.fakes import settings_in
from tests.serve.test_material import promoted
from tests.serve.test_night_limits import ledger, night_in

__all__ = ["ledger"]

QUESTIONS = 5
NUMBER = {"similarity": 1.0, "score": 0.5, "recency": 1.0, "rank": 1.0, "tokens": 9, "why": "near"}
KINDS = (FeedbackKind.SCORE, FeedbackKind.CORRECTION, FeedbackKind.HINT, FeedbackKind.COMMENT)


class Life:
    """A ledger in which much happens, the same for the same seed but for its ids."""

    def __init__(self, ledger: Ledger, seed: int) -> None:
        self.ledger, self.chance = ledger, random.Random(seed)
        self.items: dict[str, list[Principle]] = {tenant: [] for tenant in ("ada", "eve")}
        for tenant, items in self.items.items():
            items += [samples.principle(f"Rule {n} of {tenant}.", tenant) for n in range(4)]
            for item in items:
                ledger.add_principle(item)
        self.runs: list[Trajectory] = []

    def run(self, *purposes: Purpose) -> Trajectory:
        chance, tenant = self.chance, self.chance.choice(("ada", "eve"))
        number = chance.randrange(QUESTIONS)
        asked = {"messages": [{"role": "user", "content": f"What is {number} + {number}?"}], "user": "ada"}
        task = Task(tenant=tenant, reference=chance.choice((None, str(2 * number))), **asked)
        answer = chance.choice((str(2 * number), "0"))
        source = OutcomeSource.VERIFIER if task.reference else OutcomeSource.CRITIC
        outcome = Outcome(score=float(answer != "0"), by=source) if chance.random() < 0.6 else None
        shown = chance.sample(self.items[tenant], 2)
        recalled = [
            Recalled(id=i.id, kind=MemoryKind.PRINCIPLE, withheld=chance.random() < 0.3, **NUMBER) for i in shown
        ]
        run = Trajectory(
            task_id=task.id, tenant=tenant, purpose=chance.choice(purposes), generation=0, model="base", answer=answer,
            messages=[*task.messages, {"role": "assistant", "content": answer}], steps=[Step(message=1)],
            outcome=outcome, recalled=recalled, stop_reason=StopReason.ANSWER, seconds=60.0,
            started_at=now() - timedelta(hours=chance.randrange(1, 99)),
        )  # fmt: skip
        self.ledger.add_run(task, run)
        self.runs.append(run)
        return run

    def say(self, runs: list[Trajectory], count: int) -> None:
        for _ in range(count):
            run, kind = self.chance.choice(runs), self.chance.choice(KINDS)
            value = (
                self.chance.choice((0.0, 1.0)) if kind is FeedbackKind.SCORE else self.chance.choice(("4", "6", "8"))
            )
            author = self.chance.choice(("ann", "bob", "operator", "anonymous"))
            at = now() - timedelta(hours=self.chance.randrange(99))
            word = Feedback(
                trajectory_id=run.id, tenant=run.tenant, kind=kind, value=value, author=author, created_at=at
            )
            self.ledger.add_feedback(word)
            if kind is not FeedbackKind.COMMENT and self.chance.random() < 0.1:
                trust = self.chance.choice((Trust.TRUSTED, Trust.REJECTED))
                approvals.decide(self.ledger.database, word.id, trust, "so", tenant=run.tenant, by="operator")


def all_judged(run: NightRun) -> dict[str, Any]:
    """What `judge_feedback` must come to, by reading everything."""
    ledger, upto = run.services.ledger, run.done("snapshot")["upto"]
    trajectories = ledger.trajectories(upto_seq=upto["trajectory"], purpose=DAYS)
    tasks = ledger.tasks(t.task_id for t in trajectories)
    counts: Counter[str] = Counter()
    for judgement in credit(ledger.feedback(upto_seq=upto["feedback"]), trajectories, tasks, verify):
        ledger.set_trust(judgement.feedback_id, judgement.trust, judgement.reason)
        counts[judgement.trust.value] += 1
    credited = lessons.credit_runs(run.services, trajectories, ledger.feedback(upto_seq=upto["feedback"]))
    return {"trust": counts, "credited": credited}


def all_loaded(run: NightRun) -> Snapshot:
    """What `load_snapshot` must come to, by reading everything."""
    drawn, ledger = run.done("snapshot"), run.services.ledger
    since, upto = drawn["since"], drawn["upto"]
    moment = datetime.fromisoformat(drawn["since_time"]) if drawn["since_time"] else None
    everything = [
        (seq, t)
        for seq, t in enumerate(ledger.trajectories(), 1)
        if (t.purpose in DAYS and seq <= upto["trajectory"]) or t.purpose is Purpose.PRACTICE
    ]
    practised = ledger.stage(run.night.id, "practice")
    until, behind = practised.output["upto"] if practised else upto["trajectory"], since.get("practice")
    lines = {
        Purpose.PRACTICE: (since["trajectory"] if behind is None else behind, until),
        **dict.fromkeys(DAYS, (since["trajectory"], upto["trajectory"])),
    }
    runs = {t.id: t for s, t in everything if t.purpose in DAYS or lines[t.purpose][0] < s <= until}
    new = [t for s, t in everything if lines[t.purpose][0] < s <= lines[t.purpose][1]]
    said = ledger.feedback(after_seq=since["feedback"], upto_seq=upto["feedback"])
    if moment is not None:
        new = [t for t in new if t.started_at + timedelta(seconds=t.seconds) >= moment]
        said = [f for f in said if f.created_at >= moment]
    wanted = {t.id for t in new} | {f.trajectory_id for f in said if f.trajectory_id in runs}
    heard = ledger.feedback(upto_seq=upto["feedback"])
    before = [t for id, t in runs.items() if id not in wanted]
    return Snapshot(
        trajectories=[runs[id] for id in wanted],
        feedback=[f for f in heard if f.trajectory_id in wanted],
        tasks=ledger.tasks(runs[id].task_id for id in wanted),
        held_out_tasks=[item.task for suite in suites_of(run) for item in suite.tasks],
        seed=run.services.settings.dataset.seed,
        praised=praise_of(before, heard, ledger.tasks(t.task_id for t in before)),
        champion=run.done("snapshot")["champion"],
    )


def begun(ledger: Ledger, folder: Path, **options: Any) -> NightRun:
    """A night that has drawn its line."""
    run = night_in(ledger, folder, [], Night(options=options), controls=[])
    ledger.record_stage(StageRun(night_id=run.night.id, stage="snapshot", output=snapshot(run), seconds=0.0))
    return run


def lived(folder: Path, seed: int) -> tuple[Ledger, Life]:
    """Days that a promoted night learned from, and what came after it: runs, practice, late words on old runs."""
    settings = settings_in(folder)
    exam = EvalTask(key="k", task=Task(messages=[{"role": "user", "content": "Name a colour."}], reference="red"))
    save_suite(Suite(name="held_out", role="held_out", tasks=[exam]), settings.suites_dir / "h.jsonl")
    ledger = open_ledger(settings)
    promotion.ensure_base(ledger, settings.model)
    life = Life(ledger, seed)
    for _ in range(60):
        life.run(Purpose.SERVE, Purpose.SERVE, Purpose.TEACHER, Purpose.EVAL, Purpose.PRACTICE, Purpose.UNTAUGHT)
    life.say(life.runs, 80)
    first = begun(ledger, folder)
    ledger.record_stage(StageRun(night_id=first.night.id, stage="credit", output=judge_feedback(first), seconds=0.0))
    ledger.end_night(first.night.id, NightStatus.SKIPPED, [])
    promoted(ledger, folder, 1)
    old = list(life.runs)
    for _ in range(20):
        life.run(Purpose.SERVE, Purpose.SERVE, Purpose.TEACHER, Purpose.PRACTICE, Purpose.EVAL)
    life.say(old, 40)
    life.say(life.runs, 25)
    return ledger, life


def standing(ledger: Ledger) -> Any:
    words = [(f.id, f.trust, f.trust_reason) for f in ledger.feedback()]
    return words, [(p.id, p.uses, p.successes) for p in ledger.principles()]


def opened(folder: Path, like: NightRun) -> NightRun:
    """The night over the ledger of a folder."""
    return night_in(open_ledger(settings_in(folder)), folder, [], like.night, controls=[])


@pytest.mark.parametrize("forgetting", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_feedback_is_judged_and_items_are_credited_as_if_everything_were_read(
    tmp_path: Path, seed: int, forgetting: bool
) -> None:
    ledger, _ = lived(tmp_path / "few", seed)
    if forgetting:
        forget.forget(ledger.database, tmp_path / "few" / "data", tenant="ada", user="bob", by="ada")
    run = begun(ledger, tmp_path / "few")
    before = standing(ledger)
    ledger.close()
    shutil.copytree(tmp_path / "few", tmp_path / "all")
    few, everything = opened(tmp_path / "few", run), opened(tmp_path / "all", run)
    told, expected = judge_feedback(few), all_judged(everything)
    assert told == expected
    assert standing(few.services.ledger) == standing(everything.services.ledger) != before
    assert judge_feedback(few)["credited"] == 0
    few.services.ledger.close()
    everything.services.ledger.close()


@pytest.mark.parametrize("options", [{}, {"since": 50}])
@pytest.mark.parametrize("seed", range(4))
def test_a_night_learns_the_same_from_few_runs_as_from_a_ledger_read_as_a_whole(
    tmp_path: Path, seed: int, options: dict[str, Any]
) -> None:
    ledger, life = lived(tmp_path, seed)
    since = {"since": (now() - timedelta(hours=options["since"])).isoformat()} if options else {}
    run = begun(ledger, tmp_path, **since)
    drawn = run.done("snapshot")
    judge_feedback(run)
    life.run(Purpose.SERVE)
    tries = [life.run(Purpose.PRACTICE) for _ in range(3)]
    life.say(life.runs, 5)
    upto = {"upto": ledger.watermark()["trajectory"]}
    ledger.record_stage(StageRun(night_id=run.night.id, stage="practice", output=upto, seconds=0.0))
    found, expected = load_snapshot(run), all_loaded(run)
    asked = {(task.tenant, task.fingerprint) for task in found.tasks.values()}
    needed = {key: voices for key, voices in expected.praised.items() if key[:2] in asked}
    assert {key: voices for key, voices in found.praised.items() if key[:2] in asked} == needed
    for field in fields(Snapshot):
        if field.name != "praised":
            assert getattr(found, field.name) == getattr(expected, field.name), field.name
    if not since:
        assert len(found.trajectories) + len(found.taught) > drawn["runs"]
        assert {t.id for t in tries} <= {t.id for t in found.trajectories}
    recipes = ("successes", "corrections", "contrast", "teacher")
    config = DatasetConfig(min_examples=1)
    for name, material in {"found": found, "expected": expected}.items():
        write(build(material, recipes, NoMemory(), compose, config), tmp_path / name)
    files = {path.name: path.read_bytes() for path in (tmp_path / "found").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert files["sft.jsonl"]
    ledger.close()


def judged_night(ledger: Ledger, folder: Path) -> None:
    run = begun(ledger, folder)
    output = judge_feedback(run)
    ledger.record_stage(StageRun(night_id=run.night.id, stage="credit", output=output, seconds=0.0))
    ledger.end_night(run.night.id, NightStatus.SKIPPED, [])


def test_a_correction_is_trusted_for_a_word_that_an_earlier_night_trusted(ledger: Ledger, tmp_path: Path) -> None:
    def corrected(author: str) -> str:
        task = Task(messages=[{"role": "user", "content": "Who wrote it?"}])
        run = samples.trajectory(task, "Nobody.")
        ledger.add_run(task, run)
        word = samples.feedback(run).model_copy(update={"author": author, "value": "Lovelace"})
        ledger.add_feedback(word)
        return word.id

    corrected("operator")
    judged_night(ledger, tmp_path)
    later = corrected("ann")
    judged_night(ledger, tmp_path)
    assert {f.id: f.trust for f in ledger.feedback()}[later] is Trust.TRUSTED


def test_a_run_is_counted_anew_when_the_word_that_turned_its_outcome_is_forgotten(
    ledger: Ledger, tmp_path: Path
) -> None:
    item = samples.principle()
    ledger.add_principle(item)
    task = samples.task()
    run = samples.trajectory(task).model_copy(
        update={
            "recalled": [Recalled(id=item.id, kind=MemoryKind.PRINCIPLE, **NUMBER)],
            "outcome": Outcome(score=1.0, by=OutcomeSource.CRITIC),
        }
    )
    ledger.add_run(task, run)
    ledger.add_feedback(Feedback(trajectory_id=run.id, kind=FeedbackKind.SCORE, value=0.0, author="bob"))
    judged_night(ledger, tmp_path)
    assert (ledger.get_principle(item.id).uses, ledger.get_principle(item.id).successes) == (1, 0)
    forget.forget(ledger.database, tmp_path / "data", tenant=run.tenant, user="bob", by="operator")
    judged_night(ledger, tmp_path)
    assert (ledger.get_principle(item.id).uses, ledger.get_principle(item.id).successes) == (1, 1)
