"""From a reply back to the feedback that its generation learned from, and from feedback forth to the generations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from memory import keys
from memory.errors import NotFoundError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, Night, NightStatus, StageRun
from memory.records import Example, Feedback, Trajectory
from memory.responses import StoredResponse, add_response
from serve.lineage import trace, tree_of
from serve.promotion import ensure_base
from serve.settings import ServerConfig
from serve.wiring import open_ledger
from tests.memory.samples import example, feedback, task, trajectory
from tests.serve.fakes import running, settings_in
from tests.serve.test_cli import assert_refused, nightschool


@dataclass
class School:
    """A ledger with two nights behind it: the first taught from a correction, the second went on from there."""

    corrected: Trajectory
    correction: Feedback
    lesson: Example
    strangers: Example
    nights: list[Night]
    reply: Trajectory
    """By generation 2."""


def teach(ledger: Ledger) -> School:
    ensure_base(ledger, "test/model")
    asked, elsewhere = task("What is 2 + 3?"), task("Whose secret?", tenant="beta")
    corrected, foreign = trajectory(asked, "4"), trajectory(elsewhere)
    correction = feedback(corrected)
    for of, run in ((asked, corrected), (elsewhere, foreign)):
        ledger.add_run(of, run)
    ledger.add_feedback(correction)
    lesson = example(asked).model_copy(update={"recipe": "corrections", "sources": [corrected.id, correction.id]})
    strangers = example(elsewhere).model_copy(update={"tenant": "beta", "sources": [foreign.id]})
    nights = []
    for number, parent, learned in ((1, 0, [lesson, strangers]), (2, 1, [])):
        night = Night()
        ledger.add_night(night)
        ledger.set_examples(night.id, learned)
        ledger.add_generation(
            Generation(
                number=number,
                parent=parent,
                base_model="test/model",
                adapter_path=night.id,
                adapter_sha256=f"{number}" * 64,
                night_id=night.id,
                status=GenerationStatus.CANDIDATE,
            )
        )
        ledger.set_candidate(night.id, number)
        ledger.promote(number, "better", "night")
        nights.append(ledger.end_night(night.id, NightStatus.PROMOTED, ["better"], candidate=number))
    reply = trajectory(asked).model_copy(update={"id": "traj_reply", "generation": 2})
    ledger.add_trajectory(reply)
    return School(corrected, correction, lesson, strangers, nights, reply)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(f"sqlite:///{tmp_path}/ledger.db")
    yield opened
    opened.close()


def test_a_reply_leads_back_to_the_feedback_its_generation_learned_from(ledger: Ledger) -> None:
    school = teach(ledger)
    found = trace(ledger, f"chatcmpl-{school.reply.id}", tenant="default")
    assert found.trajectory.id == school.reply.id
    assert [a.generation for a in found.learned_from] == [2, 1, 0]
    assert [a.night for a in found.learned_from] == [school.nights[1].id, school.nights[0].id, None]
    first = found.learned_from[1]
    assert first.recipes == {"corrections": 1, "successes": 1}
    [source] = first.examples
    assert (source.id, source.trajectories) == (school.lesson.id, [school.corrected.id])
    assert [(word.id, word.author) for word in source.feedback] == [(school.correction.id, "ada")]
    assert found.taught == []


@pytest.mark.parametrize("name", ["corrected", "correction"])
def test_a_run_and_the_word_on_it_lead_forth_to_the_generations_that_learned(ledger: Ledger, name: str) -> None:
    school = teach(ledger)
    found = trace(ledger, getattr(school, name).id, tenant="default")
    assert found.trajectory.id == school.corrected.id
    assert [f.id for f in found.feedback] == [school.correction.id]
    [taught] = found.taught
    assert (taught.night, taught.generation, taught.descendants) == (school.nights[0].id, 1, [2])
    assert taught.generation_status is GenerationStatus.RETIRED
    assert [e.id for e in taught.examples] == [school.lesson.id]


def test_a_replayed_example_is_found_in_every_night_that_used_it(ledger: Ledger) -> None:
    school = teach(ledger)
    ledger.set_examples(school.nights[1].id, [school.lesson])
    found = trace(ledger, school.corrected.id, tenant="default")
    assert [(t.night, t.generation) for t in found.taught] == [(n.id, n.candidate) for n in school.nights]


def test_an_id_that_is_only_quoted_in_a_text_is_no_source(ledger: Ledger) -> None:
    school = teach(ledger)
    quoting = [{"role": "user", "content": school.reply.id, "name": school.reply.id}]
    said = school.lesson.model_copy(update={"id": "ex_quote", "messages": quoting})
    ledger.set_examples(school.nights[1].id, [said])
    assert trace(ledger, school.reply.id, tenant="default").taught == []


def test_a_stored_response_is_traced_by_its_own_id(ledger: Ledger) -> None:
    school = teach(ledger)
    stored = StoredResponse(
        id="resp_1", tenant="default", trajectory_id=school.reply.id, conversation_id="c", items=[], reply={}
    )
    add_response(ledger.database, stored)
    assert trace(ledger, "resp_1", tenant="default").trajectory.id == school.reply.id


def test_the_list_of_examples_is_cut_and_says_so(ledger: Ledger) -> None:
    school = teach(ledger)
    more = [school.lesson.model_copy(update={"id": f"ex_{n}"}) for n in range(4)]
    ledger.set_examples(school.nights[1].id, more)
    latest = trace(ledger, school.reply.id, tenant="default", limit=3).learned_from[0]
    assert (len(latest.examples), latest.more) == (3, 1)


def test_another_tenants_run_and_word_are_not_found_and_its_examples_are_only_counted(ledger: Ledger) -> None:
    school = teach(ledger)
    for record_id in (school.reply.id, f"chatcmpl-{school.reply.id}", school.correction.id, "traj_none", "fb_none"):
        with pytest.raises(NotFoundError):
            trace(ledger, record_id, tenant="beta")
    said = trace(ledger, school.reply.id, tenant="default").model_dump_json()
    assert school.strangers.id not in said
    assert school.strangers.sources[0] not in said


def test_the_tree_reads_from_the_reply_to_the_word_and_forth(ledger: Ledger) -> None:
    from rich.console import Console

    school = teach(ledger)
    console = Console(width=200, record=True)
    for record_id in (school.reply.id, school.correction.id):
        console.print(tree_of(trace(ledger, record_id, tenant="default")))
    told = console.export_text()
    for part in ("generation 2", school.nights[0].id, "1 corrections", school.correction.id, "by ada"):
        assert part in told
    assert "generation 1 (retired), and through it 2" in told


def test_between_a_night_and_its_examples_stands_the_dataset_with_its_hashes(ledger: Ledger) -> None:
    from rich.console import Console

    school = teach(ledger)
    night = school.nights[0].id
    files = {"sft.jsonl": {"rows": 3, "sha256": "ab" * 32}, "dpo.jsonl": {"rows": 0, "sha256": "cd" * 32}}
    output = {"folder": f"/srv/school/nights/{night}/dataset", "counts": {}, "dropped": {}, "files": files}
    ledger.record_stage(StageRun(night_id=night, stage="dataset", output=output, seconds=1.0))
    found = trace(ledger, school.reply.id, tenant="default")
    (built,) = [a.dataset for a in found.learned_from if a.night == night]
    assert built is not None
    assert built.manifest == f"nights/{night}/dataset/manifest.json"
    assert {part.name: part.sha256 for part in built.files} == {name: file["sha256"] for name, file in files.items()}
    (taught,) = trace(ledger, school.correction.id, tenant="default").taught
    assert taught.dataset == built
    console = Console(width=200, record=True)
    console.print(tree_of(found))
    lines = console.export_text().splitlines()
    places = [
        next(i for i, line in enumerate(lines) if part in line)
        for part in (f"{night} (promoted)", built.manifest, "ab" * 32, school.lesson.id)
    ]
    assert places == sorted(places)


def test_the_api_answers_operators_of_the_tenant_only(tmp_path: Path) -> None:
    with running(settings_in(tmp_path, server=ServerConfig(keys=True)), lambda _: "Action: finish(1)") as started:
        url, services = started
        school = teach(services.ledger)

        def get(record_id: str, tenant: str, scope: keys.Scope = keys.Scope.OPERATE) -> httpx.Response:
            key = keys.ApiKey(name="ann", tenant=tenant, scopes=[scope])
            secret = keys.mint(services.ledger.database, key)
            return httpx.get(f"{url}/v1/lineage/{record_id}", headers={"Authorization": f"Bearer {secret}"})

        assert get(school.reply.id, "default").json()["learned_from"][1]["generation"] == 1
        assert get(school.reply.id, "beta").status_code == 404
        assert get(school.correction.id, "beta").status_code == 404
        assert get(school.reply.id, "default", keys.Scope.CHAT).status_code == 403


def test_the_command_prints_the_tree_or_json_and_refuses_an_unknown_id(tmp_path: Path) -> None:
    ledger = open_ledger(settings_in(tmp_path))
    school = teach(ledger)
    ledger.close()
    assert "it taught" in nightschool("lineage", school.correction.id, cwd=tmp_path).stdout
    shown = json.loads(nightschool("lineage", school.reply.id, "--json", cwd=tmp_path).stdout)
    assert shown["trajectory"]["generation"] == 2
    assert_refused(nightschool("lineage", "traj_none", cwd=tmp_path), "traj_none")
