"""Experience into words: principles distilled from runs, and runs worth showing again.

EvolveR's self-distillation (arXiv 2510.16079 §3) with its leaks closed: the summariser sees only the
agent's own messages, never the reference answer nor recalled text, and what it writes is checked
before it is kept. Owns the prompt, the parser and the checks. Owns neither the store, nor scoring,
merging and retiring (`memory`).
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import chain

from distill.parse import SHAPE, Draft, Flaw, normal_text, parse_principle
from distill.runs import answer_of, attempt_of, by_usefulness, looked_up, run_of, task_messages
from distill.snapshot import Snapshot
from memory.errors import ModelError
from memory.records import (
    LOOKED_UP,
    MALFORMED,
    RECALLED,
    FeedbackKind,
    Message,
    OutcomeSource,
    PastRun,
    Principle,
    PrincipleKind,
    StopReason,
    Task,
    Trajectory,
    content_hash,
    text_of,
)

Ask = Callable[[str, str | None], Awaitable[str]]
"""(prompt, regex the reply is constrained to where the engine can) -> the reply."""

LOG_CHARS = 4096
"""A run's log is cut to this many characters in the prompt (EvolveR)."""

_EXPERIENCE = re.compile(r"<experience>(.*?)</experience>", re.DOTALL)
_INFRASTRUCTURE = (StopReason.ERROR, StopReason.CANCELLED, StopReason.TOOL_CALLS)

_PROMPT = """Below is a task and what an agent did. The agent {verdict}.
Write one general lesson in one sentence: {wanted}
It must help with other tasks of this kind, so name no number, answer or quotation of this one.
Then give it as triplets of subject, predicate and object. Reply with exactly these two lines:
[DESCRIPTION]: the sentence
[STRUCTURE]: [(subject, predicate, object), ...]

{log}
{hints}
Your two lines:
"""

_CONTRAST = """Below are a task and two attempts of an agent. The first solved it, the second did not.
Write one general lesson in one sentence: what the first did differently that made it work.
It must help with other tasks of this kind, so name no number, answer or quotation of this one.
Then give it as triplets of subject, predicate and object. Reply with exactly these two lines:
[DESCRIPTION]: the sentence
[STRUCTURE]: [(subject, predicate, object), ...]

The attempt that solved it:
{won}

The attempt that did not:
{lost}
{hints}
Your two lines:
"""

_WORDING: dict[PrincipleKind, tuple[str, str]] = {
    PrincipleKind.GUIDING: ("solved the task", "what the agent did that made it work."),
    PrincipleKind.CAUTIONARY: ("did not solve the task", "the mistake to avoid, and what to do instead."),
}


@dataclass(frozen=True)
class _Asked:
    """What one lesson is to be drawn from: a run, or a success (`trajectory`) against a failure at the same task."""

    trajectory: Trajectory
    task: Task
    kind: PrincipleKind
    against: Trajectory | None = None

    @property
    def runs(self) -> list[Trajectory]:
        return [self.trajectory] if self.against is None else [self.trajectory, self.against]

    @property
    def form(self) -> int:
        """Contrasts say most and go first, then successes, then failures."""
        return 0 if self.against is not None else 1 if self.kind is PrincipleKind.GUIDING else 2


@dataclass(frozen=True)
class DistilReport:
    """The new principles, and reason -> how many replies were dropped for it."""

    principles: list[Principle]
    dropped: dict[str, int]


async def distill_principles(
    snapshot: Snapshot,
    ask: Ask,
    existing: Iterable[Principle] = (),
    *,
    limit: int = 32,
    concurrency: int = 4,
) -> DistilReport:
    """At most `limit` lessons: guiding from successes, cautionary from failures, and guiding from both against each
    other where one question has both.

    Of a question at most one success and one failure are asked about, workloads in turn, and as many of each
    form where there are enough. Runs that `existing` principles came from and held-out tasks are left
    out. Scores start unused. A reply that cannot be used, or a model call that fails, is counted in
    `dropped`, never stored.
    """
    known = list(existing)
    chosen = _worth_asking(snapshot, {source for p in known for source in p.sources}, limit)
    gate = asyncio.Semaphore(concurrency)

    async def reply_to(prompt: str) -> str | None:
        async with gate:
            try:
                return await ask(prompt, SHAPE)
            except ModelError:
                return None

    prompts = [_prompt(snapshot, asked) for asked in chosen]
    replies = await asyncio.gather(*(reply_to(prompt) for prompt in prompts))

    dropped: Counter[str] = Counter()
    stored = {(p.tenant, p.kind, normal_text(p.text)) for p in known}
    fresh: dict[tuple[str, PrincipleKind, str], Principle] = {}
    for asked, reply in zip(chosen, replies, strict=True):
        draft = parse_principle(reply) if reply is not None else Flaw.NO_REPLY
        for run in asked.runs:
            if isinstance(draft, Draft):
                draft = _leak(draft, snapshot, run, asked.task) or draft
        if isinstance(draft, Flaw):
            dropped[draft.value] += 1
            continue
        task, kind, made_from = asked.task, asked.kind, [run.id for run in asked.runs]
        key = (task.tenant, kind, normal_text(draft.text))
        if key in stored:
            dropped[Flaw.KNOWN.value] += 1
        elif key in fresh:
            dropped[Flaw.REPEATED.value] += 1
            sources = sorted({*fresh[key].sources, *made_from})
            fresh[key] = fresh[key].model_copy(update={"sources": sources})
        else:
            fresh[key] = Principle(
                id=f"prin_{content_hash([*key])[:32]}",
                tenant=task.tenant,
                workload=task.workload,
                kind=kind,
                text=draft.text,
                structure=draft.structure,
                sources=sorted(made_from),
                created_at=asked.trajectory.started_at,
            )
    return DistilReport(list(fresh.values()), dict(sorted(dropped.items())))


def past_runs(snapshot: Snapshot, existing: Iterable[PastRun] = ()) -> list[PastRun]:
    """The runs worth showing in a prompt: own and the teacher's successes, trusted corrections; one a question.

    The best of a question is one that shows its work with the offered tools, then the shortest. Ids
    come from the content and a question that `existing` already has is left out, so a second call adds
    nothing; unless a trusted correction newer than all of its runs gives an answer that none of them has. Held-out
    tasks, tasks that lean on earlier turns of a conversation, and runs that looked something up are left out.
    """
    found, corrected = _offered(snapshot)
    taken = _by_question(existing)
    best = {key: min(offers, key=lambda pair: pair[0])[1] for key, offers in found.items() if key not in taken}
    for key, said in corrected.items():
        known = taken.get(key, [])
        if known and all(
            not r.pinned and r.created_at < said.created_at and _answer(r) != _answer(said) for r in known
        ):
            best[key] = said
    return [best[key] for key in sorted(best)]


def contradicted(snapshot: Snapshot, existing: Iterable[PastRun]) -> list[PastRun]:
    """The past runs whose answer a newer trusted correction of their question contradicts. A pinned one stands."""
    _, corrected = _offered(snapshot)
    return [
        run
        for key, known in _by_question(existing).items()
        if (said := corrected.get(key)) is not None
        for run in known
        if _outdates(said, run)
    ]


_Question = tuple[str, str, str]
"""(tenant, workload, what is asked)"""


def _by_question(runs: Iterable[PastRun]) -> dict[_Question, list[PastRun]]:
    found: defaultdict[_Question, list[PastRun]] = defaultdict(list)
    for run in runs:
        found[run.tenant, run.workload, _squeeze(run.question)].append(run)
    return dict(found)


def _outdates(said: PastRun, run: PastRun) -> bool:
    return not run.pinned and said.created_at > run.created_at and _answer(run) != _answer(said)


def _answer(run: PastRun) -> str:
    return _squeeze(answer_of(run.messages)).casefold()


def _offered(
    snapshot: Snapshot,
) -> tuple[dict[_Question, list[tuple[tuple[object, ...], PastRun]]], dict[_Question, PastRun]]:
    """(question -> all that could be shown for it, each with its order; question -> its newest correction)"""
    found: defaultdict[_Question, list[tuple[tuple[object, ...], PastRun]]] = defaultdict(list)
    corrected: dict[_Question, PastRun] = {}

    def offer(
        trajectory: Trajectory, task: Task, run: list[Message], sources: list[str], at: datetime
    ) -> PastRun | None:
        asked = task_messages(task)
        standing_alone = len(asked) == 1 and asked[0].get("role") == "user" and not looked_up(run)
        if not standing_alone or snapshot.held_out_reason(task):
            return None
        messages = [{"role": "user", "content": text_of(asked[0])}, *run]
        past = PastRun(
            id=f"run_{content_hash([task.tenant, task.workload, messages])[:32]}",
            tenant=task.tenant,
            workload=task.workload,
            task_id=task.id,
            messages=messages,
            sources=sorted({trajectory.id, *sources}),
            created_at=at,
        )
        order = (by_usefulness(run, trajectory.tools), sources[0])
        found[task.tenant, task.workload, _squeeze(past.question)].append((order, past))
        return past

    for trajectory, task, _ in chain(snapshot.own_successes(), snapshot.teacher_successes()):
        run = run_of(trajectory, task)
        if run is not None:
            offer(trajectory, task, run, snapshot.sources_of(trajectory), trajectory.started_at)
    for trajectory, task, feedback, run in snapshot.corrections():
        past = offer(trajectory, task, run, [feedback.id], feedback.created_at)
        if past is not None:
            key = (past.tenant, past.workload, _squeeze(past.question))
            corrected[key] = max(corrected.get(key, past), past, key=lambda run: (run.created_at, run.id))
    return dict(found), corrected


def gives_away(text: str, snapshot: Snapshot, trajectory: Trajectory, task: Task) -> bool:
    """Whether a text holds an answer of the task that is known to be right."""
    return _gives_away(text, _answers(snapshot, trajectory, task))


def _worth_asking(snapshot: Snapshot, already: set[str], limit: int) -> list[_Asked]:
    """What to learn from: forms in turn, in each form workloads in turn, one run or pair a question."""
    won = {trajectory.id for trajectory, _, _ in snapshot.own_successes()}
    by_question: defaultdict[tuple[str, str], dict[PrincipleKind, _Asked]] = defaultdict(dict)
    single: list[_Asked] = []
    in_order = sorted(snapshot.trajectories, key=lambda t: content_hash([snapshot.seed, t.id]))
    for trajectory in in_order:
        task = snapshot.tasks.get(trajectory.task_id)
        kind = _kind(snapshot, trajectory, trajectory.id in won)
        if task is None or kind is None or attempt_of(trajectory, task) is None or snapshot.held_out_reason(task):
            continue
        asked = _Asked(trajectory, task, kind)
        question = by_question[task.tenant, task.fingerprint]
        if kind not in question or question[kind].trajectory.id in already:
            if trajectory.id not in already:
                single.append(asked)
            if kind not in question or trajectory.id not in already:
                question[kind] = asked
    pairs: list[_Asked] = []
    for question in by_question.values():
        win, loss = question.get(PrincipleKind.GUIDING), question.get(PrincipleKind.CAUTIONARY)
        if win and loss and not {win.trajectory.id, loss.trajectory.id} <= already:
            pairs.append(_Asked(win.trajectory, win.task, PrincipleKind.GUIDING, against=loss.trajectory))
    groups: defaultdict[tuple[int, str, str], list[_Asked]] = defaultdict(list)
    for asked in (*pairs, *single):
        groups[asked.form, asked.task.tenant, asked.task.workload].append(asked)
    by_form: defaultdict[int, list[tuple[int, str, str, _Asked]]] = defaultdict(list)
    for (form, tenant, workload), group in groups.items():
        by_form[form] += [(turn, tenant, workload, asked) for turn, asked in enumerate(group)]
    turns: list[tuple[int, int, _Asked]] = []
    for form, entries in by_form.items():
        entries.sort(key=lambda entry: entry[:3])
        turns += [(turn, form, asked) for turn, (*_, asked) in enumerate(entries)]
    turns.sort(key=lambda entry: entry[:2])
    return [asked for *_, asked in turns[:limit]]


def _kind(snapshot: Snapshot, trajectory: Trajectory, won: bool) -> PrincipleKind | None:
    """What a run can teach: None when nobody reliable judged it or it ended by no fault of the model."""
    if won:
        return PrincipleKind.GUIDING
    outcome = snapshot.outcome(trajectory)
    judges = (OutcomeSource.VERIFIER, OutcomeSource.USER)
    if outcome is None or outcome.by not in judges or not snapshot.failed(trajectory):
        return None
    return None if trajectory.stop_reason in _INFRASTRUCTURE else PrincipleKind.CAUTIONARY


def _prompt(snapshot: Snapshot, asked: _Asked) -> str:
    secrets = [answer for run in asked.runs for answer in _answers(snapshot, run, asked.task)]
    said = [f for run in asked.runs for f in snapshot.said_of(run)]
    hints = "\n".join(
        f"A user's hint: {_squeeze(f.value)}"
        for f in said
        if f.kind is FeedbackKind.HINT and isinstance(f.value, str) and not _gives_away(f.value, secrets)
    )
    if asked.against is not None:
        won, lost = _log(asked.trajectory, LOG_CHARS // 2), _log(asked.against, LOG_CHARS // 2)
        return _CONTRAST.format(won=won, lost=lost, hints=hints)
    verdict, wanted = _WORDING[asked.kind]
    return _PROMPT.format(verdict=verdict, wanted=wanted, log=_log(asked.trajectory, LOG_CHARS), hints=hints)


def _log(trajectory: Trajectory, chars: int) -> str:
    """What the agent did, its middle cut out where it is too long."""
    log = "\n".join(line for message in trajectory.own_messages for line in _told(message))
    half = chars // 2
    return log if len(log) <= chars else f"{log[:half]}\n…\n{log[-half:]}"


def _told(message: Message) -> list[str]:
    """A message as lines of a log."""
    text = text_of(message)
    if message.get("name") == LOOKED_UP:
        return ["Result: (what memory or documents say)"]
    if message.get("role") == "tool":
        return [f"Result: {text}"]
    if message.get("role") != "assistant":
        return [f"User: {text}"]
    if message.get("name") == MALFORMED:
        return [f"Agent (unreadable): {text}"]
    calls = [call["function"] for call in message.get("tool_calls") or []]
    lines = [f"Agent calls {function['name']} with {function['arguments']}" for function in calls]
    return [f"Agent: {text}", *lines] if text else lines


def _answers(snapshot: Snapshot, trajectory: Trajectory, task: Task) -> list[str]:
    """What a lesson of this run must not contain: its reference and every answer known to be right."""
    right = [task.reference or ""]
    right += [answer_of(run) for _, _, _, run in snapshot.corrections(of=trajectory)]
    outcome = snapshot.outcome(trajectory)
    if outcome is not None and outcome.success:
        right.append(trajectory.answer or "")
    return [answer for answer in right if answer.strip()]


def _gives_away(text: str, answers: Iterable[str]) -> bool:
    said = _tokens(text)
    return any(_within(_tokens(answer), said) for answer in answers)


def _tokens(text: str) -> list[str]:
    """Words, numbers and signs; a lone capital letter keeps its case, so that the answer "A" is no article."""
    tokens = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]", re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    return [token if len(token) == 1 else re.sub(r"\.0+$", "", token).casefold() for token in tokens]


def _within(part: list[str], whole: list[str]) -> bool:
    size = len(part)
    return size > 0 and any(whole[start : start + size] == part for start in range(len(whole) - size + 1))


def _leak(draft: Draft, snapshot: Snapshot, trajectory: Trajectory, task: Task) -> Flaw | None:
    said = "\n".join([draft.text, *(part for triplet in draft.structure for part in triplet)])
    if _gives_away(said, _answers(snapshot, trajectory, task)):
        return Flaw.ANSWER
    text = f" {normal_text(draft.text)} "
    for line in _recalled_lines(trajectory):
        shown = f" {normal_text(line)} "
        if text in shown or (len(shown.split()) >= 5 and shown in text):
            return Flaw.RECALLED
    return None


def _recalled_lines(trajectory: Trajectory) -> list[str]:
    lines: list[str] = []
    for message in trajectory.messages:
        if message.get("name") == RECALLED:
            lines.append(text_of(message))
        elif message.get("name") == LOOKED_UP:
            lines += text_of(message).splitlines()
        elif message.get("role") == "system":
            lines += [line for block in _EXPERIENCE.findall(text_of(message)) for line in block.splitlines()]
    return lines


def _squeeze(text: str) -> str:
    return " ".join(text.split())
