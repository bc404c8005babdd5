"""Credit: which feedback may teach, and why.

Owns the rule that turns a user's word into trusted, quarantined or rejected. Owns no storage of the
result: `serve` writes it through the ledger.

The rule's core is corroboration: a word teaches when something else than its author supports it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from distill.runs import answer_of, callable_tools, corrected_run
from distill.snapshot import ANONYMOUS, OPERATOR, judged_blindly, score_of
from memory.errors import VerifierError
from memory.records import TEACHING, Feedback, FeedbackKind, Outcome, OutcomeSource, Task, Trajectory, Trust

Verify = Callable[[Task, str], Outcome | None]
"""`agent.verify.verify`: (task, answer) -> how good it is, None when the task has no verifier."""


@dataclass(frozen=True)
class Judgement:
    """What credit says of one feedback."""

    feedback_id: str
    trust: Trust
    reason: str


def credit(
    feedback: Iterable[Feedback],
    trajectories: Iterable[Trajectory],
    tasks: Mapping[str, Task],
    verify: Verify,
    operators: frozenset[str] = frozenset(),
) -> list[Judgement]:
    """Judge the quarantined feedback, in the order of its ids; what was decided before stays.

    A correction: the task's verifier decides with full marks (trusted) or zero (rejected), unless the
    corrector is who asked, user or key, and so sent the yardstick along. Otherwise it is trusted from an operator
    (author starting with "operator", or in `operators`) or when a second named voice gives the same answer to
    the same question, and else stays quarantined.
    A score: trusted as a verdict, unless it contradicts the task's verifier; what it praises is taught only once
    somebody else does too (`Snapshot.own_successes`). A hint or a preference: an operator's
    only. A comment is kept and never teaches.
    """
    everything = sorted({f.id: f for f in feedback}.values(), key=lambda f: f.id)
    runs = {t.id: t for t in trajectories}
    voices = _voices(everything, runs, tasks)
    judgements: list[Judgement] = []
    for said in everything:
        if said.trust is not Trust.QUARANTINED:
            continue
        trajectory = runs.get(said.trajectory_id)
        task = tasks.get(trajectory.task_id) if trajectory else None
        if trajectory is None or task is None:
            judgement = (Trust.QUARANTINED, "its run is not in this snapshot")
        elif trajectory.tenant != said.tenant:
            judgement = (Trust.REJECTED, "it speaks of another tenant's run")
        elif trajectory.purpose not in TEACHING:
            judgement = (Trust.REJECTED, "its run is an evaluation, which never teaches")
        else:
            operator = said.author.startswith(OPERATOR) or said.author in operators
            judgement = _judge(said, trajectory, task, verify, operator, voices)
        judgements.append(Judgement(said.id, *judgement))
    return judgements


_Voices = Mapping[tuple[str, str, str], frozenset[str]]
"""(tenant, task fingerprint, answer) -> the voices of the named authors who gave it."""


def _judge(
    said: Feedback, trajectory: Trajectory, task: Task, verify: Verify, operator: bool, voices: _Voices
) -> tuple[Trust, str]:
    if said.kind is FeedbackKind.CORRECTION:
        return _judge_correction(said, trajectory, task, verify, operator, voices)
    if said.kind is FeedbackKind.SCORE:
        return _judge_score(said, trajectory)
    if said.kind is FeedbackKind.COMMENT:
        return Trust.QUARANTINED, "comments are kept and never trained on"
    if said.kind is FeedbackKind.HINT and not (isinstance(said.value, str) and said.value.strip()):
        return Trust.REJECTED, "the hint is empty"
    if operator:
        return Trust.TRUSTED, "an operator's word"
    return Trust.QUARANTINED, f"nothing supports this {said.kind.value} yet: an operator may trust it"


def _judge_correction(
    said: Feedback, trajectory: Trajectory, task: Task, verify: Verify, operator: bool, voices: _Voices
) -> tuple[Trust, str]:
    try:
        answer = answer_of(corrected_run(said.value, task, callable_tools(trajectory)))
    except ValueError as exc:
        return Trust.REJECTED, f"not a usable correction: {exc}"
    own = _asked(said, task)
    outcome = None if own else _verdict(task, answer, verify)
    if outcome is not None and outcome.success:
        return Trust.TRUSTED, "the task's verifier gives its answer full marks"
    if outcome is not None and outcome.score <= 0.0:
        return Trust.REJECTED, "the task's verifier gives its answer zero"
    if operator:
        return Trust.TRUSTED, "an operator's correction"
    others = voices.get(_voice_key(said, task, answer), frozenset()) - {said.voice}
    if others and said.author != ANONYMOUS:
        return Trust.TRUSTED, f"{sorted(others)[0]!r} gave the same answer"
    if own and (task.verifier is not None or task.reference is not None):
        return Trust.QUARANTINED, "its author sent the yardstick too; no second author or operator supports it yet"
    return Trust.QUARANTINED, "no verifier, second author or operator supports it yet"


def _judge_score(said: Feedback, trajectory: Trajectory) -> tuple[Trust, str]:
    score = score_of(said.value)
    if score is None:
        return Trust.REJECTED, f"a score is a boolean or a number in 0..1, got {said.value!r}"
    outcome = trajectory.outcome
    if outcome is None or outcome.by is not OutcomeSource.VERIFIER:
        return Trust.TRUSTED, "a user's verdict; no verifier has judged this run"
    if (score >= 0.5) == (outcome.score >= 0.5):
        return Trust.TRUSTED, "the task's verifier agrees"
    return Trust.REJECTED, f"the task's verifier says {outcome.score:g}"


def _asked(said: Feedback, task: Task) -> bool:
    """Whether the author is who asked, the request's user or its key: its reference and verifier are the same voice."""
    names = {said.author, said.author.partition("/")[2]} - {""}
    return bool(names & {task.user, task.safety_identifier}) or said.voice == task.voice


def _verdict(task: Task, answer: str, verify: Verify) -> Outcome | None:
    if judged_blindly(task):
        return None
    try:
        return verify(task, answer)
    except VerifierError:
        # A verifier that cannot judge supports nobody; the other rules still apply.
        return None


def _voices(feedback: list[Feedback], runs: Mapping[str, Trajectory], tasks: Mapping[str, Task]) -> _Voices:
    found: defaultdict[tuple[str, str, str], set[str]] = defaultdict(set)
    for said in feedback:
        trajectory = runs.get(said.trajectory_id)
        task = tasks.get(trajectory.task_id) if trajectory else None
        if said.kind is not FeedbackKind.CORRECTION or said.trust is Trust.REJECTED or said.author == ANONYMOUS:
            continue
        if trajectory is None or task is None or trajectory.tenant != said.tenant:
            continue
        try:
            answer = answer_of(corrected_run(said.value, task, callable_tools(trajectory)))
        except ValueError:
            continue
        found[_voice_key(said, task, answer)].add(said.voice)
    return {key: frozenset(authors) for key, authors in found.items()}


def _voice_key(said: Feedback, task: Task, answer: str) -> tuple[str, str, str]:
    return said.tenant, task.fingerprint, " ".join(answer.split()).casefold()
