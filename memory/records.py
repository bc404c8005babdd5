"""The records every room speaks in: frozen, versioned, made of OpenAI messages. A leaf module.

Owns the shapes and their legal life cycles (`*_TRANSITIONS`). Owns no storage (`memory.ledger`)
and no behaviour beyond values that can be computed from a record.

`None` means "not measured", never 0 or "". Times are UTC. Ids sort by creation (UUIDv7) and are
minted by the creator, so writing the same record twice is one row.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
import uuid
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Message = dict[str, Any]
"""One OpenAI chat message dict: role, content, and where they apply tool_calls, tool_call_id, name."""

RECALLED = "recalled"
"""The `name` of messages that memory put into a prompt: they are never learned from again."""

LOOKED_UP = "looked_up"
"""The `name` of an observation that shows memory or documents: part of the run, and never distilled from."""

MALFORMED = "malformed"
"""The `name` of an assistant message that held no readable action: kept as it came, never trained on."""

DEFAULT_TENANT = "default"
DEFAULT_WORKLOAD = "default"


def new_id(prefix: str) -> str:
    """A sortable id, e.g. `traj_0192f…`: a UUIDv7 (RFC 9562) behind a type prefix."""
    ms = time.time_ns() // 1_000_000
    value = (ms << 80) | (0x7 << 76) | (secrets.randbits(12) << 64) | (0b10 << 62) | secrets.randbits(62)
    return f"{prefix}_{uuid.UUID(int=value).hex}"


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


def content_hash(value: Any) -> str:
    """sha256 (hex) of a JSON-able value in canonical form: sorted keys, no spaces, ASCII."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1


class Purpose(StrEnum):
    """Why a run was made. Those in `TEACHING` may teach."""

    SERVE = "serve"
    EVAL = "eval"
    UNTAUGHT = "untaught"
    """Served like any other, but its client asked (`store: false`) that nothing be learned from it."""
    PRACTICE = "practice"
    """The night's own: the champion tries an earlier task again."""
    TEACHER = "teacher"
    """Another model's, on a task that was escalated; `model` names it."""


TEACHING = frozenset({Purpose.SERVE, Purpose.PRACTICE, Purpose.TEACHER})


class VerifierSpec(Record):
    """Which verifier judges a task, by name, with its arguments (see `agent.verify`)."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class Task(Record):
    """A piece of work for the agent. `reference` is never shown to the model."""

    id: str = Field(default_factory=lambda: new_id("task"))
    tenant: str = DEFAULT_TENANT
    workload: str = DEFAULT_WORKLOAD
    messages: list[Message]
    tools: list[str] | None = None
    """Names of the service's own tools; None = the service's default set."""
    client_tools: list[dict[str, Any]] = Field(default_factory=list)
    """OpenAI function tools that the client runs itself."""
    reference: str | None = None
    verifier: VerifierSpec | None = None
    source: str = "api"
    user: str | None = None
    """Who asked, as the client tells its own users apart."""
    safety_identifier: str | None = None
    """The same, in OpenAI's newer field."""
    caller: str | None = None
    """The API key that asked, as it signs feedback; None: the operator, or a service without keys."""
    metadata: dict[str, str] = Field(default_factory=dict)
    """What the client attached; never shown to the model."""
    created_at: datetime = Field(default_factory=now)

    @property
    def asker(self) -> str | None:
        """Who asked, as feedback is signed: the key, and behind it the user whom the request names."""
        return "/".join(part for part in (self.caller, self.safety_identifier or self.user) if part) or None

    @property
    def voice(self) -> str | None:
        """Whom what rests on the request counts for, as `Feedback.voice`; None where nobody is named."""
        return None if self.asker is None else voice_of(self.asker)

    def asks_the_same(self, other: Task) -> bool:
        """Whether both are one task, whoever asked, how and when."""
        asking = ("source", "created_at", "user", "safety_identifier", "caller", "metadata")
        return self == other.model_copy(update={name: getattr(self, name) for name in asking})

    @property
    def question(self) -> str:
        """The last user message as text: what recall searches by."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return text_of(message)
        return ""

    @property
    def fingerprint(self) -> str:
        """Hash of what was asked, whatever the task's id: two tasks with it are the same task."""
        said = [(m.get("role"), " ".join(text_of(m).split())) for m in self.messages]
        return content_hash(said)

    @property
    def content(self) -> dict[str, Any]:
        """What is asked and how it is judged: suites are frozen by its hash."""
        return self.model_dump(mode="json", include={"workload", "messages", "tools", "reference", "verifier"})


def text_of(message: Message) -> str:
    """The plain text of a message whose content is a string or OpenAI content parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return ""


class OutcomeSource(StrEnum):
    """Who judged a run, strongest first."""

    VERIFIER = "verifier"
    USER = "user"
    TEACHER = "teacher"
    CRITIC = "critic"


FULL_MARKS = 0.99
"""The score of a success: partial credit is a failure to learn from."""


class Outcome(Record):
    """How good an answer is: `score` in 0..1, by whom, and how sure (`confidence` in 0..1)."""

    score: float = Field(ge=0.0, le=1.0)
    by: OutcomeSource
    confidence: float = Field(default=1.0, ge=0.0, le=1.0)
    detail: str = ""

    @property
    def success(self) -> bool:
        """Full marks."""
        return self.score >= FULL_MARKS


class StopReason(StrEnum):
    """Why a run ended."""

    ANSWER = "answer"
    TOOL_CALLS = "tool_calls"
    """The client runs its own tools and comes back with their results."""
    MAX_TURNS = "max_turns"
    LENGTH = "length"
    MALFORMED = "malformed"
    """The model's action could not be read, also after one reminder."""
    ERROR = "error"
    CANCELLED = "cancelled"


class Step(Record):
    """One model call inside a run; `message` is the index of its assistant message."""

    message: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    """The engine's own ids for the completion: training must render to the same ones."""
    logprob: float | None = None
    """Sum of the completion's token log-probabilities."""
    logprobs: list[dict[str, Any]] | None = None
    """OpenAI's entry per token, when the client asked for them."""
    finish_reason: str | None = None
    seconds: float = 0.0


class MemoryKind(StrEnum):
    """What memory can put into a prompt."""

    PRINCIPLE = "principle"
    RUN = "run"


CHUNK: Literal["chunk"] = "chunk"
IndexKind = MemoryKind | Literal["chunk"]
"""What the index holds: memory items, and chunks of documents."""


def index_kind(name: str) -> IndexKind:
    """The kind of that name."""
    return CHUNK if name == CHUNK else MemoryKind(name)


class Recalled(Record):
    """One item that memory put into a prompt, with every number that chose it."""

    id: str
    kind: MemoryKind
    similarity: float
    score: float
    recency: float
    rank: float
    """The blended figure it was chosen by."""
    tokens: int
    why: str
    uplift: float | None = None
    """What showing it was worth so far, shrunken towards 0; None while too little was measured."""
    withheld: bool = False
    """It would have been shown and was not, to measure what runs come to without it."""
    turn: int = 0
    """After how many of the run's model calls it was looked up; 0: it was there from the start."""


class Consulted(Record):
    """A passage of a document that a search in a run showed."""

    chunk_id: str
    document_id: str
    source: str
    place: str
    similarity: float | None = None
    """Its cosine to the query; None when only the query's words led to it."""
    turn: int
    """After how many of the run's model calls."""


class Trajectory(Record):
    """One run of the agent: exactly what was sent and received, in OpenAI messages.

    `messages` is the whole conversation, system prompt and recalled block included; messages named
    `RECALLED` came from memory. Append-only: later knowledge arrives as Feedback.
    """

    id: str = Field(default_factory=lambda: new_id("traj"))
    task_id: str
    tenant: str = DEFAULT_TENANT
    workload: str = DEFAULT_WORKLOAD
    purpose: Purpose = Purpose.SERVE
    generation: int
    model: str
    """The engine's name of what really answered: the base model's, or `gen-N@sha`; `teacher:NAME` for a teacher."""
    sampling: dict[str, Any] = Field(default_factory=dict)
    tools: list[str] = Field(default_factory=list)
    client_tools: list[dict[str, Any]] = Field(default_factory=list)
    conversation_id: str | None = None
    """The conversation it belongs to, when its client or its predecessor named one."""
    continues: str | None = None
    """The run that ended in a client's tool call and whose messages this one begins with."""
    inherited_steps: int = 0
    """How many of `steps`, the first ones, were made by the run that it continues."""
    messages: list[Message]
    steps: list[Step] = Field(default_factory=list)
    recalled: list[Recalled] = Field(default_factory=list)
    consulted: list[Consulted] = Field(default_factory=list)
    answer: str | None = None
    outcome: Outcome | None = None
    stop_reason: StopReason
    error: str | None = None
    error_type: str | None = None
    """The class name of the error (`memory.errors`) when `stop_reason` is `error`."""
    started_at: datetime = Field(default_factory=now)
    seconds: float = 0.0

    @property
    def ended_at(self) -> datetime:
        """When it was over."""
        return self.started_at + timedelta(seconds=self.seconds)

    @property
    def own_messages(self) -> list[Message]:
        """The conversation without what memory put into it and without the system prompt."""
        return [m for m in self.messages if m.get("name") != RECALLED and m.get("role") != "system"]

    @property
    def success(self) -> bool:
        """Judged, and given full marks."""
        return self.outcome is not None and self.outcome.success


def voice_of(author: str) -> str:
    """A key speaks with one voice, whatever authors its holder names behind it (`key:NAME/AUTHOR`). Other authors, also
    those whom a vouching key names (`app:NAME/AUTHOR`), are their own."""
    return author.split("/", 1)[0] if author.startswith("key:") else author


class FeedbackKind(StrEnum):
    """What a user can say about a run."""

    SCORE = "score"
    """`value`: a number in 0..1 or a boolean."""
    CORRECTION = "correction"
    """`value`: a better answer (str), or OpenAI messages of a better run (assistant, tool, …)."""
    HINT = "hint"
    """`value`: a sentence that would have helped."""
    PREFERENCE = "preference"
    """`value`: {"over": trajectory id}: this run is better than that one."""
    COMMENT = "comment"
    """`value`: free text; kept, never trained on."""


class Trust(StrEnum):
    """Whether feedback may teach."""

    TRUSTED = "trusted"
    QUARANTINED = "quarantined"
    REJECTED = "rejected"


class Feedback(Record):
    """A user's word on a run. It teaches only once trusted."""

    id: str = Field(default_factory=lambda: new_id("fb"))
    trajectory_id: str
    tenant: str = DEFAULT_TENANT
    kind: FeedbackKind
    value: Any
    author: str = "anonymous"
    trust: Trust = Trust.QUARANTINED
    trust_reason: str = "not yet judged"
    created_at: datetime = Field(default_factory=now)

    @property
    def voice(self) -> str:
        """Whom the word counts for."""
        return voice_of(self.author)


class PrincipleKind(StrEnum):
    """EvolveR (arXiv 2510.16079): what to do, learned from successes; what to avoid, from failures."""

    GUIDING = "guiding"
    CAUTIONARY = "cautionary"


class MemoryStatus(StrEnum):
    """The life of a principle or remembered run. Only `active` ones are shown.

    `internalised`: the model does as well without it. It is still looked up, and how runs go without it is
    still counted, so that it returns when a later generation has forgotten.
    """

    ACTIVE = "active"
    MERGED = "merged"
    RETIRED = "retired"
    INTERNALISED = "internalised"


MEMORY_TRANSITIONS: dict[MemoryStatus, frozenset[MemoryStatus]] = {
    MemoryStatus.ACTIVE: frozenset({MemoryStatus.MERGED, MemoryStatus.RETIRED, MemoryStatus.INTERNALISED}),
    MemoryStatus.MERGED: frozenset(),
    MemoryStatus.RETIRED: frozenset({MemoryStatus.ACTIVE}),
    MemoryStatus.INTERNALISED: frozenset({MemoryStatus.ACTIVE, MemoryStatus.RETIRED}),
}


class Principle(Record):
    """One sentence of experience with triples, scored by use (EvolveR §3: (successes+1)/(uses+2))."""

    id: str = Field(default_factory=lambda: new_id("prin"))
    tenant: str = DEFAULT_TENANT
    workload: str = DEFAULT_WORKLOAD
    kind: PrincipleKind
    text: str
    structure: list[tuple[str, str, str]] = Field(default_factory=list)
    uses: int = 0
    successes: int = 0
    sources: list[str] = Field(default_factory=list)
    """Ids of the trajectories it was distilled from."""
    status: MemoryStatus = MemoryStatus.ACTIVE
    pinned: bool = False
    """Somebody wants it kept: neither score nor uplift retires it."""
    merged_into: str | None = None
    """The item that says the same and took over its evidence."""
    created_at: datetime = Field(default_factory=now)

    @property
    def score(self) -> float:
        """Laplace-smoothed success rate, in 0..1; 0.5 when never used."""
        return (self.successes + 1) / (self.uses + 2)


class PastRun(Record):
    """A run worth repeating, own success or correction, as it may be shown in a prompt.

    `messages`: user question, then assistant and tool messages, the last one the answer.
    """

    id: str = Field(default_factory=lambda: new_id("run"))
    tenant: str = DEFAULT_TENANT
    workload: str = DEFAULT_WORKLOAD
    task_id: str
    messages: list[Message]
    uses: int = 0
    successes: int = 0
    sources: list[str] = Field(default_factory=list)
    """Ids of the trajectory and of the feedback that it rests on: a correction, the hints it was shown, signed praise.
    It is retired when one of them is rejected."""
    status: MemoryStatus = MemoryStatus.ACTIVE
    pinned: bool = False
    """Somebody wants it kept: neither score nor uplift retires it."""
    merged_into: str | None = None
    """The item that says the same and took over its evidence."""
    created_at: datetime = Field(default_factory=now)

    @property
    def question(self) -> str:
        """The user's words: the embedded text."""
        return text_of(self.messages[0])

    @property
    def score(self) -> float:
        """As for principles."""
        return (self.successes + 1) / (self.uses + 2)


class ExampleKind(StrEnum):
    """What an example trains."""

    SFT = "sft"
    DPO = "dpo"


class Example(Record):
    """One training example in OpenAI messages, as they would be served.

    SFT: `messages` ends with an assistant turn; loss falls on the assistant messages that are not
    named `RECALLED`. DPO: `messages` is the prompt, `chosen` and `rejected` are an assistant turn each, or the rest
    of a run.
    """

    id: str = Field(default_factory=lambda: new_id("ex"))
    recipe: str
    kind: ExampleKind
    tenant: str = DEFAULT_TENANT
    workload: str = DEFAULT_WORKLOAD
    task_id: str
    tools: list[str] = Field(default_factory=list)
    messages: list[Message]
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    weight: float = 1.0
    sources: list[str] = Field(default_factory=list)
    """Ids of the trajectories and feedback it was made from."""
    with_memory: bool = False
    bare: bool = False
    """It teaches to do without memory, so its prompt never shows any."""

    @property
    def content_hash(self) -> str:
        """Hash of what is trained on: equal hashes are duplicates."""
        return content_hash([self.kind, self.messages, self.chosen, self.rejected])
