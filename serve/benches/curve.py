"""`nightschool bench curve | arrivals | gsm8k`: days and nights through the public API, unattended, night by night.

Resumable: a course lives in its own data folder under `DATA_DIR/bench/`, and the same command goes on. What it
writes there beside the service's own files: `report.json` and `learning_curve.png`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from agent.calculator import calculate
from evals.bench import BenchResult, Figure, result
from evals.chat import chat_suite
from evals.gate import GateConfig, pair_outcomes
from evals.plot import learning_curve
from evals.refusals import refusal_suite
from evals.report import Measured, build_report, write_report
from evals.stats import paired_difference, wilson
from evals.suites import (
    TRAINED_FAMILIES,
    EvalTask,
    Suite,
    reasoning_gym_suite,
    reasoning_gym_tasks,
    save_suite,
    tool_validity_suite,
    untrained_suite,
)
from evals.word_problems import WORKLOAD, word_problems
from memory.errors import ConfigError
from memory.night_records import Evaluation
from memory.records import Message, Task
from serve.client import Client, connect
from serve.days import Course, Timings, correct, correct_value, evaluations_in, live_day, live_night
from serve.settings import Settings

Connect = Callable[[], AbstractContextManager[Client]]

NIGHTS = 5
PER_DAY = 3
"""New tasks of each workload a day: a slow drip, so that there is a curve to see."""
ARRIVALS = (("chain_sum", "products"), ("gcd",), ("lcm",), ("letter_counting",), ("simple_equations",))
"""The workloads that each day of `arrivals` brings; the earlier ones go on."""
PER_ARRIVAL = 6
"""A day's tasks of each workload that is new; those that are not come once each."""
HELD_OUT = 12
HELD_OUT_OF_ARRIVALS = 24
"""Of each workload, where a night brings one new: three or four more of twelve prove nothing."""
HELD_OUT_SEED = 71_001
WORD_PROBLEMS = 24
"""A day's word problems; twice as many are held out."""


@dataclass(frozen=True)
class Morning:
    """What serves after a night, and how it did on the suites of that night's gate."""

    night: int
    verdict: str
    generation: int
    evaluations: list[Evaluation]

    def of(self, role: str) -> list[Evaluation]:
        """The evaluations of one role."""
        return [e for e in self.evaluations if e.role == role]


def curve(settings: Settings) -> BenchResult:
    """Five nights of three corrections a workload and day at most, on six workloads, with controls."""
    days = days_of(NIGHTS, PER_DAY, "curve")
    taught = frozenset(task.fingerprint for tasks in days.values() for task in tasks)
    held_out = reasoning_gym_suite(TRAINED_FAMILIES, HELD_OUT, HELD_OUT_SEED, "held_out", "held_out", exclude=taught)
    course = Course("curve", days.__getitem__, correct_value)
    return lived(settings, course, [held_out, *controls(taught)], NIGHTS)


def arrivals(settings: Settings) -> BenchResult:
    """Five nights on workloads that come one after the other; all six are examined from the first night on."""
    days = arriving(ARRIVALS, PER_ARRIVAL, "arrivals")
    taught = frozenset(task.fingerprint for tasks in days.values() for task in tasks)
    count = HELD_OUT_OF_ARRIVALS
    held_out = reasoning_gym_suite(TRAINED_FAMILIES, count, HELD_OUT_SEED, "held_out", "held_out", exclude=taught)
    course = Course("arrivals", days.__getitem__, correct_value)
    return lived(settings, course, [held_out, *controls(taught)], len(ARRIVALS))


def gsm8k(settings: Settings, data: Path | None) -> BenchResult:
    """Two nights on real word problems with the calculator. `data`: folder with GSM8K's train.jsonl and dev.jsonl."""
    if data is None:
        raise ConfigError(
            "bench gsm8k reads real word problems: name the folder with train.jsonl and dev.jsonl, --data"
        )
    learned = word_problems(data / "train.jsonl", calculate)[: 2 * WORD_PROBLEMS]
    asked = word_problems(data / "dev.jsonl", calculate)[: 2 * WORD_PROBLEMS]
    if len(learned) < 2 * WORD_PROBLEMS or not asked:
        raise ConfigError(f"{data} holds {len(learned)} usable word problems to learn, {2 * WORD_PROBLEMS} are needed")
    runs: dict[str, list[Message]] = {task.id: run for task, run in learned}

    def tasks(day: int) -> list[Task]:
        return [task for task, _ in learned[(day - 1) * WORD_PROBLEMS : day * WORD_PROBLEMS]]

    held_out = Suite(
        name="held_out", role="held_out", tasks=[EvalTask(key=f"{WORKLOAD}/{t.id}", task=t) for t, _ in asked]
    )
    course = Course("gsm8k", tasks, lambda task: runs.get(task.id))
    return lived(settings, course, [held_out, *controls(frozenset(t.fingerprint for t, _ in learned))], 2)


def days_of(count: int, per_day: int, source: str) -> dict[int, list[Task]]:
    """Day, from 1 -> its tasks, `per_day` of each workload; no question comes twice."""
    days: dict[int, list[Task]] = {}
    seen = frozenset[str]()
    for day in range(1, count + 1):
        # reasoning-gym adds a question's number to the seed: seeds that are near share questions.
        days[day] = reasoning_gym_tasks(TRAINED_FAMILIES, per_day, 1000 * day, source=source, exclude=seen)
        seen |= {task.fingerprint for task in days[day]}
    return days


def arriving(order: Sequence[Sequence[str]], per_arrival: int, source: str) -> dict[int, list[Task]]:
    """Day, from 1 -> `per_arrival` tasks of each workload that is new then and one of each that came before."""
    days: dict[int, list[Task]] = {}
    seen, known = frozenset[str](), set[str]()
    for day, new in enumerate(order, 1):
        days[day] = []
        for names, count in ((new, per_arrival), (known, 1)):
            families = {name: config for name, config in TRAINED_FAMILIES.items() if name in names}
            days[day] += reasoning_gym_tasks(families, count, 1000 * day, source=source, exclude=seen)
        seen |= {task.fingerprint for task in days[day]}
        known.update(new)
    return days


def controls(taught: frozenset[str]) -> list[Suite]:
    """What the model could do before, as the demo guards it."""
    return [untrained_suite(exclude=taught), tool_validity_suite(exclude=taught), chat_suite(), refusal_suite()]


def lived(settings: Settings, course: Course, suites: Sequence[Suite], nights: int) -> BenchResult:
    """Live the course in its own data folder, and measure what serves after each night."""
    console = Console()
    mine = home_of(settings, course.name, suites)
    # Few runs: all of them show what memory does, none measures what an item is worth.
    shown = {"NIGHTSCHOOL_RECALL__WITHHOLD_SHARE": "0"}
    reach: Connect = partial(connect, mine, partial(console.print, style="dim", highlight=False), shown)
    return live(reach, course, nights, mine, console)


def home_of(settings: Settings, name: str, suites: Sequence[Suite]) -> Settings:
    """The settings of a course in its own data folder, which holds these suites from the first call on."""
    mine = settings.model_copy(update={"data_dir": settings.data_dir / "bench" / name})
    for suite in suites:
        if not (path := mine.suites_dir / f"{suite.name}.jsonl").exists():
            save_suite(suite, path)
    return mine


def live(reach: Connect, course: Course, nights: int, settings: Settings, console: Console) -> BenchResult:
    """Days, corrections and nights through one service; then the figures, the plot and the report."""
    timings = Timings(settings.data_dir / "seconds.json")
    corrections, mornings = 0, list[Morning]()
    with reach() as client:
        with timings.timed("base"):
            mornings.append(Morning(0, "-", 0, base_evaluations(client)))
        for number in range(1, nights + 1):
            replies = live_day(client, course, number, console, timings)
            corrections += correct(client, course, number, replies, console, timings)
            mornings.append(morning(client, mornings[-1], live_night(client, number, console, timings)))
        engine = client.get("/readyz")["engine_name"]
    measured = [Measured(_title(m), m.of("held_out"), m.of("control")) for m in mornings]
    report = build_report(
        measured,
        decision=mornings[-1].verdict,
        reasons=[],
        corrections=corrections,
        seconds=timings.seconds,
        engine=engine,
        model=settings.model,
    )
    write_report(report, settings.data_dir / "report.json")
    learning_curve(report["rows"], settings.data_dir / "learning_curve.png", "Held-out success after each night")
    console.print(f"report.json and learning_curve.png: {settings.data_dir}", highlight=False)
    seconds = sum(timings.seconds.values())
    return result(
        course.name,
        {**figures(mornings, settings.gate), "corrections": corrections, "minutes": round(seconds / 60, 1)},
        {"nights_decided": f">= {nights}", "gain_low_points": "> 0", "worst_step_beyond_margin_points": "<= 0"},
    )


def base_evaluations(client: Client) -> list[Evaluation]:
    """Generation 0 on every suite, before anything was learned or remembered; measured once."""
    known = evaluations_in(client.get("/v1/evaluations", generation=0))
    found = [e for e in known if not e.memory and e.night_id is None]
    if not found:
        asked = {"model": "nightschool:gen-0", "suites": None, "memory": False}
        found = evaluations_in(client.post("/v1/evaluations", asked))
    return found


def morning(client: Client, before: Morning, job: dict[str, Any]) -> Morning:
    """What serves after a night that has ended. ConfigError when the night failed or was cancelled."""
    ended, number = job["nightschool"], before.night + 1
    decision = ended["decision"]
    if decision is None:
        if ended["status"] != "skipped":
            raise ConfigError(f"night {number} ended without a decision: {'; '.join(ended['reasons'])}")
        return Morning(number, "skipped", before.generation, before.evaluations)
    found = evaluations_in(client.get("/v1/evaluations", night=job["id"]))
    champion, candidate = min(e.generation for e in found), max(e.generation for e in found)
    serves = candidate if ended["status"] == "promoted" else champion
    return Morning(number, decision["verdict"], serves, [e for e in found if e.generation == serves])


def figures(mornings: Sequence[Morning], gate: GateConfig) -> dict[str, Figure]:
    """A line per night, the whole gain, and the worst step of a control suite from one morning to the next."""
    found: dict[str, Figure] = {}
    for each in mornings:
        name = f"night {each.night}" if each.night else "base, no memory"
        found[name] = f"{each.verdict}, generation {each.generation}: {_rate(each.of('held_out'))}"
        found[f"{name}: workloads"] = _workloads(each.of("held_out"))
        found[f"{name}: controls"] = ", ".join(f"{e.suite} {_rate([e])}" for e in each.of("control"))
        found[f"{name}: prompt tokens per task"] = _prompt_tokens(each.of("held_out"))
    first, last = mornings[0], mornings[-1]
    pairs = [
        p
        for a, b in zip(first.of("held_out"), last.of("held_out"), strict=True)
        for p in pair_outcomes(a, b, same_settings=False)
    ]
    gain = paired_difference(
        [a.success for a, _ in pairs], [b.success for _, b in pairs], strata=[a.workload for a, _ in pairs]
    )
    steps = [step for a, b in pairwise(mornings) for step in _falls(a, b).items()]
    beyond = [points - 100 * gate.margin(suite) for suite, points in steps]
    return {
        **found,
        "nights_decided": len(mornings) - 1,
        "promoted": sum(m.verdict == "promote" for m in mornings),
        "gain_points": round(gain.points, 1),
        "gain_low_points": round(gain.low, 1),
        "gain_high_points": round(gain.high, 1),
        "worst_control_step_points": round(max((points for _, points in steps), default=0.0), 1),
        "worst_step_beyond_margin_points": round(max([0.0, *beyond]), 1),
        "worst_control_since_base_points": round(max(_falls(first, last).values(), default=0.0), 1),
    }


def _falls(before: Morning, after: Morning) -> dict[str, float]:
    """By how many points each control suite fell (below 0: rose)."""
    was = {e.suite: e.success or 0.0 for e in before.of("control")}
    return {e.suite: 100 * (was[e.suite] - (e.success or 0.0)) for e in after.of("control") if e.suite in was}


def _title(each: Morning) -> str:
    return f"night {each.night}\n(gen {each.generation})" if each.night else "base"


def _rate(evaluations: Sequence[Evaluation]) -> str:
    outcomes = [o.success for e in evaluations for o in e.outcomes]
    if not outcomes:
        return "-"
    low, high = wilson(sum(outcomes), len(outcomes))
    return f"{sum(outcomes) / len(outcomes):.0%} [{low:.0%}, {high:.0%}] ({sum(outcomes)}/{len(outcomes)})"


def _workloads(evaluations: Sequence[Evaluation]) -> str:
    """Tasks done and asked, workload by workload."""
    asked, done = Counter[str](), Counter[str]()
    for outcome in (o for e in evaluations for o in e.outcomes):
        asked[outcome.workload] += 1
        done[outcome.workload] += outcome.success
    return ", ".join(f"{name} {done[name]}/{count}" for name, count in asked.items())


def _prompt_tokens(evaluations: Sequence[Evaluation]) -> int:
    spent = [o.prompt_tokens for e in evaluations for o in e.outcomes]
    return round(sum(spent) / len(spent)) if spent else 0
