"""The teacher behind real HTTP and the real LiteLLM: what it takes over, what it costs, and what happens without it."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agent.llm import ChatRequest, ScriptedModel
from agent.state import AgentDeps
from evals.night_page import render_night
from memory import escalations
from memory.embed import load_embedder
from memory.errors import ConfigError
from memory.escalations import Budget, Escalation, Reason, Status
from memory.ledger import Ledger
from memory.night_records import Night, NightStatus, StageRun
from memory.predictor import PastOutcome, Predictor, fit
from memory.records import Outcome, OutcomeSource, Purpose, StopReason, Task, Trajectory
from serve import escalation, promotion
from serve.counters import COUNTED
from serve.escalation import Teacher, TeacherConfig, recipes_with_teacher
from serve.reports import night_report
from serve.wiring import Services
from tests.agent.fake_engine import FakeEngine, Refuses, Says
from tests.memory import samples
from tests.serve.fakes import running, settings_in

KEY = "NIGHTSCHOOL_TEST_TEACHER_KEY"
RIGHT, WRONG = Says(pieces=["Action: finish(", "42)"]), Says(pieces=["Action: finish(41)"])
HARD = {"workload": "puzzles", "reference": "42"}


def pupil(request: ChatRequest) -> str:
    """Knows one answer only."""
    return "Action: finish(7)"


def config(oracle: FakeEngine, **given: Any) -> TeacherConfig:
    plenty = {"max_share": 1.0, "tokens_per_day": None, "explore": 0.0, "key_variable": KEY, "failures": 2}
    return TeacherConfig(**{"model": "openai/gpt-4o-mini", "base_url": oracle.base_url, **plenty, **given})


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY, "sk-teacher")
        yield


@pytest.fixture(scope="module")
def oracle() -> Iterator[FakeEngine]:
    with FakeEngine([RIGHT]) as engine:
        yield engine


@pytest.fixture(scope="module")
def service(oracle: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services]]:
    with running(settings_in(tmp_path_factory.mktemp("taught"), teacher=config(oracle)), pupil) as started:
        yield started


@pytest.fixture(autouse=True)
def afresh(oracle: FakeEngine) -> None:
    oracle.script = [RIGHT]
    oracle.requests.clear()


def ask(url: str, text: str, task: dict[str, Any] = HARD, **fields: Any) -> Any:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": text}]
        given = {"model": "nightschool", "messages": messages, "extra_body": {"nightschool": task}, **fields}
        reply = client.chat.completions.create(**given)
        return list(reply) if fields.get("stream") else reply


def counted() -> list[float]:
    """Escalations of a failed own try that ended well, their tokens and their dollars, as Prometheus is told."""
    of = {"generation": "0"}
    wanted = {"s": of | {"reason": "failed", "outcome": "success"}, "_tokens": of, "_cost_dollars": of}
    told = (COUNTED.get_sample_value(f"nightschool_escalation{name}_total", by) for name, by in wanted.items())
    return [value or 0.0 for value in told]


def runs_of(services: Services, text: str) -> dict[Purpose, Trajectory]:
    runs = services.ledger.trajectories()
    tasks = services.ledger.tasks(run.task_id for run in runs)
    return {run.purpose: run for run in runs if tasks[run.task_id].question == text}


def test_a_failed_check_goes_to_the_teacher_whose_run_answers_and_is_marked(
    service: tuple[str, Services], oracle: FakeEngine
) -> None:
    url, services = service
    before = counted()
    reply = ask(url, "What is six times seven?")
    assert reply.choices[0].message.content == "42"
    assert reply.nightschool["served_by"] == "teacher:openai/gpt-4o-mini"
    assert reply.nightschool["outcome"]["score"] == 1.0

    runs = runs_of(services, "What is six times seven?")
    assert (runs[Purpose.SERVE].answer, runs[Purpose.TEACHER].answer) == ("7", "42")
    assert reply.id == f"chatcmpl-{runs[Purpose.TEACHER].id}"
    assert runs[Purpose.SERVE].task_id == runs[Purpose.TEACHER].task_id
    assert all(step.token_ids is None and step.prompt_tokens for step in runs[Purpose.TEACHER].steps)
    (sent,) = oracle.requests
    assert oracle.headers[-1]["authorization"] == "Bearer sk-teacher"
    assert [m["content"] for m in sent["messages"]][1:] == ["What is six times seven?"]
    assert "42" not in json.dumps(sent["messages"])

    figures = escalations.figures(services.ledger.database)[0]
    assert (figures.requests, figures.escalated, figures.predicted, figures.succeeded) == (1, 1, 0, 1)
    assert figures.tokens == 5
    assert figures.cost_usd is not None
    assert figures.cost_usd > 0
    shown = httpx.get(f"{url}/v1/generations").json()["data"][0]
    assert shown["escalation"] == figures.model_dump(mode="json")
    escalated, tokens, dollars = (now - then for now, then in zip(counted(), before, strict=True))
    assert (escalated, tokens, dollars) == (1, 5, pytest.approx(figures.cost_usd))


def test_what_the_own_model_can_do_costs_nothing(service: tuple[str, Services], oracle: FakeEngine) -> None:
    easy = {"workload": "puzzles", "reference": "7"}
    assert ask(service[0], "How many days has a week?", easy).choices[0].message.content == "7"
    assert ask(service[0], "Nobody judges this.", {}).choices[0].message.content == "7"
    assert oracle.requests == []


def test_a_wrong_teacher_does_not_replace_the_own_answer(service: tuple[str, Services], oracle: FakeEngine) -> None:
    oracle.script = [WRONG]
    url, services = service
    assert ask(url, "A trick question?").choices[0].message.content == "7"
    runs = runs_of(services, "A trick question?")
    assert runs[Purpose.TEACHER].outcome is not None
    assert not runs[Purpose.TEACHER].success


def test_a_stream_keeps_what_it_said_and_the_night_gets_the_teachers_run(service: tuple[str, Services]) -> None:
    url, services = service
    chunks = ask(url, "Streamed: six times seven?", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "7"
    until = time.monotonic() + 120
    while Purpose.TEACHER not in (runs := runs_of(services, "Streamed: six times seven?")):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert runs[Purpose.TEACHER].success


@pytest.mark.parametrize(
    ("fields", "task"),
    [
        ({"model": "nightschool:gen-0"}, HARD),
        ({"model": "champion"}, HARD),
        ({"store": False}, HARD),
        ({"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]}, HARD),
    ],
)
def test_a_named_generation_an_unstored_request_and_a_clients_tools_stay_with_us(
    service: tuple[str, Services], oracle: FakeEngine, fields: dict[str, Any], task: dict[str, Any]
) -> None:
    ask(service[0], "Mine alone?", task, **fields)
    assert oracle.requests == []


def test_a_retry_with_the_same_key_is_the_teachers_run_again(service: tuple[str, Services], oracle: FakeEngine) -> None:
    again = {"extra_headers": {"Idempotency-Key": "once"}}
    first, second = (ask(service[0], "Once?", **again) for _ in range(2))
    assert (first.id, first.choices[0].message.content) == (second.id, "42")
    assert len(oracle.requests) == 1


def past(ledger: Ledger, count: int, success: bool, tenant: str = "default") -> None:
    """Judged runs of tasks like those that are asked below."""
    for number in range(count):
        task = samples.task(f"How many primes are there below {3000 + 17 * number}?", tenant)
        outcome = Outcome(score=float(success), by=OutcomeSource.VERIFIER)
        ledger.add_run(task, samples.trajectory(task).model_copy(update={"outcome": outcome}))


def test_what_failed_before_goes_straight_to_the_teacher_streams_too(oracle: FakeEngine, tmp_path: Path) -> None:
    asked: list[str] = []

    def silent(request: ChatRequest) -> str:
        asked.append(request.messages[-1]["content"])
        return "Action: finish(7)"

    with running(settings_in(tmp_path, teacher=config(oracle)), silent) as (url, services):
        past(services.ledger, 40, success=False)
        question = "How many primes are there below 4001?"
        assert ask(url, question, {}).choices[0].message.content == "42"
        chunks = ask(url, question, {}, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "42"
        assert asked == []
        found = escalations.all_escalations(services.ledger.database)
        assert [e.reason for e in found] == [Reason.PREDICTED, Reason.PREDICTED]
        assert all(e.expected is not None and e.expected < 0.2 for e in found)
        # Nobody vouched for it: it answered, and teaches nothing.
        assert all(run.outcome is None for run in services.ledger.trajectories(purpose=Purpose.TEACHER))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    yield opened
    opened.close()


def helped(ledger: Ledger, reason: Reason, success: bool) -> None:
    """A task that the teacher answered, for a cent."""
    task = samples.task("How many moons has Mars?")
    begun = Escalation(task_id=task.id, generation=0, reason=reason, teacher="openai/oracle")
    assert escalations.begin(ledger.database, begun, Budget(share=1.0))
    known = {"status": Status.ANSWERED, "success": success, "tokens": 50, "cost_usd": 0.01}
    escalations.end(ledger.database, begun.model_copy(update=known))
    ledger.add_run(task, samples.trajectory(task).model_copy(update={"purpose": Purpose.TEACHER}))


def fell_asleep(ledger: Ledger) -> Night:
    night = Night()
    ledger.add_night(night)
    drawn = {"champion": 0, "runs": 0, "upto": ledger.watermark()}
    ledger.record_stage(StageRun(night_id=night.id, stage="snapshot", output=drawn, seconds=0.0))
    return ledger.end_night(night.id, NightStatus.SKIPPED, [])


def test_the_report_tells_the_help_of_the_day_and_of_each_generation(ledger: Ledger) -> None:
    promotion.ensure_base(ledger, "m")
    past(ledger, 3, success=True)
    alone = fell_asleep(ledger)
    past(ledger, 4, success=True)
    helped(ledger, Reason.FAILED, success=True)
    first = fell_asleep(ledger)
    past(ledger, 2, success=True)
    helped(ledger, Reason.PREDICTED, success=False)
    second, third = fell_asleep(ledger), fell_asleep(ledger)
    assert night_report(ledger, alone, "m").teacher is None
    shown: list[list[tuple[int, int, int, int]]] = []
    for night in (first, second, third):
        told = night_report(ledger, night, "m").teacher
        assert told is not None
        rows = [told.day, *told.generations]
        shown.append([(row.requests, row.escalated, row.predicted, row.succeeded) for row in rows])
    assert shown == [[(4, 1, 0, 1), (7, 1, 0, 1)], [(3, 1, 1, 0), (10, 2, 1, 1)], [(0, 0, 0, 0), (10, 2, 1, 1)]]
    report = night_report(ledger, second, "m")
    assert report.teacher is not None
    assert [(t.part, t.total) for t in report.tokens] == [("teacher", report.teacher.day.tokens)]
    assert (report.teacher.day.rate, report.teacher.day.cost_usd) == (1 / 3, 0.01)
    assert report.teacher.generations[0].cost_usd == pytest.approx(0.02)
    page = render_night(report)
    assert "The teacher&#x27;s help" in page
    assert "33.3%" in page


def teacher_of(ledger: Ledger, oracle: FakeEngine, **given: Any) -> Teacher:
    return Teacher(config(oracle, **given), ledger, load_embedder("wordllama", Path("unused")))


DEPS = AgentDeps(llm=ScriptedModel([]))


def taught(teacher: Teacher, task: Task) -> Trajectory | None:
    return asyncio.run(teacher.run(task, DEPS, 0, Reason.PREDICTED))


def test_a_teacher_that_is_down_is_left_alone_after_some_failures(
    ledger: Ledger, oracle: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    oracle.script = [Refuses(500)]
    teacher = teacher_of(ledger, oracle, pause_s=3600)
    with caplog.at_level(logging.WARNING, logger="serve.escalation"):
        for _ in range(4):
            assert taught(teacher, samples.task()) is None
            past(ledger, 1, success=False)
    assert len(oracle.requests) == 2
    told = [record.getMessage() for record in caplog.records if record.name == "serve.escalation"]
    assert len(told) == 2
    assert "not asked again for 3600 s" in told[-1]
    assert [e.status for e in escalations.all_escalations(ledger.database)] == [Status.UNANSWERED] * 2
    oracle.script = [RIGHT]
    recovered = teacher_of(ledger, oracle, pause_s=0.001, failures=1)
    oracle.script = [Refuses(503), RIGHT]
    oracle.requests.clear()
    assert taught(recovered, samples.task()) is None
    past(ledger, 1, success=False)
    time.sleep(0.01)
    assert taught(recovered, samples.task()) is not None


class Slow(list[Says]):
    """Answers once it is told to."""

    def __init__(self) -> None:
        super().__init__([RIGHT])
        self.go_on = threading.Event()

    def __getitem__(self, index: Any) -> Any:
        self.go_on.wait(60)
        return super().__getitem__(index)


def test_a_slow_teacher_is_not_waited_for(ledger: Ledger, oracle: FakeEngine) -> None:
    oracle.script = slow = Slow()
    teacher, started = teacher_of(ledger, oracle, timeout_s=0.3), time.monotonic()
    try:
        assert taught(teacher, samples.task()) is None
        assert time.monotonic() - started < 30
    finally:
        slow.go_on.set()


def test_the_budget_of_yesterdays_process_is_todays(ledger: Ledger, oracle: FakeEngine) -> None:
    assert taught(teacher_of(ledger, oracle, tokens_per_day=1001), samples.task()) is not None
    assert taught(teacher_of(ledger, oracle, tokens_per_day=1001), samples.task()) is None
    assert taught(teacher_of(ledger, oracle, max_share=0.4), samples.task()) is None
    assert len(oracle.requests) == 1


def test_a_tenants_text_leaves_the_house_only_where_the_operator_allowed_it(ledger: Ledger, oracle: FakeEngine) -> None:
    acme, ours = samples.task(tenant="acme"), samples.task()
    assert [teacher_of(ledger, oracle).may_see(task) for task in (acme, ours)] == [False, True]
    named, everybody = (teacher_of(ledger, oracle, tenants=tenants) for tenants in (["acme"], ["*"]))
    assert [named.may_see(task) for task in (acme, ours)] == [True, False]
    assert [everybody.may_see(task) for task in (acme, ours)] == [True, True]


def test_a_prediction_is_made_from_the_tenants_own_past_and_some_hopeless_tasks_are_tried(
    ledger: Ledger, oracle: FakeEngine
) -> None:
    past(ledger, 30, success=False)
    past(ledger, 30, success=True, tenant="acme")
    teacher = teacher_of(ledger, oracle, tenants=["*"])

    def chance(tenant: str, using: Teacher = teacher, run: str = "traj_1") -> float | None:
        task = samples.task("How many primes are there below 4001?", tenant)
        return asyncio.run(using.foreseen(task, 0, run))

    assert (chance("default") or 1.0) < 0.2
    assert chance("acme") is None
    assert chance("newcomer") is None
    bold = teacher_of(ledger, oracle, explore=0.5)
    tried = sum(chance("default", bold, f"traj_{n}") is None for n in range(40))
    assert 10 <= tried <= 30
    assert chance("default", teacher_of(ledger, oracle, threshold=0.0)) is None


def test_beside_a_canary_both_generations_predictors_are_remembered_and_old_ones_are_not(
    ledger: Ledger, oracle: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    past(ledger, 30, success=False)
    fitted: list[int] = []

    def counted(history: list[PastOutcome], generation: int) -> Predictor | None:
        fitted.append(generation)
        return fit(history, generation)

    monkeypatch.setattr(escalation, "fit", counted)
    teacher = teacher_of(ledger, oracle)

    def asked(*generations: int) -> None:
        for number in generations:
            asyncio.run(teacher.foreseen(samples.task(), number, "traj_1"))

    asked(1, 2, 1, 2)
    assert fitted == [1, 2]
    monkeypatch.setattr(escalation, "REFIT_S", 0.0)
    asked(2, 1)
    assert fitted == [1, 2, 2, 1]


def test_an_unjudged_run_teaches_only_where_the_operator_trusts_the_teacher(ledger: Ledger, oracle: FakeEngine) -> None:
    unjudged = samples.task().model_copy(update={"reference": None})
    doubted = taught(teacher_of(ledger, oracle), unjudged)
    trusted = taught(teacher_of(ledger, oracle, trust="always"), unjudged)
    assert doubted is not None
    assert trusted is not None
    assert doubted.outcome is None
    assert trusted.outcome is not None
    assert trusted.outcome.by is OutcomeSource.TEACHER
    judged = taught(teacher_of(ledger, oracle, trust="always"), samples.task())
    assert judged is not None
    assert judged.outcome is not None
    assert (judged.outcome.by, judged.success) == (OutcomeSource.VERIFIER, False)
    assert judged.stop_reason is StopReason.ANSWER


def test_settings_that_cannot_work_are_refused(ledger: Ledger, oracle: FakeEngine) -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        teacher_of(ledger, oracle, key_variable="NO_SUCH_KEY")
    assert recipes_with_teacher(["successes"], config(oracle)) == ["successes", "teacher"]
    assert recipes_with_teacher(["successes"], config(oracle, teach=False)) == ["successes"]
    assert recipes_with_teacher(["successes"], TeacherConfig()) == ["successes"]
