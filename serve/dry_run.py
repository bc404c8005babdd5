"""What a night would do now: what it would learn from what, what that would cost, and whether it would skip itself.

Writes nothing: feedback is judged in memory, suites are frozen in a folder that goes away. Three things differ from
the night itself: principles that it would distil first are not in the recalled blocks yet, rehearsed answers are
counted as half as long as they may be, and what practice would add is not among the examples.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from agent.prompts import compose
from distill.dataset import Dataset, build, too_few
from distill.rehearsal import ANSWER_TOKENS, PROMPTS
from distill.snapshot import Snapshot
from distill.train.config import TrainConfig
from memory import runs
from memory.errors import NotEnoughExperienceError
from memory.ledger import Ledger
from memory.night_records import Night
from memory.records import Example, ExampleKind
from serve.escalation import recipes_with_teacher
from serve.stages import stages_of
from serve.stages.budget import after_training, foretold, last_trained, uncut
from serve.stages.dataset import replayed, trains_on_pairs
from serve.stages.material import judged, load_snapshot, snapshot
from serve.stages.night_run import NightRun, Output
from serve.stages.practice import COMPLAINTS, PRACTICE, chosen_for, practice_options
from serve.stages.training import train_config
from serve.stages.worth import nothing_new
from serve.wiring import Services

CHARS_PER_TOKEN = 4
"""Of English text, where no night has counted yet."""


class Cost(BaseModel):
    """What a night would take without a budget: by the last night that trained and was examined, else by the length of
    the texts."""

    rows: int
    tokens: int
    """Trained on, all epochs together."""
    measured: bool
    """Whether an earlier night's figures are behind it."""
    train_seconds: float | None
    practice_seconds: float | None = None
    """None where nights do not practise, and before the first that did."""
    night_seconds: float | None
    """All stages but a practice that was never timed; None before the first night that trained."""


class PracticeForetold(BaseModel):
    """The earlier tasks that the night would try again, all tenants' together."""

    budget: int
    """Tasks that the bandit may choose (`night.practice`)."""
    tasks: int
    """Those to be tried, all of them."""
    hinted: int
    complained: int = 0
    tries: int
    workloads: dict[str, int]
    """Workload -> tasks that the bandit would choose."""


class TeacherForetold(BaseModel):
    """What a teacher's runs would contribute."""

    runs: int
    right: int
    """Of the runs: a verifier, users or the settings vouch for them."""
    examples: int


class Estimate(BaseModel):
    """A dry run's result."""

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    would_skip: bool
    reasons: list[str]
    starts_from: str
    runs: int
    """New ones, since the last promoted night where the champion is gone on from."""
    feedback: dict[str, int]
    """By trust, as tonight's judgement would leave it."""
    examples: dict[str, int]
    """By recipe, replayed and rehearsed ones included."""
    dropped: dict[str, int]
    """Reason -> examples left out."""
    practice: PracticeForetold | None = None
    """None where nights do not practise."""
    teacher: TeacherForetold | None = None
    """None without a teacher and its runs."""
    cost: Cost


@dataclass(frozen=True)
class _DryRun(NightRun):
    """A night that is in no ledger and whose folder goes away."""

    scratch: Path

    @property
    def folder(self) -> Path:
        return self.scratch


def estimate(services: Services, options: dict[str, Any]) -> Estimate:
    """What a night with these options would do now. Raises ConfigError for an unknown recipe."""
    drawn: Output = {}
    with TemporaryDirectory() as folder:
        night = Night(options={**options, **practice_options(services.settings, options)})
        run = _DryRun(services, night, _silent, lambda _: drawn, Path(folder))
        drawn.update(snapshot(run))
        try:
            snap = load_snapshot(run)
        except NotEnoughExperienceError as exc:
            return _skipped(drawn, str(exc))
        return _estimated(run, drawn, snap)


def print_estimate(found: Estimate, console: Console) -> None:
    """The estimate on one screen."""
    verdict = "would skip itself" if found.would_skip else f"would train {found.cost.rows} rows from the"
    console.print(f"[bold]a night now {verdict}{'' if found.would_skip else f' {found.starts_from}'}[/bold]")
    for reason in found.reasons:
        console.print(f"  - {reason}", highlight=False, markup=False)
    said = ", ".join(f"{count} {trust}" for trust, count in found.feedback.items())
    console.print(f"{found.runs} new runs; feedback: {said or 'none'}", highlight=False)
    table = Table("examples", "")
    for recipe, count in found.examples.items():
        table.add_row(recipe, str(count))
    for reason, count in found.dropped.items():
        table.add_row(f"[dim]left out: {reason}[/dim]", str(count))
    console.print(table)
    if found.practice is not None:
        console.print(_told_of_practice(found.practice), highlight=False, markup=False)
    if (teacher := found.teacher) is not None:
        told = f"the teacher: {teacher.runs} runs, {teacher.right} of them right, {teacher.examples} examples"
        console.print(told, highlight=False)
    cost = found.cost
    basis = "as the last night's" if cost.measured else "by the length of the texts"
    console.print(f"about {cost.tokens} tokens to train on, all epochs ({basis})", highlight=False)
    console.print(_told_of_time(cost, found.practice), highlight=False)


def _told_of_time(cost: Cost, practice: PracticeForetold | None) -> str:
    if cost.train_seconds is None or cost.night_seconds is None:
        return "how long it would take is not known before the first night that trained and was examined"
    told = f"about {cost.train_seconds:.0f} s of training, {cost.night_seconds:.0f} s in all"
    if cost.practice_seconds is not None:
        return f"{told}, {cost.practice_seconds:.0f} s of them practice"
    return f"{told}, and practice, which was never timed" if practice and practice.tries else told


def _told_of_practice(practice: PracticeForetold) -> str:
    chosen = ", ".join(f"{count} of {workload}" for workload, count in practice.workloads.items())
    hinted = f"{practice.hinted} for a user's hint" if practice.hinted else ""
    complained = f"{practice.complained} for a user's complaint" if practice.complained else ""
    told = ", ".join(part for part in (chosen, hinted, complained) if part) or "none that can be judged"
    return f"practice: {practice.tasks} tasks ({told}; budget {practice.budget}), {practice.tries} tries"


def _estimated(run: NightRun, drawn: Output, snap: Snapshot) -> Estimate:
    services, settings, ledger = run.services, run.services.settings, run.services.ledger
    known = {t.id for t in [*snap.trajectories, *snap.begun, *snap.taught]}
    _, judgements = judged(ledger, drawn)
    decided = {one.feedback_id: {"trust": one.trust, "trust_reason": one.reason} for one in judgements}
    heard = runs.feedback_on(ledger.database, known, upto_seq=drawn["upto"]["feedback"])
    heard = [said.model_copy(update=decided.get(said.id, {})) for said in heard]
    # Zero, so that a night that is too small still shows what it has.
    config = settings.dataset.model_copy(update={"min_examples": 0})
    recipes = run.night.options.get("recipes") or recipes_with_teacher(settings.night.recipes, settings.teacher)
    material = replace(snap, feedback=heard)
    dataset = build(material, recipes, services.memory, compose, config, pairs=trains_on_pairs(run))
    count, needed = sum(dataset.counts.values()), settings.night.min_examples
    again = replayed(run, snap, dataset.examples)
    practice = _practice(run, material) if PRACTICE in stages_of(run.night) else None
    cost = _cost(run, [*dataset.examples, *again], practice.tries if practice else 0)
    nothing = nothing_new(run, material)
    budget, trains = foretold(
        settings.night, cost.tokens, cost.train_seconds, cost.night_seconds, cost.practice_seconds or 0
    )
    return Estimate(
        would_skip=count < needed or nothing is not None or not trains,
        reasons=[
            too_few(count, needed, dataset.dropped)
            if count < needed
            else f"{count} examples to learn from, {needed} needed",
            *([nothing] if nothing else []),
            *budget,
        ],
        starts_from=drawn["train_from"],
        runs=drawn["runs"],
        feedback=dict(sorted(Counter(f.trust.value for f in heard).items())),
        examples={**dataset.counts, "replay": len(again), "rehearsal": len(PROMPTS[: settings.night.rehearsal])},
        dropped=dataset.dropped,
        practice=practice,
        teacher=_teacher(material, dataset) if settings.teacher.model is not None or material.taught else None,
        cost=cost,
    )


def _practice(run: NightRun, material: Snapshot) -> PracticeForetold:
    config, options = run.services.settings.night, run.night.options
    chosen = chosen_for(run, material, options.get(PRACTICE, 0), options.get(COMPLAINTS, 0))
    workloads: Counter[str] = Counter()
    for arm in chosen.arms:
        workloads[arm.workload] += arm.chosen
    tasks = len(chosen.tasks) + len(chosen.hinted) + len(chosen.complained)
    return PracticeForetold(
        budget=options.get(PRACTICE, 0),
        tasks=tasks,
        hinted=len(chosen.hinted),
        complained=len(chosen.complained),
        tries=tasks * config.practice_samples,
        workloads={workload: count for workload, count in workloads.items() if count},
    )


def _teacher(material: Snapshot, dataset: Dataset) -> TeacherForetold:
    right = sum(1 for _ in material.teacher_successes())
    return TeacherForetold(runs=len(material.taught), right=right, examples=dataset.counts.get("teacher", 0))


def _skipped(drawn: Output, reason: str) -> Estimate:
    return Estimate(
        would_skip=True,
        reasons=[reason],
        starts_from=drawn["train_from"],
        runs=drawn["runs"],
        feedback={},
        examples={},
        dropped={},
        cost=Cost(rows=0, tokens=0, measured=False, train_seconds=None, night_seconds=None),
    )


def _cost(run: NightRun, examples: list[Example], tries: int) -> Cost:
    """By the last night; its rows and tonight's are alike, the service's workloads being the same."""
    ledger, settings, config = run.services.ledger, run.services.settings, train_config(run)
    general = PROMPTS[: settings.night.rehearsal]
    rows, pairs = len(examples) + len(general), sum(example.kind is ExampleKind.DPO for example in examples)
    last = {stage.stage: stage for stage in last_trained(ledger)}
    if not last:
        chars = sum(_chars(example, config) for example in examples) + sum(map(len, general)) * config.epochs
        tokens = chars // CHARS_PER_TOKEN + len(general) * ANSWER_TOKENS // 2 * config.epochs
        return Cost(rows=rows, tokens=tokens, measured=False, train_seconds=None, night_seconds=None)
    passes = (rows - pairs) * config.epochs + pairs * config.dpo_epochs
    done, (tokens, seconds) = last["train"].output, uncut(list(last.values()))
    # A night of an older version has not said how often it went over its rows.
    before = done["sft_rows"] * done.get("epochs", config.epochs)
    before += done["dpo_pairs"] * done.get("dpo_epochs", config.dpo_epochs)
    scale, of_a_try = passes / max(1, before), _seconds_of_a_try(ledger)
    practice = tries * of_a_try if tries and of_a_try is not None else None
    names = list(last)
    rest = sum(last[name].seconds for name in names[: names.index("train")] if name != PRACTICE)
    rest += after_training(ledger) or 0.0
    return Cost(
        rows=rows,
        tokens=round(tokens * scale),
        measured=True,
        train_seconds=seconds * scale,
        practice_seconds=practice,
        night_seconds=rest + seconds * scale + (practice or 0),
    )


def _chars(example: Example, config: TrainConfig) -> int:
    """Of the text that all epochs over an example read; a pair is its prompt twice, with either answer."""
    prompt, *answers = (
        len(json.dumps(part, ensure_ascii=False))
        for part in (example.messages, example.chosen, example.rejected)
        if part is not None
    )
    if example.kind is ExampleKind.DPO:
        return (2 * prompt + sum(answers)) * config.dpo_epochs
    return prompt * config.epochs


def _seconds_of_a_try(ledger: Ledger) -> float | None:
    """By the newest night that practised."""
    for night in reversed(ledger.nights()):
        practised = ledger.stage(night.id, PRACTICE)
        if practised is not None and practised.output["tries"]:
            return practised.seconds / practised.output["tries"]
    return None


def _silent(stage: str, message: str, **data: Any) -> None:
    """Nobody watches a dry run."""
