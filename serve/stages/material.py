"""The night's first stages: what it learns from, which feedback may teach, what is remembered."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from itertools import chain

from agent.llm import ChatRequest
from agent.verify import verify
from distill.credit import Judgement, credit
from distill.equivalence import MAX_TOKENS
from distill.principles import Ask, DistilReport, contradicted, distill_principles, past_runs
from distill.runs import hints_shown
from distill.snapshot import AnswerKey, Snapshot, praise_of
from evals.suites import Suite
from memory import rows, runs
from memory.forget import must_start_from_base, newest_forgetting
from memory.items import RECALLABLE
from memory.ledger import Ledger
from memory.night_records import Night, NightStatus
from memory.records import Feedback, FeedbackKind, MemoryStatus, Purpose, Task, Trajectory, Trust
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
    drawn = {"since": since, "upto": upto, "since_time": asked}
    new = len(_new_days(ledger, drawn))
    told = f"{new} runs since {asked or 'the last promoted night'}"
    told += "; starting from the base model, since the champion learned from what was forgotten" if tainted else ""
    run.emit("snapshot", told, runs=new)
    after = before.id if before else None
    return {**drawn, "champion": champion, "runs": new, "train_from": start, "after": after}


def _new_days(ledger: Ledger, drawn: Output) -> set[str]:
    """The runs of the days since the line, or since the moment that was asked for."""
    after, upto = drawn["since"]["trajectory"], drawn["upto"]["trajectory"]
    return runs.run_ids(ledger.database, DAYS, after_seq=after, upto_seq=upto, since=_asked_moment(drawn))


def _asked_moment(drawn: Output) -> datetime | None:
    asked = drawn.get("since_time")
    return datetime.fromisoformat(asked) if asked else None


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


def on_trial(run: NightRun) -> str | None:
    """Why tonight trains nothing: a canary is on trial, which the new generation would end. None
    while there is no canary, for a night that was told what to learn, and where the canary knows what was forgotten."""
    canary, ledger = run.services.ledger.canary(), run.services.ledger
    told = any(run.night.options.get(name) for name in PARTIAL)
    if canary is None or told or must_start_from_base(ledger.database, canary):
        return None
    number = canary.number
    return (
        f"generation {number} is on trial as a canary, and a generation that is trained now would end its trial: the "
        f"next night learns from these days (`nightschool promote {number}` or `nightschool rollback` ends the trial; "
        "--since or --recipes trains all the same)"
    )


def load_snapshot(run: NightRun) -> Snapshot:
    """The records behind the watermark, always the same for the same night. Of what lies behind the line only the runs
    that somebody has spoken of since, and those that are left over."""
    drawn, ledger = run.done("snapshot"), run.services.ledger
    since, upto, asked = drawn["since"], drawn["upto"], _asked_moment(drawn)
    database, of_days = ledger.database, {"purposes": DAYS, "upto_seq": upto["trajectory"]}
    known = runs.by_id(database, _new_days(ledger, drawn), **of_days)
    wanted = set(known)
    # Practice comes after the line: this night's own, and that of nights since which did not promote.
    practised = ledger.stage(run.night.id, "practice")
    until = practised.output["upto"] if practised else upto["trajectory"]
    behind = since.get("practice", since["trajectory"])
    tried = ledger.trajectories(after_seq=behind, upto_seq=until, purpose=Purpose.PRACTICE)
    known |= {t.id: t for t in tried}
    wanted |= {t.id for t in tried if asked is None or t.ended_at >= asked}
    # A run that was corrected later than it was made is new experience as well.
    again = runs.spoken_of(database, after_seq=since["feedback"], upto_seq=upto["feedback"], since=asked)
    known |= runs.by_id(database, again - known.keys(), **of_days)
    left = left_over(run)
    known |= runs.by_id(database, left - known.keys(), (*DAYS, Purpose.PRACTICE), upto_seq=upto["trajectory"])
    wanted |= (again | left) & known.keys()
    trajectories = [known[id] for id in sorted(wanted)]
    tasks = ledger.tasks(t.task_id for t in trajectories)
    held_out = [item.task for suite in suites_of(run) for item in suite.tasks]
    # A try rests on the hint that it was shown, which somebody gave to another run.
    hints = runs.feedback_by_id(database, {hint for t in trajectories for hint in hints_shown(t)})
    return Snapshot(
        trajectories=trajectories,
        feedback=[*runs.feedback_on(database, wanted, upto_seq=upto["feedback"]), *hints],
        tasks=tasks,
        held_out_tasks=held_out,
        seed=run.services.settings.dataset.seed,
        praised=_praised_before(ledger, drawn, tasks, known, wanted),
        champion=drawn["champion"],
    )


def _praised_before(
    ledger: Ledger, drawn: Output, tasks: dict[str, Task], known: dict[str, Trajectory], wanted: set[str]
) -> dict[AnswerKey, set[str]]:
    """Who praised which answers to tonight's questions on runs that are not tonight's."""
    asked = {task.fingerprint for task in tasks.values()}
    upto = drawn["upto"]["feedback"]
    scored = runs.spoken_of_questions(ledger.database, asked, FeedbackKind.SCORE, upto_seq=upto) - wanted
    before = [known[id] for id in scored & known.keys()]
    before += _outlines(ledger, drawn, scored - known.keys())
    heard = runs.feedback_on(ledger.database, (t.id for t in before), upto_seq=upto)
    return praise_of(before, heard, ledger.tasks(t.task_id for t in before))


def _outlines(ledger: Ledger, drawn: Output, ids: Iterable[str]) -> list[Trajectory]:
    """Those of the runs that the days brought up to the night's line, outlined."""
    upto = drawn["upto"]["trajectory"]
    return list(runs.by_id(ledger.database, ids, DAYS, upto_seq=upto, outlined=True).values())


def suites_of(run: NightRun) -> list[Suite]:
    """The night's suites, frozen in its folder at first use."""
    return night_suites(run.services.settings, run.services.ledger, run.folder)


def judge_feedback(run: NightRun) -> Output:
    """Decide which feedback may teach, and credit what was recalled with how the runs ended."""
    if "training_file" in run.night.options:
        return {"trust": {}}
    ledger, drawn = run.services.ledger, run.done("snapshot")
    standing, judgements = judged(ledger, drawn)
    counts: dict[str, int] = {}
    for judgement in judgements:
        said = standing[judgement.feedback_id]
        # What nothing supports yet is judged again every night, and each write waits for the disk.
        if (said.trust, said.trust_reason) != (judgement.trust, judgement.reason):
            ledger.set_trust(judgement.feedback_id, judgement.trust, judgement.reason)
        counts[judgement.trust.value] = counts.get(judgement.trust.value, 0) + 1
    credited = 0
    for part in rows.chunks(_to_credit(ledger, drawn)):
        heard = runs.feedback_on(ledger.database, part, upto_seq=drawn["upto"]["feedback"])
        credited += lessons.credit_runs(run.services, _outlines(ledger, drawn, part), heard)
    told = ", ".join(f"{count} {trust}" for trust, count in counts.items())
    run.emit("credit", f"feedback judged: {told or 'none new'}", **counts)
    return {"trust": counts, "credited": credited}


def judged(ledger: Ledger, drawn: Output) -> tuple[dict[str, Feedback], list[Judgement]]:
    """The undecided feedback up to the night's line, by id, and what is said of it now. Read for it: the runs it is
    about, and what else was said of corrected questions, for that may corroborate it."""
    database, upto = ledger.database, drawn["upto"]["feedback"]
    undecided = {said.id: said for said in runs.undecided(database, upto_seq=upto)}
    about = _outlines(ledger, drawn, {said.trajectory_id for said in undecided.values()})
    tasks = ledger.tasks(t.task_id for t in about)
    corrected = {said.trajectory_id for said in undecided.values() if said.kind is FeedbackKind.CORRECTION}
    questions = {tasks[t.task_id].fingerprint for t in about if t.id in corrected and t.task_id in tasks}
    same = runs.spoken_of_questions(database, questions, FeedbackKind.CORRECTION, upto_seq=upto)
    others = _outlines(ledger, drawn, same - {t.id for t in about})
    tasks |= ledger.tasks(t.task_id for t in others)
    heard = runs.feedback_on(database, same, upto_seq=upto)
    return undecided, credit([*undecided.values(), *heard], [*about, *others], tasks, verify)


def _to_credit(ledger: Ledger, drawn: Output) -> set[str]:
    """The runs whose outcome no night has counted yet, or that users may have judged otherwise since: new ones, and
    all that anybody has spoken of. After a forgetting all runs: an item may stand for itself again, without its
    counts, and one voice less may turn an outcome."""
    database, upto, line = ledger.database, drawn["upto"], 0
    for night in reversed(ledger.nights()):
        done, line_drawn = ledger.stage(night.id, "credit"), ledger.stage(night.id, "snapshot")
        if done is not None and line_drawn is not None and "credited" in done.output:
            forgot = newest_forgetting(database)
            line = line_drawn.output["upto"]["trajectory"] if forgot is None or forgot < line_drawn.at else 0
            break
    new = runs.run_ids(database, DAYS, after_seq=line, upto_seq=upto["trajectory"])
    return new | runs.spoken_of(database, upto_seq=upto["feedback"])


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
    new = past_runs(snap, known)
    for past_run in new:
        services.ledger.add_past_run(past_run)
    behind = runs.feedback_by_id(services.ledger.database, chain.from_iterable(old.sources for old in known))
    rejected = {said.id for said in behind if said.trust is Trust.REJECTED}
    newer = "a newer trusted correction of its question gives another answer"
    outdated = {old.id: newer for old in contradicted(snap, known)}
    outdated |= {old.id: "the word behind it was rejected" for old in known if rejected & set(old.sources)}
    for old in known:
        if old.id in outdated and old.status in RECALLABLE and not old.pinned:
            services.ledger.set_memory_status(old.id, MemoryStatus.RETIRED, outdated[old.id])
    moved = lessons.review_items(services, champion.number)
    told = f"{kept['added']} principles ({kept['merged']} merged), {len(new)} runs remembered"
    run.emit("principles", told, dropped=report.dropped, moved=moved)
    counts = {"principles": kept["added"], "merged": kept["merged"], "runs": len(new)}
    return {**counts, "dropped": report.dropped, "moved": moved}
