"""Records of what is trained, judged and served: generations, promotions, nights, evaluations."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from memory.records import Record, new_id, now


class GenerationStatus(StrEnum):
    """The life of a trained adapter."""

    CANDIDATE = "candidate"
    CANARY = "canary"
    """Serves a share of the users; `metrics["canary"]` says which share, since when and why."""
    CHAMPION = "champion"
    RETIRED = "retired"
    REJECTED = "rejected"


GENERATION_TRANSITIONS: dict[GenerationStatus, frozenset[GenerationStatus]] = {
    GenerationStatus.CANDIDATE: frozenset(
        {GenerationStatus.CANARY, GenerationStatus.CHAMPION, GenerationStatus.REJECTED}
    ),
    GenerationStatus.CANARY: frozenset({GenerationStatus.CHAMPION, GenerationStatus.RETIRED}),
    GenerationStatus.CHAMPION: frozenset({GenerationStatus.RETIRED}),
    GenerationStatus.RETIRED: frozenset({GenerationStatus.CANARY, GenerationStatus.CHAMPION}),
    GenerationStatus.REJECTED: frozenset(),
}


class Generation(Record):
    """What can be served: the base model (number 0) or a trained adapter on it."""

    number: int = Field(ge=0)
    parent: int | None = None
    base_model: str
    adapter_path: str | None = None
    adapter_sha256: str | None = None
    night_id: str | None = None
    status: GenerationStatus
    metrics: dict[str, Any] = Field(default_factory=dict)
    created_at: datetime = Field(default_factory=now)

    @property
    def served_name(self) -> str:
        """The engine's immutable name for it: `gen-N@` and twelve hex digits of the adapter's hash.

        Generation 0 is the engine's `base`. A name is never loaded twice with other weights.
        """
        if self.adapter_sha256 is None:
            return "base"
        return f"gen-{self.number}@{self.adapter_sha256[:12]}"


class Promotion(Record):
    """One row of the log of what is served. The last row's `to_generation` is the champion.

    A row from a generation that was not champion then is the end of its canary.
    """

    id: str = Field(default_factory=lambda: new_id("prom"))
    from_generation: int
    to_generation: int
    why: str
    by: str
    evidence: dict[str, Any] | None = None
    """The counts that decided, when live outcomes did (`evals.live`)."""
    at: datetime = Field(default_factory=now)


class NightStatus(StrEnum):
    """The life of a night. All but the first are final."""

    RUNNING = "running"
    PROMOTED = "promoted"
    REJECTED = "rejected"
    SKIPPED = "skipped"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Night(Record):
    """One self-training job."""

    id: str = Field(default_factory=lambda: new_id("night"))
    status: NightStatus = NightStatus.RUNNING
    options: dict[str, Any] = Field(default_factory=dict)
    limits: dict[str, Any] | None = None
    """What its training may spend, by the trainer's names; None until that was decided."""
    candidate: int | None = None
    reasons: list[str] = Field(default_factory=list)
    report_path: str | None = None
    created_at: datetime = Field(default_factory=now)
    ended_at: datetime | None = None


class StageRun(Record):
    """One finished stage of a night: its output is what a resumed night goes on from."""

    night_id: str
    stage: str
    output: dict[str, Any]
    seconds: float
    at: datetime = Field(default_factory=now)


class TaskOutcome(Record):
    """One task of a suite as one generation did it. `key` pairs it with other generations' runs."""

    key: str
    workload: str
    score: float = Field(ge=0.0, le=1.0)
    answer: str | None = None
    trajectory_id: str | None = None
    prompt_tokens: int = 0
    task_hash: str | None = None
    """Hash of what was asked and how it was judged; None in evaluations of older versions."""
    completion_tokens: int | None = None
    """None where it was not counted yet."""

    @property
    def success(self) -> bool:
        """Full marks."""
        return self.score >= 0.99


class Evaluation(Record):
    """A suite run by a generation under stated settings."""

    id: str = Field(default_factory=lambda: new_id("eval"))
    suite: str
    suite_hash: str
    role: Literal["held_out", "control"]
    generation: int
    memory: bool
    memory_watermark: str = ""
    """What memory held: the newest memory row's id, or "" for an empty one."""
    settings: dict[str, Any] = Field(default_factory=dict)
    outcomes: list[TaskOutcome]
    unjudged: list[str] = Field(default_factory=list)
    """Keys of tasks whose verifier failed at the answer: they have no outcome."""
    seconds: float
    night_id: str | None = None
    created_at: datetime = Field(default_factory=now)

    def common(self, other: Evaluation) -> list[tuple[TaskOutcome, TaskOutcome]]:
        """The outcomes of both on the tasks they share, in the order of their keys: of the same suite all, of one that
        has changed since those that ask the same and judge alike under the same key."""
        mine, same = {o.key: o for o in self.outcomes}, self.suite_hash == other.suite_hash
        return [
            (mine[o.key], o)
            for o in sorted(other.outcomes, key=lambda o: o.key)
            if o.key in mine and (same or (o.task_hash is not None and o.task_hash == mine[o.key].task_hash))
        ]

    @property
    def success(self) -> float | None:
        """Share of tasks with full marks; None for an empty suite."""
        if not self.outcomes:
            return None
        return sum(o.success for o in self.outcomes) / len(self.outcomes)
