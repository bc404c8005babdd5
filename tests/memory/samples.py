"""Small records for the memory tests."""

from __future__ import annotations

from memory.ledger import Ledger
from memory.night_records import Evaluation, Generation, GenerationStatus, TaskOutcome
from memory.records import (
    DEFAULT_TENANT,
    Example,
    ExampleKind,
    Feedback,
    FeedbackKind,
    PastRun,
    Principle,
    PrincipleKind,
    StopReason,
    Task,
    Trajectory,
)


def task(question: str = "What is 2 + 3?", tenant: str = DEFAULT_TENANT) -> Task:
    return Task(tenant=tenant, messages=[{"role": "user", "content": question}], reference="5")


def trajectory(of: Task, answer: str = "5") -> Trajectory:
    return Trajectory(
        task_id=of.id,
        tenant=of.tenant,
        generation=0,
        model="base",
        messages=[*of.messages, {"role": "assistant", "content": answer}],
        answer=answer,
        stop_reason=StopReason.ANSWER,
    )


def feedback(on: Trajectory) -> Feedback:
    return Feedback(trajectory_id=on.id, tenant=on.tenant, kind=FeedbackKind.CORRECTION, value="6", author="ada")


def principle(
    text: str = "Add the ones first.", tenant: str = DEFAULT_TENANT, sources: list[str] | None = None
) -> Principle:
    return Principle(
        tenant=tenant,
        kind=PrincipleKind.GUIDING,
        text=text,
        structure=[("sum", "starts with", "ones")],
        sources=sources or [],
    )


def past_run(of: Task, answer: str = "5") -> PastRun:
    return PastRun(tenant=of.tenant, task_id=of.id, messages=[*of.messages, {"role": "assistant", "content": answer}])


def remember(ledger: Ledger, question: str, tenant: str = DEFAULT_TENANT) -> PastRun:
    """A past run on a task of its own, both in the ledger."""
    of = task(question, tenant)
    ledger.add_task(of)
    run = past_run(of)
    ledger.add_past_run(run)
    return run


def generation(number: int, status: GenerationStatus = GenerationStatus.CANDIDATE) -> Generation:
    sha = None if number == 0 else f"{number:064x}"
    return Generation(number=number, base_model="smollm2", adapter_sha256=sha, status=status)


def example(of: Task) -> Example:
    return Example(recipe="successes", kind=ExampleKind.SFT, task_id=of.id, messages=of.messages)


def evaluation(number: int, suite_hash: str = "s1", night_id: str | None = None) -> Evaluation:
    return Evaluation(
        suite="sums",
        suite_hash=suite_hash,
        role="held_out",
        generation=number,
        memory=True,
        outcomes=[TaskOutcome(key="k1", workload="sums", score=1.0)],
        seconds=0.5,
        night_id=night_id,
    )
