"""The stages of a night, in order. Each reads the ledger, does one thing and returns its output as JSON.

A stage may be run again after a crash: everything it writes is idempotent (ids follow from content,
folders appear by rename, the ledger's first row wins), so `serve.night` only has to call them in order.
"""

from __future__ import annotations

from collections.abc import Callable

from memory.night_records import Night
from serve.stages.dataset import make_dataset
from serve.stages.evaluation import judge, measure
from serve.stages.material import judge_feedback, remember, snapshot
from serve.stages.night_run import NightRun, Output
from serve.stages.practice import COMPLAINTS, PRACTICE, practise
from serve.stages.publication import publish, report
from serve.stages.training import train

STAGES: dict[str, Callable[[NightRun], Output]] = {
    "snapshot": snapshot,
    "credit": judge_feedback,
    "principles": remember,
    PRACTICE: practise,
    "dataset": make_dataset,
    "train": train,
    "evaluate": measure,
    "decide": judge,
    "publish": publish,
    "report": report,
}
"""Name -> stage, in the order of a night (design: snapshot … report)."""


def stages_of(night: Night) -> list[str]:
    """The stages of one night. Its options say whether it practises, so a night that was begun by an older version
    keeps its steps: DBOS tells them by their number when it goes on after a crash."""
    practises = any(night.options.get(name) for name in (PRACTICE, COMPLAINTS))
    return [name for name in STAGES if name != PRACTICE or practises]
