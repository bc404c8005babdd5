"""What the CLI's commands do and print, apart from parsing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from evals.stats import wilson
from memory import escalations, runs, stats
from memory.errors import ConfigError
from memory.escalations import EscalationFigures
from memory.ledger import Ledger
from memory.night_records import GenerationStatus
from memory.records import FeedbackKind, MemoryKind, MemoryStatus, Purpose
from serve.batch import ResultsFile, read_tasks, run_lines
from serve.client import Client
from serve.settings import Settings
from serve.watching import standing
from serve.wiring import running_service

FINAL = ("succeeded", "failed", "cancelled")


def progress_bar(console: Console) -> Progress:
    """The progress bar of every long stage; a non-interactive terminal gets the finished bar only."""
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("[dim]{task.fields[note]}[/dim]"),
        console=console,
    )


def share(successes: int, n: int) -> str:
    """`31% [21, 43]  (22/72)`: success with its 95% Wilson interval."""
    if n == 0:
        return "-"
    low, high = wilson(successes, n)
    return f"{successes / n:4.0%} [{low:.0%}, {high:.0%}]  ({successes}/{n})"


def run_file(
    connect: Callable[[], AbstractContextManager[Client]],
    tasks: Path,
    output: Path,
    model: str,
    concurrency: int,
    console: Console,
) -> list[str]:
    """Run a tasks file; prints the outcomes and returns what was said of broken lines."""
    lines, broken = read_tasks(tasks)
    for sentence in broken:
        console.print(f"[yellow]{tasks}: {sentence}[/yellow]", highlight=False)
    results = ResultsFile(output, tasks)
    left = [(number, line) for number, line in lines if number not in results.done]
    if len(left) < len(lines):
        console.print(f"going on with {output}: {len(lines) - len(left)} of {len(lines)} are done")
    if left:
        with connect() as client, progress_bar(console) as bar:
            job = bar.add_task(tasks.name, total=len(lines), completed=len(lines) - len(left), note="")

            def landed(number: int, reply: dict[str, Any]) -> None:
                results.add(number, reply)
                bar.advance(job)

            run_lines(client, left, run_id=results.run_id, model=model, concurrency=concurrency, on_reply=landed)
    workloads = {number: line.workload for number, line in lines}
    print_outcomes({n: workloads[n] for n in results.done if n in workloads}, results.done, console)
    console.print(f"results: {output}")
    return broken


def print_outcomes(workloads: dict[int, str], replies: dict[int, dict[str, Any]], console: Console) -> None:
    """Outcomes by workload, with intervals."""
    table = Table("workload", "judged a success", "unjudged", "failed to run")
    for workload in sorted(set(workloads.values())):
        mine = [replies[n] for n, w in workloads.items() if w == workload]
        outcomes = [reply["nightschool"]["outcome"] for reply in mine if "nightschool" in reply]
        judged = [o["score"] >= 0.99 for o in outcomes if o is not None]
        errors = sum("error" in reply for reply in mine)
        table.add_row(workload, share(sum(judged), len(judged)), str(len(outcomes) - len(judged)), str(errors))
    console.print(table)


def feedback_value(**given: Any) -> tuple[FeedbackKind, Any]:
    """The one kind of feedback that was given; ConfigError for none or several."""
    said = {kind: value for kind, value in given.items() if value is not None}
    if len(said) != 1:
        raise ConfigError("say exactly one of --score, --correction, --hint, --comment, --over")
    ((kind, value),) = said.items()
    if kind == "correction" and value.startswith("@"):
        try:
            value = json.loads(Path(value[1:]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise ConfigError(f"cannot read OpenAI messages from {value[1:]}: {exc}") from exc
    return FeedbackKind(kind), {"over": value} if kind == "preference" else value


def follow_night(client: Client, job_id: str, console: Console) -> dict[str, Any]:
    """Show a night's events as they come; returns the job once it has ended."""
    seen: dict[str, Any] = {"order": "asc", "limit": 1000}
    with progress_bar(console) as bar:
        rows: dict[str, Any] = {}
        stage = bar.add_task("begins", total=None, note="")
        while True:
            job = client.get(f"/v1/fine_tuning/jobs/{job_id}")
            for event in client.get(f"/v1/fine_tuning/jobs/{job_id}/events", **seen)["data"]:
                seen["after"] = event["id"]
                bar.update(stage, description=event["stage"])
                _show(event, bar, rows)
            bar.update(stage, note=_left(job.get("nightschool", {}).get("progress") or {}))
            if job["status"] in FINAL:
                bar.remove_task(stage)
                return job
            time.sleep(0.5)


def print_resumed(job: dict[str, Any], asked: dict[str, Any], console: Console) -> None:
    """That an unfinished night goes on, and where; what was asked for a new one waits."""
    done = ", ".join(job["nightschool"]["stages"]) or "nothing yet"
    console.print(f"going on with {job['id']} (done: {done})", highlight=False)
    if asked:
        told = " and ".join(f"--{name}" for name in asked)
        console.print(f"[yellow]{told} is for a new night: ask again when this one has ended[/yellow]", highlight=False)


def _show(event: dict[str, Any], bar: Progress, rows: dict[str, Any]) -> None:
    data, name = event["data"], event["stage"]
    if name == "train" and data.get("steps"):
        _advance(bar, rows, "train", int(data.get("step") or 0), int(data["steps"]), _pace(data))
    elif data.get("total"):
        _advance(bar, rows, event["message"], data["done"], data["total"], "")
        if data.get("stage_total"):
            _advance(bar, rows, f"{name}, all in all", data["stage_done"], data["stage_total"], "")
    elif event["message"] != "started" and "event" not in data:
        bar.console.print(f"  [dim]{name:10}[/dim] {escape(event['message'])}", highlight=False)


def _left(progress: dict[str, Any]) -> str:
    """`about 40 s of it left, 3 min of the night`: as far as it is known."""
    known = [
        f"{_about(seconds)} {of}"
        for of, seconds in (("of it", progress.get("left_s")), ("of the night", progress.get("night_left_s")))
        if seconds is not None
    ]
    return f"left: about {', '.join(known)}" if known else ""


def _about(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _pace(data: dict[str, Any]) -> str:
    """`loss 0.312, 38926 tokens, 268 a second`: what a training event says of it."""
    told = [f"loss {data['loss']:.3f}"] if data.get("loss") is not None else []
    told += [f"{data['tokens']} tokens"] if data.get("tokens") else []
    told += [f"{data['tokens_per_s']:.0f} a second"] if data.get("tokens_per_s") else []
    return ", ".join(told)


def _advance(bar: Progress, rows: dict[str, Any], title: str, done: int, total: int, note: str) -> None:
    if title not in rows:
        rows[title] = bar.add_task(title, total=total, note="")
    bar.update(rows[title], completed=done, total=total, note=note)


def print_night(job: dict[str, Any], console: Console) -> None:
    """How a night ended and why."""
    ours = job["nightschool"]
    console.print(f"[bold]night {job['id']}: {ours['status']}[/bold]")
    for reason in ours["reasons"]:
        console.print(f"  - {escape(reason)}", highlight=False)
    console.print("  seconds: " + ", ".join(f"{k} {v}" for k, v in ours["stages"].items()), highlight=False)
    console.print(f"  report: {ours['report'] or 'nightschool report ' + job['id']}", highlight=False, soft_wrap=True)


def print_generations(ledger: Ledger, console: Console) -> None:
    """The generations and the log of what served."""
    table = Table(box=SIMPLE_HEAD)
    # An id that is cut or folded cannot be copied: a narrow terminal is not shown the nights.
    nights = console.width >= 110
    for name in ("generation", "status", "parent", "served as", "trained", *(["night"] if nights else [])):
        table.add_column(name, no_wrap=True)
    for g in ledger.generations():
        table.add_row(
            str(g.number),
            f"canary {g.metrics['canary']['share']:.0%}" if g.status is GenerationStatus.CANARY else g.status,
            str(g.parent) if g.parent is not None else "-",
            g.served_name,
            f"{g.created_at:%Y-%m-%d %H:%M}",
            *([g.night_id or "-"] if nights else []),
        )
    console.print(table)
    for figures in escalations.figures(ledger.database):
        console.print(f"generation {figures.generation}: {help_needed(figures)}", highlight=False)
    for p in ledger.promotions():
        console.print(
            f"{p.at:%Y-%m-%d %H:%M}  {p.from_generation} -> {p.to_generation} by {p.by}: {p.why}",
            highlight=False,
            markup=False,
        )


def help_needed(figures: EscalationFigures) -> str:
    """`12 of 300 requests to the teacher (4.0%), 9 right, 5120 tokens, $0.0031`."""
    share = "" if figures.rate is None else f" ({figures.rate:.1%})"
    cost = "" if figures.cost_usd is None else f", ${figures.cost_usd:.4f}"
    told = f"{figures.escalated} of {figures.requests} requests to the teacher{share}"
    return f"{told}, {figures.succeeded} right by their verifier, {figures.tokens} tokens{cost}"


def print_status(settings: Settings, ledger: Ledger, console: Console) -> None:
    """One screen: service, champion, what was recorded and remembered."""
    service = running_service(settings.data_dir)
    generations = ledger.generations()
    champion = ledger.champion() if generations else None
    nights = ledger.nights()
    served, items = runs.count(ledger.database, Purpose.SERVE), stats.counts(ledger.database, tenant=None)
    remembered = {kind: items.get((kind, MemoryStatus.ACTIVE), 0) for kind in MemoryKind}
    rows = {
        "service": f"{service['url']} (pid {service['pid']})" if service else "not running (nightschool serve)",
        "data": str(settings.data_dir.resolve()),
        "model": settings.model,
        "champion": f"generation {champion.number} ({champion.served_name})" if champion else "none yet",
        "runs": f"{served.runs}, {served.successes} successes",
        "feedback": str(runs.count_feedback(ledger.database)),
        "memory": f"{remembered[MemoryKind.RUN]} runs, {remembered[MemoryKind.PRINCIPLE]} principles",
        "last night": f"{nights[-1].id}: {nights[-1].status}" if nights else "none yet",
    }
    switches = ledger.promotions()
    if switches:
        last = switches[-1]
        rows["last switch"] = f"{last.from_generation} -> {last.to_generation} by {last.by}: {last.why}"
    for found in standing(ledger, settings.watch):
        rows["watch"] = f"generation {found['generation']} against {found['against']}: {found['told']}"
    if settings.teacher.model:
        mine = [f for f in escalations.figures(ledger.database) if champion and f.generation == champion.number]
        rows["teacher"] = f"{settings.teacher.model}; {help_needed(mine[0]) if mine else 'not needed by the champion'}"
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def print_evaluations(evaluations: Sequence[dict[str, Any]], console: Console) -> None:
    """Success by suite and workload with intervals."""
    table = Table("suite", "workload", "generation", "success")
    for evaluation in evaluations:
        by_workload: dict[str, list[bool]] = {}
        for outcome in evaluation["outcomes"]:
            by_workload.setdefault(outcome["workload"], []).append(outcome["score"] >= 0.99)
        for workload, results in by_workload.items():
            table.add_row(
                evaluation["suite"], workload, str(evaluation["generation"]), share(sum(results), len(results))
            )
    console.print(table)
    for evaluation in evaluations:
        if left_out := evaluation["unjudged"]:
            console.print(f"{evaluation['suite']}: verifiers failed at {len(left_out)} tasks, which do not count")
