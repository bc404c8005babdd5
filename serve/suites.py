"""Which suites a night is judged by: files of the operator, or tasks held out from the day.

Files in `data_dir/suites/*.jsonl` come first. Without a held-out one, a share of the judged tasks,
chosen by the hash of what was asked, is kept from training and used instead. Without a control there, those that
`night.controls` names are built.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from agent.verify import verify
from evals.chat import chat_suite
from evals.refusals import refusal_suite
from evals.suites import EvalTask, Suite, load_suite, save_suite, tool_validity_suite, untrained_suite
from memory import runs
from memory.errors import NotEnoughExperienceError, VerifierError
from memory.ledger import Ledger
from memory.records import Purpose, Task
from serve.settings import Settings

MAX_HELD_OUT = 200

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
    """The judged tasks whose fingerprint falls into the held-out share, newest 200."""
    # What only the teacher tried are the hard ones: without them the exam would be an easy one.
    tasks = ledger.tasks(runs.task_ids(ledger.database, Purpose.SERVE, Purpose.TEACHER))
    chosen: dict[str, Task] = {}
    for task in tasks.values():
        # A task with tools of a client cannot be judged without that client.
        if not task.client_tools and int(task.fingerprint[:8], 16) / 0xFFFFFFFF < share and _can_be_judged(task):
            chosen[task.fingerprint] = task
    if not chosen:
        raise NotEnoughExperienceError(
            "no task with a verifier or a reference can be held out for the gate: "
            "run tasks that carry one, or put a suite file into the data folder's suites/"
        )
    newest = sorted(chosen.values(), key=lambda t: (t.created_at, t.id))[-MAX_HELD_OUT:]
    return Suite(name="held_out", role="held_out", tasks=[EvalTask(key=t.fingerprint[:16], task=t) for t in newest])


def _can_be_judged(task: Task) -> bool:
    """One that fails at every answer (a pattern that is none, a reference without a number) would end every night."""
    try:
        return verify(task, "0") is not None
    except VerifierError:
        return False
