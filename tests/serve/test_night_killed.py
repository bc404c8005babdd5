"""A night on a service process that is killed at every boundary and at random moments: one decision, nothing lost."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from evals.oracle import oracle_expression
from evals.suites import EvalTask, Suite, reasoning_gym_suite, reasoning_gym_tasks, save_suite
from memory.errors import EngineError, NightschoolError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, Night, NightStatus
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
    VerifierSpec,
)
from serve import promotion
from serve.adapters import verify
from serve.client import Client
from serve.days import correct_value
from serve.stages import STAGES
from serve.stages.practice import PRACTICE
from serve.wiring import open_ledger
from tests.serve.night_life import CONTROL, MOMENTS, NIGHT, live, settings_for

pytestmark = pytest.mark.slow

KILLS = 20
PATIENCE_S = 300
FAMILY = {"chain_sum": {}}
LIVES = multiprocessing.get_context("forkserver")
LIVES.set_forkserver_preload(["tests.serve.night_life", "serve.api.app", "serve.night", "chromadb", "uvicorn"])


def evening(folder: Path) -> Path:
    """A data folder after a day of corrected failures, with a night that has just begun."""
    folder.mkdir()
    settings = settings_for(folder)
    held_out = reasoning_gym_suite(FAMILY, 8, 70_001, "held_out", "held_out")
    polite = VerifierSpec(name="contains", args={"any": ["fine"]})
    asked = [
        Task(messages=[{"role": "user", "content": CONTROL.format(n)}], tools=[], verifier=polite) for n in range(4)
    ]
    control = Suite(name="chat", role="control", tasks=[EvalTask(key=f"c{n}", task=t) for n, t in enumerate(asked)])
    for suite in (held_out, control):
        save_suite(suite, settings.suites_dir / f"{suite.name}.jsonl")
    day = reasoning_gym_tasks(FAMILY, 8, 101, source="day")
    answers = {task.question: oracle_expression(task) for task in [*day, *(item.task for item in held_out.tasks)]}
    (folder / "answers.json").write_text(json.dumps(answers))
    ledger = open_ledger(settings)
    promotion.ensure_base(ledger, settings.model)
    for number, task in enumerate(day):
        run = Trajectory(
            id=f"traj_{number}",
            task_id=task.id,
            generation=0,
            model="base",
            tools=settings.agent.tools,
            messages=[{"role": "system", "content": "Solve."}, *task.messages, {"role": "assistant", "content": "0"}],
            answer="0",
            outcome=Outcome(score=0.0, by=OutcomeSource.VERIFIER),
            stop_reason=StopReason.ANSWER,
        )
        ledger.add_run(task, run)
        said = {"kind": FeedbackKind.CORRECTION, "value": correct_value(task), "author": "ann"}
        ledger.add_feedback(Feedback(id=f"fb_{number}", trajectory_id=run.id, **said))
    ledger.add_night(Night(id=NIGHT, options={PRACTICE: 2}))
    ledger.close()
    return folder


def copy(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(name)))


def begin(folder: Path, die_at: str | None = None) -> BaseProcess:
    (folder / "url").unlink(missing_ok=True)
    life = LIVES.Process(target=live, args=(folder, die_at))
    life.start()
    return life


def opened(folder: Path) -> Ledger:
    return Ledger.open(settings_for(folder).database_url)


def dataset(folder: Path, ledger: Ledger) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of the night's dataset and its manifest, but for the line up to which words were read: those that came
    before the night first drew it are behind it."""
    files = {path.name: path.read_bytes() for path in (settings_for(folder).night_dir(NIGHT) / "dataset").iterdir()}
    manifest, drawn = json.loads(files.pop("manifest.json")), ledger.stage(NIGHT, "snapshot")
    assert drawn is not None
    assert manifest["upto"].pop("feedback") == drawn.output["upto"]["feedback"]
    return files, manifest


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same night without a kill; beside it, `evening` is as it was before."""
    folder = evening(tmp_path_factory.mktemp("nights") / "evening")
    whole = copy(folder, "unkilled")
    begin(copy(folder, "first")).join(PATIENCE_S)  # the fork server's imports are not part of a life
    began = time.monotonic()
    life = begin(whole)
    life.join(PATIENCE_S)
    assert life.exitcode == 0
    (whole / "seconds").write_text(str(time.monotonic() - began))
    return whole


def no_half_adapter_can_be_loaded(folder: Path, whole: Generation) -> None:
    """What the registry shows is whole; a half-written folder is refused even by its own name."""
    root = settings_for(folder).adapters_dir
    for found in {path.parent for path in root.rglob("adapter_*")}:
        named = whole.model_copy(update={"adapter_path": str(found.relative_to(root))})
        shown = found.parent == root and found.suffix != ".work"
        if shown or (found / "result.json").is_file():
            verify(named, root)
        else:
            with pytest.raises(EngineError):
                verify(named, root)


def ends_as_if_unkilled(folder: Path, unkilled: Path) -> None:
    ledger, whole = opened(folder), opened(unkilled)
    try:
        night = ledger.night(NIGHT)
        assert night.status is NightStatus.PROMOTED, night.reasons
        assert [(p.from_generation, p.to_generation) for p in ledger.promotions()] == [(0, 1)]
        assert [(g.number, g.status) for g in ledger.generations()] == [
            (0, GenerationStatus.RETIRED),
            (1, GenerationStatus.CHAMPION),
        ]
        assert [run.stage for run in ledger.stages(NIGHT)] == list(STAGES)
        measured = [(e.generation, e.suite) for e in ledger.evaluations(night_id=NIGHT)]
        assert sorted(measured) == [(g, suite) for g in (0, 1) for suite in ("chat", "held_out")]
        assert {f.id for f in whole.feedback()} <= {f.id for f in ledger.feedback()}
        assert {f.trust for f in ledger.feedback() if f.kind is FeedbackKind.CORRECTION} == {Trust.TRUSTED}
        assert dataset(folder, ledger) == dataset(unkilled, whole)
        assert [e.id for e in ledger.examples(NIGHT)] == [e.id for e in whole.examples(NIGHT)]
        tries = [{t.id for t in known.trajectories(purpose=Purpose.PRACTICE)} for known in (ledger, whole)]
        assert tries[0] == tries[1] != set()
        assert {r.id for r in ledger.past_runs()} == {r.id for r in whole.past_runs()}
        assert {p.id for p in ledger.principles()} == {p.id for p in whole.principles()}
        assert ledger.champion().adapter_sha256 == whole.champion().adapter_sha256
        no_half_adapter_can_be_loaded(folder, whole.champion())
    finally:
        ledger.close()
        whole.close()


def test_a_night_killed_at_every_boundary_ends_as_if_it_had_not_been(unkilled: Path) -> None:
    folder = copy(unkilled.with_name("evening"), "boundaries")
    for moment in MOMENTS:
        life = begin(folder, moment)
        life.join(PATIENCE_S)
        assert life.exitcode == -signal.SIGKILL, f"not killed {moment}"
    assert (folder / "deaths").read_text().splitlines() == MOMENTS
    last = begin(folder)
    last.join(PATIENCE_S)
    assert last.exitcode == 0
    ends_as_if_unkilled(folder, unkilled)


def test_a_night_killed_at_random_moments_ends_once_and_loses_no_word(unkilled: Path) -> None:
    chance, kills, rounds = random.Random(20), 0, 0
    longest = float((unkilled / "seconds").read_text())
    whole = opened(unkilled)
    champion = whole.champion()
    whole.close()
    while kills < KILLS:
        rounds += 1
        folder, kept = copy(unkilled.with_name("evening"), f"random-{rounds}"), []
        while True:
            life = begin(folder)
            if kills < KILLS and outlived(life, folder, chance.uniform(0.0, longest), kept):
                kills += 1
                no_half_adapter_can_be_loaded(folder, champion)
                continue
            life.join(PATIENCE_S)
            assert life.exitcode == 0
            break
        ends_as_if_unkilled(folder, unkilled)
        ledger = opened(folder)
        assert set(kept) <= {f.id for f in ledger.feedback()}
        ledger.close()


def outlived(life: BaseProcess, folder: Path, seconds: float, kept: list[str]) -> bool:
    """Kill the service after so many seconds of speaking to it; whether it lived. `kept`: the words it confirmed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and life.is_alive():
        if (folder / "url").exists():
            with suppress(NightschoolError, OSError):
                word = {"trajectory_id": "traj_0", "kind": "comment", "value": f"word {len(kept)}", "author": "bob"}
                kept.append(Client((folder / "url").read_text()).post("/v1/feedback", word)["id"])
        life.join(0.05)
    if not life.is_alive():
        return False
    life.kill()
    life.join()
    return True
