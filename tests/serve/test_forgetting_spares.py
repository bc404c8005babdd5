"""Forgetting takes a person's words, by whichever way they came, and nothing that is somebody else's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ormsgpack
import pytest

from agent.prompts import compose, system_prompt
from distill.hints import Hinted
from evals.chat import chat_suite
from evals.suites import EvalTask, Suite, load_suite, save_suite
from memory.night_records import Night, NightStatus
from memory.recall import NoMemory
from memory.records import RECALLED, Example, ExampleKind, Feedback, FeedbackKind, Purpose, Task, Trajectory
from memory.scrub import Needles
from serve.client import Client
from serve.settings import ServerConfig, Settings
from serve.wiring import Services
from tests.memory import samples
from tests.serve.fakes import OPERATOR_TOKEN, running, settings_in

FRANCE = "What is the capital of France?"
SPAIN, MADRID = "What is the capital of Spain?", "The capital of Spain is Madrid."
LLAMA = "How heavy is the oldest llama of all?"
HARMLESS = (
    FRANCE,
    SPAIN,
    LLAMA,
    "calculator",
    "assistant",
    "revision",
    "You solve tasks step by step.",
    "general chat",
)
"""Questions of the chat control, of the rehearsal and in another tenant's lines; words of every prompt and row."""

PIN = "my PIN is 4711"


def ask(client: Client, question: str, user: str) -> str:
    body = {"model": "nightschool", "messages": [{"role": "user", "content": question}], "user": user}
    return client.post("/v1/chat/completions", body)["id"]


def forget(client: Client, user: str | None = "ann") -> dict[str, Any]:
    return client.post("/v1/memory/forget", {"tenant": "default"} | ({"user": user} if user else {}))


def row(of: Task, recipe: str = "successes") -> Example:
    messages = [{"role": "system", "content": system_prompt(["calculator"], None)}, *of.messages]
    messages.append({"role": "assistant", "content": "Certainly."})
    return Example(
        recipe=recipe,
        kind=ExampleKind.SFT,
        tenant=of.tenant,
        workload="general chat",
        task_id=of.id,
        tools=["calculator"],
        messages=messages,
    )


def a_night_on(services: Services, rows: list[Example], number: int = 1) -> Path:
    """A promoted night that taught these rows; its folder, with what a night leaves there."""
    ledger, night = services.ledger, Night()
    ledger.add_night(night)
    ledger.set_examples(night.id, rows)
    ledger.add_generation(samples.generation(number).model_copy(update={"parent": 0, "night_id": night.id}))
    ledger.set_candidate(night.id, number)
    ledger.end_night(night.id, NightStatus.PROMOTED, ["better"])
    folder = services.settings.night_dir(night.id)
    (folder / "dataset").mkdir(parents=True)
    (folder / "dataset" / "sft.jsonl").write_text("".join(f"{r.model_dump_json()}\n" for r in rows))
    (folder / "dataset" / "manifest.json").write_text("{}")
    told = "".join(f"<div>assistant</div><pre>{r.messages[1]['content']}</pre>" for r in rows)
    (folder / "report.html").write_text(told)
    return folder


def files_in(settings: Settings) -> dict[str, bytes]:
    """What nights, operators and other tenants have in the data folder."""
    kept = ("nights", "suites", "adapters", "exports")
    found = [p for name in kept for p in (settings.data_dir / name).rglob("*") if p.is_file()]
    return {p.relative_to(settings.data_dir).as_posix(): p.read_bytes() for p in found}


def test_words_that_are_everybodys_take_nothing_with_them(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    save_suite(chat_suite(), settings.suites_dir / "chat.jsonl")
    adapter = settings.adapters_dir / "gen-001"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"revision": null, "text": "revision"}')
    with running(settings, lambda _: MADRID) as (url, services):
        client = Client(url)
        asked = services.ledger.get_trajectory(ask(client, "How heavy is my cow?", "bob")[9:]).task_id
        bob, zoo = services.ledger.get_task(asked), samples.task(FRANCE, "zoo")
        services.ledger.add_run(zoo, samples.trajectory(zoo))
        rehearsed = row(samples.task(SPAIN), "rehearsal")
        rehearsed = rehearsed.model_copy(
            update={"messages": [*rehearsed.messages[:-1], {"role": "assistant", "content": MADRID}]}
        )
        folder = a_night_on(services, [row(bob), row(zoo), rehearsed])
        llama = samples.task(LLAMA, "zoo")
        with (folder / "dataset" / "sft.jsonl").open("a") as rows:
            rows.write(row(llama).model_dump_json() + "\n")
        save_suite(chat_suite(), folder / "suites" / "chat.jsonl")
        export = settings.data_dir / "exports" / "zoo.jsonl"
        export.parent.mkdir()
        export.write_text(samples.past_run(llama).model_dump_json() + "\n")
        for question in HARMLESS:
            ask(client, question, "ann")
        before = files_in(settings)

        told = forget(client)
        assert files_in(settings) == before
        assert (told["counts"]["tasks"], told["generations"]) == (len(HARMLESS), [])
        assert told["left"] == sorted([f"nights/{folder.name}/suites/chat.jsonl", "suites/chat.jsonl"])
        assert len(services.ledger.examples(folder.name)) == 3


@pytest.mark.parametrize("question", [PIN, f"{PIN}, and please tell it to nobody at all"])
def test_words_of_ones_own_go_however_few_they_are(tmp_path: Path, question: str) -> None:
    settings = settings_in(tmp_path)
    with running(settings, lambda _: "I see.") as (url, services):
        client = Client(url)
        run = services.ledger.get_trajectory(ask(client, question, "ann").removeprefix("chatcmpl-"))
        mine = services.ledger.get_task(run.task_id).model_copy(update={"id": "task_copied"})
        bob = samples.task("How heavy is my cow?")
        services.ledger.add_run(bob, samples.trajectory(bob))
        folder = a_night_on(services, [row(mine)])
        his = a_night_on(services, [row(bob)], 2)
        (settings.data_dir / "export.jsonl").write_text("".join(f"{t.model_dump_json()}\n" for t in (mine, bob)))

        told = forget(client)
        assert told["generations"] == [1]
        assert services.ledger.examples(folder.name) == []
        assert not (folder / "dataset").exists()
        assert not (folder / "report.html").exists()
        assert len(list(his.rglob("*"))) == 4
        assert (settings.data_dir / "export.jsonl").read_text() == f"{bob.model_dump_json()}\n"


def test_a_short_text_counts_only_where_it_is_all_that_was_said() -> None:
    needles = Needles((), [PIN])
    packed = ormsgpack.packb({"messages": [{"role": "user", "content": PIN}]})
    for holds in (f'{{"content": "{PIN}"}}', f'{{"text":"{PIN}\\n"}}', f"<pre>{PIN}</pre>", f"score 0.50) {PIN}\\n"):
        assert needles.among(holds.encode()), holds
    assert needles.among(packed)
    others = (
        f'{{"name": "{PIN}"}}',
        f'{{"content": "{PIN}, said he"}}',
        f'{{"content": "{PIN}\\nand more"}}',
        f"asked: {PIN}",
    )
    for spares in others:
        assert not needles.among(spares.encode()), spares
    many = Needles((), [PIN, *(f"number {n} of many" for n in range(99))])
    assert many.among(packed) == needles.among(packed)
    assert not many.among(f"asked: {PIN}".encode())


def test_a_suite_made_of_runs_loses_the_forgotten_ones_and_still_loads(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings, lambda _: "I see.") as (url, services):
        client = Client(url)
        asked = {
            user: services.ledger.get_trajectory(ask(client, f"How heavy is the cow of {user}?", user)[9:]).task_id
            for user in ("ann", "bob")
        }
        tasks = services.ledger.tasks(asked.values())
        made = [EvalTask(key=user, task=tasks[id]) for user, id in asked.items()]
        path = settings.suites_dir / "cows.jsonl"
        save_suite(Suite(name="cows", role="held_out", tasks=made), path)

        told = forget(client)
        assert load_suite(path).tasks == made[1:]
        assert told["files"] == ["suites/cows.jsonl"]
        assert told["left"] == []
        forget(client, "bob")
        assert not path.exists()


def test_the_operators_suites_outlive_the_tenant_that_their_tasks_name(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    save_suite(chat_suite(), settings.suites_dir / "chat.jsonl")
    with running(settings, lambda _: "I see.") as (url, services):
        client = Client(url)
        for item in chat_suite().tasks:  # as a night's exam leaves them
            exam = samples.trajectory(item.task, "It is Paris, as far as I know, good friend.")
            services.ledger.add_run(item.task, exam.model_copy(update={"purpose": Purpose.EVAL}))
        ask(client, FRANCE, "ann")
        before = files_in(settings)
        assert forget(client, None)["left"] == ["suites/chat.jsonl"]
        assert files_in(settings) == before
        assert services.ledger.trajectories() == []


@pytest.mark.parametrize("vouches", [False, True])
def test_what_a_user_said_through_a_key_is_that_users(tmp_path: Path, vouches: bool) -> None:
    settings = settings_in(tmp_path, server=ServerConfig(keys=True))
    with running(settings, lambda _: "I see.") as (url, services):
        operator = Client(url, OPERATOR_TOKEN)
        key = operator.post("/v1/keys", {"name": "app", "scopes": ["chat", "feedback"], "vouches": vouches})["secret"]
        app = Client(url, key)
        run = ask(app, "How heavy is my cow?", "bob")
        for author in ("ann", "joann"):
            word = {"response_id": run, "kind": "comment", "value": f"{author} knows cows better", "author": author}
            app.post("/v1/feedback", word)
        assert forget(operator)["counts"] == {"feedback": 1}
        [left] = services.ledger.feedback(tenant="default")
        assert left.author.endswith(":app/joann")


def test_a_hint_is_taken_out_of_the_tries_that_were_shown_it(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with running(settings, lambda _: "I see.") as (url, services):
        client, ledger = Client(url), services.ledger
        asked = ask(client, "How heavy is the cow?", "ann").removeprefix("chatcmpl-")
        hint = {"trajectory_id": asked, "kind": "hint", "value": "Ask my\nvet Ünderwood.", "author": "ann"}
        client.post("/v1/feedback", hint)
        bob = samples.task("How heavy is the cow?").model_copy(update={"user": "bob"})
        tried = shown_hints(bob, ledger.feedback(trajectory_id=asked))
        ledger.add_run(bob, tried)
        assert "vet Ünderwood" in tried.messages[0]["content"]

        assert forget(client)["counts"]["cleared"] == 1
        [kept] = ledger.trajectories()
        assert (kept.id, kept.recalled, kept.own_messages) == (tried.id, [], tried.own_messages)
        assert kept.messages[0]["content"].startswith(str(system_prompt(["calculator"], None)))
        assert not [m for m in kept.messages if m.get("name") == RECALLED or "vet" in json.dumps(m)]


def shown_hints(task: Task, hints: list[Feedback]) -> Trajectory:
    """A practice run with the hints in its prompt, as `serve.stages.practice` makes it."""
    assert [said.kind for said in hints] == [FeedbackKind.HINT]
    recall = Hinted(NoMemory(), {(task.tenant, task.fingerprint): hints}).recall(task)
    prompt, run = compose(task, ["calculator"], recall), samples.trajectory(task)
    shown = {"messages": [*prompt, run.messages[-1]], "recalled": recall.items, "purpose": Purpose.PRACTICE}
    return run.model_copy(update=shown)
