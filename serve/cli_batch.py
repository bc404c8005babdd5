"""`nightschool batch submit | status | results | cancel | list`: OpenAI's batches at the command line."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from memory.errors import ConfigError, boundary

if TYPE_CHECKING:
    from serve.client import Client

app = typer.Typer(help="Run files of requests or tasks as batches.", no_args_is_help=True)
out = Console()
err = Console(stderr=True)

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "cancelled", "expired")
POLL_S = 0.5


@app.command()
def submit(
    context: typer.Context,
    tasks: Annotated[Path, typer.Argument(help="OpenAI batch JSONL, or task lines as `nightschool run` reads them")],
    watch: Annotated[bool, typer.Option("--watch", help="stay until it has ended, with a progress bar")] = False,
    model: Annotated[str | None, typer.Option(help="for task lines (default: nightschool)")] = None,
) -> None:
    """Upload a file and begin a batch; prints its id. It goes on by itself for as long as a service runs."""
    from serve.wiring import running_service

    settings = _settings(context)
    alone = running_service(settings.data_dir) is None
    with _requests(tasks, model) as (path, endpoint), _connect(settings) as client:
        uploaded = client.upload(path, tasks.name, "batch")
        body = {"input_file_id": uploaded["id"], "endpoint": endpoint, "completion_window": "24h"}
        batch = client.post("/v1/batches", body)
        out.print(batch["id"], highlight=False)
        if watch:
            _finished(_watch(client, batch["id"]))
        elif alone:
            err.print("no service is running: the batch goes on when one does (`nightschool serve`)")


@app.command()
def status(context: typer.Context, batch_id: str) -> None:
    """How far a batch is, and why it failed."""
    with _connect(_settings(context)) as client:
        _describe(client.get(f"/v1/batches/{batch_id}"))


@app.command()
def results(
    context: typer.Context,
    batch_id: str,
    output: Annotated[Path | None, typer.Option(help="write the lines there (default: to the screen)")] = None,
) -> None:
    """The lines of an ended batch's output and error files, as OpenAI writes them."""
    with _connect(_settings(context)) as client:
        batch = client.get(f"/v1/batches/{batch_id}")
        if batch["status"] not in ENDED:
            raise ConfigError(f"batch {batch_id} is {batch['status']}: its results come when it has ended")
        with boundary(ConfigError, f"cannot write {output}"), _opened(output) as file:
            scores, unjudged = _write_results(client, batch, file)
    _summarize(batch, scores, unjudged)
    if output is not None:
        err.print(f"results: {output}")


@app.command()
def cancel(context: typer.Context, batch_id: str) -> None:
    """Begin no further line; what was finished can be fetched."""
    with _connect(_settings(context)) as client:
        _describe(client.post(f"/v1/batches/{batch_id}/cancel", {}))


@app.command("list")
def show(context: typer.Context, limit: Annotated[int, typer.Option(min=1, max=100)] = 20) -> None:
    """The newest batches."""
    with _connect(_settings(context)) as client:
        found = client.get("/v1/batches", limit=limit)["data"]
    table = Table("id", "status", "endpoint", "completed", "failed", "lines", "created")
    for batch in found:
        counts = batch["request_counts"]
        numbers = [str(counts[name]) for name in ("completed", "failed", "total")]
        table.add_row(batch["id"], batch["status"], batch["endpoint"], *numbers, _moment(batch["created_at"]))
    out.print(table)


def _settings(context: typer.Context) -> Any:
    from serve.settings import load_settings

    return load_settings(**context.obj)


def _connect(settings: Any) -> AbstractContextManager[Client]:
    from serve.client import connect

    return connect(settings, _once())


def _once() -> Callable[[str], None]:
    """Says each change of state once."""
    said = ""

    def say(text: str) -> None:
        nonlocal said
        if text != said:
            said = text
            err.print(f"[dim]{text}[/dim]")

    return say


@contextmanager
def _requests(tasks: Path, model: str | None) -> Iterator[tuple[Path, str]]:
    """(a file of OpenAI batch lines, the endpoint they go to), whichever of the two forms `tasks` has."""
    first = _first_line(tasks)
    if "custom_id" in first:
        if model is not None:
            raise ConfigError(f"{tasks} names its models itself: leave --model out")
        yield tasks, str(first.get("url", CHAT))
        return
    from serve.batch import read_tasks, request_of

    lines, broken = read_tasks(tasks)
    if broken:
        raise ConfigError(f"{len(broken)} broken line(s) in {tasks}, nothing was submitted: {broken[0]}")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for number, line in lines:
            body = request_of(line, model or "nightschool")
            named = {"custom_id": line.id or f"line-{number}", "method": "POST", "url": CHAT, "body": body}
            file.write(json.dumps(named) + "\n")
        file.flush()
        yield Path(file.name), CHAT


def _first_line(tasks: Path) -> dict[str, Any]:
    with boundary(ConfigError, f"cannot read {tasks}"), tasks.open(encoding="utf-8") as file:
        first = next((line for line in file if line.strip()), None)
    if first is None:
        raise ConfigError(f"{tasks} is empty")
    try:
        value = json.loads(first)
    except ValueError as exc:
        raise ConfigError(f"{tasks}: the first line is no JSON: {exc}") from exc
    return value if isinstance(value, dict) else {}


def _watch(client: Client, batch_id: str) -> dict[str, Any]:
    """The batch once it has ended; until then a bar."""
    from serve.commands import progress_bar

    with progress_bar(err) as bar:
        job = bar.add_task("lines", total=None, note="")
        while True:
            batch = client.get(f"/v1/batches/{batch_id}")
            counts = batch["request_counts"]
            note = batch["status"] + (f", {counts['failed']} failed" if counts["failed"] else "")
            done = counts["completed"] + counts["failed"]
            # While it is validated the number of lines still grows.
            total = None if batch["status"] == "validating" else counts["total"]
            bar.update(job, total=total, completed=done, note=note)
            if batch["status"] in ENDED:
                return batch
            time.sleep(POLL_S)


def _finished(batch: dict[str, Any]) -> None:
    _describe(batch)
    if batch["status"] == "failed":
        raise ConfigError(f"batch {batch['id']} failed")


def _describe(batch: dict[str, Any]) -> None:
    counts = batch["request_counts"]
    table = Table(show_header=False, box=None)
    table.add_row("batch", batch["id"])
    table.add_row("status", batch["status"])
    table.add_row("endpoint", batch["endpoint"])
    table.add_row("lines", f"{counts['total']}: {counts['completed']} completed, {counts['failed']} failed")
    for name in ("created_at", "in_progress_at", "completed_at", "failed_at", "expired_at", "cancelled_at"):
        if batch[name]:
            table.add_row(name.removesuffix("_at"), _moment(batch[name]))
    for name in ("output_file_id", "error_file_id"):
        if batch[name]:
            table.add_row(name.removesuffix("_file_id"), batch[name])
    out.print(table)
    for error in (batch["errors"] or {"data": []})["data"]:
        where = f"line {error['line']}: " if error["line"] else ""
        err.print(f"  {where}{error['message']} ({error['code']})", style="yellow", highlight=False, markup=False)


def _moment(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@contextmanager
def _opened(output: Path | None) -> Iterator[IO[str]]:
    if output is None:
        yield sys.stdout
        return
    with output.open("w", encoding="utf-8") as file:
        yield file


def _write_results(client: Client, batch: dict[str, Any], file: IO[str]) -> tuple[list[float], int]:
    """Copy both files' lines; returns the scores of the judged runs and the number of the others."""
    scores: list[float] = []
    unjudged = 0
    for name in ("output_file_id", "error_file_id"):
        if batch[name] is None:
            continue
        for line in client.lines(f"/v1/files/{batch[name]}/content"):
            file.write(line + "\n")
            if name == "output_file_id":
                outcome = json.loads(line)["response"]["body"].get("nightschool", {}).get("outcome")
                if outcome is None:
                    unjudged += 1
                else:
                    scores.append(outcome["score"])
    return scores, unjudged


def _summarize(batch: dict[str, Any], scores: list[float], unjudged: int) -> None:
    from serve.commands import share

    counts = batch["request_counts"]
    unrun = counts["total"] - counts["completed"] - counts["failed"]
    table = Table("judged a success", "unjudged", "failed", "not run")
    judged = share(sum(score >= 0.99 for score in scores), len(scores))
    table.add_row(judged, str(unjudged), str(counts["failed"]), str(unrun))
    err.print(table)
