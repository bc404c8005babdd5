"""The watch at work: live outcomes undo a promotion within a second, and a canary stands its trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from io import StringIO
from itertools import count
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from evals.live import WatchConfig
from memory.approvals import decide
from memory.errors import ConflictError
from memory.forget import forget
from memory.ledger import Ledger, insert_run
from memory.night_records import Generation, GenerationStatus, Night, NightStatus, StageRun
from memory.records import (
    Feedback,
    FeedbackKind,
    Outcome,
    OutcomeSource,
    Purpose,
    StopReason,
    Task,
    Trajectory,
    Trust,
)
from serve import promotion, watching
from serve.commands import print_generations, print_status
from serve.reports import night_report
from serve.stages.material import snapshot
from serve.stages.night_run import NightRun
from serve.stages.publication import publish
from serve.watching import LiveOutcomes, standing
from serve.wiring import Services
from tests.serve.fakes import running, settings_in

numbers = count()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Services]]:
    settings = settings_in(tmp_path_factory.mktemp("watch"))
    with (
        running(settings, lambda request: "Action: finish(3)") as (url, services),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield http, services


@pytest.fixture
def ledger(service: tuple[httpx.Client, Services]) -> Ledger:
    return service[1].ledger


@pytest.fixture
def pair(ledger: Ledger) -> tuple[int, int]:
    """The champion and a candidate beside it, both new."""
    return newcomer(ledger, serves=True), newcomer(ledger)


def newcomer(ledger: Ledger, *, serves: bool = False) -> int:
    number = ledger.next_generation_number()
    ledger.add_generation(
        Generation(
            number=number,
            base_model="test/model",
            adapter_path=f"night-{number}",
            adapter_sha256=f"{number:064d}",
            status=GenerationStatus.CANDIDATE,
        )
    )
    if serves:
        ledger.promote(number, why="test", by="test")
    return number


def served(
    ledger: Ledger,
    generation: int,
    n: int,
    success: bool,
    by: OutcomeSource | None = OutcomeSource.VERIFIER,
    user: str | None = None,
) -> list[Trajectory]:
    """Runs of the generation on new tasks, committed with what a verifier said of them."""
    made: list[tuple[Task, Trajectory]] = []
    name = ledger.generation(generation).served_name
    for _ in range(n):
        asked = [{"role": "user", "content": f"What is {next(numbers)} + 1?"}]
        task = Task(workload="sums", messages=asked, user=user)
        run = Trajectory(
            task_id=task.id,
            workload="sums",
            generation=generation,
            model=name,
            messages=task.messages,
            stop_reason=StopReason.ANSWER,
            outcome=Outcome(score=float(success), by=by) if by else None,
        )
        made.append((task, run))
    with ledger.database.writing() as connection:
        for task, run in made:
            insert_run(connection, task, run)
    return [run for _, run in made]


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it happens by itself. The aim is a second, which `bench swap` measures."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def calm(ledger: Ledger) -> bool:
    """Whether the watch, asked now, would leave everything as it is."""
    config = WatchConfig()
    found = LiveOutcomes(ledger, config).look()
    return not any(v.worse or (pair.canary and v.compared >= config.canary_outcomes) for pair, v in found)


def test_a_generation_that_fails_in_use_is_rolled_back_within_a_second_and_stays_so(
    service: tuple[httpx.Client, Services], pair: tuple[int, int]
) -> None:
    http, services = service
    ledger, (old, new) = services.ledger, pair
    served(ledger, old, 30, success=True)
    http.post(f"/v1/generations/{new}/promote", json={}).raise_for_status()
    served(ledger, new, 19, success=False)
    assert calm(ledger)
    assert ledger.champion().number == new
    [found] = [w for w in http.get("/v1/watch").json()["data"] if w["generation"] == new]
    assert (found["against"], found["canary"]) == (old, False)
    assert found["workloads"][0]["new"] == {"n": 19, "successes": 0}

    served(ledger, new, 1, success=False)
    assert soon(lambda: ledger.champion().number == old)
    row = ledger.promotions()[-1]
    assert (row.from_generation, row.to_generation, row.by) == (new, old, "watch")
    assert row.evidence is not None
    assert row.evidence["new"] == {"n": 20, "successes": 0}
    assert row.evidence["confidence"] == 0.95
    assert "0/20 (0%) now" in row.why
    assert ledger.generation(new).status is GenerationStatus.RETIRED
    shown = Console(file=StringIO(), width=300)
    print_generations(ledger, shown)
    print_status(services.settings, ledger, shown)
    assert shown.file.getvalue().count(f"{new} -> {old} by watch: rolled back: workload 'sums'") == 2  # type: ignore[attr-defined]

    # Whoever asks for it by name may still see it fail: nothing flaps, in either direction.
    served(ledger, new, 10, success=False)
    served(ledger, old, 40, success=False)
    assert calm(ledger)
    assert ledger.promotions()[-1] == row

    # By hand it may come again, on a probation of its own: what went before does not count.
    http.post(f"/v1/generations/{new}/promote", json={}).raise_for_status()
    assert calm(ledger)
    assert ledger.champion().number == new


def test_evaluations_and_runs_that_a_model_judged_roll_nothing_back(ledger: Ledger, pair: tuple[int, int]) -> None:
    old, new = pair
    served(ledger, old, 40, success=True)
    ledger.promote(new, why="test", by="test")
    served(ledger, new, 40, success=False, by=OutcomeSource.CRITIC)
    for run in served(ledger, old, 40, success=True):
        exam = run.model_copy(update={"id": f"{run.id}e", "purpose": Purpose.EVAL, "generation": new})
        ledger.add_trajectory(exam.model_copy(update={"outcome": Outcome(score=0, by=OutcomeSource.VERIFIER)}))
        taught = run.model_copy(update={"id": f"{run.id}t", "model": "a teacher", "generation": new})
        ledger.add_trajectory(taught.model_copy(update={"outcome": Outcome(score=0, by=OutcomeSource.VERIFIER)}))
    assert calm(ledger)
    assert ledger.champion().number == new


def test_users_who_complain_roll_back_and_one_who_complains_of_everything_does_not(
    ledger: Ledger, pair: tuple[int, int]
) -> None:
    old, new = pair

    def score(runs: list[Trajectory], value: float, author: str) -> None:
        for run in runs:
            said = {"kind": FeedbackKind.SCORE, "value": value, "author": author}
            ledger.add_feedback(Feedback(trajectory_id=run.id, **said))

    score(served(ledger, old, 30, success=True, by=None), 1.0, "operator")
    ledger.promote(new, why="test", by="test")
    runs = served(ledger, new, 50, success=True, by=None)
    score(runs[:30], 0.0, "key:hostile/somebody")
    assert calm(ledger)
    assert ledger.champion().number == new
    score(runs[30:40], 0.0, "key:second")
    assert soon(lambda: ledger.champion().number == old)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger that no service watches, with generation 0 as its champion."""
    opened = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    promotion.ensure_base(opened, "test/model")
    yield opened
    opened.close()


def scored(ledger: Ledger, runs: list[Trajectory], value: float, author: str) -> list[Feedback]:
    said = [Feedback(trajectory_id=run.id, kind=FeedbackKind.SCORE, value=value, author=author) for run in runs]
    for word in said:
        ledger.add_feedback(word)
    return said


def reject(ledger: Ledger, said: list[Feedback]) -> None:
    for word in said:
        decide(ledger.database, word.id, Trust.REJECTED, "a campaign", tenant=word.tenant, by="operator")


def worse(live: LiveOutcomes) -> list[bool]:
    return [verdict.worse for _, verdict in live.look()]


def test_what_was_rejected_since_it_was_read_rolls_nothing_back(alone: Ledger) -> None:
    served(alone, 0, 30, success=True)
    newcomer(alone, serves=True)
    runs, live = served(alone, 1, 21, success=True, by=None), LiveOutcomes(alone, WatchConfig())
    campaign = scored(alone, runs[:10], 0.0, "key:hostile")
    scored(alone, runs[10:19], 0.0, "key:second")
    assert worse(live) == [False]
    reject(alone, campaign)
    scored(alone, runs[19:20], 0.0, "key:third")
    assert worse(live) == [False]
    scored(alone, runs[:10], 0.0, "key:fourth")
    assert worse(live) == [True]


def test_what_was_forgotten_since_it_was_read_rolls_nothing_back(alone: Ledger, tmp_path: Path) -> None:
    served(alone, 0, 30, success=True)
    newcomer(alone, serves=True)
    live = LiveOutcomes(alone, WatchConfig())
    served(alone, 1, 19, success=False, user="eve")
    assert worse(live) == [False]
    forget(alone.database, tmp_path, tenant="default", user="eve", by="operator")
    served(alone, 1, 1, success=False)
    assert worse(live) == [False]


def test_praise_that_was_rejected_hides_a_fall_no_longer(alone: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "HEARD_S", 0.0)
    served(alone, 0, 30, success=True)
    newcomer(alone, serves=True)
    runs, live = served(alone, 1, 20, success=True, by=None), LiveOutcomes(alone, WatchConfig())
    for i in (0, 10):
        scored(alone, runs[i : i + 10], 0.0, f"key:{i}")
    campaign = scored(alone, runs, 1.0, "key:hostile")
    assert worse(live) == [False]
    reject(alone, campaign)
    assert worse(live) == [True]


def test_only_its_tenant_and_the_operator_are_told_which_work_got_worse(alone: Ledger) -> None:
    served(alone, 0, 30, success=True)
    newcomer(alone, serves=True)
    served(alone, 1, 30, success=False)
    for tenant in (None, "default"):
        [shown] = standing(alone, WatchConfig(), tenant)
        assert "workload 'sums': live success 30/30" in shown["told"]
        assert [(w["tenant"], w["workload"]) for w in shown["workloads"]] == [("default", "sums")]
    [hidden] = standing(alone, WatchConfig(), "rival")
    assert "proven worse in what another tenant asks" in hidden["told"]
    assert "sums" not in str(hidden)
    assert hidden["workloads"] == []


def test_a_canary_is_the_same_to_a_user_every_time_and_says_who_answered(
    service: tuple[httpx.Client, Services], pair: tuple[int, int]
) -> None:
    http, services = service
    old, new = pair
    begun = http.post(f"/v1/generations/{new}/promote", json={"canary": 0.3}).json()
    assert (begun["number"], begun["status"], begun["metrics"]["canary"]["share"]) == (new, "canary", 0.3)

    def answered_by(**asker: str) -> int:
        body = {"model": "nightschool", "messages": [{"role": "user", "content": "Hello."}], **asker}
        return http.post("/v1/chat/completions", json=body).raise_for_status().json()["nightschool"]["generation"]

    def meant_for(user: str) -> int:
        task = Task(messages=[{"role": "user", "content": "Hello."}], user=user)
        return promotion.resolve(services.ledger, "nightschool", promotion.asker_of(task))[1].number

    users = [f"user-{i}" for i in range(1000)]
    lot = [user for user in users if meant_for(user) == new]
    assert 250 < len(lot) < 350
    in_canary, outside = lot[0], next(user for user in users if user not in lot)
    assert [answered_by(user=in_canary) for _ in range(3)] == [new] * 3
    assert [answered_by(user=outside) for _ in range(3)] == [old] * 3
    assert answered_by(safety_identifier=in_canary) == new
    assert answered_by() == answered_by()
    named = {"model": f"gen-{old}", "messages": [{"role": "user", "content": "Hello."}], "user": in_canary}
    assert http.post("/v1/chat/completions", json=named).json()["nightschool"]["generation"] == old
    assert services.ledger.champion().number == old

    assert http.post("/v1/generations/rollback", json={"why": "enough"}).json()["to_generation"] == old
    assert answered_by(user=in_canary) == old
    with pytest.raises(ConflictError, match="not in canary"):
        services.ledger.end_canary("again", "test", expected=new)


def test_a_canary_that_fails_goes_and_one_that_stands_its_trial_serves_all(
    service: tuple[httpx.Client, Services], pair: tuple[int, int]
) -> None:
    http, services = service
    ledger, (old, worse) = services.ledger, pair
    served(ledger, old, 120, success=True)
    http.post(f"/v1/generations/{worse}/promote", json={"canary": 0.1}).raise_for_status()
    served(ledger, worse, 20, success=False)
    assert soon(lambda: ledger.canary() is None)
    row = ledger.promotions()[-1]
    assert (row.from_generation, row.to_generation, row.by) == (worse, old, "watch")
    assert row.evidence is not None
    assert ledger.generation(worse).status is GenerationStatus.RETIRED
    assert ledger.champion().number == old

    good = newcomer(ledger)
    http.post(f"/v1/generations/{good}/promote", json={"canary": 0.1}).raise_for_status()
    served(ledger, good, 99, success=True)
    assert calm(ledger)
    assert ledger.champion().number == old
    served(ledger, good, 1, success=True)
    assert soon(lambda: ledger.champion().number == good)
    assert "stood its trial" in ledger.promotions()[-1].why
    assert ledger.canary() is None


def test_only_a_share_that_leaves_both_sides_users_is_a_canary(service: tuple[httpx.Client, Services]) -> None:
    http, services = service
    for share in (0, 1, -0.5, 2):
        number = newcomer(services.ledger)
        assert http.post(f"/v1/generations/{number}/promote", json={"canary": share}).status_code == 400
    champion = services.ledger.champion().number
    assert http.post(f"/v1/generations/{champion}/promote", json={"canary": 0.5}).status_code == 409


def night_of(services: Services, candidate: int, judged_against: int) -> NightRun:
    stages = {
        "snapshot": {"champion": judged_against},
        "train": {"generation": candidate},
        "decide": {"verdict": "promote", "reasons": ["better"]},
    }
    for earlier in (n for n in services.ledger.nights() if n.status is NightStatus.RUNNING):
        services.ledger.end_night(earlier.id, NightStatus.CANCELLED, [])
    night = Night(candidate=candidate)
    services.ledger.add_night(night)
    return NightRun(services, night, lambda *_, **__: None, stages.__getitem__)


def test_a_night_that_goes_on_after_its_generation_was_rolled_back_does_not_bring_it_again(
    service: tuple[httpx.Client, Services], pair: tuple[int, int]
) -> None:
    ledger, (old, new) = service[1].ledger, pair
    night = night_of(service[1], new, old)
    publish(night)
    assert ledger.champion().number == new
    ledger.promote(old, why="rolled back", by="watch")
    publish(night)
    assert ledger.champion().number == old


def test_what_only_a_generation_knew_that_was_rolled_back_is_learned_again(
    service: tuple[httpx.Client, Services], pair: tuple[int, int]
) -> None:
    services, (old, new) = service[1], pair
    night = night_of(services, new, old)
    drawn = {"upto": {"trajectory": 77, "feedback": 7}, "since": {"trajectory": 0, "feedback": 0}, "champion": old}
    services.ledger.record_stage(StageRun(night_id=night.night.id, stage="snapshot", output=drawn, seconds=0))
    publish(night)
    services.ledger.end_night(night.night.id, NightStatus.PROMOTED, [])
    assert snapshot(night_of(services, newcomer(services.ledger), new))["since"] == drawn["upto"]
    services.ledger.promote(old, why="rolled back", by="watch")
    assert snapshot(night_of(services, newcomer(services.ledger), old))["since"] == {"trajectory": 0, "feedback": 0}


def test_a_candidate_that_was_judged_against_another_champion_is_not_promoted(
    service: tuple[httpx.Client, Services], pair: tuple[int, int]
) -> None:
    ledger, (old, new) = service[1].ledger, pair
    night = night_of(service[1], new, old)
    other = newcomer(ledger, serves=True)
    with pytest.raises(ConflictError, match="changed meanwhile"):
        publish(night)
    assert ledger.champion().number == other


def test_a_night_may_begin_with_a_canary(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, watch={"canary": 0.2})
    with running(settings, lambda request: "Action: finish(3)") as (_, services):
        number = newcomer(services.ledger)
        run = night_of(services, number, 0)
        done = publish(run)
        assert done == {"promoted": True, "canary": 0.2}
        services.ledger.record_stage(StageRun(night_id=run.night.id, stage="publish", output=done, seconds=0))
        ended = services.ledger.end_night(run.night.id, NightStatus.PROMOTED, [])
        assert night_report(services.ledger, ended, "a model").story[0] == (
            f"Generation {number} passed: it got 20% of the users first, generation 0 went on serving the others."
        )
        canary = services.ledger.canary()
        assert canary is not None
        assert (canary.number, canary.metrics["canary"]["share"]) == (number, 0.2)
        assert services.ledger.champion().number == 0
