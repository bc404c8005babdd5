"""The night's practice: what is tried again, that a crash repeats nothing, and that the recipes read it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill.dataset import read_manifest
from distill.recipes.successes import successes
from distill.train.config import TrainConfig
from evals.night_page import render_night
from memory.errors import LedgerError
from memory.night_records import Generation, GenerationStatus, Night, NightStatus, StageRun
from memory.records import ExampleKind, FeedbackKind, Outcome, OutcomeSource, Purpose, Task, Trajectory, Trust
from serve import counters, dry_run
from serve.events import read_events
from serve.night import run_stage
from serve.reports import night_report
from serve.settings import NightConfig
from serve.stages import STAGES, stages_of
from serve.stages.dataset import make_dataset
from serve.stages.material import load_snapshot, suites_of
from serve.stages.night_run import NightRun
from serve.stages.practice import COMPLAINTS, FEW_COMPLAINTS, PRACTICE, chosen_for, practice_options, practise
from serve.wiring import Services
from tests.memory import samples
from tests.serve.fakes import running, settings_in

TASKS, SAMPLES = 3, 2


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    practice = {"practice": TASKS, "practice_samples": SAMPLES, "practice_temperature": 0.7}
    night = NightConfig(**practice, held_out_share=0.3, controls=["chat"], concurrency=1, rehearsal=3, min_examples=1)
    # One try after the other: of two tries of a task one is right, whatever ids and seeds chance gave out.
    answers = cycle((5, 6))
    settings = settings_in(tmp_path, night=night, train=TrainConfig(dpo_epochs=1))
    with running(settings, lambda _: f"Action: finish({next(answers)})") as (_, made):
        for number in range(12):
            serve(made, samples.task(f"What is {number} + {5 - number}?"), success=number % 2 == 0)
        serve(made, samples.task("Tell me a story.").model_copy(update={"reference": None}), success=None)
        yield made


def serve(services: Services, task: Task, success: bool | None) -> Trajectory:
    outcome = None if success is None else Outcome(score=float(success), by=OutcomeSource.VERIFIER)
    run = samples.trajectory(task).model_copy(update={"outcome": outcome})
    services.ledger.add_run(task, run)
    return run


def begun(services: Services, **options: Any) -> NightRun:
    """A night that has drawn its line."""
    night = Night(options={"practice": TASKS, **options})
    services.ledger.add_night(night)
    run_stage(night.id, "snapshot")
    return run_of(services, night)


def run_of(services: Services, night: Night) -> NightRun:
    def done(stage: str) -> dict:
        found = services.ledger.stage(night.id, stage)
        assert found is not None
        return found.output

    return NightRun(services, night, lambda *_, **__: None, done)


def tries(services: Services) -> list[Trajectory]:
    return services.ledger.trajectories(purpose=Purpose.PRACTICE)


def solved() -> float:
    """Practised tasks that were solved, as Prometheus is told."""
    labels = {"generation": "0", "outcome": "solved"}
    return counters.COUNTED.get_sample_value("nightschool_practised_tasks_total", labels) or 0.0


def test_the_champion_tries_judged_tasks_again_and_none_that_are_held_out(services: Services) -> None:
    run = begun(services)
    run_stage(run.night.id, "practice")
    made = tries(services)
    assert len(made) == TASKS * SAMPLES
    assert len({t.task_id for t in made}) == TASKS
    tried = services.ledger.tasks(t.task_id for t in made).values()
    held_out = [suite for suite in suites_of(run) if suite.role == "held_out"]
    assert held_out
    assert not {task.fingerprint for task in tried} & {f for suite in held_out for f in suite.fingerprints}
    assert all(task.reference is not None for task in tried)
    assert all(t.sampling["temperature"] == 0.7 and t.outcome is not None for t in made)
    assert len({t.sampling["seed"] for t in made}) == len(made)
    output = run.done("practice")
    assert (output["tasks"], output["tries"]) == (TASKS, TASKS * SAMPLES)
    assert output["successes"] == sum(t.success for t in made)
    (told,) = [e for e in read_events(run.folder) if e["stage"] == "practice" and "arms" in e["data"]]
    assert told["data"]["arms"] == output["arms"]
    assert sum(arm["chosen"] for arm in output["arms"]) == TASKS


def test_a_stage_that_died_goes_on_and_tries_nothing_twice(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    run, real, left = begun(services), services.ledger.add_trajectory, [2]

    def dies(trajectory: Trajectory) -> None:
        if not left[0]:
            raise LedgerError("killed")
        left[0] -= 1
        real(trajectory)

    with monkeypatch.context() as patch:
        patch.setattr(services.ledger, "add_trajectory", dies)
        with pytest.raises(LedgerError, match="killed"):
            run_stage(run.night.id, "practice")
    assert services.ledger.stage(run.night.id, "practice") is None
    before = {t.id for t in tries(services)}
    assert len(before) == 2
    # What came meanwhile lies behind the line and does not change the plan.
    serve(services, samples.task("What is 50 - 45?"), success=False)
    run_stage(run.night.id, "practice")
    after = {t.id for t in tries(services)}
    assert before < after
    assert len(after) == TASKS * SAMPLES
    assert run.done("practice")["tries"] == TASKS * SAMPLES


def test_tries_that_the_nights_time_leaves_no_room_for_are_left_out_and_it_is_said(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {"tokens": 1000, "seconds": 20.0}
    before = Night()
    services.ledger.add_night(before)
    for stage, output, seconds in (("train", trained, 20.0), ("evaluate", {}, 30.0)):
        services.ledger.record_stage(StageRun(night_id=before.id, stage=stage, output=output, seconds=seconds))
    services.ledger.end_night(before.id, NightStatus.REJECTED, ["test"])
    # A question that the bandit does not draw by itself.
    asked = serve(services, samples.task("How many fingers has a hand?"), success=False)
    hint = {"kind": FeedbackKind.HINT, "value": "Count down.", "trust": Trust.TRUSTED}
    services.ledger.add_feedback(samples.feedback(asked).model_copy(update=hint))
    first, said, clock = begun(services), list[str](), [0.0]
    monkeypatch.setattr("serve.stages.practice.time", SimpleNamespace(monotonic=lambda: clock[0]))
    spent = sum(stage.seconds for stage in services.ledger.stages(first.night.id))
    wanted = (TASKS + 1) * SAMPLES

    def slowly(_stage: str, told: str, /, **_: Any) -> None:
        said.append(told)
        clock[0] += 0.1

    def within(max_seconds: float) -> dict[str, Any]:
        night = services.settings.night.model_copy(update={"max_seconds": max_seconds})
        short = replace(services, settings=services.settings.model_copy(update={"night": night}))
        return practise(replace(first, services=short, emit=slowly))

    nothing = within(30.0)
    assert (nothing["tasks"], nothing["tries"], nothing["left_out"]) == (0, 0, wanted)
    assert f"night.max_seconds leaves 0 s for practice: {wanted} tries were left out" in said
    some = within(30.0 + spent + 0.6)
    assert SAMPLES <= some["tries"] < wanted
    assert some["left_out"] == wanted - some["tries"]
    # Whom somebody gave a hint comes before what the bandit chose.
    assert some["hinted"] == 1
    assert tries(services)[0].task_id == asked.task_id


def test_the_recipes_read_the_practice_of_this_night_and_of_unpromoted_ones_only(services: Services) -> None:
    first = begun(services)
    run_stage(first.night.id, "practice")
    won = {t.id for t in tries(services) if t.success}
    assert len(won) == TASKS
    material = load_snapshot(first)
    assert won <= {t.id for t in material.trajectories}
    assert {id for example in successes(material) for id in example.sources} & {t.id for t in tries(services)}

    services.ledger.end_night(first.night.id, NightStatus.REJECTED, ["test"])
    second = begun(services)
    assert won <= {t.id for t in load_snapshot(second).trajectories}
    run_stage(second.night.id, "practice")
    services.ledger.end_night(second.night.id, NightStatus.PROMOTED, ["test"], candidate=0)
    third = begun(services)
    assert not [t for t in load_snapshot(third).trajectories if t.purpose is Purpose.PRACTICE]


def test_a_dry_run_foretells_practice_and_the_report_tells_what_came_of_it(services: Services) -> None:
    ledger, taught = services.ledger, samples.task("What is 70 - 65?")
    vouched = {"purpose": Purpose.TEACHER, "outcome": Outcome(score=1.0, by=OutcomeSource.VERIFIER)}
    ledger.add_run(taught, samples.trajectory(taught).model_copy(update=vouched))
    said = dry_run.estimate(services, {})
    assert tries(services) == []
    assert said.teacher is not None
    assert (said.teacher.runs, said.teacher.right) == (1, 1)

    before = solved()
    run = begun(services)
    run_stage(run.night.id, "practice")
    made, output = tries(services), run.done("practice")
    assert solved() - before == len({t.task_id for t in made if t.success})
    assert said.practice is not None
    assert (said.practice.budget, said.practice.tasks, said.practice.tries) == (TASKS, TASKS, len(made))
    assert said.practice.workloads == {arm["workload"]: arm["chosen"] for arm in output["arms"] if arm["chosen"]}

    named = [samples.example(taught).model_copy(update={"id": f"ex_{id}", "sources": [id]}) for id in (made[0].id, "x")]
    ledger.set_examples(run.night.id, named)
    report = night_report(ledger, run.night, "m")
    told = report.practice
    assert told is not None
    spent = sum((s.prompt_tokens or 0) + (s.completion_tokens or 0) for t in made for s in t.steps)
    won = sum(t.success for t in made)
    assert (told.tasks, told.tries, told.successes, told.tokens) == (TASKS, len(made), won, spent)
    assert told.examples == 1
    assert sum(row.share for row in told.workloads) == pytest.approx(1.0)
    for name in ("tasks", "tries", "successes", "tokens", "examples"):
        assert sum(getattr(row, name) for row in told.workloads) == getattr(told, name)
    assert "Practice" in render_night(report)
    assert [(t.part, t.total) for t in report.tokens if t.part == "practice"] == [("practice", spent)]
    assert "had no time for 3 more tries" not in render_night(report)
    short = report.model_copy(update={"practice": told.model_copy(update={"left_out": 3})})
    assert "had no time for 3 more tries" in render_night(short)
    others = night_report(ledger, run.night, "m", tenant="rival").practice
    assert others == told.model_copy(update={"workloads": []})


def complain(services: Services, question: str) -> Trajectory:
    """A run that failed and that a trusted word finds fault with."""
    task, failed = samples.task(question), Outcome(score=0.0, by=OutcomeSource.VERIFIER)
    run = samples.trajectory(task, "I would rather not.")
    run = run.model_copy(update={"outcome": failed, "tools": services.settings.agent.tools})
    services.ledger.add_run(task, run)
    score = {"kind": FeedbackKind.SCORE, "value": 0.0, "trust": Trust.TRUSTED}
    services.ledger.add_feedback(samples.feedback(run).model_copy(update=score))
    return run


def test_questions_complained_about_are_tried_again_and_the_fresh_success_is_put_over_the_complaint(
    services: Services,
) -> None:
    ledger = services.ledger
    asked = {q: complain(services, q) for q in ("Name a prime.", "How many fingers?", "Which digit is odd?")}
    solved = complain(services, "How many days does a working week have?")
    again = samples.trajectory(ledger.tasks([solved.task_id])[solved.task_id])
    ledger.add_trajectory(again.model_copy(update={"outcome": Outcome(score=1.0, by=OutcomeSource.VERIFIER)}))

    plain = begun(services)
    assert chosen_for(plain, load_snapshot(plain), TASKS).complained == []
    ledger.end_night(plain.night.id, NightStatus.SKIPPED, [])
    run = begun(services, recipes=["dissatisfaction"])
    material = load_snapshot(run)
    may_teach = {q for q, on in asked.items() if not material.held_out_reason(material.tasks[on.task_id])}
    assert may_teach
    chosen = chosen_for(run, material, TASKS)
    assert len(chosen.tasks) == TASKS
    assert {t.question for t in [*chosen.complained, *chosen.tasks]} >= may_teach
    assert {t.question for t in chosen.complained} <= may_teach
    assert chosen.complained, "the bandit alone would not have tried all of them"
    assert len(chosen_for(run, material, 1).complained) <= 1

    run_stage(run.night.id, "practice")
    output = run.done("practice")
    told = night_report(ledger, run.night, "m").practice
    assert told is not None
    assert told.complained == output["complained"]
    assert (output["tasks"], output["complained"]) == (TASKS + len(chosen.complained), len(chosen.complained))
    run_stage(run.night.id, "dataset")
    pairs = {e.messages[-1]["content"]: e for e in ledger.examples(run.night.id) if e.recipe == "dissatisfaction"}
    assert set(pairs) == may_teach
    for question, pair in pairs.items():
        assert pair.kind is ExampleKind.DPO
        assert ("5" in str(pair.chosen), "I would rather not." in str(pair.rejected)) == (True, True)
        assert asked[question].id in pair.sources


def test_complaints_are_tried_again_without_a_budget_for_practice_where_pairs_are_made_of_them(
    services: Services,
) -> None:
    hinted = complain(services, "Which digit is odd?")
    hint = {"kind": FeedbackKind.HINT, "value": "Look at the last bit.", "trust": Trust.TRUSTED}
    services.ledger.add_feedback(samples.feedback(hinted).model_copy(update=hint))
    for question in ("Name a prime.", "How many fingers?"):
        complain(services, question)
    settings = services.settings
    idle = settings.model_copy(update={"night": settings.night.model_copy(update={"practice": 0})})
    unpaired = idle.model_copy(update={"train": TrainConfig(dpo_epochs=0)})
    asked = {"recipes": ["dissatisfaction"]}
    assert practice_options(idle, asked) == {COMPLAINTS: FEW_COMPLAINTS}
    assert practice_options(settings, asked) == {PRACTICE: TASKS}
    assert practice_options(idle, {}) == practice_options(unpaired, asked) == {}
    assert practice_options(settings, {**asked, "training_file": "file-1"}) == {}

    night = Night(options={**asked, COMPLAINTS: FEW_COMPLAINTS})
    assert stages_of(night) == list(STAGES)
    services.ledger.add_night(night)
    run_stage(night.id, "snapshot")
    run = run_of(services, night)
    chosen = chosen_for(run, load_snapshot(run), 0, FEW_COMPLAINTS)
    assert (chosen.tasks, chosen.hinted, chosen.hints) == ([], [], {})
    assert chosen.complained
    assert chosen_for(run, load_snapshot(run), 0, 1).complained == chosen.complained[:1]
    run_stage(night.id, "practice")
    assert {t.task_id for t in tries(services)} == {t.id for t in chosen.complained}
    foretold = dry_run.estimate(replace(services, settings=idle), asked).practice
    assert foretold is not None
    assert (foretold.budget, foretold.complained) == (0, 0), "those were solved meanwhile"


def test_a_dataset_stage_that_runs_again_gives_the_same_bytes_whatever_came_after_the_line(services: Services) -> None:
    samples.remember(services.ledger, "What is 9 - 4?")
    complain(services, "Name a prime.")
    run = begun(services, recipes=["successes", "dissatisfaction"])
    run_stage(run.night.id, "practice")
    folder = run.folder / "dataset"

    def made() -> dict[str, bytes]:
        make_dataset(run)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    before, manifest = made(), read_manifest(folder)
    assert manifest is not None
    assert (manifest.champion, manifest.memory_watermark) == (0, services.ledger.memory_watermark())
    assert manifest.memory_watermark
    assert manifest.recipes == ["successes", "dissatisfaction"]
    assert manifest.upto == {**run.done("snapshot")["upto"], "practice": run.done("practice")["upto"]}
    assert manifest.counts["rehearsal"] == 3
    shutil.rmtree(folder)
    services.ledger.add_generation(Generation(number=1, base_model="m", status=GenerationStatus.CANDIDATE))
    services.ledger.promote(1, why="by hand", by="ada")
    complain(services, "How many fingers?")
    serve(services, samples.task("What is 50 - 45?"), success=True)
    assert made() == before


def test_a_night_of_an_older_version_keeps_its_steps() -> None:
    practises = stages_of(Night(options={"practice": 2}))
    assert practises == list(STAGES)
    assert practises.index("practice") == practises.index("dataset") - 1
    assert stages_of(Night(options={"recipes": ["successes"]})) == [n for n in STAGES if n != "practice"]
