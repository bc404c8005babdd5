"""Word problems from a file: which are usable, and that the oracle's run is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.calculator import calculate
from agent.verify import verify
from evals.word_problems import word_problems
from memory.errors import ConfigError


def write(path: Path, *rows: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows))
    return path


def test_the_oracle_calculates_as_the_solution_does_and_its_answer_is_right(tmp_path: Path) -> None:
    solution = "In May 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"
    ((task, run),) = word_problems(write(tmp_path / "p.jsonl", ("How many clips?", solution)), calculate)
    expressions = [json.loads(m["tool_calls"][0]["function"]["arguments"])["expression"] for m in run[:4:2]]
    assert expressions == ["48/2", "48+24"]
    assert [m["content"] for m in run if m["role"] == "tool"] == ["24", "72"]
    outcome = verify(task, run[-1]["content"])
    assert outcome is not None
    assert outcome.score == 1.0


def test_a_problem_the_calculator_does_not_solve_within_its_calls_is_left_out(tmp_path: Path) -> None:
    wrong = ("wrong", "<<2+2=4>>\n#### 5")
    unreadable = ("unreadable", "<<2+*2=4>>\n#### 4")
    without = ("no calculation", "#### 4")
    long = ("long", "<<1+1=2>><<2+1=3>><<3+1=4>><<4+1=5>>\n#### 5")
    good = ("good", "<<1,0+0=10>>\n#### 10"), ("thousands", "<<500*2=1000>>\n#### 1,000")
    found = word_problems(write(tmp_path / "p.jsonl", wrong, unreadable, without, long, *good), calculate)
    assert [task.reference for task, _ in found] == ["1000"]


def test_a_line_that_is_no_problem_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n{"question": "?"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        word_problems(tmp_path / "p.jsonl", calculate)
