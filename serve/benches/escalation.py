"""`nightschool bench escalation`: nobody corrects, a teacher takes what fails; how much of it each generation needs.

The teacher is an oracle behind real HTTP and the real LiteLLM, wrong on a tenth of the questions. Resumable, like
`bench curve`: the same command goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from rich.console import Console

from evals.bench import BenchResult, Figure, result
from evals.oracle_server import oracle_server
from evals.suites import TRAINED_FAMILIES, reasoning_gym_suite
from memory.records import Task
from serve.benches.curve import HELD_OUT, HELD_OUT_SEED, controls, days_of, home_of, live
from serve.client import connect
from serve.days import Course, Timings, live_day
from serve.settings import Settings

NIGHTS = 2
PER_DAY = 6
"""Tasks of each workload a day; half of a first day's fail, and are what is learned."""
WRONG = 0.1


def escalation(settings: Settings) -> BenchResult:
    """Two nights that learn from the teacher's verified runs, and a third day: how often each generation needed it."""
    console, days = Console(), days_of(NIGHTS + 1, PER_DAY, "escalation")
    taught = frozenset(task.fingerprint for tasks in days.values() for task in tasks)
    held_out = reasoning_gym_suite(TRAINED_FAMILIES, HELD_OUT, HELD_OUT_SEED, "held_out", "held_out", exclude=taught)
    mine = home_of(settings, "escalation", [held_out, *controls(taught)])
    course = Course("escalation", days.__getitem__, _nobody_corrects)
    say = partial(console.print, style="dim", highlight=False)
    with (
        oracle_server((task for tasks in days.values() for task in tasks), WRONG) as url,
        connect(mine, say, {"NIGHTSCHOOL_RECALL__WITHHOLD_SHARE": "0", **teacher_at(url)}) as client,
    ):
        lived = live(partial(nullcontext, client), course, NIGHTS, mine, console)
        live_day(client, course, NIGHTS + 1, console, Timings(mine.data_dir / "seconds.json"))
        generations = client.get("/v1/generations")["data"]
    return result("escalation", {**lived.figures, **helped(generations)}, {"rate_falls_to": "< 0.5"})


def teacher_at(url: str) -> dict[str, str]:
    """The settings of a teacher without a budget, as environment variables."""
    said = {"MODEL": "openai/oracle", "BASE_URL": url, "MAX_SHARE": "1"}
    return {f"NIGHTSCHOOL_TEACHER__{name}": value for name, value in said.items()}


def helped(generations: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """A line for each generation that served, and how the rate of the last compares with the first's (0..1)."""
    served = [e for g in sorted(generations, key=lambda g: g["number"]) if (e := g["escalation"]) and e["requests"]]
    figures: dict[str, Figure] = {
        f"generation {e['generation']}": f"{e['escalated']} of {e['requests']} to the teacher ({e['rate']:.0%}), "
        f"{e['predicted']} without an own try, {e['succeeded']} right by their verifier, {e['tokens']} tokens"
        for e in served
    }
    if len(served) > 1 and served[0]["rate"]:
        figures["rate_falls_to"] = round(served[-1]["rate"] / served[0]["rate"], 2)
    return figures


def _nobody_corrects(_task: Task) -> None:
    return None
