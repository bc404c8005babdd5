"""The night's first stages: what it learns from, which feedback may teach, what is remembered."""

from __future__ import annotations

from datetime import datetime, timedelta

from agent.llm import ChatRequest
from agent.verify import verify
from distill.credit import credit
from distill.equivalence import MAX_TOKENS
from distill.principles import Ask, DistilReport, contradicted, distill_principles, past_runs
from distill.snapshot import Snapshot, praise_of
from evals.suites import Suite
from memory.forget import must_start_from_base
from memory.items import RECALLABLE
from memory.ledger import Ledger
from memory.night_records import Night, NightStatus
from memory.records import FeedbackKind, MemoryStatus, Purpose, Trajectory, Trust
from serve import lessons, promotion
from serve.stages.night_run import NightRun, Output
from serve.suites import night_suites

DAYS = (Purpose.SERVE, Purpose.TEACHER)
"""What the days brought; practice is the nights' own."""

MOST_LEFT = 4000
"""Runs that a night keeps for the next one, of what its caps and of what its budget left out."""

PARTIAL = ("training_file", "since", "recipes")
"""Options of a night that leaves out some of what the days brought: the next one still has all of it to learn."""


def snapshot(run: NightRun) -> Output:
    """Draw the line: what happened up to here teaches tonight, what comes later waits."""
    settings, ledger = run.services.settings, run.services.ledger
    # Weights cannot unlearn: a champion that knows what was forgotten is no start for the next one.
    tainted = must_start_from_base(ledger.database, ledger.champion())
    start = "base" if tainted else settings.night.train_from
    asked = run.night.options.get("since")
    champion = ledger.champion().number
    goes_on = start == "champion" and not asked
    since = learned_upto(ledger, champion) if goes_on else {"trajectory": 0, "feedback": 0}
    before = last_learned(ledger, champion) if goes_on else None
    upto = ledger.watermark()
    serve = ledger.trajectories(after_seq=since["trajectory"], upto_seq=upto["trajectory"], purpose=DAYS)
    new = sum(_ended(t) >= datetime.fromisoformat(asked) for t in serve) if asked else len(serve)
    told = f"{new} runs since {asked or 'the last promoted night'}"
    told += "; starting from the base model, since the champion learned from what was forgotten" if tainted else ""
    run.emit("snapshot", told, runs=new)
    drawn = {"since": since, "upto": upto, "champion": champion, "runs": new, "train_from": start}
    return {**drawn, "since_time": asked, "after": before.id if before else None}


def last_learned(ledger: Ledger, champion: int) -> Night | None:
    """The newest night from which the champion learned what the days had brought. What only a generation knows that
    was rolled back since is still to be learned."""
    known = promotion.ancestry(ledger, champion)
    for night in reversed(ledger.nights()):
        promoted = night.status is NightStatus.PROMOTED and night.candidate in known
        if promoted and not any(night.options.get(name) for name in PARTIAL) and ledger.stage(night.id, "snapshot"):
            return night
    return None


def learned_upto(ledger: Ledger, champion: int) -> dict[str, int]:
    """The line up to which a champion has learned what the days brought: by kind of record, its last seq. What its
    night had no room or no time for lies behind the line all the same (`left_over`)."""
    night = last_learned(ledger, champion)
    drawn = ledger.stage(night.id, "snapshot") if night else None
    if night is None or drawn is None:
        return {"trajectory": 0, "feedback": 0}
    practised = ledger.stage(night.id, "practice")
    return drawn.output["upto"] | ({"practice": practised.output["upto"]} if practised else {})


def left_over(run: NightRun) -> set[str]:
    """The runs behind the night's line that are to be learned all the same: over the caps of the night that drew it,
    or not reached by its training. That night has decided, so they are the same whenever this is asked."""
    night = run.done("snapshot").get("after")
    stages = [run.services.ledger.stage(night, name) for name in ("dataset", "train")] if night else []
    return {id for stage in stages if stage is not None for id in stage.output.get("left", [])}


def tonights(run: NightRun, sources: list[str]) -> list[str]:
    """Those of the sources that are runs of the night's own material: what was replayed had been learned before."""
    if not sources:
        return []
    snap = load_snapshot(run)
    mine = {t.id for t in (*snap.trajectories, *snap.begun, *snap.taught)}
    return [id for id in sources if id in mine][:MOST_LEFT]


def tried_upto(run: NightRun) -> dict[str, int]:
    """The line up to which training from tonight's champion has been tried: what it learned, and what a night that was
    rejected since had learned from. Trained again on the same, it would be rejected again; where evidence was wanting,
    by the same exam."""
    ledger, champion = run.services.ledger, run.done("snapshot")["champion"]
    line = learned_upto(ledger, champion)
    for night in ledger.nights():
        drawn, decided = ledger.stage(night.id, "snapshot"), ledger.stage(night.id, "decide")
        whole = not any(night.options.get(name) for name in PARTIAL)
        if not whole or night.status is not NightStatus.REJECTED or drawn is None or decided is None:
            continue
        if drawn.output["champion"] == champion and (decided.output["verdict"] == "reject" or _same_exam(run, night)):
            line = {kind: max(seq, drawn.output["upto"].get(kind, 0)) for kind, seq in line.items()}
    return line


def _same_exam(run: NightRun, night: Night) -> bool:
    judged = run.services.ledger.stage(night.id, "evaluate")
    asked: dict[str, str] = judged.output["suites"] if judged else {}
    return all(asked.get(suite.name) == suite.hash for suite in suites_of(run))


def load_snapshot(run: NightRun) -> Snapshot:
    """The records behind the watermark, always the same for the same night."""
    drawn, ledger = run.done("snapshot"), run.services.ledger
    since, upto = drawn["since"], drawn["upto"]["trajectory"]
    runs = {t.id: t for t in ledger.trajectories(upto_seq=upto, purpose=DAYS)}
    new = ledger.trajectories(after_seq=since["trajectory"], upto_seq=upto, purpose=DAYS)
    # Practice comes after the line: this night's own, and that of nights since which did not promote.
    practised = ledger.stage(run.night.id, "practice")
    until = practised.output["upto"] if practised else upto
    behind = since.get("practice", since["trajectory"])
    tried = ledger.trajectories(after_seq=behind, upto_seq=until, purpose=Purpose.PRACTICE)
    runs |= {t.id: t for t in tried}
    new += tried
    said = ledger.feedback(after_seq=drawn["since"]["feedback"], upto_seq=drawn["upto"]["feedback"])
    if asked := drawn.get("since_time"):
        new = [t for t in new if _ended(t) >= datetime.fromisoformat(asked)]
        said = [f for f in said if f.created_at >= datetime.fromisoformat(asked)]
    # A run that was corrected later than it was made is new experience as well.
    wanted = {t.id for t in new} | {f.trajectory_id for f in said if f.trajectory_id in runs}
    wanted |= left_over(run) & runs.keys()
    trajectories = [runs[id] for id in sorted(wanted)]
    heard = ledger.feedback(upto_seq=drawn["upto"]["feedback"])
    feedback = [f for f in heard if f.trajectory_id in wanted]
    earlier = {f.trajectory_id for f in heard if f.kind is FeedbackKind.SCORE and f.trajectory_id in runs} - wanted
    before = [runs[id] for id in sorted(earlier)]
    held_out = [item.task for suite in suites_of(run) for item in suite.tasks]
    return Snapshot(
        trajectories=trajectories,
        feedback=feedback,
        tasks=ledger.tasks(t.task_id for t in trajectories),
        held_out_tasks=held_out,
        seed=run.services.settings.dataset.seed,
        praised=praise_of(before, heard, ledger.tasks(t.task_id for t in before)),
    )


def _ended(run: Trajectory) -> datetime:
    return run.started_at + timedelta(seconds=run.seconds)


def suites_of(run: NightRun) -> list[Suite]:
    """The night's suites, frozen in its folder at first use."""
    return night_suites(run.services.settings, run.services.ledger, run.folder)


def judge_feedback(run: NightRun) -> Output:
    """Decide which feedback may teach, and credit what was recalled with how the runs ended."""
    if "training_file" in run.night.options:
        return {"trust": {}}
    ledger, drawn = run.services.ledger, run.done("snapshot")
    trajectories = ledger.trajectories(upto_seq=drawn["upto"]["trajectory"], purpose=DAYS)
    feedback = ledger.feedback(upto_seq=drawn["upto"]["feedback"])
    tasks = ledger.tasks(t.task_id for t in trajectories)
    counts: dict[str, int] = {}
    for judgement in credit(feedback, trajectories, tasks, verify):
        ledger.set_trust(judgement.feedback_id, judgement.trust, judgement.reason)
        counts[judgement.trust.value] = counts.get(judgement.trust.value, 0) + 1
    credited = lessons.credit_runs(run.services, trajectories, ledger.feedback(upto_seq=drawn["upto"]["feedback"]))
    told = ", ".join(f"{count} {trust}" for trust, count in counts.items())
    run.emit("credit", f"feedback judged: {told or 'none new'}", **counts)
    return {"trust": counts, "credited": credited}


def remember(run: NightRun) -> Output:
    """Distil principles and keep successful and corrected runs, in the ledger first, then in the index."""
    if "training_file" in run.night.options:
        return {"principles": 0, "merged": 0, "dropped": {}, "runs": 0, "moved": {}}
    services, snap = run.services, load_snapshot(run)
    champion = services.ledger.generation(run.done("snapshot")["champion"])

    def ask(max_tokens: int) -> Ask:
        async def reply(prompt: str, regex: str | None) -> str:
            sampling = {"temperature": 0.0, "max_tokens": max_tokens}
            messages = [{"role": "user", "content": prompt}]
            name = promotion.model_ref(champion).name
            return (await services.llm.complete(ChatRequest(name, messages, sampling, regex))).text

        return reply

    async def distil() -> tuple[DistilReport, dict[str, int]]:
        known, limit = services.ledger.principles(), services.settings.night.principles
        async with services.residency.using(champion):
            found = await distill_principles(snap, ask(120), known, limit=limit, concurrency=8)
            return found, await lessons.keep_principles(services, found.principles, ask(MAX_TOKENS))

    report, kept = run.wait(distil())
    known = services.ledger.past_runs()
    runs = past_runs(snap, known)
    for past_run in runs:
        services.ledger.add_past_run(past_run)
    rejected = {said.id for said in services.ledger.feedback() if said.trust is Trust.REJECTED}
    newer = "a newer trusted correction of its question gives another answer"
    outdated = {old.id: newer for old in contradicted(snap, known)}
    outdated |= {old.id: "the word behind it was rejected" for old in known if rejected & set(old.sources)}
    for old in known:
        if old.id in outdated and old.status in RECALLABLE and not old.pinned:
            services.ledger.set_memory_status(old.id, MemoryStatus.RETIRED, outdated[old.id])
    moved = lessons.review_items(services, champion.number)
    told = f"{kept['added']} principles ({kept['merged']} merged), {len(runs)} runs remembered"
    run.emit("principles", told, dropped=report.dropped, moved=moved)
    counts = {"principles": kept["added"], "merged": kept["merged"], "runs": len(runs)}
    return {**counts, "dropped": report.dropped, "moved": moved}
