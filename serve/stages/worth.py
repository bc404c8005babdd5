"""Whether the days brought what training could learn from; memory takes in the successes all the same."""

from __future__ import annotations

from distill.snapshot import Snapshot
from memory import runs
from memory.forget import must_start_from_base
from memory.records import FeedbackKind, Purpose, Trajectory
from serve.stages.material import DAYS, learned_upto, left_over, on_trial, tried_upto
from serve.stages.night_run import NightRun
from serve.stages.practice import PRACTICE

TELLING = (FeedbackKind.CORRECTION, FeedbackKind.HINT, FeedbackKind.PREFERENCE)
"""Words that say how a run should have gone. A complaint makes a failure of a run that nothing else judged."""


def nothing_new(run: NightRun, material: Snapshot) -> str | None:
    """Why training on `material` would teach nothing new, or has to wait for a canary; None when it may.

    New is what came after the line up to which training from the champion has been tried, however far back tonight's
    examples go, and what the champion's own night had no room or time for. Never said of a night that was told what to
    learn (recipes, an uploaded file), that practises, or that has to train because something was forgotten.
    """
    if reason := on_trial(run):
        return reason
    ledger, config, options = run.services.ledger, run.services.settings.night, run.night.options
    told = any(options.get(name) for name in ("training_file", "recipes", PRACTICE)) or config.practice
    drawn = run.done("snapshot")
    if told or not config.min_failures or must_start_from_base(ledger.database, ledger.generation(drawn["champion"])):
        return None
    learned, tried = learned_upto(ledger, drawn["champion"]), tried_upto(run)
    since = drawn["since"] if options.get("since") else tried
    upto = drawn["upto"]
    made = runs.run_ids(ledger.database, DAYS, after_seq=since["trajectory"], upto_seq=upto["trajectory"])
    fresh = made | runs.spoken_of(ledger.database, after_seq=since["feedback"], upto_seq=upto["feedback"])
    # A night that was rejected since had them among its own.
    fresh |= left_over(run) if tried == learned else set()
    everything = (*material.trajectories, *material.begun, *material.taught)
    found = sum(_tells(material, t) for t in everything if t.id in fresh)
    if found >= config.min_failures:
        return None
    few = (
        f"only {found} of the new runs failed, went to the teacher or were corrected"
        if found
        else "no new run failed, and nobody whose word is trusted corrected one or gave a hint"
    )
    told = f"{few}: nothing new to learn (night.min_failures is {config.min_failures})"
    # Changed settings may be worth another try, which only its user can know.
    again = "; what a rejected night learned from is taken again with --since or --recipes" if tried != learned else ""
    return told + again


def _tells(material: Snapshot, run: Trajectory) -> bool:
    """Whether the run shows something that the model did not know; a task that is kept for the exam never does."""
    task, outcome = material.tasks.get(run.task_id), material.outcome(run)
    failed = outcome is not None and not outcome.success
    telling = any(said.kind in TELLING for said in material.said_of(run))
    if task is None or not (failed or telling or run.purpose is Purpose.TEACHER):
        return False
    return material.held_out_reason(task) is None
