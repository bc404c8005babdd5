"""`nightschool bench ablation | samples`: one night in many variants, on the same day and under the same exam.

Each arm is a whole night through the public API, in a data folder of its own under `DATA_DIR/bench/`, with one
setting changed. One engine serves all arms. Resumable: an arm that is done is read back, not lived again. A recipe that
another package adds is an arm by itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from distill.recipes import installed, load
from evals.bench import BenchResult, Figure, result
from evals.plot import variants
from evals.suites import TRAINED_FAMILIES, Suite, load_suite, reasoning_gym_suite, reasoning_gym_tasks, save_suite
from memory.errors import ConfigError
from memory.jsonl import lines_of
from memory.records import Task
from serve.benches.curve import HELD_OUT, HELD_OUT_SEED, controls
from serve.benches.engine import live_engine
from serve.benches.exams import Scores, examine, exams_of, rate, told
from serve.benches.train import corrected, stock
from serve.client import Client, connect
from serve.days import Course, Timings, correct, correct_value, evaluations_in, live_day, live_night
from serve.settings import Settings
from serve.wiring import INFO_FILE, LOCK_FILE

if TYPE_CHECKING:
    from serve.engine import Engine

PER_WORKLOAD = 7
SAMPLES = (1, 2, 4, 7)
GOAL = 0.8
VARIABLE = "NIGHTSCHOOL_"
STOCK = "stock TRL SFT"


@dataclass(frozen=True)
class Arm:
    """A variant of the night: what it is called, and the settings that make it."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """Names as in the environment, without the prefix."""
    per_workload: int = PER_WORKLOAD
    bare_too: bool = False
    """The candidate is examined without memory as well."""


ARMS = (
    Arm("full", bare_too=True),
    Arm("without successes", {"NIGHT__RECIPES": '["corrections"]'}),
    Arm("without corrections", {"NIGHT__RECIPES": '["successes"]'}),
    Arm("with weighted_successes", {"NIGHT__RECIPES": '["weighted_successes", "corrections"]'}),
    Arm("with intervene", {"NIGHT__RECIPES": '["successes", "corrections", "intervene"]'}),
    Arm("with revise", {"NIGHT__RECIPES": '["successes", "corrections", "revise"]'}),
    Arm("with contrast (DPO after SFT)", {"TRAIN__DPO_EPOCHS": "2"}),
    Arm(
        "with contrast_runs (DPO after SFT)",
        {"NIGHT__RECIPES": '["successes", "corrections", "contrast_runs"]', "TRAIN__DPO_EPOCHS": "2"},
    ),
    Arm(
        "with contrast_runs, length-regularised",
        {
            "NIGHT__RECIPES": '["successes", "corrections", "contrast_runs"]',
            "TRAIN__DPO_EPOCHS": "2",
            "TRAIN__DPO_LENGTH_ALPHA": "0.01",
        },
    ),
    Arm(
        "with dissatisfaction (fresh samples, DPO after SFT)",
        {"NIGHT__RECIPES": '["successes", "corrections", "dissatisfaction"]', "TRAIN__DPO_EPOCHS": "2"},
    ),
    Arm("without rehearsal", {"NIGHT__REHEARSAL": "0"}),
    Arm("with interpolation", {"TRAIN__INTERPOLATE": "[0.5, 0.7]"}),
    Arm("ten blocks trained", {"TRAIN__LAYERS": "10"}),
    Arm("twenty blocks trained", {"TRAIN__LAYERS": "20"}),
    Arm("standard profile (all blocks trained)", {"TRAIN__PROFILE": "standard"}),
    Arm("with practice (24 tasks tried again)", {"NIGHT__PRACTICE": "24"}),
    Arm("two past runs recalled", {"RECALL__RUNS": "2"}, bare_too=True),
    Arm("trained without the recalled block", {"DATASET__RECALLED": "false"}, bare_too=True),
    Arm("share without memory: none", {"DATASET__REPEAT_WITHOUT": "0"}, bare_too=True),
    Arm(
        "internalise (only recalled successes without memory)",
        {"NIGHT__RECIPES": '["successes", "corrections", "internalise"]', "DATASET__REPEAT_WITHOUT": "0"},
        bare_too=True,
    ),
    Arm("share without memory: a third", {"DATASET__REPEAT_WITHOUT": "0.5"}, bare_too=True),
)
"""`full` is the default night: half of its rows show no memory. Opt-in recipes are arms where the day has something for
them; the other ones need praise, preferences, a teacher or practice."""


def arms(settings: Settings, only: Sequence[str] = ()) -> list[Arm]:
    """The nights by name, those of installed recipes included: all, or the default one and those that `only` names.

    `only` may name the baseline as well, which is no night. ConfigError for a name that is none, and for a recipe that
    cannot be loaded.
    """
    added = installed()
    load(added)
    recipes = {name: json.dumps([*settings.night.recipes, name]) for name in added}
    known = [*ARMS, *(Arm(f"with {name}", {"NIGHT__RECIPES": named}) for name, named in recipes.items())]
    names = [*(arm.name for arm in known), STOCK]
    if unknown := set(only) - set(names):
        raise ConfigError(f"no arm {sorted(unknown)[0]!r}; there are: {', '.join(names)}")
    return [arm for arm in known if not only or arm.name in {"full", *only}]


def ablation(settings: Settings, only: Sequence[str] = ()) -> BenchResult:
    """Each recipe off, memory only, weights only, both, several shares of memory in training, and stock TRL's SFT.

    `only`: these arms, beside the default night and its memory alone.
    """
    console, folder = Console(), settings.data_dir / "bench" / "ablation"
    chosen = arms(settings, only)
    with one_engine(settings, folder) as (engine, base, variables):
        taught = day_one(settings, folder / "taught", PER_WORKLOAD, variables, console)
        found = [night_of(settings, folder, taught, arm, variables, console) for arm in chosen]
        stock = stock_arm(settings, folder, taught, engine, base, console) if not only or STOCK in only else None
    memory_only = [
        Scores(arm=name, verdict="-", corrections=0, rows=0, exams=memory_exams(home_of(folder, scores.arm)))
        for name, arm in (("memory only", "full"), ("memory only, two past runs", "two past runs recalled"))
        for scores in found
        if scores.arm == arm
    ]
    measured = [*memory_only, *found, *([stock] if stock else [])]
    figures: dict[str, Figure] = {}
    for scores in measured:
        figures |= told(scores)
    show({s.arm: s for s in measured}, folder / "ablation.png", "Held-out success after one night, by variant", console)
    if stock is None:
        return result("ablation", figures, {})
    ours, plain = found[0].exams["held out"], stock.exams["held out"]
    return result(
        "ablation",
        {**figures, "full_over_stock_points": round(100 * (rate(ours) - rate(plain)), 1)},
        {"full_over_stock_points": "> 0"},
    )


def samples(settings: Settings) -> BenchResult:
    """Held-out success after one night with 1, 2, 4 and 7 tasks of each workload, corrected where they failed."""
    console, folder = Console(), settings.data_dir / "bench" / "samples"
    figures: dict[str, Figure] = {}
    measured: dict[str, Scores] = {}
    enough: int | None = None
    with one_engine(settings, folder) as (_, _, variables):
        for count in SAMPLES:
            taught = day_one(settings, folder / f"taught-{count}", count, variables, console)
            few = Arm(f"{count} a workload", {"NIGHT__MIN_EXAMPLES": "1"}, per_workload=count)
            scores = night_of(settings, folder, taught, few, variables, console)
            figures |= told(scores)
            measured[f"{scores.corrections} corrections"] = scores
            if enough is None and rate(scores.exams["held out"]) >= GOAL:
                enough = scores.corrections
    show(measured, folder / "samples.png", "Held-out success after one night, by corrections", console)
    reached: Figure = "not reached" if enough is None else enough
    return result("samples", {**figures, f"corrections_to_{GOAL:.0%}": reached}, {})


@contextmanager
def one_engine(settings: Settings, folder: Path) -> Iterator[tuple[Engine, Path, dict[str, str]]]:
    """An engine for all arms: it, the base model's folder, and the variables that make a service use it."""
    from anyio.from_thread import start_blocking_portal

    folder.mkdir(parents=True, exist_ok=True)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(live_engine(settings, folder)) as (engine, base),
    ):
        address = {"ENGINE__URL": engine.base_url, "ENGINE__API_KEY": engine.api_key}
        yield engine, base, {**address, "RECALL__WITHHOLD_SHARE": "0"}


@contextmanager
def service(settings: Settings, folder: Path, changed: Mapping[str, str], console: Console) -> Iterator[Client]:
    """A service on `folder` with settings changed. ConfigError when the user's environment overrides one of them."""
    variables = {f"{VARIABLE}{name}": value for name, value in changed.items()}
    if clash := sorted(variables.keys() & os.environ.keys()):
        raise ConfigError(f"this bench sets {', '.join(clash)} itself; unset it first")
    mine = settings.model_copy(update={"data_dir": folder})
    with connect(mine, partial(console.print, style="dim", highlight=False), variables) as client:
        yield client


def day_one(
    settings: Settings, folder: Path, per_workload: int, variables: Mapping[str, str], console: Console
) -> Path:
    """The data folder after day 1 and its corrections; lived once, copied by every arm."""
    finished = folder / "corrections.json"
    if not finished.exists():
        course = Course("ablation", lambda _day: taught_tasks(per_workload), correct_value)
        for suite in suites():
            if not (path := folder / "suites" / f"{suite.name}.jsonl").exists():
                save_suite(suite, path)
        timings = Timings(folder / "seconds.json")
        with service(settings, folder, variables, console) as client:
            replies = live_day(client, course, 1, console, timings)
            count = correct(client, course, 1, replies, console, timings)
        finished.write_text(json.dumps(count))
    return folder


def taught_tasks(per_workload: int) -> list[Task]:
    """The day's tasks; a smaller day is the beginning of a larger one."""
    return reasoning_gym_tasks(TRAINED_FAMILIES, per_workload, 1101, source="ablation")


def suites() -> list[Suite]:
    """The exam: held-out tasks of all workloads, and the controls."""
    taught = frozenset(task.fingerprint for task in taught_tasks(max(*SAMPLES, PER_WORKLOAD)))
    held_out = reasoning_gym_suite(TRAINED_FAMILIES, HELD_OUT, HELD_OUT_SEED, "held_out", "held_out", exclude=taught)
    return [held_out, *controls(taught)]


def night_of(
    settings: Settings, folder: Path, taught: Path, arm: Arm, variables: Mapping[str, str], console: Console
) -> Scores:
    """One arm's night on a copy of the taught folder; read back when it was lived before."""
    home = home_of(folder, arm.name)
    finished = home / "scores.json"
    if finished.exists():
        return Scores.model_validate_json(finished.read_text())
    copied(taught, home)
    console.rule(f"[bold]{arm.name}")
    with service(settings, home, {**variables, **arm.settings}, console) as client:
        job = live_night(client, 1, console, Timings(home / "seconds.json"))
        if job["nightschool"]["decision"] is None:
            why = "; ".join(job["nightschool"]["reasons"])
            raise ConfigError(f"the night of {arm.name!r} came to no decision: {why}; remove {home} to try it again")
        found = evaluations_in(client.get("/v1/evaluations", night=job["id"]))
        exams = exams_of([e for e in found if e.generation == max(e.generation for e in found)])
        if arm.bare_too:
            asked = {"model": "nightschool:gen-1", "suites": ["held_out"], "memory": False}
            bare = evaluations_in(client.post("/v1/evaluations", asked))
            exams |= {f"{name}, no memory": count for name, count in exams_of(bare).items()}
    scores = Scores(
        arm=arm.name,
        verdict=job["nightschool"]["decision"]["verdict"],
        corrections=json.loads((home / "corrections.json").read_text()),
        rows=rows_of(home, job["id"]),
        exams=exams,
    )
    finished.write_text(scores.model_dump_json())
    return scores


def home_of(folder: Path, arm: str) -> Path:
    """The data folder of an arm."""
    return folder / arm.replace(" ", "-").replace(":", "").replace(",", "")


def copied(taught: Path, home: Path) -> None:
    """Make a data folder that has lived what `taught` has; nothing happens where there is one."""
    if not home.exists():
        draft = home.with_name(f"{home.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(taught, draft, ignore=shutil.ignore_patterns(LOCK_FILE, INFO_FILE, "*.log"))
        draft.rename(home)


def rows_of(home: Path, night: str) -> int:
    """Rows of a night's SFT file."""
    return len(lines_of((home / "nights" / night / "dataset" / "sft.jsonl").read_text(encoding="utf-8")))


def memory_exams(home: Path) -> dict[str, tuple[int, int]]:
    """Generation 0 with the memory that an arm's night left: what its gate measured as the champion."""
    from memory.ledger import Ledger

    ledger = Ledger.open(f"sqlite:///{home / 'ledger.sqlite'}")
    try:
        return exams_of([e for e in ledger.evaluations(generation=0) if e.memory])
    finally:
        ledger.close()


def stock_arm(settings: Settings, folder: Path, taught: Path, engine: Engine, base: Path, console: Console) -> Scores:
    """The plain baseline: stock TRL SFT on the same corrections, served without memory."""
    import asyncio

    finished = folder / "stock.json"
    if finished.exists():
        return Scores.model_validate_json(finished.read_text())
    console.rule("[bold]stock TRL SFT on the same corrections")
    tasks = [t for t in taught_tasks(PER_WORKLOAD) if t.id in _failed(taught)]
    stock(settings, base, tasks, folder / "stock", settings.train.epochs)
    exam = [load_suite(path) for path in sorted((taught / "suites").glob("*.jsonl"))]
    found = asyncio.run(examine(settings, engine, "stock", folder / "stock" / "adapter", exam))
    rows = len(corrected(tasks))
    scores = Scores(arm=STOCK, verdict="-", corrections=rows, rows=rows, exams=exams_of(found))
    finished.write_text(scores.model_dump_json())
    return scores


def _failed(taught: Path) -> set[str]:
    """Ids of the tasks that were corrected."""
    from memory.ledger import Ledger

    ledger = Ledger.open(f"sqlite:///{taught / 'ledger.sqlite'}")
    try:
        runs = {t.id: t.task_id for t in ledger.trajectories()}
        return {runs[f.trajectory_id] for f in ledger.feedback() if f.trajectory_id in runs}
    finally:
        ledger.close()


def show(measured: Mapping[str, Scores], path: Path, title: str, console: Console) -> None:
    """Draw the held-out exams under these names."""
    variants({name: scores.exams["held out"] for name, scores in measured.items()}, path, title)
    console.print(f"{path.name}: {path.parent}", highlight=False)
