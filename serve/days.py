"""A day and a night of a course that is lived through the public API: the demo's and the learning benches' steps.

Real: everything but the user, whose corrections come from an oracle over each task's reference. Every step
is idempotent (requests carry keys, nights are counted), so whoever calls them goes on after any interruption.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from agent.calculator import calculate
from evals.oracle import oracle
from memory.errors import ToolError
from memory.night_records import Evaluation
from memory.records import Message, Task
from serve.batch import line_of, run_lines
from serve.client import Client
from serve.commands import follow_night, print_night, print_outcomes, progress_bar


@dataclass(frozen=True)
class Course:
    """What is taught: each day's new tasks, and what a user who knows the answers would have done."""

    name: str
    """Begins the ids of its runs and names the author of its corrections."""
    tasks: Callable[[int], list[Task]]
    """Day, from 1 -> its new tasks, the same at every call."""
    better: Callable[[Task], list[Message] | None]
    """A task's right run as OpenAI messages; None where nobody knows one."""


class Timings:
    """Seconds per stage, kept in a file so that what is resumed adds up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - started
            self._path.write_text(json.dumps(self.seconds))


def ask_all(
    client: Client, tasks: Sequence[Task], run_id: str, title: str, console: Console
) -> dict[int, dict[str, Any]]:
    """Run tasks through the public endpoint under the one model name, with a progress bar."""
    with progress_bar(console) as bar:
        job = bar.add_task(title, total=len(tasks), note="")
        return run_lines(
            client,
            [(i, line_of(task)) for i, task in enumerate(tasks)],
            run_id=run_id,
            on_reply=lambda _n, _r: bar.advance(job),
        )


def live_day(client: Client, course: Course, day: int, console: Console, timings: Timings) -> dict[int, dict[str, Any]]:
    """New tasks through the endpoint; prints the outcomes and returns the replies by the task's place."""
    console.rule(f"[bold]Day {day}")
    tasks = course.tasks(day)
    with timings.timed(f"day {day}"):
        replies = ask_all(client, tasks, f"{course.name}-day-{day}", f"{len(tasks)} new tasks", console)
    print_outcomes({i: task.workload for i, task in enumerate(tasks)}, replies, console)
    served = {reply["nightschool"]["served_by"] for reply in replies.values() if "nightschool" in reply}
    console.print(f"model name: nightschool; answered by: {', '.join(sorted(served))}", highlight=False)
    return replies


def correct(
    client: Client, course: Course, day: int, replies: dict[int, dict[str, Any]], console: Console, timings: Timings
) -> int:
    """Where the agent failed, the oracle plays the user through the feedback API; returns how often."""
    failed = [
        (better, replies[i]["id"])
        for i, task in enumerate(course.tasks(day))
        if "nightschool" in replies[i] and replies[i]["nightschool"]["outcome"]["score"] < 0.99
        if (better := course.better(task)) is not None
    ]
    with timings.timed(f"corrections {day}"):
        for better, response in failed:
            said = {"response_id": response, "kind": "correction", "value": better, "author": f"{course.name}-oracle"}
            client.post("/v1/feedback", said)
    console.print(
        f"[yellow]simulated user:[/yellow] {len(failed)} corrections from an oracle over the tasks' references, "
        "sent to /v1/feedback (everything else here is real)",
        highlight=False,
    )
    return len(failed)


def correct_value(task: Task) -> list[Message] | None:
    """The oracle's better run of a reasoning-gym task; None for a task that has none (reasoning-gym makes `0 = 0`)."""
    try:
        return oracle(task, calculate)
    except ToolError:
        return None


def live_night(client: Client, number: int, console: Console, timings: Timings) -> dict[str, Any]:
    """The course's night `number`: started once, followed to its end, however often it is called; returns the job."""
    console.rule(f"[bold]Night {number}")
    nights = nights_so_far(client)
    job = nights[number - 1] if len(nights) >= number else client.post("/v1/fine_tuning/jobs", {})
    ended = follow_night(client, job["id"], console)
    print_night(ended, console)
    for stage, seconds in ended["nightschool"]["stages"].items():
        timings.seconds[f"night {number} {stage}"] = seconds
    return ended


def evaluations_in(reply: dict[str, Any]) -> list[Evaluation]:
    """The records in a list of `/v1/evaluations`, which tells callers other than the operator a summary besides."""
    return [Evaluation.model_validate({k: v for k, v in e.items() if k != "summary"}) for e in reply["data"]]


def nights_so_far(client: Client) -> list[dict[str, Any]]:
    """All nights so far, oldest first."""
    return list(reversed(client.get("/v1/fine_tuning/jobs")["data"]))
