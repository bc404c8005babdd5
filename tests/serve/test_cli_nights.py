"""`nightschool night | report | promote | rollback` against a running service, and what a followed night shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from serve.client import Client
from serve.commands import follow_night, print_night, print_resumed
from tests.serve.fake_engine import ROOT
from tests.serve.real_service import started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("nights")
    process, _ = started(made)
    yield made
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0


def nightschool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTSCHOOL_")}
    return subprocess.run(
        [sys.executable, "-m", "serve.cli", *arguments],
        cwd=folder,
        env=env | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_night_with_too_little_to_learn_skips_itself_and_its_report_says_so(folder: Path) -> None:
    looked = nightschool(folder, "night", "--dry-run", "--since", "7d")
    assert "would skip itself" in looked.stdout, looked.stderr
    done = nightschool(folder, "night")
    assert done.returncode == 0, done.stderr
    assert "skipped" in done.stdout
    assert "run tasks that carry one" in " ".join(done.stdout.split())
    told = nightschool(folder, "report")
    assert told.returncode == 0, told.stderr
    assert "The night skipped itself; generation 0 goes on serving." in told.stdout
    page = Path(told.stdout.split("page: ")[1].strip())
    assert "run tasks that carry one" in page.read_text()
    assert json.loads(nightschool(folder, "report", "--json").stdout)["status"] == "skipped"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["night", "--since", "lately"], "since: expected a date"),
        (["night", "--recipes", "successes, magic"], "unknown recipe 'magic'; known: contrast,"),
        (["night", "--cancel"], "no unfinished night to cancel"),
        (["report", "night_x"], "no night 'night_x'"),
        (["promote", "0"], "champion already"),
        (["rollback"], "roll back"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder: Path, arguments: list[str], said: str) -> None:
    done = nightschool(folder, *arguments)
    assert done.returncode == 2, done.stdout
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


class Told:
    """A service whose night has these events and is over, once it has said where it stood."""

    def __init__(self, events: list[dict[str, Any]], *progress: dict[str, Any]) -> None:
        self.events = [{"id": f"ftevent-n-{i}", **event} for i, event in enumerate(events)]
        self.progress = list(progress)

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        if path.endswith("/events"):
            return {"data": [] if "after" in params else self.events}
        where = self.progress.pop(0) if self.progress else None
        return {
            "id": "night_1",
            "status": "running" if where else "succeeded",
            "nightschool": {"status": "running", "progress": where},
        }


def test_a_followed_night_shows_step_loss_tokens_and_pace() -> None:
    step = {"event": "step", "step": 3, "steps": 9, "loss": 0.5, "tokens": 120, "tokens_per_s": 60.0, "eta_s": 12.0}
    events: list[dict[str, Any]] = [
        {"stage": "snapshot", "message": "started", "data": {}},
        {"stage": "snapshot", "message": "12 runs since [the] last", "data": {"runs": 12}},
        {"stage": "train", "message": "the night's budget leaves 600 tokens for training", "data": {"max_tokens": 600}},
        {"stage": "train", "message": "step", "data": step},
        {"stage": "evaluate", "message": "generation 1 on held_out", "data": {"done": 4, "total": 8}},
    ]
    console = Console(width=200, record=True)
    follow_night(cast(Client, Told(events)), "night_1", console)
    shown = console.export_text()
    for told in (
        "12 runs since [the] last",
        "leaves 600 tokens",
        "3/9",
        "loss 0.500, 120 tokens, 60 a second",
        "generation 1 on held_out",
        "4/8",
    ):
        assert told in shown


def test_a_followed_exam_shows_all_its_runs_and_how_long_they_and_the_night_still_take() -> None:
    runs = {"done": 4, "total": 8, "stage_done": 20, "stage_total": 48}
    events = [{"stage": "evaluate", "message": "generation 0 on held_out", "data": runs}]
    console = Console(width=200, record=True, force_terminal=True)
    known = {"stage": "evaluate", "done": 20, "total": 48, "left_s": 42.3, "night_left_s": 130.0}
    unknown = {**known, "left_s": None, "night_left_s": None}
    follow_night(cast(Client, Told(events, known, unknown)), "night_1", console)
    shown = console.export_text()
    for told in ("generation 0 on held_out", "4/8", "evaluate, all in all", "20/48"):
        assert told in shown
    assert "left: about 42 s of it, 2 min of the night" in shown


def test_a_killed_night_goes_on_and_the_terminal_says_where() -> None:
    console = Console(width=200, record=True)
    job = {"id": "night_1", "nightschool": {"stages": {"snapshot": 0.1, "credit": 0.2}}}
    print_resumed(job, {"since": "7d"}, console)
    shown = console.export_text()
    assert "going on with night_1 (done: snapshot, credit)" in shown
    assert "--since is for a new night" in shown


def test_a_night_without_a_page_says_how_to_get_one() -> None:
    console = Console(width=200, record=True)
    ours = {"status": "failed", "reasons": ["[red] is no colour here"], "stages": {}, "report": None}
    print_night({"id": "night_1", "nightschool": ours}, console)
    shown = console.export_text()
    assert "[red] is no colour here" in shown
    assert "nightschool report night_1" in shown
