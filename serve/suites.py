"""Which suites a night is judged by: files of the operator, or tasks held out from the day.

Files in `data_dir/suites/*.jsonl` come first. Without a held-out one, a share of the judged tasks,
chosen by the hash of what was asked, is kept from training and used instead, as far as no night has taught it.
Without a control there, those that `night.controls` names are built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from datetime import datetime
from pathlib import Path

from agent.verify import verify
from distill.near import Questions
from evals.chat import chat_suite
from evals.refusals import refusal_suite
from evals.suites import EvalTask, Suite, load_suite, save_suite, tool_validity_suite, untrained_suite
from memory import runs
from memory.errors import NotEnoughExperienceError, VerifierError
from memory.ledger import Ledger
from memory.night_records import NightStatus
from memory.records import RECALLED, Message, Purpose, Task, content_hash, text_of
from serve.settings import Settings

MAX_HELD_OUT = 200
LOOKED_AT = 1000
"""Of more tasks that may be held out nobody asks whether a night has taught them: each is compared with a ledger's
examples."""

CONTROLS: dict[str, Callable[[], Suite]] = {
    "chat": chat_suite,
    "tool_validity": tool_validity_suite,
    "refusals": refusal_suite,
    "other_families": untrained_suite,
}


def night_suites(settings: Settings, ledger: Ledger, folder: Path) -> list[Suite]:
    """The suites of one night, frozen under `folder` at first use, so that a resumed night has the same."""
    frozen = folder / "suites"
    if not frozen.exists():
        temporary = folder / "suites.new"
        for suite in configured_suites(settings, ledger):
            save_suite(suite, temporary / f"{suite.name}.jsonl")
        temporary.rename(frozen)
    return [load_suite(path) for path in sorted(frozen.glob("*.jsonl"))]


def configured_suites(settings: Settings, ledger: Ledger) -> list[Suite]:
    """The operator's suites, completed. NotEnoughExperienceError when nothing can be held out."""
    suites = {s.name: s for s in (load_suite(path) for path in sorted(settings.suites_dir.glob("*.jsonl")))}
    if not any(s.role == "held_out" for s in suites.values()):
        suites["held_out"] = held_out_from_days(ledger, settings.night.held_out_share)
    if not any(s.role == "control" for s in suites.values()):
        for control in (CONTROLS[name]() for name in settings.night.controls):
            suites[control.name] = control
    return list(suites.values())


def held_out_from_days(ledger: Ledger, share: float) -> Suite:
    """The judged tasks whose fingerprint falls into the held-out share and which no night has taught, 200 at most:
    of the tenants in turn, of each its workloads in turn, the newest first. Nobody's flood is the whole exam."""
    # What only the teacher tried are the hard ones: without them the exam would be an easy one.
    tasks = ledger.tasks(runs.task_ids(ledger.database, Purpose.SERVE, Purpose.TEACHER))
    chosen: dict[tuple[str, str], Task] = {}
    for task in sorted(tasks.values(), key=_age):
        # A task with tools of a client cannot be judged without that client.
        if not task.client_tools and int(task.fingerprint[:8], 16) / 0xFFFFFFFF < share and _can_be_judged(task):
            chosen[task.tenant, task.fingerprint] = task
    untaught = _untaught(ledger, _fairly(chosen.values(), LOOKED_AT))
    if not untaught:
        raise NotEnoughExperienceError(
            "no task with a verifier or a reference that no night has taught can be held out for the gate: "
            "run tasks that carry one, or put a suite file into the data folder's suites/"
        )
    held_out = sorted(_fairly(untaught, MAX_HELD_OUT), key=_age)
    keyed = [EvalTask(key=content_hash([task.tenant, task.fingerprint])[:16], task=task) for task in held_out]
    return Suite(name="held_out", role="held_out", tasks=keyed, from_days=True)


def _age(task: Task) -> tuple[datetime, str]:
    return task.created_at, task.id


def _fairly(tasks: Iterable[Task], most: int) -> list[Task]:
    """Of the tenants in turn, of each its workloads in turn, the newest first."""
    newest = sorted(tasks, key=_age, reverse=True)
    by_workload = _in_turn(newest, lambda task: (task.tenant, task.workload))
    return _in_turn(by_workload, lambda task: task.tenant)[:most]


def _untaught(ledger: Ledger, tasks: list[Task]) -> list[Task]:
    """Those that no example of a promoted night asks, nor nearly: a task may have been taught before it could be judged
    or while it was not among the newest, and so may a copy of it."""
    questions = {task.question for task in tasks}
    known, taught, seen = Questions(questions), set[str](), set[str]()
    for night in ledger.nights() if tasks else []:
        # What a rejected night was taught serves nobody.
        for example in ledger.examples(night.id) if night.status is NightStatus.PROMOTED else []:
            texts = {text_of(m) for m in example.messages if _asks(m)} - seen
            seen |= texts
            taught |= texts & questions
            for text in texts:
                taught.update(known.all_like(text))
    return [task for task in tasks if task.question not in taught]


def _asks(message: Message) -> bool:
    return message.get("role") == "user" and message.get("name") != RECALLED


def _in_turn(tasks: Iterable[Task], group: Callable[[Task], Hashable]) -> list[Task]:
    """The first task of every group, then the second of every group, and so on."""
    taken: Counter[Hashable] = Counter()
    ranked: list[tuple[int, Task]] = []
    for task in tasks:
        ranked.append((taken[group(task)], task))
        taken[group(task)] += 1
    return [task for _, task in sorted(ranked, key=lambda entry: entry[0])]


def _can_be_judged(task: Task) -> bool:
    """One that fails at every answer (a pattern that is none, a reference without a number) would end every night."""
    try:
        return verify(task, "0") is not None
    except VerifierError:
        return False
