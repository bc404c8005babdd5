"""A file of tasks, run through the endpoint: `nightschool run`, and the demo's days.

One JSON object per line: `messages` (or `prompt`), and optionally `id`, `workload`, `tools`, `reference`,
`verifier` ({"name", "args"}). A broken line is reported by number and the rest runs. Results are appended
as they land; the same command goes on after an interruption, since each line has an idempotency key.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memory.errors import ConfigError, EngineError, NightschoolError, boundary
from memory.jsonl import lines_of
from memory.records import Message, Task, VerifierSpec, content_hash, new_id
from serve.api.openai_types import check_message
from serve.client import Client


class TaskLine(BaseModel):
    """One line of a tasks file."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_\-]{1,100}$")
    messages: list[Message] = Field(min_length=1)
    workload: str = "default"
    tools: list[str] | None = None
    reference: str | None = None
    verifier: VerifierSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _prompt_is_short_for_messages(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("prompt"), str) and "messages" not in value:
            rest = {k: v for k, v in value.items() if k != "prompt"}
            return {**rest, "messages": [{"role": "user", "content": value["prompt"]}]}
        return value

    @model_validator(mode="after")
    def _messages_are_chat_messages(self) -> TaskLine:
        for i, message in enumerate(self.messages):
            check_message(message, f"messages[{i}]")
        return self


def line_of(task: Task) -> TaskLine:
    """A task as a line."""
    return TaskLine(
        id=task.id,
        messages=task.messages,
        workload=task.workload,
        tools=task.tools,
        reference=task.reference,
        verifier=task.verifier,
    )


def read_tasks(path: Path) -> tuple[list[tuple[int, TaskLine]], list[str]]:
    """(line number, task) of every good line, and one sentence for every broken one."""
    with boundary(ConfigError, f"cannot read {path}"):
        text = path.read_text(encoding="utf-8")
    good: list[tuple[int, TaskLine]] = []
    broken: list[str] = []
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        try:
            good.append((number, TaskLine.model_validate_json(line)))
        except ValidationError as exc:
            first = exc.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            broken.append(f"line {number}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}")
    return good, broken


def request_of(line: TaskLine, model: str) -> dict[str, Any]:
    """The chat completion that runs a line."""
    extension = {"workload": line.workload, "task_id": line.id, "tools": line.tools, "reference": line.reference}
    extension["verifier"] = line.verifier.model_dump(mode="json") if line.verifier else None
    return {"model": model, "messages": line.messages, "nightschool": extension}


def run_lines(
    client: Client,
    lines: Iterable[tuple[int, TaskLine]],
    *,
    run_id: str,
    model: str = "nightschool",
    concurrency: int = 32,
    on_reply: Callable[[int, dict[str, Any]], None],
) -> dict[int, dict[str, Any]]:
    """Send every line; replies by line number. A line the service refuses is a reply with `error`.

    `on_reply` is called once per line as it lands. When the service goes away the call ends with
    EngineError; the same call later goes on, and finished lines are not run again.
    """
    replies: dict[int, dict[str, Any]] = {}
    gone = threading.Event()
    lock = threading.Lock()

    def one(number: int, line: TaskLine) -> None:
        if gone.is_set():
            return
        key = f"{run_id}/{number}/{content_hash(line.model_dump(mode='json'))[:16]}"
        try:
            reply = client.post("/v1/chat/completions", request_of(line, model), key)
        except EngineError:
            gone.set()
            raise
        except NightschoolError as exc:
            reply = {"error": str(exc)}
        with lock:
            replies[number] = reply
            on_reply(number, reply)

    with ThreadPoolExecutor(max_workers=concurrency) as pool:
        futures = [pool.submit(one, number, line) for number, line in lines]
        try:
            for future in futures:
                future.result()
        except BaseException:
            gone.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return replies


class ResultsFile:
    """The results of one run of a tasks file, appended line by line; the first line names the run."""

    def __init__(self, path: Path, tasks: Path) -> None:
        self.path = path
        source = content_hash(tasks.read_text(encoding="utf-8"))
        self.done: dict[int, dict[str, Any]] = {}
        self.run_id = new_id("batch")
        if path.exists():
            rows = [json.loads(line) for line in lines_of(path.read_text(encoding="utf-8")) if line.endswith("}")]
            if rows and rows[0].get("tasks_sha256") == source:
                self.run_id = rows[0]["run"]
                self.done = {row["line"]: row["reply"] for row in rows[1:]}
            else:
                raise ConfigError(f"{path} holds the results of another tasks file; choose another --output")
        else:
            self._append({"run": self.run_id, "tasks": str(tasks), "tasks_sha256": source})

    def add(self, number: int, reply: dict[str, Any]) -> None:
        """One line's reply."""
        self._append({"line": number, "reply": reply})
        self.done[number] = reply

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
