"""A batch on a real service process that is killed twice in the middle: every line finishes exactly once."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import openai

from memory import batches
from memory.batches import LineStatus
from memory.ledger import Ledger
from memory.records import Trajectory
from tests.serve.real_service import started, until

LINES = 500
KILL_AT = (120, 280)
CONCURRENCY = 8
CHAT = "/v1/chat/completions"


def asked(folder: Path) -> list[str]:
    """The questions that the engine has answered, in order, by all its lives."""
    log = folder / "asked.jsonl"
    texts = log.read_text().splitlines() if log.exists() else []
    return [json.loads(text) for text in texts if text.endswith('"')]


def stored(folder: Path, batch_id: str) -> tuple[dict[str, str], list[Trajectory]]:
    """(results by custom_id, trajectories) in the ledger."""
    ledger = Ledger.open(f"sqlite:///{folder / 'data' / 'ledger.sqlite'}")
    try:
        done = batches.every_line(ledger.database, batch_id, LineStatus.COMPLETED)
        return {line.custom_id: line.result or "" for line in done}, ledger.trajectories()
    finally:
        ledger.close()


def question(i: int) -> str:
    return f"What is {i} + 0?"


def test_a_batch_killed_twice_finishes_every_line_exactly_once(tmp_path: Path) -> None:
    process, client = started(tmp_path, CONCURRENCY)
    try:
        lines: list[dict[str, Any]] = [
            {
                "custom_id": f"r{i}",
                "method": "POST",
                "url": CHAT,
                "body": {"model": "champion", "messages": [{"role": "user", "content": question(i)}]},
            }
            for i in range(LINES)
        ]
        data = "\n".join(json.dumps(line) for line in lines).encode()
        file = client.files.create(file=("lines.jsonl", data), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        finished: dict[str, str] = {}
        for mark in KILL_AT:
            until(lambda: counts(client, batch.id)[0] >= mark, 120)  # noqa: B023
            process.send_signal(signal.SIGKILL)
            process.wait()
            before = finished
            finished, runs = stored(tmp_path, batch.id)
            assert mark <= len(finished) < LINES
            assert len(runs) == len(finished), "a result without its run, or a run without its result"
            assert before.items() <= finished.items()
            answered = len(asked(tmp_path))
            process, client = started(tmp_path, CONCURRENCY)
            until(lambda: counts(client, batch.id)[0] > mark, 120)  # noqa: B023
            again = asked(tmp_path)[answered:]
            assert not {question(int(name[1:])) for name in finished} & set(again)
        until(lambda: client.batches.retrieve(batch.id).status == "completed", 120)
        assert counts(client, batch.id) == (LINES, 0, LINES)
        output = client.batches.retrieve(batch.id).output_file_id
        read = [json.loads(text) for text in client.files.content(str(output)).text.splitlines()]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert Counter(each["custom_id"] for each in read) == Counter(f"r{i}" for i in range(LINES))
    results, runs = stored(tmp_path, batch.id)
    assert finished.items() <= results.items(), "a finished line keeps its result"
    assert len(results) == LINES
    assert Counter(run.messages[-2]["content"] for run in runs) == Counter(question(i) for i in range(LINES))
    times = Counter(asked(tmp_path))
    assert set(times) == {question(i) for i in range(LINES)}
    # What a kill interrupts is asked again: no more than was in flight, and what waited for its commit.
    assert sum(times.values()) <= LINES + len(KILL_AT) * 4 * CONCURRENCY


def counts(client: openai.OpenAI, batch_id: str) -> tuple[int, int, int]:
    now = client.batches.retrieve(batch_id).request_counts
    assert now is not None
    return now.completed, now.failed, now.total
