"""What a night learns from, frozen: the runs, the trusted feedback, their tasks, what is held out.

Owns the order (by id, whatever order the records came in), how well a run went all things said, and
which tasks are held out. Owns no decision of what may teach (`distill.credit`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from distill.near import Questions
from distill.runs import answer_of, callable_tools, corrected_run, hints_shown, run_of
from memory.records import (
    FULL_MARKS,
    TEACHING,
    Feedback,
    FeedbackKind,
    Message,
    Outcome,
    OutcomeSource,
    Purpose,
    StopReason,
    Task,
    Trajectory,
    Trust,
    text_of,
)

ANSWER_BLIND = frozenset({"action"})
"""Verifiers that judge how a run acted and not its answer: they make no success and support no correction."""

ANONYMOUS = "anonymous"
"""The author of a word that nobody signed."""

OPERATOR = "operator"
"""What the names of operators begin with; the service gives such names to nobody else."""

AnswerKey = tuple[str, str, str]
"""(tenant, task fingerprint, answer): the same answer to the same question, on whichever runs."""


@dataclass(frozen=True)
class Snapshot:
    """A night's material. Records are sorted by id; evaluation runs, untrusted feedback and what
    crosses tenants are left out.

    `held_out` are fingerprints of tasks that must never teach. `held_out_tasks` are the tasks
    themselves where at hand: they also catch near-duplicates, and join `held_out` by themselves.
    `begun`: runs that ended in a client's tool call. They are no whole runs; what came of them is, in the
    run that continues them. They are taken out of `trajectories`, as is every run that another continues.
    So are the runs of a teacher, which are nobody's own: `taught`. A try that was shown a hint which was rejected since
    is left out.
    `praised`: who praised which answers on runs that are not here (`praise_of`): earlier nights' material vouches for
    tonight's and is not taught again.
    `champion`: the generation that the night goes on from, whose samples are today's model's; None: any generation's.
    """

    trajectories: list[Trajectory]
    feedback: list[Feedback]
    tasks: dict[str, Task]
    held_out: frozenset[str] = frozenset()
    seed: int = 0
    held_out_tasks: list[Task] = field(default_factory=list)
    begun: list[Trajectory] = field(default_factory=list)
    taught: list[Trajectory] = field(default_factory=list)
    praised: Mapping[AnswerKey, set[str]] = field(default_factory=dict)
    champion: int | None = None

    def __post_init__(self) -> None:
        tenants = {task.id: task.tenant for task in self.tasks.values()}
        rejected = {f.id for f in self.feedback if f.trust is Trust.REJECTED}
        serve = {
            t.id: t
            for t in [*self.begun, *self.taught, *self.trajectories]
            if t.purpose in TEACHING and tenants.get(t.task_id, t.tenant) == t.tenant
            if not rejected.intersection(hints_shown(t))
        }
        continued = {t.continues for t in serve.values()}
        begun = {id for id, t in serve.items() if t.stop_reason is StopReason.TOOL_CALLS or id in continued}
        taught = {id for id, t in serve.items() if t.purpose is Purpose.TEACHER}
        trusted = {
            f.id: f
            for f in self.feedback
            if f.trust is Trust.TRUSTED and (f.trajectory_id not in serve or serve[f.trajectory_id].tenant == f.tenant)
        }
        held_out_tasks = {t.id: t for t in self.held_out_tasks}
        fingerprints = self.held_out | {t.fingerprint for t in self.held_out_tasks}
        for name, value in (
            ("trajectories", [serve[id] for id in sorted(serve.keys() - begun - taught)]),
            ("begun", [serve[id] for id in sorted(begun - taught)]),
            ("taught", [serve[id] for id in sorted(taught)]),
            ("feedback", [trusted[id] for id in sorted(trusted)]),
            ("tasks", {id: self.tasks[id] for id in sorted(self.tasks)}),
            ("held_out_tasks", [held_out_tasks[id] for id in sorted(held_out_tasks)]),
            ("held_out", frozenset(fingerprints)),
        ):
            object.__setattr__(self, name, value)

    def said_of(self, trajectory: Trajectory) -> list[Feedback]:
        """The trusted feedback on a run."""
        return self._feedback_by_run.get(trajectory.id, [])

    def outcome(self, trajectory: Trajectory) -> Outcome | None:
        """`outcome_of` with this snapshot's feedback."""
        return outcome_of(trajectory, self.said_of(trajectory))

    def corrections(self, of: Trajectory | None = None) -> Iterator[tuple[Trajectory, Task, Feedback, list[Message]]]:
        """The trusted corrections (of one run), each with the whole run it stands for. One that its author took back
        by another answer to the same question is left out, on whichever run that came."""
        for trajectory in [*self.trajectories, *self.taught] if of is None else [of]:
            task = self.tasks.get(trajectory.task_id)
            if task is None:
                continue
            for feedback in corrections_of(trajectory, self.said_of(trajectory)):
                run = _usable(feedback, task, trajectory)
                if run is None:
                    continue
                answer = _plain(answer_of(run))
                if self._last_answers.get((task.tenant, task.fingerprint, feedback.voice), answer) == answer:
                    yield trajectory, task, feedback, run

    def own_successes(self) -> Iterator[tuple[Trajectory, Task, Outcome]]:
        """The runs that ended in an answer with full marks, by a verifier of answers or by users: an operator, or
        two named voices for the same answer to the same question. One user's praise is an outcome and no lesson:
        whoever can make the model say something could otherwise teach it by praising it.

        A run that goes on after a client's tool calls comes with the task that its conversation began with.
        """
        for trajectory in self.trajectories:
            task = self.tasks.get(trajectory.task_id)
            outcome = self._vouched(trajectory, task) if task is not None else None
            if task is not None and outcome is not None:
                yield trajectory, self._first_task(trajectory, task), outcome

    def teacher_successes(self) -> Iterator[tuple[Trajectory, Task, Outcome]]:
        """The teacher's runs by the same standard: whoever can make the teacher say something could otherwise teach
        that. Besides, those that the operator's settings trust and no user finds fault with."""
        for trajectory in self.taught:
            task, own = self.tasks.get(trajectory.task_id), trajectory.outcome
            if task is None:
                continue
            outcome = self._vouched(trajectory, task)
            if outcome is None and own is not None and own.by is OutcomeSource.TEACHER:
                outcome = self._full_marks(trajectory)
            if outcome is not None:
                yield trajectory, task, outcome

    def sources_of(self, success: Trajectory) -> list[str]:
        """What an example that teaches this run is made from: the run, the hints that it was shown, and the
        praise that somebody signed where that is what made it a success."""
        outcome = self.outcome(success)
        by_users = outcome is not None and outcome.by is OutcomeSource.USER
        said = [f for f in self.said_of(success) if f.voice != ANONYMOUS] if by_users else []
        praise = [f.id for f in said if f.kind is FeedbackKind.SCORE and (score_of(f.value) or 0.0) >= 0.5]
        return [success.id, *hints_shown(success), *praise]

    def failed(self, trajectory: Trajectory) -> bool:
        """Whether a run may be put behind a better one: judged, and without full marks. Where users judged, somebody
        with a name must find fault: a bad mark that nobody signed is an outcome and decides no pair."""
        outcome = self.outcome(trajectory)
        if outcome is None or outcome.success or outcome.by is not OutcomeSource.USER:
            return outcome is not None and not outcome.success
        said = self.said_of(trajectory)
        signed = scores_of(trajectory, (f for f in said if f.voice != ANONYMOUS))
        corrected = any(_other_answer(f.value, trajectory.answer) for f in corrections_of(trajectory, said))
        return corrected or any(score < FULL_MARKS for score in signed.values())

    def _full_marks(self, trajectory: Trajectory) -> Outcome | None:
        outcome = self.outcome(trajectory)
        done = outcome is not None and outcome.success and trajectory.stop_reason is StopReason.ANSWER
        return outcome if done else None

    def _vouched(self, trajectory: Trajectory, task: Task) -> Outcome | None:
        """The outcome of a run that may teach: an answer with full marks by whom `own_successes` names."""
        outcome = self._full_marks(trajectory)
        if outcome is None or (outcome.by is OutcomeSource.VERIFIER and judged_blindly(task)):
            return None
        by_users = outcome.by is OutcomeSource.USER and self._corroborated(trajectory, task)
        return outcome if by_users or outcome.by is OutcomeSource.VERIFIER else None

    def _first_task(self, trajectory: Trajectory, task: Task) -> Task:
        first = trajectory
        while first.continues in self._begun_by_id:
            first = self._begun_by_id[first.continues]
        began = self.tasks.get(first.task_id, task)
        return began if began is task or run_of(trajectory, began) is not None else task

    def held_out_reason(self, task: Task) -> str | None:
        """Why this task must not teach: its id, what it asks, or nearly that; None when it may."""
        if task.id in self._held_out_ids:
            return "held out: the task itself"
        if task.fingerprint in self.held_out:
            return "held out: the same question"
        if any(self._held_out_questions.has(text_of(m)) for m in task.messages if m.get("role") == "user"):
            return "held out: nearly the same question"
        return None

    def _corroborated(self, trajectory: Trajectory, task: Task) -> bool:
        key = _answer_key(trajectory, task)
        voices = self._praise.get(key, set()) | self.praised.get(key, set())
        return len(voices - {ANONYMOUS}) > 1 or any(voice.startswith(OPERATOR) for voice in voices)

    @cached_property
    def _praise(self) -> dict[AnswerKey, set[str]]:
        return praise_of([*self.trajectories, *self.taught], self.feedback, self.tasks)

    @cached_property
    def _last_answers(self) -> dict[tuple[str, str, str], str]:
        """(tenant, task fingerprint, voice) -> the answer of its newest trusted correction."""
        runs = {t.id: t for t in [*self.trajectories, *self.taught]}
        last: dict[tuple[str, str, str], str] = {}
        for said in sorted(self.feedback, key=_by_time):
            trajectory = runs.get(said.trajectory_id)
            task = self.tasks.get(trajectory.task_id) if trajectory else None
            if trajectory is None or task is None or said.kind is not FeedbackKind.CORRECTION:
                continue
            run = _usable(said, task, trajectory)
            if run is not None:
                last[task.tenant, task.fingerprint, said.voice] = _plain(answer_of(run))
        return last

    @cached_property
    def _feedback_by_run(self) -> dict[str, list[Feedback]]:
        by_run: defaultdict[str, list[Feedback]] = defaultdict(list)
        for feedback in self.feedback:
            by_run[feedback.trajectory_id].append(feedback)
        return by_run

    @cached_property
    def _begun_by_id(self) -> dict[str | None, Trajectory]:
        return {t.id: t for t in self.begun}

    @cached_property
    def _held_out_known(self) -> list[Task]:
        stored = [t for t in self.tasks.values() if t.fingerprint in self.held_out]
        return self.held_out_tasks + stored

    @cached_property
    def _held_out_ids(self) -> frozenset[str]:
        return frozenset(t.id for t in self._held_out_known)

    @cached_property
    def _held_out_questions(self) -> Questions:
        return Questions(t.question for t in self._held_out_known)


def outcome_of(trajectory: Trajectory, feedback: Iterable[Feedback]) -> Outcome | None:
    """The best supported judgement of a run: verifier, then users, then teacher or critic.

    Users: the mean of each author's last trusted score in 0..1, so full marks need agreement. A trusted
    correction with another answer is a score of 0 (DRIFT, arXiv 2510.02341: a complaint is a
    verdict). None when nobody judged.
    """
    own = trajectory.outcome
    if own is not None and own.by is OutcomeSource.VERIFIER:
        return own
    scores = scores_of(trajectory, feedback)
    if not scores:
        return own
    mean = sum(scores.values()) / len(scores)
    agreeing = sum((score >= 0.5) == (mean >= 0.5) for score in scores.values())
    # Laplace-smoothed share of authors that agree: one voice alone is two thirds sure.
    return Outcome(score=mean, by=OutcomeSource.USER, confidence=(agreeing + 1) / (len(scores) + 2))


def scores_of(trajectory: Trajectory, feedback: Iterable[Feedback]) -> dict[str, float]:
    """Voice -> its last trusted score of the run; a correction with another answer is a score of 0."""
    scores: dict[str, float] = {}
    for said in sorted(feedback, key=_by_time):
        if said.trajectory_id != trajectory.id or said.trust is not Trust.TRUSTED:
            continue
        score = score_of(said.value) if said.kind is FeedbackKind.SCORE else None
        if said.kind is FeedbackKind.CORRECTION and _other_answer(said.value, trajectory.answer):
            score = 0.0
        if score is not None:
            scores[said.voice] = score
    return scores


def praise_of(
    trajectories: Iterable[Trajectory], feedback: Iterable[Feedback], tasks: Mapping[str, Task]
) -> dict[AnswerKey, set[str]]:
    """Answer -> the voices whose last trusted score of it is praise. Runs whose task is unknown are left out."""
    by_run: defaultdict[str, list[Feedback]] = defaultdict(list)
    for said in feedback:
        by_run[said.trajectory_id].append(said)
    found: defaultdict[AnswerKey, set[str]] = defaultdict(set)
    for trajectory in trajectories:
        task = tasks.get(trajectory.task_id)
        for voice, score in scores_of(trajectory, by_run[trajectory.id]).items():
            if task is not None and score >= 0.5:
                found[_answer_key(trajectory, task)].add(voice)
    return dict(found)


def corrections_of(trajectory: Trajectory, feedback: Iterable[Feedback]) -> list[Feedback]:
    """The trusted corrections of a run, oldest first; of one author only the last word counts."""
    last: dict[str, Feedback] = {}
    for said in sorted(feedback, key=_by_time):
        if said.trajectory_id != trajectory.id or said.trust is not Trust.TRUSTED:
            continue
        if said.kind is FeedbackKind.CORRECTION:
            last[said.voice] = said
    return sorted(last.values(), key=_by_time)


def judged_blindly(task: Task) -> bool:
    """Whether the task's verifier does not look at the answer."""
    return task.verifier is not None and task.verifier.name in ANSWER_BLIND


def score_of(value: Any) -> float | None:
    """A score feedback's value in 0..1; None when it is neither a boolean nor a number in 0..1."""
    if isinstance(value, (bool, int, float)) and 0.0 <= value <= 1.0:
        return float(value)
    return None


def _answer_key(trajectory: Trajectory, task: Task) -> AnswerKey:
    return task.tenant, task.fingerprint, _plain(trajectory.answer or "")


def _plain(answer: str) -> str:
    return " ".join(answer.split()).casefold()


def _usable(said: Feedback, task: Task, trajectory: Trajectory) -> list[Message] | None:
    """The run that a correction stands for. `credit` rejects one that has none; it may be trusted by hand all the
    same, and has nothing to show."""
    try:
        return corrected_run(said.value, task, callable_tools(trajectory))
    except ValueError:
        return None


def _by_time(feedback: Feedback) -> tuple[float, str]:
    return feedback.created_at.timestamp(), feedback.id


def _other_answer(value: Any, answer: str | None) -> bool:
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = answer_of(value)
    return isinstance(value, str) and " ".join(value.split()) != " ".join((answer or "").split())
