"""One life of a service process with an unfinished night, to be ended by SIGKILL: by itself at a named moment of the
night, or by whoever watches it.

A child of a fork server that has imported everything: a life then costs what a service does at its start (ledger,
Chroma, DBOS, port) and not seconds of imports. Everything is real but the model, the engine's process and the
trainer's process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from agent.llm import ChatRequest
from evals.gate import GateConfig
from memory import chroma
from memory.ledger import Ledger
from memory.night_records import NightStatus, StageRun
from serve.settings import NightConfig, Settings
from serve.stages import STAGES
from tests.serve.fake_trainer import fake_trainer_python
from tests.serve.fakes import running, settings_in

NIGHT = "night_killed"
CONTROL = "Hello number {}, how are you?"

MOMENTS = [
    *(f"{when} {stage}" for stage in STAGES for when in ("before", "after", "recorded")),
    "before the end",
    "after the end",
]
"""Every boundary of a night: before a stage, after it but before the ledger has its output, after that, and around the
one transition that ends the night."""


def settings_for(folder: Path) -> Settings:
    night = NightConfig(rehearsal=4, principles=2, min_examples=4, practice_samples=2)
    gate = GateConfig(min_tasks=6, min_control_tasks=4)
    return settings_in(folder, night=night, gate=gate, trainer_python=fake_trainer_python(folder))


def pupil_of(answers: dict[str, str]) -> Callable[[ChatRequest], str]:
    """Generation 0 guesses, its successor calls the calculator; both are polite."""

    def pupil(request: ChatRequest) -> str:
        last = request.messages[-1]["content"]
        if last.startswith("Observation: "):
            return f"Action: finish({last.removeprefix('Observation: ')})"
        if last in answers:
            return "Action: finish(0)" if request.model == "base" else f"Action: calc({answers[last]})"
        if "[DESCRIPTION]" in last:
            return "[DESCRIPTION]: Use the tool for every step.\n[STRUCTURE]: [(agent, uses, tool)]"
        return "I am fine, thank you."

    return pupil


def live(folder: Path, die_at: str | None) -> None:
    """Serve until the night has ended; at the moment `die_at` the process kills itself."""
    chroma.subprocess = SimpleNamespace(run=_probed, TimeoutExpired=subprocess.TimeoutExpired)  # pyright: ignore
    if die_at is not None:
        _arm(folder, die_at)
    answers = json.loads((folder / "answers.json").read_text())
    with running(settings_for(folder), pupil_of(answers)) as (url, services):
        (folder / "url").write_text(url)
        while services.ledger.night(NIGHT).status is NightStatus.RUNNING:
            time.sleep(0.02)
        if die_at is not None:
            # The end's own last moment may still be on its way.
            time.sleep(5)


def _probed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """The index's probe in a process of its own, as at every start, but forked: imports are most of its time."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            sys.argv = command[2:]
            exec(command[2], {"__name__": "__main__"})
            code = 0
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return subprocess.CompletedProcess(command, code, "", "")


def _arm(folder: Path, die_at: str) -> None:
    def at(moment: str) -> None:
        if moment == die_at:
            (folder / "deaths").open("a").write(moment + "\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            at(f"before {name}")
            result = call(*args, **kwargs)
            at(f"after {name}")
            return result

        return wrapped

    record, end = Ledger.record_stage, Ledger.end_night

    def record_stage(self: Ledger, stage_run: StageRun) -> StageRun:
        kept = record(self, stage_run)
        at(f"recorded {stage_run.stage}")
        return kept

    for name, stage in list(STAGES.items()):
        STAGES[name] = around(name, stage)
    Ledger.record_stage = record_stage
    Ledger.end_night = around("the end", end)
