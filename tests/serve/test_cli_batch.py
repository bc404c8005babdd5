"""`nightschool batch …` against a running service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.fake_engine import ROOT
from tests.serve.real_service import started

TASKS = """\
{"prompt": "What is 1 + 2?", "id": "sum-1", "workload": "sums", "reference": "3"}

{"prompt": "What is 2 + 2?", "reference": "4", "verifier": {"name": "numeric"}}
{"prompt": "Say something."}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("cli")
    process, _ = started(made)
    yield made
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0


def batch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTSCHOOL_")}
    return subprocess.run(
        [sys.executable, "-m", "serve.cli", "batch", *arguments],
        cwd=folder,
        env=env | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_task_lines_are_watched_to_their_end_and_their_results_fetched(folder: Path) -> None:
    (folder / "tasks.jsonl").write_text(TASKS)
    done = batch(folder, "submit", "tasks.jsonl", "--watch")
    assert done.returncode == 0, done.stderr
    batch_id = done.stdout.split()[0]
    assert "completed" in done.stdout
    assert "3/3" in done.stderr

    fetched = batch(folder, "results", batch_id, "--output", "out.jsonl")
    assert fetched.returncode == 0, fetched.stderr
    assert "(1/2)" in fetched.stderr, "one of the two judged runs is a success"
    lines = {each["custom_id"]: each for each in map(json.loads, (folder / "out.jsonl").read_text().splitlines())}
    assert set(lines) == {"sum-1", "line-3", "line-4"}
    assert lines["sum-1"]["response"]["body"]["nightschool"]["outcome"]["score"] == 1.0

    assert batch_id in batch(folder, "list").stdout
    assert "3 completed, 0 failed" in batch(folder, "status", batch_id).stdout
    too_late = batch(folder, "cancel", batch_id)
    assert too_late.returncode == 2
    assert "completed" in too_late.stderr


def test_openai_lines_go_as_they_are(folder: Path) -> None:
    body = {"model": "champion", "messages": [{"role": "user", "content": "Hi"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (folder / "openai.jsonl").write_text(json.dumps(line))
    refused = batch(folder, "submit", "openai.jsonl", "--model", "champion")
    assert refused.returncode == 2
    assert "--model" in refused.stderr
    done = batch(folder, "submit", "openai.jsonl", "--watch")
    shown = batch(folder, "results", done.stdout.split()[0])
    assert json.loads(shown.stdout)["response"]["body"]["choices"][0]["message"]["content"] == "Hello there."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("{", "first line"),
        ('{"prompt": "x"}\n{"prompt": "x", "verifyer": 1}\n', "line 2"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_cannot_be_a_batch_is_one_line(folder: Path, text: str | None, said: str) -> None:
    if text is not None:
        (folder / "bad.jsonl").write_text(text)
    done = batch(folder, "submit", "bad.jsonl" if text is not None else "none.jsonl")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_batch_is_told_with_its_lines(folder: Path) -> None:
    (folder / "failing.jsonl").write_text(
        '{"custom_id": "a", "method": "GET", "url": "/v1/chat/completions", "body": {}}'
    )
    done = batch(folder, "submit", "failing.jsonl", "--watch")
    assert done.returncode == 2
    assert "line 1: method must be 'POST'" in done.stderr


def test_an_unknown_batch_is_said(folder: Path) -> None:
    done = batch(folder, "status", "batch_none")
    assert done.returncode == 2
    assert "batch_none" in done.stderr
