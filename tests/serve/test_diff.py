"""Two generations on the same frozen tasks, from the evaluations that are there."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from memory import keys
from memory.errors import ConfigError, NotFoundError
from memory.ledger import Ledger
from memory.night_records import Evaluation, Night, TaskOutcome
from memory.records import now
from serve.diff import compare, print_diff
from serve.promotion import ensure_base
from serve.settings import ServerConfig
from tests.memory.samples import evaluation, generation, task, trajectory
from tests.serve.fakes import OPERATOR_TOKEN, running, settings_in
from tests.serve.test_cli import assert_refused, nightschool


def prepare(ledger: Ledger) -> None:
    ensure_base(ledger, "test/model")
    for number in (1, 2):
        ledger.add_generation(generation(number))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    prepare(opened)
    yield opened
    opened.close()


def measured(number: int, scores: dict[str, float], **changed: Any) -> Evaluation:
    outcomes = [TaskOutcome(key=k, workload="sums", score=s, answer=f"{k} by {number}") for k, s in scores.items()]
    return evaluation(number).model_copy(update={"outcomes": outcomes, **changed})


def test_tasks_that_changed_are_counted_and_shown_worse_ones_first(ledger: Ledger) -> None:
    for number, scores in ((1, {"a": 0.0, "b": 1.0, "c": 1.0}), (2, {"c": 1.0, "b": 0.0, "a": 1.0})):
        ledger.add_evaluation(measured(number, scores))
    [suite] = compare(ledger, 1, 2, tenant="default").suites
    assert (suite.better, suite.worse, suite.same) == (1, 1, 1)
    assert [(t.key, t.scores) for t in suite.changed] == [("b", (1.0, 0.0)), ("a", (0.0, 1.0))]
    back = compare(ledger, 2, 1, tenant="default").suites[0]
    assert [t.key for t in back.changed] == ["a", "b"]


def test_only_the_same_tasks_with_the_same_use_of_memory_are_compared(ledger: Ledger) -> None:
    ledger.add_evaluation(measured(1, {"a": 1.0}))
    ledger.add_evaluation(measured(2, {"a": 0.0}, suite_hash="s2"))
    ledger.add_evaluation(measured(2, {"a": 0.0}, memory=False))
    with pytest.raises(NotFoundError, match="never both evaluated on the same tasks"):
        compare(ledger, 1, 2, tenant="default")


def test_of_several_evaluations_those_of_one_night_are_taken_then_the_newest(ledger: Ledger) -> None:
    night, later = Night(), now() + timedelta(hours=1)
    ledger.add_night(night)
    ledger.add_evaluation(measured(1, {"a": 1.0}))
    ledger.add_evaluation(measured(1, {"a": 0.5}, created_at=later))
    ledger.add_evaluation(measured(2, {"a": 0.0}, created_at=later))
    assert compare(ledger, 1, 2, tenant="default").suites[0].changed[0].scores == (0.5, 0.0)
    for number, score in ((1, 0.25), (2, 0.75)):
        ledger.add_evaluation(measured(number, {"a": score}, night_id=night.id))
    assert compare(ledger, 1, 2, tenant="default").suites[0].changed[0].scores == (0.25, 0.75)


def test_a_suite_can_be_named_and_an_unknown_one_is_answered_with_those_there_are(ledger: Ledger) -> None:
    for number in (1, 2):
        for name in ("sums", "chat"):
            ledger.add_evaluation(measured(number, {"a": 1.0}, suite=name, suite_hash=name))
    assert [s.suite for s in compare(ledger, 1, 2, tenant="default").suites] == ["chat", "sums"]
    assert [s.suite for s in compare(ledger, 1, 2, tenant="default", suite="chat").suites] == ["chat"]
    with pytest.raises(NotFoundError, match=r"suite 'maths'; they were on chat, sums"):
        compare(ledger, 1, 2, tenant="default", suite="maths")


def test_a_generation_is_not_compared_with_itself_nor_with_one_that_is_not_there(ledger: Ledger) -> None:
    with pytest.raises(ConfigError, match="itself"):
        compare(ledger, 1, 1, tenant="default")
    with pytest.raises(NotFoundError, match="generation 9"):
        compare(ledger, 1, 9, tenant="default")


def test_questions_and_answers_are_shown_to_their_own_tenant_only(ledger: Ledger) -> None:
    asked = task("What is [2 + 3]?")
    for number, score in ((1, 0.0), (2, 1.0)):
        run = trajectory(asked)
        ledger.add_run(asked, run)
        outcome = TaskOutcome(key="k", workload="sums", score=score, answer=f"[{number}]", trajectory_id=run.id)
        ledger.add_evaluation(evaluation(number).model_copy(update={"outcomes": [outcome]}))
    mine = compare(ledger, 1, 2, tenant="default")
    [changed] = mine.suites[0].changed
    assert (changed.question, changed.answers) == ("What is [2 + 3]?", ("[1]", "[2]"))
    [hidden] = compare(ledger, 1, 2, tenant="beta").suites[0].changed
    assert (hidden.question, hidden.answers, hidden.trajectories) == (None, (None, None), (None, None))
    console = Console(width=120, record=True)
    print_diff(mine, console)
    shown = console.export_text()
    assert "What is [2 + 3]?" in shown
    assert "0: [1]" in shown
    assert "1: [2]" in shown


def own(ledger: Ledger, tenant: str, scores: tuple[float, float], says: tuple[str, str]) -> str:
    """A task of the tenant's that both generations were examined on; its key."""
    asked = task(f"What is {tenant}'s secret?", tenant)
    for number, score, answer in zip((1, 2), scores, says, strict=True):
        run = trajectory(asked)
        ledger.add_run(asked, run)
        key = asked.fingerprint[:16]
        outcome = TaskOutcome(key=key, workload=tenant, score=score, answer=answer, trajectory_id=run.id)
        found = evaluation(number).model_copy(update={"suite": tenant, "suite_hash": tenant, "outcomes": [outcome]})
        ledger.add_evaluation(found)
    return asked.fingerprint[:16]


def test_unchanged_tasks_are_listed_on_request_those_with_other_answers_first(ledger: Ledger) -> None:
    for number, answers in ((1, {"a": "5", "b": "6", "c": "7"}), (2, {"a": "5", "b": "six", "c": "8"})):
        outcomes = [
            TaskOutcome(key=key, workload="sums", score=float(key == "c" and number == 1), answer=answer)
            for key, answer in answers.items()
        ]
        ledger.add_evaluation(evaluation(number).model_copy(update={"outcomes": outcomes}))
    [plain] = compare(ledger, 1, 2, tenant="default").suites
    assert ([t.key for t in plain.changed], plain.same, plain.unchanged) == (["c"], 2, [])
    [found] = compare(ledger, 1, 2, tenant="default", unchanged=True).suites
    assert ([t.key for t in found.changed], [t.key for t in found.unchanged]) == (["c"], ["b", "a"])


def test_answers_are_shown_by_their_ends_or_in_full(ledger: Ledger) -> None:
    long = " ".join(["Once upon a time"] * 20)
    own(ledger, "default", (1.0, 1.0), (long, "The end."))
    found = compare(ledger, 1, 2, tenant="default", unchanged=True)

    def printed(**options: bool) -> str:
        console = Console(width=200, record=True)
        print_diff(found, console, **options)
        return " ".join(console.export_text().split())

    assert "The end." in printed()
    assert printed().count("Once upon a time") < 5
    assert printed(full=True).count("Once upon") == 20


def test_a_key_sees_its_own_tenants_tasks_and_counts_of_all(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, server=ServerConfig(keys=True)), lambda _: "Action: finish(1)") as started:
        url, services = started
        prepare(services.ledger)
        mine = own(services.ledger, "beta", (0.0, 1.0), ("no", "yes"))
        theirs = own(services.ledger, "rival", (1.0, 1.0), ("yes", "yes"))
        key = keys.mint(services.ledger.database, keys.ApiKey(name="ann", tenant="beta", scopes=[keys.Scope.OPERATE]))

        def get(secret: str) -> httpx.Response:
            asked = {"unchanged": "true"}
            return httpx.get(
                f"{url}/v1/generations/1/diff/2", params=asked, headers={"Authorization": f"Bearer {secret}"}
            )

        shown = get(key)
        assert theirs not in shown.text
        beta, rival = shown.json()["suites"]
        assert [(t["key"], t["answers"]) for t in beta["changed"]] == [(mine, ["no", "yes"])]
        assert (rival["same"], rival["changed"], rival["unchanged"]) == (1, [], [])
        assert theirs in get(OPERATOR_TOKEN).text


def test_the_api_and_the_command_say_the_same(tmp_path: Path) -> None:
    with running(settings_in(tmp_path), lambda _: "Action: finish(1)") as (url, services):
        prepare(services.ledger)
        for number, score in ((1, 0.0), (2, 1.0)):
            services.ledger.add_evaluation(measured(number, {"a": score, "b": 1.0}))
        reply = httpx.get(f"{url}/v1/generations/1/diff/2")
        assert reply.json()["suites"][0]["better"] == 1
        assert httpx.get(f"{url}/v1/generations/1/diff/0").status_code == 404
        assert httpx.get(f"{url}/v1/generations/1/diff/1").status_code == 400
        assert httpx.get(f"{url}/v1/generations/1/diff/{10**30}").status_code == 400
        unchanged = httpx.get(f"{url}/v1/generations/1/diff/2", params={"unchanged": True}).json()["suites"][0][
            "unchanged"
        ]
        assert [t["key"] for t in unchanged] == ["b"]
    assert "gen-2 better" in nightschool("diff", "1", "2", cwd=tmp_path).stdout
    assert "sums b" not in nightschool("diff", "1", "2", cwd=tmp_path).stdout
    assert "sums b" in nightschool("diff", "1", "2", "--all", "--full", cwd=tmp_path).stdout
    assert_refused(nightschool("diff", "1", "0", cwd=tmp_path), "never both evaluated")
