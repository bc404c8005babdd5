"""What is watched: the dashboard's page, the metrics, the newest runs and the morning report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.llm import ChatRequest
from evals.gate import GateConfig, decide
from memory import keys
from memory.escalations import EscalationFigures
from memory.night_records import Evaluation, Generation, GenerationStatus, Night, NightStatus, StageRun, TaskOutcome
from memory.records import Example, ExampleKind, Feedback, FeedbackKind, Purpose, StopReason, Task, Trajectory
from serve import metrics
from serve.api.dashboard import page
from serve.eta import Standing
from serve.events import emitter
from serve.metrics import standing
from serve.settings import ServerConfig
from serve.wiring import Services
from tests.evals.test_page import seen
from tests.serve.fakes import OPERATOR_TOKEN, running, settings_in

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
TENANT = "acme-corp"


def pupil(request: ChatRequest) -> str:
    return "Action: finish(2)"


def learned(services: Services, tenant: str, author: str) -> tuple[Example, Feedback]:
    """A run with a correction, and the example made of it."""
    ledger = services.ledger
    asked = [{"role": "user", "content": f"{HOSTILE} by {tenant}?"}]
    task = Task(messages=asked, tenant=tenant, workload=HOSTILE)
    run = Trajectory(
        task_id=task.id, tenant=tenant, generation=0, model="base", messages=asked, stop_reason=StopReason.ANSWER,
        answer="1",
    )  # fmt: skip
    said = Feedback(trajectory_id=run.id, tenant=tenant, kind=FeedbackKind.CORRECTION, value=HOSTILE, author=author)
    ledger.add_task(task)
    ledger.add_trajectory(run)
    ledger.add_feedback(said)
    messages = [{"role": "system", "content": "secret rules"}, *asked, {"role": "assistant", "content": HOSTILE}]
    example = Example(
        recipe="corrections", kind=ExampleKind.SFT, tenant=tenant, workload=HOSTILE, task_id=task.id,
        messages=messages, sources=[run.id, said.id],
    )  # fmt: skip
    return example, said


def slept(services: Services) -> Night:
    """A night that learned from two tenants and rejected what it made."""
    ledger, night = services.ledger, Night(candidate=1)
    ledger.add_night(night)
    examples = [learned(services, TENANT, "key:ada")[0], learned(services, "rival", "key:mallory")[0]]
    ledger.set_examples(night.id, examples)
    made = Generation(number=1, parent=0, base_model="m", night_id=night.id, status=GenerationStatus.REJECTED)
    ledger.add_generation(made)
    for number in (0, 1):
        outcomes = [TaskOutcome(key=str(n), workload=HOSTILE, score=float(number), prompt_tokens=50) for n in range(6)]
        ledger.add_evaluation(
            Evaluation(
                suite="held_out",
                suite_hash="h",
                role="held_out",
                generation=number,
                memory=True,
                outcomes=outcomes,
                seconds=1.0,
                night_id=night.id,
            )
        )
    trained = {
        "generation": 1, "tokens": 9, "trained_tokens": 3, "tokens_per_s": 4.0, "seconds": 2.0, "sft_rows": 2,
        "dpo_pairs": 0, "note": HOSTILE, "losses": {"sft": [2.0, 1.0]},
    }  # fmt: skip
    outputs: dict[str, dict[str, Any]] = {
        "snapshot": {"champion": 0, "runs": 2},
        "credit": {"trust": {"trusted": 2}},
        "dataset": {"dropped": {HOSTILE: 1}},
        "train": trained,
        "evaluate": {"generations": [0, 1]},
        "decide": {"verdict": "reject", "reasons": [HOSTILE], "table": []},
    }
    for stage, output in outputs.items():
        ledger.record_stage(StageRun(night_id=night.id, stage=stage, output=output, seconds=1.0))
    return ledger.end_night(night.id, NightStatus.REJECTED, [HOSTILE])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Services, Night]]:
    with running(settings_in(tmp_path_factory.mktemp("watched"), server=ServerConfig()), pupil) as (url, services):
        yield url, services, slept(services)


@pytest.fixture(scope="module")
def key(service: tuple[str, Services, Night]) -> str:
    scopes = [keys.Scope.OPERATE, keys.Scope.CHAT]
    return keys.mint(service[1].ledger.database, keys.ApiKey(name="ann", tenant=TENANT, scopes=scopes))


def get(url: str, key: str | None = None, **params: str) -> httpx.Response:
    return httpx.get(url, params=params, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=60)


def test_the_page_needs_no_key_loads_nothing_and_runs_only_its_own_script(
    service: tuple[str, Services, Night],
) -> None:
    for path in ("/", "/dashboard"):
        reply = get(service[0] + path)
        assert reply.status_code == 200
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert policy["script-src"].startswith("'sha256-")
        assert "unsafe" not in reply.headers["content-security-policy"]
    found = seen(reply.text)
    assert [
        value for name, value in found.attributes if name in ("src", "href", "style") or name.startswith("on")
    ] == []
    assert found.tags.count("script") == policy["script-src"].count("sha256-") == 1
    assert "http" not in reply.text.replace("http://www.w3.org/2000/svg", "")
    assert "innerHTML" not in reply.text
    assert OPERATOR_TOKEN not in reply.text


def test_the_page_travels_with_the_package() -> None:
    text, _ = page()
    assert text.rstrip().endswith("</html>")
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"*.html"' in pyproject


def test_the_page_shows_what_the_night_and_the_teachers_help_have() -> None:
    text, _ = page()
    assert set(re.findall(r"\bwhere\.(\w+)", text)) == set(Standing.model_fields)
    read = set(re.findall(r"\b(?:help|escalation)\.(\w+)", text))
    assert read == {"rate", "escalated", "requests", "tokens", "cost_usd"} <= set(EscalationFigures.model_fields)


def figures(url: str, key: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    reply = get(f"{url}/metrics", key)
    assert reply.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_metrics_count_requests_runs_and_tokens_and_name_nobody(service: tuple[str, Services, Night], key: str) -> None:
    url, services, _ = service
    before = figures(url, key)
    body = {"model": "nightschool", "messages": [{"role": "user", "content": "1 + 1?"}], "user": "zoe"}
    sent = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    assert sent.status_code == 200
    for path in ("/v1/models/no-such-model", "/no/such/route-of-zoe"):
        assert get(url + path, key).status_code == 404
    assert get(f"{url}/metrics").status_code == 401
    after = figures(url, key)

    def rise(name: str, **labels: str) -> float:
        place = (name, tuple(sorted(labels.items())))
        return after.get(place, 0.0) - before.get(place, 0.0)

    count = "nightschool_requests_total"
    assert rise(count, method="POST", route="/v1/chat/completions", status="200") == 1
    assert rise(count, method="GET", route="/v1/models/{model}", status="404") == 1
    assert rise(count, method="other", route="other", status="404") == 1
    assert rise(count, method="GET", route="/metrics", status="401") == 1
    assert rise("nightschool_request_seconds_count", method="POST", route="/v1/chat/completions") == 1
    assert rise("nightschool_runs_total", generation="0", outcome="unjudged", by="own") == 1
    for name, value in (("engine_ready", 1), ("champion_generation", 0), ("night_running", 0), ("runs_waiting", 0)):
        assert after[f"nightschool_{name}", ()] == value
    assert after["nightschool_nights", (("status", "rejected"),)] == 1
    labels = {value for _, pairs in after for _, value in pairs}
    assert not [value for value in labels if any(word in value for word in (TENANT, "ann", "zoe", "1 + 1"))]
    for scopes in ([keys.Scope.CHAT], [keys.Scope.MEMORY, keys.Scope.FEEDBACK, keys.Scope.BATCH]):
        narrow = keys.mint(services.ledger.database, keys.ApiKey(name="n", scopes=scopes))
        assert get(f"{url}/metrics", narrow).status_code == 403


def test_metrics_show_where_a_running_night_is(service: tuple[str, Services, Night], key: str) -> None:
    url, services, _ = service
    night = Night()
    services.ledger.add_night(night)
    emit = emitter(services.settings.night_dir(night.id))
    emit("train", "started")
    emit("train", "step", event="step", step=3, steps=9, loss=0.5, tokens=120, tokens_per_s=60.0, eta_s=1000.0)
    told = figures(url, key)
    assert told["nightschool_night_running", ()] == 1
    assert told["nightschool_night_stage", (("stage", "train"),)] == 1
    assert told["nightschool_night_stage", (("stage", "evaluate"),)] == 0
    shown = {name: told[f"nightschool_night_{name}", ()] for name in ("step", "steps", "loss", "tokens_per_s")}
    assert shown == {"step": 3, "steps": 9, "loss": 0.5, "tokens_per_s": 60}
    assert told["nightschool_night_eta_s", ()] == pytest.approx(1000, abs=100)
    assert ("nightschool_night_left_s", ()) not in told
    emit("evaluate", "started")
    emit("evaluate", "generation 0 on chat", done=0, total=4, stage_done=0, stage_total=80)
    # Training's time is over: it is not the exam's.
    assert ("nightschool_night_eta_s", ()) not in figures(url, key)
    emit("evaluate", "generation 0 on chat", done=4, total=4, stage_done=20, stage_total=80)
    told = figures(url, key)
    assert told["nightschool_night_stage", (("stage", "evaluate"),)] == 1
    assert (told["nightschool_night_stage_done", ()], told["nightschool_night_stage_total", ()]) == (20, 80)
    assert told["nightschool_night_eta_s", ()] >= 0
    services.ledger.end_night(night.id, NightStatus.CANCELLED, ["a test"])


def test_a_later_attempt_of_a_killed_night_is_where_it_stands() -> None:
    events = [
        {"stage": "train", "data": {"step": 30, "loss": 0.9}},
        {"stage": "train", "data": {"step": 20, "loss": 0.8}},
        {"stage": "evaluate", "data": {"done": 1}},
    ]
    assert standing(events) == {"stage": "evaluate", "step": 20, "loss": 0.8}


@pytest.mark.parametrize(
    ("allowed", "path", "host", "header", "is_open"),
    [
        (True, "/metrics", "127.0.0.1", None, True),
        (True, "/metrics", "::1", None, True),
        (False, "/metrics", "127.0.0.1", None, False),
        (True, "/v1/runs", "127.0.0.1", None, False),
        (True, "/metrics", "10.0.0.7", None, False),
        (True, "/metrics", "127.0.0.1", b"x-forwarded-for", False),
    ],
)
def test_metrics_are_open_to_this_machine_only_where_the_settings_say_so(
    allowed: bool, path: str, host: str, header: bytes | None, is_open: bool
) -> None:
    headers = [(header, b"10.0.0.7")] if header else []
    scope = {"type": "http", "path": path, "client": (host, 5), "headers": headers}
    assert metrics.is_open(scope, allowed) is is_open


def test_runs_are_listed_without_their_texts_and_to_their_tenant(
    service: tuple[str, Services, Night], key: str
) -> None:
    url, _, _ = service
    mine = get(f"{url}/v1/runs", key).json()["data"]
    assert mine
    assert all(HOSTILE not in str({**run, "workload": ""}) for run in mine)
    everybody = get(f"{url}/v1/runs", OPERATOR_TOKEN, limit="1").json()["data"]
    assert not {run["id"] for run in everybody} & {run["id"] for run in mine}


def test_the_report_names_authors_to_the_operator_alone(service: tuple[str, Services, Night], key: str) -> None:
    url, _, night = service
    path = f"{url}/v1/nights/{night.id}/report"
    told = get(path, key).json()
    assert [voice["who"] for voice in told["learned"]["voices"]] == ["author 1"]
    assert (told["learned"]["elsewhere"], told["recipes"][0]["examples"]) == (1, 2)
    assert len(told["recipes"][0]["samples"]) == 1
    # Whole words: "ada" is also three hex digits, and the manifest is full of hashes.
    assert re.findall(r"\b(?:rival|mallory|ada|secret rules)\b", json.dumps(told)) == []
    whole = get(path, OPERATOR_TOKEN).json()
    assert [v["who"] for v in whole["learned"]["voices"]] == [f"key:ada of {TENANT}", "key:mallory of rival"]
    assert whole["learned"]["elsewhere"] == 0


def test_the_report_tells_the_decision_the_curve_and_the_cost(service: tuple[str, Services, Night], key: str) -> None:
    url, _, night = service
    told = get(f"{url}/v1/nights/{night.id}/report", key).json()
    assert told["story"][0] == "Generation 1 was rejected; generation 0 goes on serving."
    assert (told["status"], told["decision"], told["reasons"]) == ("rejected", "reject", [HOSTILE])
    assert [(p["generation"], p["prompt_tokens"], p["same_tasks"]) for p in told["curve"]] == [
        (0, 50, True),
        (1, 50, True),
    ]
    assert told["gain"]["points"] == 100
    assert told["training"]["losses"] == {"sft": [2.0, 1.0]}
    assert told["seconds"]["train"] == 1.0


def test_the_report_tells_the_cost_in_tokens_by_part(service: tuple[str, Services, Night], key: str) -> None:
    url, services, night = service
    training = {"part": "training", "prompt": None, "completion": None, "total": 9}
    # As an older version left it: only the prompts of its exam were counted.
    exam = {"part": "evaluation", "prompt": 600, "completion": None, "total": 600}
    path = f"{url}/v1/nights/{night.id}/report"
    assert get(path, key).json()["tokens"] == [training, exam]
    shown = re.sub(r"<[^>]+>", "|", get(path, key, format="html").text)
    assert "|training, all its steps||||||9||||evaluation||600||||600|" in shown
    counted = Night()
    services.ledger.add_night(counted)
    outcomes = [TaskOutcome(key=str(n), workload="w", score=1.0, prompt_tokens=50, completion_tokens=n) for n in (3, 4)]
    services.ledger.add_evaluation(
        Evaluation(
            suite="held_out", suite_hash="c", role="held_out", generation=0, memory=True, outcomes=outcomes,
            seconds=1.0, night_id=counted.id,
        )
    )  # fmt: skip
    services.ledger.end_night(counted.id, NightStatus.FAILED, ["a test"])
    (told,) = get(f"{url}/v1/nights/{counted.id}/report", key).json()["tokens"]
    assert told == {"part": "evaluation", "prompt": 100, "completion": 7, "total": 107}


def test_what_hostile_runs_say_stays_text_in_the_page(service: tuple[str, Services, Night]) -> None:
    url, _, night = service
    reply = get(f"{url}/v1/nights/{night.id}/report", OPERATOR_TOKEN, format="html")
    assert reply.headers["content-type"].startswith("text/html")
    assert reply.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
    found = seen(reply.text)
    assert not {"script", "img"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)" in reply.text


def test_a_key_hears_of_its_own_tenants_workloads_only(service: tuple[str, Services, Night], key: str) -> None:
    url, services, _ = service
    ledger, night, outcomes = services.ledger, Night(), []
    ledger.add_night(night)
    for tenant, workload in ((TENANT, "our maps"), ("rival", "their secret")):
        task = Task(messages=[{"role": "user", "content": f"{workload}?"}], tenant=tenant, workload=workload)
        run = Trajectory(
            task_id=task.id, tenant=tenant, generation=0, model="base", messages=task.messages,
            stop_reason=StopReason.ANSWER, purpose=Purpose.EVAL,
        )  # fmt: skip
        ledger.add_task(task)
        ledger.add_trajectory(run)
        outcomes.append(TaskOutcome(key=task.id, workload=workload, score=0.0, trajectory_id=run.id))
    measured = [
        Evaluation(
            suite="held", suite_hash="k", role="held_out", generation=number, memory=True,
            outcomes=[o.model_copy(update={"score": 1.0 - number}) for o in outcomes], seconds=1.0, night_id=night.id,
        )
        for number in (0, 1)
    ]  # fmt: skip
    for evaluation in measured:
        ledger.add_evaluation(evaluation)
    decision = decide([(measured[0], measured[1])], [], GateConfig(min_tasks=1)).model_dump(mode="json")
    assert {row["workload"] for row in decision["table"]} == {None, "our maps", "their secret"}
    decision["reasons"].append("Warning: on held-out workload 'their secret' success fell.")
    for stage, output in {"snapshot": {"champion": 0}, "evaluate": {"generations": [0, 1]}, "decide": decision}.items():
        ledger.record_stage(StageRun(night_id=night.id, stage=stage, output=output, seconds=1.0))
    emit = emitter(services.settings.night_dir(night.id))
    emit("decide", "reject", reasons=decision["reasons"])
    emit("evaluate", "phrases that tonight's examples answer too much alike", phrases=["their secret"])
    arms = [{"tenant": TENANT, "workload": "our maps"}, {"tenant": "rival", "workload": "their secret"}]
    emit("practice", "2 tasks to practise: 1 of our maps, 1 of their secret", arms=arms)
    ledger.end_night(night.id, NightStatus.REJECTED, decision["reasons"], report_path="/srv/data/report.html")
    job = f"{url}/v1/fine_tuning/jobs/{night.id}"
    for path in (job, f"{url}/v1/nights/{night.id}/report", f"{job}/events"):
        mine, whole = get(path, key).text, get(path, OPERATOR_TOKEN).text
        assert "their secret" in whole
        assert "their secret" not in mine
        assert "names workloads of other tenants" in mine
        assert "names workloads of other tenants" not in whole
        assert "our maps" in mine
        assert "/srv/data" not in mine


def test_a_night_that_skipped_itself_has_a_report_too(service: tuple[str, Services, Night], key: str) -> None:
    url, services, _ = service
    night = Night()
    services.ledger.add_night(night)
    services.ledger.end_night(night.id, NightStatus.SKIPPED, ["only 3 examples"])
    told = get(f"{url}/v1/nights/{night.id}/report", key).json()
    assert (told["story"], told["reasons"]) == (
        ["The night skipped itself; generation 0 goes on serving."],
        ["only 3 examples"],
    )
    assert "only 3 examples" in get(f"{url}/v1/nights/{night.id}/report", key, format="html").text
    assert get(f"{url}/v1/nights/night_unknown/report", key).status_code == 404
    assert get(f"{url}/v1/nights/{night.id}/report", key, format="pdf").status_code == 400


def test_what_ended_a_night_behind_its_decision_stands_in_its_report(
    service: tuple[str, Services, Night], key: str
) -> None:
    url, services, _ = service
    night = Night()
    services.ledger.add_night(night)
    decision = {"verdict": "promote", "reasons": ["better by ten"], "table": []}
    services.ledger.record_stage(StageRun(night_id=night.id, stage="decide", output=decision, seconds=1.0))
    services.ledger.end_night(night.id, NightStatus.FAILED, ["the engine did not load <gen-9>"])
    report = get(f"{url}/v1/nights/{night.id}/report", key).json()
    assert report["reasons"] == ["better by ten", "the engine did not load <gen-9>"]
    page = get(f"{url}/v1/nights/{night.id}/report", key, format="html").text
    assert page.count("the engine did not load &lt;gen-9&gt;") == 1
    assert page.count("better by ten") == 1
