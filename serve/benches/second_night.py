"""`nightschool bench forgetting`: a second night on other workloads, in variants, and what it keeps of the first.

Day 1 brings three workloads, night 1 learns them, day 2 brings three others; then the second night is lived once for
each arm, on a copy of all that. Every arm is examined on all six workloads and the controls, with memory as served and
without, since memory hides what weights forget. Resumable like the ablation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from evals.bench import BenchResult, Figure, result
from evals.suites import TRAINED_FAMILIES, Suite, reasoning_gym_suite, reasoning_gym_tasks, save_suite
from memory.errors import ConfigError
from memory.night_records import Evaluation
from memory.records import Task
from serve.benches.ablation import Arm, copied, home_of, one_engine, rows_of, service, show
from serve.benches.curve import controls
from serve.benches.exams import Scores, exams_of, rate, told
from serve.client import Client
from serve.days import Course, Timings, correct, correct_value, evaluations_in, live_day, live_night
from serve.settings import Settings

DAYS = (("chain_sum", "products", "simple_equations"), ("gcd", "lcm", "letter_counting"))
"""The workloads of each day. The base model does nearly nothing of the second day's: the other way round the first
night lost nine of 24 products, which nobody had taught yet, and the gate kept it out."""
PER_WORKLOAD = 7
HELD_OUT = 24
HELD_OUT_SEED = 73_001

ARMS = (
    Arm("as by default (champion, replay 0.5)"),
    Arm("without replay", {"NIGHT__REPLAY_SHARE": "0"}),
    Arm("replay 1.0", {"NIGHT__REPLAY_SHARE": "1"}),
    Arm("replay by retention", {"NIGHT__REPLAY_SCHEDULE": "retention"}),
    Arm("from the base, all experience", {"NIGHT__TRAIN_FROM": "base"}),
    Arm("with interpolation", {"TRAIN__INTERPOLATE": "[0.5, 0.7]"}),
    Arm("without replay, without rehearsal", {"NIGHT__REPLAY_SHARE": "0", "NIGHT__REHEARSAL": "0"}),
)


def forgetting(settings: Settings, only: Sequence[str] = ()) -> BenchResult:
    """Success on the first day's workloads and on the second's, after a second night in variants (`only` these)."""
    if unknown := set(only) - {arm.name for arm in ARMS}:
        raise ConfigError(f"no arm {sorted(unknown)[0]!r}; there are: {', '.join(arm.name for arm in ARMS)}")
    console, folder = Console(), settings.data_dir / "bench" / "forgetting"
    chosen = [arm for arm in ARMS if not only or arm.name in {ARMS[0].name, *only}]
    with one_engine(settings, folder) as (_, _, variables):
        taught = two_days(settings, folder / "taught", variables, console)
        before = Scores.model_validate_json((taught / "scores.json").read_text())
        found = [second_night(settings, folder, taught, arm, variables, console) for arm in chosen]
    figures: dict[str, Figure] = {}
    for scores in (before, *found):
        figures |= told(scores)
    show({s.arm: s for s in (before, *found)}, folder / "forgetting.png", "After a second night, by variant", console)
    kept = 100 * (rate(found[0].exams["first day, no memory"]) - rate(before.exams["first day, no memory"]))
    return result(
        "forgetting", {**figures, "first_day_kept_points": round(kept, 1)}, {"first_day_kept_points": ">= -10"}
    )


def tasks_of(day: int) -> list[Task]:
    """A day's new tasks, from 1."""
    families = {name: config for name, config in TRAINED_FAMILIES.items() if name in DAYS[day - 1]}
    return reasoning_gym_tasks(families, PER_WORKLOAD, 3000 + 100 * day, source="forgetting")


def suites() -> list[Suite]:
    """The exam: held-out tasks of both days' workloads, and the controls."""
    taught = frozenset(task.fingerprint for day in (1, 2) for task in tasks_of(day))
    held_out = reasoning_gym_suite(TRAINED_FAMILIES, HELD_OUT, HELD_OUT_SEED, "held_out", "held_out", exclude=taught)
    return [held_out, *controls(taught)]


def two_days(settings: Settings, folder: Path, variables: Mapping[str, str], console: Console) -> Path:
    """The data folder after day 1, its night and day 2, all corrected; lived once. ConfigError when night 1 promotes
    nothing: then there is nothing to forget."""
    finished = folder / "scores.json"
    if finished.exists():
        return folder
    for suite in suites():
        if not (path := folder / "suites" / f"{suite.name}.jsonl").exists():
            save_suite(suite, path)
    course, timings = Course("forgetting", tasks_of, correct_value), Timings(folder / "seconds.json")
    with service(settings, folder, variables, console) as client:
        count = correct(client, course, 1, live_day(client, course, 1, console, timings), console, timings)
        job = live_night(client, 1, console, timings)
        if job["nightschool"]["status"] != "promoted":
            raise ConfigError(f"night 1 promoted nothing: {'; '.join(job['nightschool']['reasons'])}")
        exams = examined(client, job["id"], "nightschool:gen-1")
        count += correct(client, course, 2, live_day(client, course, 2, console, timings), console, timings)
    scores = Scores(arm="after night 1", verdict="promote", corrections=count, rows=0, exams=exams)
    finished.write_text(scores.model_dump_json())
    return folder


def second_night(
    settings: Settings, folder: Path, taught: Path, arm: Arm, variables: Mapping[str, str], console: Console
) -> Scores:
    """One arm's second night on a copy of the two days; read back when it was lived before."""
    home = home_of(folder, arm.name)
    finished = home / "arm.json"
    if finished.exists():
        return Scores.model_validate_json(finished.read_text())
    copied(taught, home)
    console.rule(f"[bold]{arm.name}")
    with service(settings, home, {**variables, **arm.settings}, console) as client:
        job = live_night(client, 2, console, Timings(home / "seconds.json"))
        if job["nightschool"]["decision"] is None:
            why = "; ".join(job["nightschool"]["reasons"])
            raise ConfigError(f"the night of {arm.name!r} came to no decision: {why}; remove {home} to try it again")
        exams = examined(client, job["id"], f"nightschool:gen-{job['nightschool']['candidate']}")
    scores = Scores(
        arm=arm.name,
        verdict=job["nightschool"]["decision"]["verdict"],
        corrections=json.loads((taught / "scores.json").read_text())["corrections"],
        rows=rows_of(home, job["id"]),
        exams=exams,
    )
    finished.write_text(scores.model_dump_json())
    return scores


def examined(client: Client, night: str, model: str) -> dict[str, tuple[int, int]]:
    """A night's candidate on every suite: as the night's gate saw it, and its held-out tasks without memory."""
    found = evaluations_in(client.get("/v1/evaluations", night=night))
    mine = [e for e in found if e.generation == max(e.generation for e in found)]
    asked = {"model": model, "suites": ["held_out"], "memory": False}
    bare = evaluations_in(client.post("/v1/evaluations", asked))
    exams = by_day(mine) | {f"{name}, no memory": count for name, count in by_day(bare).items()}
    return exams | exams_of([e for e in mine if e.role == "control"])


def by_day(evaluations: Sequence[Evaluation]) -> dict[str, tuple[int, int]]:
    """Successes and held-out tasks of each day's workloads, and of both."""
    outcomes = [o for e in evaluations if e.role == "held_out" for o in e.outcomes]
    named = {"held out": [*DAYS[0], *DAYS[1]], "first day": DAYS[0], "second day": DAYS[1]}
    return {
        name: (sum(o.success for o in outcomes if o.workload in of), sum(o.workload in of for o in outcomes))
        for name, of in named.items()
    }
