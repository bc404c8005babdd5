"""`nightschool demo`: three days and two nights on the real parts, told as they happen.

Real: the model, vLLM, the agent, memory, TRL training, the gate, the hot-load. Simulated: the user, whose
corrections come from an oracle over each task's reference; the screen says so. Every step is
idempotent, so the same command goes on after any interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from evals.chat import chat_suite
from evals.gate import GateDecision
from evals.page import render_page, write_page
from evals.plot import learning_curve
from evals.refusals import refusal_suite
from evals.report import Measured, Report, build_report, write_report
from evals.suites import (
    TRAINED_FAMILIES,
    Suite,
    load_suite,
    reasoning_gym_suite,
    reasoning_gym_tasks,
    save_suite,
    tool_validity_suite,
    untrained_suite,
)
from memory.night_records import Evaluation, TaskOutcome
from memory.records import Task
from serve.client import Client
from serve.commands import share
from serve.days import (
    Course,
    Timings,
    ask_all,
    correct,
    correct_value,
    evaluations_in,
    live_day,
    live_night,
    nights_so_far,
)
from serve.reports import row_name
from serve.settings import Settings

DAY_SEEDS = (101, 202, 303)


@dataclass(frozen=True)
class Plan:
    """How much is done: tasks per workload and day, and how much is measured."""

    days: tuple[int, int, int]
    held_out: int
    full: bool


QUICK = Plan(days=(7, 7, 4), held_out=16, full=False)
FULL = Plan(days=(7, 7, 10), held_out=60, full=True)


def run_demo(
    settings: Settings, connect: Callable[[], AbstractContextManager[Client]], console: Console, *, full: bool
) -> None:
    """The whole story. Ends normally whatever the gate decides."""
    plan, folder = FULL if full else QUICK, settings.data_dir / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    timings = Timings(folder / "seconds.json")
    suites = prepare_suites(settings.suites_dir, plan)
    held_out = next(s for s in suites if s.role == "held_out")
    course = Course("demo", partial(day_tasks, plan=plan), correct_value)
    console.rule("[bold]The model and the engine")
    with timings.timed("engine"):
        service = connect()
        client = service.__enter__()
    try:
        console.print(f"vLLM serves {settings.model}; the endpoint is {client.url}/v1", highlight=False)
        corrections = 0
        base: Measured | None = None
        for day in (1, 2, 3):
            replies = live_day(client, course, day, console, timings)
            if day == 1:
                base = first_exam(client, held_out, settings, console, timings)
            if day < 3:
                corrections += correct(client, course, day, replies, console, timings)
                live_night(client, day, console, timings)
        assert base is not None
        rows = [base, *measured_nights(client, suites), *(full_rows(client, suites, timings) if full else [])]
        finish(client, settings, rows, corrections, folder, console, timings)
    finally:
        service.__exit__(None, None, None)


def prepare_suites(folder: Path, plan: Plan) -> list[Suite]:
    """Held-out tasks (other seeds than any day's) and controls, frozen as files that the nights use."""
    taught = frozenset(task.fingerprint for day in (1, 2, 3) for task in day_tasks(day, plan))
    wanted = [
        reasoning_gym_suite(TRAINED_FAMILIES, plan.held_out, 70_001, "held_out", "held_out", exclude=taught),
        untrained_suite(exclude=taught),
        tool_validity_suite(exclude=taught),
        chat_suite(),
        refusal_suite(),
    ]
    for suite in wanted:
        path = folder / f"{suite.name}.jsonl"
        if not path.exists():
            save_suite(suite, path)
    return [load_suite(folder / f"{suite.name}.jsonl") for suite in wanted]


def day_tasks(day: int, plan: Plan) -> list[Task]:
    """A day's new tasks."""
    return reasoning_gym_tasks(TRAINED_FAMILIES, plan.days[day - 1], DAY_SEEDS[day - 1], source=f"demo-day-{day}")


def first_exam(client: Client, suite: Suite, settings: Settings, console: Console, timings: Timings) -> Measured:
    """Day 1's held-out exam through the endpoint, before anything was learned or remembered: the row `base`."""
    with timings.timed("day 1 exam"):
        tasks = [item.task for item in suite.tasks]
        replies = ask_all(client, tasks, "demo-exam-1", f"{len(tasks)} held-out tasks", console)
    outcomes = [
        TaskOutcome(
            key=item.key,
            workload=item.task.workload,
            score=replies[i]["nightschool"]["outcome"]["score"],
            trajectory_id=replies[i]["nightschool"]["trajectory_id"],
            prompt_tokens=replies[i]["usage"]["prompt_tokens"],
        )
        for i, item in enumerate(suite.tasks)
    ]
    evaluation = Evaluation(
        suite=suite.name,
        suite_hash=suite.hash,
        role=suite.role,
        generation=0,
        memory=False,
        settings=settings.agent.model_dump(mode="json"),
        outcomes=outcomes,
        seconds=timings.seconds["day 1 exam"],
    )
    console.print(f"held-out, generation 0: {share(sum(o.success for o in outcomes), len(outcomes))}", highlight=False)
    return Measured(name="base", held_out=[evaluation])


def measured_nights(client: Client, suites: Sequence[Suite]) -> list[Measured]:
    """What the gates measured, with memory, as served: one row per generation, the latest measurement of each."""
    hashes = {suite.hash for suite in suites}
    latest: dict[tuple[int, str], Evaluation] = {}
    for job in nights_so_far(client):
        for evaluation in evaluations_in(client.get("/v1/evaluations", night=job["id"])):
            if evaluation.suite_hash in hashes:
                latest[evaluation.generation, evaluation.suite] = evaluation
    return _rows(list(latest.values()), memory=True)


def full_rows(client: Client, suites: Sequence[Suite], timings: Timings) -> list[Measured]:
    """`--full`: every generation without memory as well."""
    found: list[Evaluation] = []
    with timings.timed("without memory"):
        for generation in client.get("/v1/generations")["data"]:
            stored = evaluations_in(client.get("/v1/evaluations", generation=generation["number"]))
            for suite in suites:
                same = [e for e in stored if e.suite_hash == suite.hash and not e.memory]
                if not same:
                    model = f"nightschool:gen-{generation['number']}"
                    body = {"model": model, "suites": [suite.name], "memory": False}
                    same = evaluations_in(client.post("/v1/evaluations", body))
                found.append(same[-1])
    return [row for row in _rows(found, memory=False) if row.name != "base"]


def _rows(evaluations: Sequence[Evaluation], memory: bool) -> list[Measured]:
    numbers = sorted({e.generation for e in evaluations})
    return [
        Measured(
            name=row_name(number, memory),
            held_out=[e for e in evaluations if e.generation == number and e.role == "held_out"],
            controls=[e for e in evaluations if e.generation == number and e.role == "control"],
        )
        for number in numbers
    ]


def finish(
    client: Client,
    settings: Settings,
    rows: list[Measured],
    corrections: int,
    folder: Path,
    console: Console,
    timings: Timings,
) -> None:
    """The table, the curve and the report."""
    nights = nights_so_far(client)
    generations = client.get("/v1/generations")["data"]
    champion = next(g for g in generations if g["status"] == "champion")
    rejected = {row_name(g["number"], memory=True) for g in generations if g["status"] == "rejected"}
    decisions = [(job["id"], GateDecision.model_validate(d)) for job in nights if (d := job["nightschool"]["decision"])]
    rows.sort(key=lambda row: (row.held_out[0].generation, row.held_out[0].memory))
    served = row_name(champion["number"], memory=True)
    report = build_report(
        rows,
        decision="promote"
        if champion["number"]
        else (decisions[-1][1].verdict if decisions else "not_enough_evidence"),
        reasons=[reason for _, decision in decisions for reason in decision.reasons],
        corrections=corrections,
        seconds=timings.seconds,
        engine=client.get("/readyz")["engine_name"],
        model=settings.model,
        before="base",
        after=served,
    )
    write_report(report, folder / "report.json")
    curve = learning_curve(_curve(report, rejected), folder / "learning_curve.png")
    intro = [
        "Three days and two nights. Corrections were simulated by an oracle; everything else is real.",
        "base: day 1, through the endpoint, memory empty. Other rows: the nights' gates, with memory as served.",
    ]
    write_page(render_page(report, intro=intro, curve=curve, decisions=decisions), folder / "report.html")
    console.rule("[bold]The learning curve")
    print_report(report, served, console)
    console.print(f"report: {folder / 'report.html'}   curve: {curve}", highlight=False)
    console.print(
        f"go on: nightschool --data-dir {settings.data_dir} serve   then any OpenAI client on "
        f"http://127.0.0.1:{settings.server.port}/v1, model nightschool",
        highlight=False,
    )


def _curve(report: Report, rejected: set[str]) -> list[Any]:
    """The rows of the curve: day 1, then every generation with memory; one that never served says so."""
    rows = [row for row in report["rows"] if row["name"].endswith("+memory") and row["name"] != "base+memory"]
    named = [{**row, "name": f"{row['name']}\n(rejected)"} if row["name"] in rejected else row for row in rows]
    return [report["rows"][0], *named]


def print_report(report: Report, served: str, console: Console) -> None:
    """The table with intervals, and where each figure comes from."""
    workloads = list(dict.fromkeys(name for row in report["rows"] for name in row["workloads"]))
    controls = list(dict.fromkeys(name for row in report["rows"] for name in row["controls"]))
    table = Table("", *(row["name"] + (" (serves)" if row["name"] == served else "") for row in report["rows"]))
    for kind, names in (("workloads", workloads), ("controls", controls)):
        for name in names:
            cells = [
                row["workloads"].get(name) if kind == "workloads" else row["controls"].get(name)
                for row in report["rows"]
            ]
            table.add_row(f"{name}{' (control)' if kind == 'controls' else ''}", *(_cell(cell) for cell in cells))
    totals = [_total(list(row["workloads"].values())) for row in report["rows"]]
    table.add_section()
    table.add_row("[bold]all held-out", *totals)
    console.print(table)
    gain = report["gain"]
    if gain is not None:
        console.print(
            f"[bold]gain as served: {gain['points']:+.1f} points[/bold] "
            f"(95% interval {gain['low']:+.1f} to {gain['high']:+.1f}) from {report['corrections']} corrections",
            highlight=False,
        )
    console.print("seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in report["seconds"].items()), highlight=False)


def _cell(rate: Any) -> str:
    return (
        "-"
        if rate is None or rate["success"] is None
        else f"{rate['success']:.0%} [{rate['low']:.0%}, {rate['high']:.0%}]"
    )


def _total(rates: Sequence[Any]) -> str:
    n = sum(rate["n"] for rate in rates)
    return share(round(sum((rate["success"] or 0) * rate["n"] for rate in rates)), n)
