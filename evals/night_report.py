"""The morning report of a night as data: what was learned from whom, what it cost, what was decided and why.

Owns the shape. The page is `evals.night_page`; the ledger's rows are gathered by `serve.reports`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel

from evals.gate import GateDecision
from evals.report import Gain, Row
from memory.escalations import EscalationFigures, HelpFigures
from memory.night_records import GenerationStatus, NightStatus
from memory.records import ExampleKind, Message


class Voice(BaseModel):
    """Somebody whom the night learned from: by words, or by asking where a verifier judged; or a teacher, or a file."""

    who: str
    """The name; "author N" where the reader may not know names, "anonymous" where there is none."""
    examples: int
    corrections: int


class Learned(BaseModel):
    """What the night learned from. Counts are of everybody; voices are of those whom the reader may know of."""

    since: datetime | None
    """The moment that the night was narrowed to."""
    runs: int
    feedback: dict[str, int]
    """Judged that night, by trust."""
    voices: list[Voice]
    elsewhere: int
    """Examples of tenants that the reader may not see."""


class Sample(BaseModel):
    """A training example without its system prompt."""

    id: str
    kind: ExampleKind
    workload: str
    with_memory: bool
    messages: list[Message]
    chosen: list[Message] | None
    rejected: list[Message] | None


class Recipe(BaseModel):
    """What a recipe contributed."""

    name: str
    examples: int
    with_memory: int
    samples: list[Sample]


class PractisedWorkload(BaseModel):
    """What a workload was given of the night's practice, why, and what came of it."""

    workload: str
    share: float
    """Of the tasks that the bandit chose."""
    why: str
    before: float
    """Success until then, smoothed."""
    tasks: int
    tries: int
    successes: int
    tokens: int
    examples: int
    """That were made from its tries."""


class Practice(BaseModel):
    """The earlier tasks that the night tried again. Counts are of everybody; workloads are those whose tasks the
    reader may know of."""

    tasks: int
    hinted: int
    """Of the tasks: chosen for a user's hint, not by the bandit."""
    complained: int = 0
    """Of the tasks: chosen for a user's complaint, not by the bandit."""
    tries: int
    successes: int
    tokens: int
    left_out: int = 0
    """Tries for which the night's time left no room."""
    examples: int
    workloads: list[PractisedWorkload]


class TeacherHelp(BaseModel):
    """The teacher's part in the days."""

    day: HelpFigures
    """Between the night before and this one."""
    generations: list[EscalationFigures]
    """Each since it began, up to this night."""


class Training(BaseModel):
    """The trainer's figures."""

    generation: int
    rows: int
    pairs: int
    tokens: int
    trained_tokens: int
    """Those that the loss fell on."""
    tokens_per_s: float
    seconds: float
    note: str
    losses: dict[str, list[float]]
    """One figure a step, by phase."""
    alpha: float | None = None
    """How far from the previous generation's weights (0) to the trained ones (1) those lie that validation chose; None
    where `train.interpolate` names no choice."""


class Tokens(BaseModel):
    """What a part of the night cost in tokens."""

    part: Literal["practice", "training", "evaluation", "teacher"]
    """Training's are those that all its steps read; the teacher's are the days', since the night before."""
    prompt: int | None = None
    completion: int | None = None
    """None for a part that does not know its tokens apart, and for exams of older versions, which counted prompts."""
    total: int


class Point(BaseModel):
    """A generation on the learning curve."""

    generation: int
    status: GenerationStatus
    row: Row
    prompt_tokens: float | None
    """Mean of a held-out task; None where it was not counted."""
    same_tasks: bool
    """Whether it was measured on the tasks of this night."""


class NightReport(BaseModel):
    """A night, told in the morning."""

    object: Literal["night.report"] = "night.report"
    night: str
    status: NightStatus
    model: str
    began: datetime
    ended: datetime | None
    story: list[str]
    """The outcome in plain words, the most important sentence first."""
    decision: str
    """The gate's verdict, or the night's status where the gate was not asked."""
    reasons: list[str]
    gate: GateDecision | None
    gain: Gain | None
    rows: list[Row]
    """Champion and candidate as the gate compared them."""
    curve: list[Point]
    """All generations up to this night's."""
    learned: Learned
    recipes: list[Recipe]
    dropped: dict[str, int]
    """Reason -> examples left out."""
    practice: Practice | None = None
    """None for a night that did not practise."""
    teacher: TeacherHelp | None = None
    """None where no teacher was asked up to this night."""
    training: Training | None
    seconds: dict[str, float]
    """By stage."""
    tokens: list[Tokens] = []
    """By part; principles and rehearsal, a few requests, are not counted."""
