"""The command line as a person meets it: help that teaches, one clear line and exit code 2 for what is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from memory.ledger import Ledger
from memory.records import Purpose, StopReason, Task, Trajectory, Trust
from tests.memory import samples


def nightschool(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """One command in a folder of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTSCHOOL_")}
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, "-m", "serve.cli", *arguments],
        cwd=cwd,
        env=env | {"PYTHONPATH": root, "COLUMNS": "200", "NO_COLOR": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_help_names_every_command(tmp_path: Path) -> None:
    done = nightschool("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in (
        "serve",
        "run",
        "feedback",
        "night",
        "generations",
        "rollback",
        "status",
        "eval",
        "models",
        "bench",
    ):
        assert command in done.stdout


def test_settings_come_from_variables_over_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "nightschool.toml").write_text('model = "from/file"\n[agent]\nmax_turns = 7\n')
    done = nightschool("settings", cwd=tmp_path, NIGHTSCHOOL_AGENT__MAX_TURNS="9")
    shown = json.loads(done.stdout)
    assert shown["model"] == "from/file"
    assert shown["agent"]["max_turns"] == 9
    assert shown["server"]["port"] == 8000


@pytest.mark.parametrize(
    ("toml", "said"),
    [("modle = 'x'", "modle"), ("[agent]\nmax_turns = 0", "agent.max_turns"), ("model = ", "nightschool.toml")],
)
def test_an_unusable_setting_is_one_line_that_names_it(tmp_path: Path, toml: str, said: str) -> None:
    (tmp_path / "nightschool.toml").write_text(toml)
    assert_refused(nightschool("settings", cwd=tmp_path), said)


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_refused(nightschool("serve", "--port", port, cwd=tmp_path), f"port {port}")


def test_a_public_address_is_refused_without_keys(tmp_path: Path) -> None:
    assert_refused(nightschool("serve", "--insecure", "--host", "0.0.0.0", cwd=tmp_path), "loopback")
    assert_refused(nightschool("serve", "--host", "0.0.0.0", cwd=tmp_path, NIGHTSCHOOL_SERVER__KEYS="0"), "loopback")


def test_a_service_without_a_model_or_engine_says_what_to_do(tmp_path: Path) -> None:
    done = nightschool("serve", "--port", "0", cwd=tmp_path, NIGHTSCHOOL_MODEL="./no-such-model")
    assert_refused(done, "no-such-model")


def test_feedback_for_an_unknown_run_is_refused(tmp_path: Path) -> None:
    assert_refused(nightschool("feedback", "chatcmpl-traj_x", "--score", "1", cwd=tmp_path), "traj_x")


def test_feedback_needs_exactly_one_word(tmp_path: Path) -> None:
    assert_refused(nightschool("feedback", "traj_x", "--score", "1", "--hint", "h", cwd=tmp_path), "exactly one")


def test_a_correction_at_the_command_line_is_the_operators(tmp_path: Path) -> None:
    task = Task(messages=[{"role": "user", "content": "1 + 1?"}], reference="2")
    run = Trajectory(
        task_id=task.id, generation=0, model="base", messages=task.messages, stop_reason=StopReason.ANSWER, answer="3",
        purpose=Purpose.SERVE,
    )  # fmt: skip
    (tmp_path / "data").mkdir()
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'data' / 'ledger.sqlite'}")
    ledger.add_task(task)
    ledger.add_trajectory(run)
    done = nightschool("feedback", run.id, "--correction", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (said,) = ledger.feedback(trajectory_id=run.id)
    assert (said.author, said.value) == ("operator", "2")
    ledger.close()


def test_trust_lets_a_word_teach_and_takes_it_back(tmp_path: Path) -> None:
    task = samples.task()
    run = samples.trajectory(task)
    word = samples.feedback(run)
    (tmp_path / "data").mkdir()
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'data' / 'ledger.sqlite'}")
    ledger.add_run(task, run)
    ledger.add_feedback(word)

    def standing() -> tuple[Trust, str]:
        (said,) = [f for f in ledger.feedback(trajectory_id=run.id) if f.id == word.id]
        return said.trust, said.trust_reason

    done = nightschool("trust", word.id, "--why", "I counted", cwd=tmp_path)
    assert done.stdout.split()[:3] == [word.id, "correction", "trusted"], done.stderr
    assert standing() == (Trust.TRUSTED, "operator: I counted")
    assert nightschool("trust", word.id, "--why", "not so", "--reject", cwd=tmp_path).returncode == 0
    assert standing() == (Trust.REJECTED, "operator: not so")
    assert_refused(nightschool("trust", word.id, "--why", "mine", "--tenant", "rival", cwd=tmp_path), word.id)
    assert_refused(nightschool("trust", word.id, cwd=tmp_path), "--why")
    assert standing() == (Trust.REJECTED, "operator: not so")
    ledger.close()


@pytest.mark.parametrize("command", [["status"], ["generations"], ["models"], ["bench"]])
def test_commands_that_only_look_work_on_an_empty_folder(tmp_path: Path, command: list[str]) -> None:
    done = nightschool(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_service_whose_settings_name_an_unknown_recipe_does_not_start(tmp_path: Path) -> None:
    done = nightschool("serve", "--port", "0", cwd=tmp_path, NIGHTSCHOOL_NIGHT__RECIPES='["successes", "magic"]')
    assert_refused(done, "unknown recipe 'magic'; known: contrast,")


def test_an_unknown_command_or_option_is_one_line(tmp_path: Path) -> None:
    assert_refused(nightschool("sleep", cwd=tmp_path), "sleep")
    assert_refused(nightschool("status", "--loudly", cwd=tmp_path), "loudly")
    assert_refused(nightschool("bench", "nap", cwd=tmp_path), "nap")
