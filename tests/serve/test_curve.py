"""`bench curve` on a service with a scripted model: it lives its nights, goes on where it was, tells what it saw."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from evals.chat import chat_suite
from evals.gate import GateConfig
from evals.suites import save_suite
from memory.errors import ConfigError
from serve.benches.curve import Morning, arriving, figures, gsm8k, live
from serve.client import Client
from serve.days import Course, correct_value
from tests.evals.made import evaluation, first
from tests.serve.fakes import fake_training, running, settings_in
from tests.serve.test_loop import HELD_OUT, day, pupil


def test_a_course_is_lived_to_its_end_and_a_second_call_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.stages.training.launch.run", fake_training)
    settings, console = settings_in(tmp_path), Console(file=io.StringIO())
    for suite in (HELD_OUT, chat_suite()):
        save_suite(suite, settings.suites_dir / f"{suite.name}.jsonl")
    course = Course("course", day, correct_value)
    with running(settings, pupil) as (url, services):

        @contextmanager
        def reach() -> Iterator[Client]:
            yield Client(url)

        done = live(reach, course, 2, settings, console)
        assert done.figures["corrections"] == len(day(1))
        assert str(done.figures["night 1"]).startswith("promote, generation 1: 100%")
        assert str(done.figures["night 2"]).startswith("skipped, generation 1: 100%")
        assert done.figures["gain_points"] == 100.0
        assert done.met["nights_decided"]
        assert done.met["worst_step_beyond_margin_points"]
        rows = json.loads((settings.data_dir / "report.json").read_text())["rows"]
        assert [row["name"].split("\n")[0] for row in rows] == ["base", "night 1", "night 2"]
        assert (settings.data_dir / "learning_curve.png").stat().st_size > 1000

        runs = len(services.ledger.trajectories())
        again = live(reach, course, 2, settings, console)
        assert len(services.ledger.trajectories()) == runs
        assert len(services.ledger.nights()) == 2
        assert {k: v for k, v in again.figures.items() if k != "minutes"} == {
            k: v for k, v in done.figures.items() if k != "minutes"
        }


def test_a_control_that_falls_beyond_its_margin_is_told_however_the_gate_saw_it() -> None:
    def of(generation: int, chat: int) -> list:
        held_out = evaluation(first(10 + 10 * generation, 30), generation=generation)
        chats = evaluation(first(chat, 24), suite="chat", role="control", generation=generation, workloads=("chat",))
        return [held_out, chats]

    mornings = [Morning(0, "-", 0, of(0, 20)), Morning(1, "promote", 1, of(1, 14))]
    found = figures(mornings, GateConfig(control_margins={"chat": 0.1}))
    assert found["worst_control_step_points"] == 25.0
    assert found["worst_step_beyond_margin_points"] == 15.0
    assert found["gain_points"] == pytest.approx(33.3)


def test_workloads_arrive_one_by_one_and_the_earlier_ones_go_on() -> None:
    days = arriving((("gcd", "lcm"), ("products",), ("chain_sum",)), 3, "course")
    assert [Counter(task.workload for task in tasks) for tasks in days.values()] == [
        {"gcd": 3, "lcm": 3},
        {"products": 3, "gcd": 1, "lcm": 1},
        {"chain_sum": 3, "gcd": 1, "lcm": 1, "products": 1},
    ]
    questions = [task.fingerprint for tasks in days.values() for task in tasks]
    assert len(set(questions)) == len(questions) == 17
    assert arriving((("gcd", "lcm"), ("products",), ("chain_sum",)), 3, "course") == days


def test_what_each_workload_came_to_is_told_night_by_night() -> None:
    found = figures([Morning(0, "-", 0, [evaluation([True, False, True, True])])], GateConfig())
    assert found["base, no memory: workloads"] == "sums 2/2, gcd 1/2"


def test_word_problems_are_asked_for_by_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--data"):
        gsm8k(settings_in(tmp_path), None)
    with pytest.raises(ConfigError, match=r"train\.jsonl"):
        gsm8k(settings_in(tmp_path), tmp_path)
