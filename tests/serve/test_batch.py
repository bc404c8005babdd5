"""A tasks file: broken lines are reported by number, finished ones are not run again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from agent.llm import ChatRequest
from memory.errors import ConfigError
from serve.batch import ResultsFile, read_tasks
from serve.client import Client
from serve.commands import run_file
from tests.serve.fakes import running, settings_in

TASKS = """\
{"prompt": "What is 1 + 2?", "workload": "sums", "reference": "3"}
{"prompt": "What is
{"messages": [{"role": "user", "content": "And 2 + 2?"}], "reference": "4", "verifier": {"name": "numeric"}}
{"prompt": "x", "verifyer": {}}

{"messages": [{"role": "robot", "content": "x"}]}
"""


def test_broken_lines_are_named_by_number_and_the_rest_is_read(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(TASKS)
    good, broken = read_tasks(tmp_path / "tasks.jsonl")
    assert [number for number, _ in good] == [1, 3]
    assert [sentence.split(":")[0] for sentence in broken] == ["line 2", "line 4", "line 6"]
    assert "verifyer" in broken[1]
    assert "robot" in broken[2]


def test_line_ends_inside_a_question_or_a_reply_cut_no_line(tmp_path: Path) -> None:
    tasks, results = tmp_path / "tasks.jsonl", tmp_path / "results.jsonl"
    tasks.write_text('{"prompt": "One\u2028two?"}\n{"prompt": "Three\x85four?"}\n', encoding="utf-8")
    good, broken = read_tasks(tasks)
    assert ([number for number, _ in good], broken) == ([1, 2], [])
    ResultsFile(results, tasks).add(1, {"answer": "five\u2028six"})
    assert ResultsFile(results, tasks).done == {1: {"answer": "five\u2028six"}}


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.jsonl"):
        read_tasks(tmp_path / "nothing.jsonl")


def test_a_run_goes_on_where_it_was_and_runs_nothing_twice(tmp_path: Path) -> None:
    asked: list[str] = []

    def pupil(request: ChatRequest) -> str:
        asked.append(request.messages[-1]["content"])
        return "Action: finish(3)"

    tasks, output = tmp_path / "tasks.jsonl", tmp_path / "tasks.results.jsonl"
    tasks.write_text(TASKS)
    with running(settings_in(tmp_path), pupil) as (url, services):

        @contextmanager
        def connect() -> Iterator[Client]:
            yield Client(url)

        def run() -> list[str]:
            return run_file(connect, tasks, output, "nightschool", 4, Console(file=(tmp_path / "screen").open("a")))

        assert len(run()) == 3
        assert sorted(asked) == ["And 2 + 2?", "What is 1 + 2?"]
        lines = output.read_text().splitlines()
        output.write_text("\n".join(lines[:2]) + "\n")
        run()
        assert len(asked) == 2, "a line whose result was lost is answered from the ledger"
        assert sorted(ResultsFile(output, tasks).done) == [1, 3]
        assert len(services.ledger.trajectories()) == 2
    assert "sums" in (tmp_path / "screen").read_text()


def test_results_of_another_file_are_not_overwritten(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"prompt": "a"}')
    second.write_text('{"prompt": "b"}')
    ResultsFile(tmp_path / "out.jsonl", first)
    with pytest.raises(ConfigError, match="another tasks file"):
        ResultsFile(tmp_path / "out.jsonl", second)


def test_a_task_without_an_oracle_is_not_corrected() -> None:
    from evals.suites import reasoning_gym_tasks
    from serve.days import correct_value

    tasks = reasoning_gym_tasks({"simple_equations": {}}, 300, 5, source="test")
    assert [task.question for task in tasks if correct_value(task) is None] == [
        "Determine the value of i that satisfies: 0 = 0"
    ]
