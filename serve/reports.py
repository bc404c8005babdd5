"""The morning report of a night: gathers the ledger's rows for a reader; shape, page and figures are `evals`'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from distill.practice import ArmFigures
from evals.gate import GateDecision
from evals.night_page import render_night
from evals.night_report import (
    Learned,
    NightReport,
    Point,
    Practice,
    PractisedWorkload,
    Recipe,
    Sample,
    TeacherHelp,
    Tokens,
    Training,
)
from evals.page import write_page
from evals.report import Gain, Measured, Row, build_report, build_row
from memory import escalations
from memory.ledger import Ledger
from memory.night_records import Evaluation, Generation, Night, NightStatus
from memory.records import Example, Purpose, Trajectory
from serve.voices import voices

SAMPLES = 3
"""Examples shown of each recipe."""


def row_name(generation: int, memory: bool) -> str:
    """`base`, `base+memory`, `gen-1`, `gen-1+memory`, …"""
    return ("base" if generation == 0 else f"gen-{generation}") + ("+memory" if memory else "")


def decision_of(ledger: Ledger, night_id: str) -> GateDecision | None:
    """What the gate said; None for a night that did not get there."""
    stage = ledger.stage(night_id, "decide")
    return GateDecision.model_validate(stage.output) if stage else None


def night_report(ledger: Ledger, night: Night, model: str, *, tenant: str | None = None) -> NightReport:
    """A night's report for a reader of `tenant`: other tenants' examples are counted and not shown, and authors have
    no names. None: for the operator, who may see everything."""
    outputs = {stage.stage: stage.output for stage in ledger.stages(night.id)}
    gate = decision_of(ledger, night.id)
    status = night.status
    if status is NightStatus.RUNNING and "publish" in outputs:
        # The report is the last stage: the night is as good as over.
        status = NightStatus.PROMOTED if outputs["publish"]["promoted"] else NightStatus.REJECTED
    rows, gain = _compared(ledger, night)
    examples = ledger.examples(night.id)
    mine = [e for e in examples if tenant is None or e.tenant == tenant]
    drawn = outputs.get("snapshot", {})
    since = drawn.get("since_time")
    learned = Learned(
        since=datetime.fromisoformat(since) if since else None,
        runs=drawn.get("runs", 0),
        feedback=outputs.get("credit", {}).get("trust", {}),
        voices=voices(ledger, mine, named=tenant is None),
        elsewhere=len(examples) - len(mine),
    )
    judged = gate.reasons if gate else []
    # What went wrong behind the decision is the night's word, and stands beside the gate's.
    reasons = [*judged, *(reason for reason in night.reasons if reason not in judged)]
    trained = outputs.get("train")
    tries = _tries(ledger, outputs) if "practice" in outputs else None
    teacher = _teacher(ledger, night, drawn["upto"]["trajectory"]) if "upto" in drawn else None
    return NightReport(
        night=night.id,
        status=status,
        model=model,
        began=night.created_at,
        ended=night.ended_at,
        story=_story(ledger, night, status, gate, named=tenant is None),
        decision=gate.verdict if gate else status.value,
        reasons=reasons,
        gate=gate,
        gain=gain,
        rows=rows,
        curve=_curve(ledger, night),
        learned=learned,
        recipes=_recipes(examples, mine),
        dropped=outputs.get("dataset", {}).get("dropped", {}) | _untrained(trained or {}),
        practice=_practice(outputs["practice"], tries, examples, tenant) if tries is not None else None,
        teacher=teacher,
        training=_training(trained) if trained else None,
        seconds={stage.stage: round(stage.seconds, 1) for stage in ledger.stages(night.id)},
        tokens=list(_tokens(tries, trained, ledger.evaluations(night_id=night.id), teacher)),
    )


def write_night_report(ledger: Ledger, night: Night, folder: Path, model: str) -> Path:
    """The operator's `report.json` and `report.html` in the night's folder; returns the page's path."""
    report = night_report(ledger, night, model)
    write_page(report.model_dump_json(indent=2) + "\n", folder / "report.json")
    write_page(render_night(report), folder / "report.html")
    return folder / "report.html"


def _compared(ledger: Ledger, night: Night) -> tuple[list[Row], Gain | None]:
    """Champion and candidate, with memory, as the gate compared them, and the gain between the two."""
    by_generation: dict[int, dict[str, Evaluation]] = {}
    for evaluation in ledger.evaluations(night_id=night.id):
        # A suite that was run again counts once.
        by_generation.setdefault(evaluation.generation, {})[evaluation.suite] = evaluation
    wanted = [number for number in sorted(by_generation) if number in _pair(ledger, night)]
    measured = [_measured(number, list(by_generation[number].values())) for number in wanted]
    if len({frozenset(e.suite_hash for e in m.held_out) for m in measured}) > 1:
        # A night that was stopped among its evaluations has nothing to compare.
        return [build_row(m) for m in measured], None
    report = build_report(measured, decision="", reasons=[], corrections=0, seconds={}, engine="", model="")
    return report["rows"], report["gain"]


def _pair(ledger: Ledger, night: Night) -> set[int]:
    evaluated = ledger.stage(night.id, "evaluate")
    if evaluated is not None:
        return set(evaluated.output["generations"])
    drawn = ledger.stage(night.id, "snapshot")
    return {number for number in (drawn and drawn.output["champion"], night.candidate) if number is not None}


def _measured(number: int, found: Sequence[Evaluation]) -> Measured:
    return Measured(
        name=row_name(number, memory=True),
        held_out=[e for e in found if e.role == "held_out"],
        controls=[e for e in found if e.role == "control"],
    )


def _curve(ledger: Ledger, night: Night) -> list[Point]:
    """Each generation up to this night's, as the night that made it measured it; the base model by the first night."""
    began = {n.id: n.created_at for n in ledger.nights() if n.created_at <= night.created_at}
    tonight = {e.suite_hash for e in ledger.evaluations(night_id=night.id) if e.role == "held_out"}
    points: list[Point] = []
    for generation in ledger.generations():
        found = [e for e in ledger.evaluations(generation=generation.number) if e.night_id in began and e.memory]
        by = _measuring_night(generation, found, began)
        chosen = [e for e in found if e.night_id == by]
        held_out = [e for e in chosen if e.role == "held_out"]
        if not held_out:
            continue
        prompts = [o.prompt_tokens for e in held_out for o in e.outcomes if o.prompt_tokens]
        points.append(
            Point(
                generation=generation.number,
                status=generation.status,
                row=build_row(_measured(generation.number, chosen)),
                prompt_tokens=sum(prompts) / len(prompts) if prompts else None,
                same_tasks={e.suite_hash for e in held_out} == tonight,
            )
        )
    return points


def _measuring_night(generation: Generation, found: Sequence[Evaluation], began: dict[str, datetime]) -> str | None:
    if generation.night_id in {e.night_id for e in found}:
        return generation.night_id
    nights = sorted({e.night_id for e in found if e.night_id is not None}, key=lambda id: began[id])
    return nights[0] if nights else None


def _recipes(examples: Sequence[Example], shown: Sequence[Example]) -> list[Recipe]:
    recipes: list[Recipe] = []
    for name in dict.fromkeys(e.recipe for e in examples):
        everything = [e for e in examples if e.recipe == name]
        # One with memory in its prompt and one without teach a reader more than two of a kind.
        mine = [e for e in shown if e.recipe == name]
        picked = [*[e for e in mine if e.with_memory][:1], *[e for e in mine if not e.with_memory]][:SAMPLES]
        recipes.append(
            Recipe(
                name=name,
                examples=len(everything),
                with_memory=sum(e.with_memory for e in everything),
                samples=[_sample(e) for e in picked],
            )
        )
    return recipes


def _sample(example: Example) -> Sample:
    return Sample(
        id=example.id,
        kind=example.kind,
        workload=example.workload,
        with_memory=example.with_memory,
        messages=[m for m in example.messages if m.get("role") != "system"],
        chosen=example.chosen,
        rejected=example.rejected,
    )


def _tries(ledger: Ledger, outputs: dict[str, dict[str, Any]]) -> list[Trajectory]:
    """The night's practice: its runs between the night's line and the end of the stage."""
    line, end = outputs["snapshot"]["upto"]["trajectory"], outputs["practice"]["upto"]
    return ledger.trajectories(after_seq=line, upto_seq=end, purpose=Purpose.PRACTICE)


def _spent(runs: Sequence[Trajectory]) -> tuple[int, int]:
    """Prompt and completion tokens."""
    steps = [step for run in runs for step in run.steps]
    return sum(step.prompt_tokens or 0 for step in steps), sum(step.completion_tokens or 0 for step in steps)


def _tokens(
    tries: Sequence[Trajectory] | None,
    trained: dict[str, Any] | None,
    evaluations: Sequence[Evaluation],
    teacher: TeacherHelp | None,
) -> Iterator[Tokens]:
    if tries is not None:
        prompt, completion = _spent(tries)
        yield Tokens(part="practice", prompt=prompt, completion=completion, total=prompt + completion)
    if trained is not None:
        yield Tokens(part="training", total=trained["tokens"])
    if outcomes := [outcome for evaluation in evaluations for outcome in evaluation.outcomes]:
        prompt, said = sum(o.prompt_tokens for o in outcomes), [o.completion_tokens for o in outcomes]
        known = [count for count in said if count is not None]
        completion = sum(known) if len(known) == len(said) else None
        yield Tokens(part="evaluation", prompt=prompt, completion=completion, total=prompt + sum(known))
    if teacher is not None:
        yield Tokens(part="teacher", total=teacher.day.tokens)


def _practice(
    stage: dict[str, Any], runs: Sequence[Trajectory], examples: Sequence[Example], tenant: str | None
) -> Practice:
    """What was tried, by workload."""
    arm_of = {run.id: (run.tenant, run.workload) for run in runs}
    behind = [{arm_of[id] for id in example.sources if id in arm_of} for example in examples]
    tokens = {run.id: sum(_spent([run])) for run in runs}
    arms = [ArmFigures.model_validate(arm) for arm in stage["arms"]]
    chosen, tenants = sum(arm.chosen for arm in arms), {arm.tenant for arm in arms}
    workloads: list[PractisedWorkload] = []
    for arm in arms:
        if tenant not in (None, arm.tenant):
            continue
        key = (arm.tenant, arm.workload)
        mine = [run for run in runs if arm_of[run.id] == key]
        workloads.append(
            PractisedWorkload(
                workload=f"{arm.workload} of {arm.tenant}" if tenant is None and len(tenants) > 1 else arm.workload,
                share=arm.chosen / chosen if chosen else 0.0,
                why=arm.why,
                before=arm.success,
                tasks=len({run.task_id for run in mine}),
                tries=len(mine),
                successes=sum(run.success for run in mine),
                tokens=sum(tokens[run.id] for run in mine),
                examples=sum(key in found for found in behind),
            )
        )
    return Practice(
        tasks=stage["tasks"],
        hinted=stage["hinted"],
        complained=stage.get("complained", 0),
        tries=stage["tries"],
        successes=stage["successes"],
        tokens=sum(tokens.values()),
        left_out=stage.get("left_out", 0),
        examples=sum(bool(found) for found in behind),
        workloads=workloads,
    )


def _teacher(ledger: Ledger, night: Night, line: int) -> TeacherHelp | None:
    """The day's figures are those between the line of the night before and this one's."""
    whole = escalations.figures(ledger.database, upto=line)
    if not whole:
        return None
    earlier = [n for n in ledger.nights() if n.created_at < night.created_at]
    lines = [drawn.output["upto"]["trajectory"] for n in earlier if (drawn := ledger.stage(n.id, "snapshot"))]
    began = lines[-1] if lines else 0
    day = escalations.figures(ledger.database, after=began, upto=line)
    own = escalations.own_requests(ledger.database, after=began, upto=line)
    requests = sum((own | {helped.generation: helped.requests for helped in day}).values())
    known = [helped.cost_usd for helped in day if helped.cost_usd is not None]
    escalated = sum(helped.escalated for helped in day)
    return TeacherHelp(
        day=escalations.HelpFigures(
            requests=requests,
            escalated=escalated,
            rate=escalated / requests if requests else None,
            predicted=sum(helped.predicted for helped in day),
            unanswered=sum(helped.unanswered for helped in day),
            succeeded=sum(helped.succeeded for helped in day),
            tokens=sum(helped.tokens for helped in day),
            cost_usd=sum(known) if known else None,
        ),
        generations=whole,
    )


def _untrained(output: dict) -> dict[str, int]:
    """The rows that the trainer left out, by reason."""
    counts = {
        "rows longer than train.max_length": output.get("too_long", 0),
        "rows that the chat template cannot render": output.get("unrendered", 0),
    }
    return {reason: count for reason, count in counts.items() if count}


def _training(output: dict) -> Training:
    names = ("generation", "tokens", "trained_tokens", "tokens_per_s", "seconds", "losses")
    figures = {name: output[name] for name in names}
    between = output.get("interpolation") or {}
    told = {"note": output.get("note", ""), "alpha": between.get("alpha")}
    return Training(rows=output["sft_rows"], pairs=output["dpo_pairs"], **told, **figures)


def _story(ledger: Ledger, night: Night, status: NightStatus, gate: GateDecision | None, *, named: bool) -> list[str]:
    """What happened, for somebody who knows no statistics."""
    drawn = ledger.stage(night.id, "snapshot")
    champion = drawn.output["champion"] if drawn else ledger.champion().number
    made, kept = f"Generation {night.candidate}", f"generation {champion} goes on serving"
    published = ledger.stage(night.id, "publish")
    share = published.output.get("canary") if published else None
    won = f"{made} was promoted: it took the place of generation {champion}."
    if share:
        won = f"{made} passed: it got {share:.0%} of the users first, generation {champion} went on serving the others."
    told = {
        NightStatus.PROMOTED: won,
        NightStatus.REJECTED: f"{made} was rejected; {kept}.",
        NightStatus.SKIPPED: f"The night skipped itself; {kept}.",
        NightStatus.FAILED: f"The night failed; {kept}.",
        NightStatus.CANCELLED: f"The night was cancelled; {kept}.",
        NightStatus.RUNNING: f"The night is still running; {kept}.",
    }[status]
    story = [told]
    whole = [row for row in gate.table if row.role == "held_out" and row.workload is None] if gate else []
    for row in whole:
        story.append(
            f"Of {row.n} tasks that neither had been trained on, generation {champion} solved {row.champion} and "
            f"generation {night.candidate} solved {row.candidate}."
        )
    if gate and gate.verdict == "not_enough_evidence":
        story.append("The difference may be chance: that is not enough to change what serves.")
    lost = [row for row in gate.table if row.role == "control" and row.state == "lost"] if gate else []
    story += [f"It lost what it could do before: {r.suite}, {r.champion} to {r.candidate} of {r.n}." for r in lost]
    for later in ledger.promotions():
        if night.candidate is not None and later.from_generation == night.candidate:
            when = f"{later.at:%Y-%m-%d %H:%M} UTC"
            # Who switched, and in what words, is for whoever may know names.
            told = f" ({later.by}): {later.why}" if named else "."
            story.append(f"On {when} generation {later.to_generation} took its place{told}")
    return story
