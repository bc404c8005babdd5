"""Fine-tuning jobs through the official client: over the ledger, over uploaded files, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from agent.llm import ChatRequest
from distill.train.config import TrainJob, TrainResult
from evals.suites import reasoning_gym_suite, save_suite
from memory.night_records import Night, NightStatus, StageRun
from memory.records import Purpose
from serve.events import emitter, read_events
from serve.wiring import Services
from tests.serve.fakes import fake_training, running, settings_in

HELD_OUT = reasoning_gym_suite({"chain_sum": {}}, 4, 70_001, "held_out", "held_out")
DRAWN: list[TrainJob] = []


def pupil(request: ChatRequest) -> str:
    return "Action: finish(0)"


def trained(job: TrainJob, *_: Any, **__: Any) -> TrainResult:
    DRAWN.append(job)
    return fake_training(job)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, Services]]:
    settings = settings_in(tmp_path_factory.mktemp("jobs"))
    save_suite(HELD_OUT, settings.suites_dir / "held_out.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        # The trainer is a process of its own with torch in it; tests/distill runs it for real.
        patch.setattr("serve.stages.training.launch.run", trained)
        with running(settings, pupil) as (url, services):
            yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), services


def upload(client: openai.OpenAI, lines: list[Any], purpose: Any = "fine-tune") -> str:
    body = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return client.files.create(file=("lessons.jsonl", body.encode()), purpose=purpose).id


def lesson(number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"Which city has the number {number}?"}
    return {"messages": [asked, {"role": "assistant", "content": f"City {number}"}]}


def pair(number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"Name river {number}."}
    sides = {
        "preferred_output": [{"role": "assistant", "content": f"River {number}"}],
        "non_preferred_output": [{"role": "assistant", "content": "I would rather not."}],
    }
    return {"input": {"messages": [asked]}, **sides}


def ended(client: openai.OpenAI, job_id: str) -> FineTuningJob:
    deadline = time.monotonic() + 120
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return job


def test_a_job_over_an_uploaded_file_trains_on_its_lines_and_names_its_generation(
    service: tuple[openai.OpenAI, Services],
) -> None:
    client, services = service
    file_id = upload(client, [lesson(n) for n in range(12)])
    hyperparameters: Any = {"n_epochs": 3, "learning_rate_multiplier": 0.5}
    job = client.fine_tuning.jobs.create(
        model="nightschool",
        training_file=file_id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        seed=7,
        metadata={"team": "maps"},
    )
    assert (job.status, job.training_file, job.seed, job.metadata) == ("running", file_id, 7, {"team": "maps"})
    job = ended(client, job.id)
    assert job.status == "succeeded", job.error
    number = job.to_dict()["nightschool"]["candidate"]  # type: ignore[index]
    assert job.fine_tuned_model == f"nightschool:gen-{number}"
    assert job.method
    assert job.method.supervised
    assert job.method.supervised.hyperparameters
    assert job.method.supervised.hyperparameters.n_epochs == 3

    config = DRAWN[-1].config
    assert (config.epochs, config.dpo_epochs, config.seed) == (3, 0, 7)
    assert config.learning_rate == pytest.approx(services.settings.train.learning_rate / 2)
    learned = [e for e in services.ledger.examples(job.id) if e.recipe == "file"]
    assert {e.messages[-1]["content"] for e in learned} == {f"City {n}" for n in range(12)}
    assert all("Action:" in e.messages[0]["content"] for e in learned), "laid out as the agent is served"
    assert all(e.sources == [file_id] for e in learned)
    assert not services.ledger.trajectories(purpose=Purpose.SERVE)

    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert checkpoint.step_number == 2
    stage = services.ledger.stage(job.id, "train")
    assert stage is not None
    assert stage.output["served_prompts"] == 0
    told = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert any("no trained prompt was compared with a served one" in message for message in told)


def test_preferences_are_trained_with_dpo(service: tuple[openai.OpenAI, Services]) -> None:
    client, services = service
    hyperparameters: Any = {"beta": 0.3, "n_epochs": 1}
    job = client.fine_tuning.jobs.create(
        model="nightschool",
        training_file=upload(client, [pair(n) for n in range(9)]),
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    )
    assert ended(client, job.id).status == "succeeded"
    assert (DRAWN[-1].config.dpo_beta, DRAWN[-1].config.dpo_epochs) == (0.3, 1)
    pairs = [e for e in services.ledger.examples(job.id) if e.recipe == "file"]
    assert {e.chosen[0]["content"] for e in pairs if e.chosen} == {f"River {n}" for n in range(9)}


def test_a_job_over_the_ledger_without_experience_fails_and_says_what_to_do(
    service: tuple[openai.OpenAI, Services],
) -> None:
    client, _ = service
    job = ended(client, client.fine_tuning.jobs.create(model="nightschool", training_file="ledger").id)
    assert job.status == "failed"
    assert job.fine_tuned_model is None
    assert job.error
    assert "run more tasks" in job.error.message


def test_jobs_and_events_are_listed_newest_first_in_pages(service: tuple[openai.OpenAI, Services]) -> None:
    client, _ = service
    first = client.fine_tuning.jobs.list(limit=1)
    assert first.has_more
    everything = list(client.fine_tuning.jobs.list(limit=1))
    assert [job.created_at for job in everything] == sorted((job.created_at for job in everything), reverse=True)
    assert len({job.id for job in everything}) == len(everything) >= 3
    tagged = client.fine_tuning.jobs.list(metadata={"team": "maps"}).data
    assert [job.metadata for job in tagged] == [{"team": "maps"}]

    events = list(client.fine_tuning.jobs.list_events(tagged[0].id, limit=3))
    numbers = [int(event.id.rsplit("-", 1)[1]) for event in events]
    assert numbers == list(reversed(range(len(numbers))))
    assert len(numbers) > 3
    assert any("trained" in event.message for event in events)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([*map(lesson, range(9)), "{broken"], "line 10 of the training file: no JSON"),
        ([*map(lesson, range(9)), {**lesson(9), "weight": 1}], "line 10 of the training file: weight"),
        ([lesson(1)], "1 examples are too few"),
        ([], "too few"),
    ],
)
def test_a_bad_training_file_is_refused_before_there_is_a_job(
    service: tuple[openai.OpenAI, Services], lines: list[Any], said: str
) -> None:
    client, services = service
    before = len(services.ledger.nights())
    file_id = upload(client, lines or ["\n"])
    with pytest.raises(openai.BadRequestError, match=said):
        client.fine_tuning.jobs.create(model="nightschool", training_file=file_id)
    assert len(services.ledger.nights()) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method": {"type": "reinforcement"}}, "method"),
        ({"method": {"type": "dpo", "supervised": {}}}, "a dpo job takes only method.dpo"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 0}}}}, "n_epochs must be greater than 0"),
        ({"hyperparameters": {"batch_size": -1}}, "batch_size"),
        ({"validation_file": "file-1"}, "validation_file: this field is not supported"),
        ({"suffix": "mine"}, "suffix: this field is not supported"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations: this field is not supported"),
        ({"model": "gpt-4o"}, "model"),
    ],
)
def test_what_a_job_cannot_honour_is_refused_by_name(
    service: tuple[openai.OpenAI, Services], more: dict[str, Any], said: str
) -> None:
    client, _ = service
    with pytest.raises(openai.BadRequestError, match=said):
        client.fine_tuning.jobs.create(**{"model": "nightschool", "training_file": "ledger", **more})


@pytest.mark.parametrize("path", ["/fine_tuning/jobs", "/fine_tuning/jobs/estimate"])
def test_an_unknown_recipe_is_refused_with_the_known_ones_before_there_is_a_job(
    service: tuple[openai.OpenAI, Services], path: str
) -> None:
    client, services = service
    before = len(services.ledger.nights())
    with pytest.raises(openai.BadRequestError, match=r"unknown recipe 'magic'; known: contrast, .*successes"):
        client.post(path, body={"recipes": ["successes", "magic"]}, cast_to=object)
    assert len(services.ledger.nights()) == before


def test_a_file_for_another_purpose_or_of_nobody_is_no_training_file(service: tuple[openai.OpenAI, Services]) -> None:
    client, _ = service
    with pytest.raises(openai.BadRequestError, match="not for 'fine-tune'"):
        client.fine_tuning.jobs.create(model="nightschool", training_file=upload(client, [lesson(1)], "batch"))
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model="nightschool", training_file="file-unknown")


def test_an_ended_or_unknown_job_cannot_be_cancelled(service: tuple[openai.OpenAI, Services]) -> None:
    client, _ = service
    newest = client.fine_tuning.jobs.list(limit=1).data[0].id
    with pytest.raises(openai.ConflictError, match="has ended already"):
        client.fine_tuning.jobs.cancel(newest)
    for path in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.retrieve):
        with pytest.raises(openai.NotFoundError):
            path("night_unknown")
    with pytest.raises(openai.BadRequestError, match="no event of job"):
        client.fine_tuning.jobs.list_events(newest, after="ftevent-other-1")


def test_a_running_job_says_how_far_it_is_and_when_it_will_have_ended(service: tuple[openai.OpenAI, Services]) -> None:
    (client, services), (before, night) = service, (Night(), Night())
    services.ledger.add_night(before)
    took = {"train": 20.0, "evaluate": 30.0, "decide": 1.0, "publish": 1.0, "report": 2.0}
    for stage, seconds in took.items():
        services.ledger.record_stage(StageRun(night_id=before.id, stage=stage, output={}, seconds=seconds))
    services.ledger.end_night(before.id, NightStatus.REJECTED, [])
    services.ledger.add_night(night)
    assert client.fine_tuning.jobs.retrieve(night.id).estimated_finish is None
    emit = emitter(services.settings.night_dir(night.id))

    def finish() -> float:
        said = client.fine_tuning.jobs.retrieve(night.id).estimated_finish
        assert said is not None
        return said - datetime.fromisoformat(read_events(services.settings.night_dir(night.id))[-1]["at"]).timestamp()

    emit("train", "step", step=3, steps=9, eta_s=12.0)
    assert finish() == pytest.approx(46, abs=2)
    emit("evaluate", "started")
    assert finish() == pytest.approx(34, abs=2)
    emit("evaluate", "generation 0 on chat", done=1, total=4, stage_done=1, stage_total=24)
    ours = client.fine_tuning.jobs.retrieve(night.id).model_dump()["nightschool"]["progress"]
    assert (ours["stage"], ours["done"], ours["total"]) == ("evaluate", 1, 24)
    client.fine_tuning.jobs.cancel(night.id)
    ended = client.fine_tuning.jobs.retrieve(night.id)
    assert (ended.estimated_finish, ended.model_dump()["nightschool"]["progress"]) == (None, None)
